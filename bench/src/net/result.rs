//! Adding up what several passes brought, and the figures that follow.

use super::pass::NetMeasurement;
use super::row::{NetRow, direction_name};
use crate::measure::{Cpu, Jobs, both, names_of, ratio};
use crate::row::completion_name;
use anyhow::Result;
use pvkit_protocol::frame::Offloads;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::NetFeatures;
use serde::Serialize;
use std::collections::BTreeMap;

/// The sum of several measurements of a row.
#[derive(Debug)]
pub struct NetSum {
    row: NetRow,
    jobs: Jobs,
    sent: u64,
    received: u64,
    stream_bytes: u64,
    offloads: [Offloads; 2],
}

impl NetSum {
    /// Nothing measured yet.
    ///
    /// # Errors
    /// If there is no memory for a histogram.
    pub fn new(row: NetRow, tsc_khz: u32) -> Result<Self> {
        Ok(Self {
            row,
            jobs: Jobs::new(tsc_khz)?,
            sent: 0,
            received: 0,
            stream_bytes: 0,
            offloads: [Offloads::empty(); 2],
        })
    }

    /// Adds a measurement.
    pub fn add(&mut self, measurement: &NetMeasurement) {
        let report = &measurement.report;
        let host = measurement.host.as_ref();
        self.jobs.add(&report.job, &measurement.latencies, host);
        self.sent += report.sent.get();
        self.received += report.received.get();
        self.stream_bytes += report.stream_bytes.get();
        let offloads = report.offloads.get();
        self.offloads =
            [offloads, offloads >> 16].map(|bits| Offloads::from_bits_truncate(bits as u8));
    }

    /// The figures of the row; `None` if nothing was measured.
    #[must_use]
    pub fn result(&self) -> Option<NetResult> {
        let Self { row, jobs, .. } = self;
        let seconds = jobs.seconds()?;
        let stream = row.is_stream();
        let per_frame = |count: u64| jobs.each(count);
        // Those of an e1000 are register accesses, and counted among them.
        let exits = jobs.costs.exits(row.card.is_virtio());
        let cpu = jobs.cpu();
        let pps = jobs.done as f64 / seconds;
        let bytes = if stream {
            self.stream_bytes as f64
        } else {
            jobs.done as f64 * f64::from(row.frame_bytes)
        };
        Some(NetResult {
            name: row.to_string(),
            case: row.case(),
            device: row.card_name(),
            driver: "pvkit-guest",
            vmm: row.vmm.name(),
            transport: row.card.transport(),
            wire: row.wire.name(),
            features: feature_names(row, jobs.features),
            offloads: OffloadNames {
                transmit: names(self.offloads[0]),
                receive: names(self.offloads[1]),
            },
            moderation: row.is_moderable().then_some(row.moderation),
            direction: direction_name(row.work),
            frame_bytes: (!stream).then_some(row.frame_bytes),
            completion: completion_name(row.completion),
            rate: (row.rate > 0).then(|| f64::from(row.rate)),
            rounds: jobs.rounds,
            samples: jobs.latency.samples(),
            spin_us: row.spin_us,
            pps,
            pps_by_round: jobs.by_round.clone(),
            frames: jobs.done,
            received: self.received,
            lost: (!stream).then(|| self.sent.saturating_sub(self.received)),
            stream_bytes: self.stream_bytes,
            mib_per_s: bytes / seconds / f64::from(1 << 20),
            p50_us: jobs.latency.microseconds(0.5),
            p99_us: jobs.latency.microseconds(0.99),
            p999_us: jobs.latency.microseconds(0.999),
            max_us: jobs.latency.max_us(),
            exits_per_frame: per_frame(exits.values().sum()),
            exits,
            exits_counted_by: jobs.costs.counted_by(false),
            kicks_per_frame: per_frame(jobs.costs.kicks),
            interrupts_per_frame: per_frame(jobs.costs.interrupts),
            halts_per_frame: per_frame(jobs.costs.halts),
            host_cpu_us_per_frame: cpu.map(|cpu| cpu.total()),
            cpu_us_per_frame: cpu,
            verified: jobs.verified_bytes > 0,
            verified_bytes: jobs.verified_bytes,
        })
    }
}

/// What is left to the other side, each way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[expect(
    missing_docs,
    reason = "the fields are named and explained in the README"
)]
pub struct OffloadNames {
    pub transmit: Vec<String>,
    pub receive: Vec<String>,
}

/// The figures of a row, as they stand in the JSON file.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(
    missing_docs,
    reason = "the fields are named and explained in the README"
)]
pub struct NetResult {
    pub name: String,
    pub case: String,
    pub device: String,
    pub driver: &'static str,
    pub vmm: &'static str,
    pub transport: &'static str,
    pub wire: &'static str,
    pub features: Vec<String>,
    pub offloads: OffloadNames,
    pub moderation: Option<bool>,
    pub direction: &'static str,
    pub frame_bytes: Option<u32>,
    pub completion: &'static str,
    pub rate: Option<f64>,
    pub rounds: u32,
    pub samples: u64,
    pub spin_us: Option<u32>,
    pub pps: f64,
    pub pps_by_round: Vec<f64>,
    pub frames: u64,
    pub received: u64,
    pub lost: Option<u64>,
    pub stream_bytes: u64,
    pub mib_per_s: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub p999_us: Option<f64>,
    pub max_us: Option<f64>,
    pub exits: BTreeMap<&'static str, u64>,
    pub exits_counted_by: &'static str,
    pub exits_per_frame: f64,
    pub kicks_per_frame: f64,
    pub interrupts_per_frame: f64,
    pub halts_per_frame: f64,
    pub host_cpu_us_per_frame: Option<f64>,
    pub cpu_us_per_frame: Option<Cpu>,
    pub verified: bool,
    pub verified_bytes: u64,
}

/// Two rows side by side: all ratios are the first through the second.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(
    missing_docs,
    reason = "the fields are named and explained in the README"
)]
pub struct NetPair {
    pub a: String,
    pub b: String,
    pub pps: Option<f64>,
    pub mib_per_s: Option<f64>,
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    pub exits_per_frame: Option<f64>,
    pub host_cpu: Option<f64>,
    pub a_exits_per_frame: f64,
    pub b_exits_per_frame: f64,
}

impl NetPair {
    /// Compares two rows.
    #[must_use]
    pub fn new(a: &NetResult, b: &NetResult) -> Self {
        // Streams differ in what a frame is: one that is to be cut counts as
        // one.
        let frames = a.frame_bytes.is_some();
        Self {
            a: a.name.clone(),
            b: b.name.clone(),
            pps: ratio(a.pps, b.pps).filter(|_| frames),
            mib_per_s: ratio(a.mib_per_s, b.mib_per_s),
            p50: both(a.p50_us, b.p50_us),
            p99: both(a.p99_us, b.p99_us),
            exits_per_frame: ratio(a.exits_per_frame, b.exits_per_frame).filter(|_| frames),
            host_cpu: both(a.host_cpu_us_per_frame, b.host_cpu_us_per_frame).filter(|_| frames),
            a_exits_per_frame: a.exits_per_frame,
            b_exits_per_frame: b.exits_per_frame,
        }
    }
}

fn names(offloads: Offloads) -> Vec<String> {
    offloads
        .iter_names()
        .map(|(name, _)| name.to_lowercase().replace('_', "-"))
        .collect()
}

/// Names of the features in use.
fn feature_names(row: &NetRow, features: Features) -> Vec<String> {
    if !row.card.is_virtio() {
        return Vec::new();
    }
    let net = NetFeatures::from(features);
    names_of(features, net.into(), net.iter_names())
}
