//! Adding up what several passes brought, and the figures that follow.

use crate::pass::{HostCounts, Measurement};
use crate::row::{DeviceKind, Row, access_name, completion_name};
use anyhow::Result;
use hdrhistogram::Histogram;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::BlockFeatures;
use pvkit_workload::report::JobReport;
use serde::Serialize;
use std::collections::BTreeMap;

/// A percentile counts only if at least so many samples lie beyond it.
const SAMPLES_BEYOND: f64 = 10.0;

/// Latencies are counted up to a minute; longer ones as a minute.
const LONGEST_NS: u64 = 60_000_000_000;

/// What a guest and its host counted, in several measurements.
#[derive(Debug, Clone, Default)]
pub(crate) struct Costs {
    pub(crate) kicks: u64,
    pub(crate) interrupts: u64,
    pub(crate) halts: u64,
    /// Accesses as the guest counts them, in the order of
    /// [`ACCESSES`](Self::ACCESSES).
    guest_accesses: [u64; 4],
    host: Option<HostCounts>,
}

impl Costs {
    const ACCESSES: [&str; 4] = ["io_in", "io_out", "mmio_read", "mmio_write"];

    pub(crate) fn add(&mut self, report: &JobReport, host: Option<&HostCounts>) {
        self.kicks += report.kicks.get();
        self.interrupts += report.interrupts.get();
        self.halts += report.halts.get();
        let accesses = [
            report.port_reads,
            report.port_writes,
            report.mmio_reads,
            report.mmio_writes,
        ];
        for (sum, count) in self.guest_accesses.iter_mut().zip(accesses) {
            *sum += count.get();
        }
        if let Some(host) = host {
            let sum = self.host.get_or_insert_default();
            sum.exits = sum.exits.plus(&host.exits);
            sum.vcpu = sum.vcpu + host.vcpu;
            sum.worker = sum.worker + host.worker;
            sum.kernel_workers += host.kernel_workers;
        }
    }

    /// All exits by reason: returns to user space as the host counted them
    /// (or, where it cannot, accesses as the guest counted them), and what the
    /// kernel took by itself. Doorbells of emulated devices are among the
    /// accesses.
    pub(crate) fn exits(&self, kernel_doorbells: bool) -> BTreeMap<&'static str, u64> {
        let mut exits: BTreeMap<&'static str, u64> = match &self.host {
            Some(host) => host.exits.by_reason().into_iter().collect(),
            None => Self::ACCESSES
                .into_iter()
                .zip(self.guest_accesses)
                .collect(),
        };
        if kernel_doorbells {
            exits.insert("doorbell", self.kicks);
        }
        exits.insert("halt", self.halts);
        // Each interrupt ends with a write to the local APIC.
        exits.insert("end_of_interrupt", self.interrupts);
        exits.retain(|_, count| *count > 0);
        exits
    }

    /// Who counted the exits.
    pub(crate) fn counted_by(&self, stepped: bool) -> &'static str {
        match self.host {
            Some(_) => "host",
            None if stepped => "driver",
            None => "guest",
        }
    }

    /// The CPU time of each of `count` things that were done, if the host knows.
    pub(crate) fn cpu(&self, count: u64) -> Option<Cpu> {
        self.host.map(|host| {
            let us = |time: std::time::Duration| time.as_secs_f64() * 1e6 / count as f64;
            Cpu {
                vcpu_us: us(host.vcpu.total),
                worker_us: us(host.worker.total),
                kernel_workers_us: us(host.kernel_workers),
                in_kernel_us: us(host.vcpu.kernel + host.worker.kernel + host.kernel_workers),
            }
        })
    }
}

/// Latencies, added up.
#[derive(Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Histogram::new_with_max(LONGEST_NS, 3)?))
    }

    pub(crate) fn add(&mut self, ticks: &[u64], tsc_khz: u32) {
        for ticks in ticks {
            let nanoseconds = *ticks as f64 * 1e6 / f64::from(tsc_khz.max(1));
            self.0.saturating_record(nanoseconds as u64);
        }
    }

    pub(crate) fn samples(&self) -> u64 {
        self.0.len()
    }

    /// Microseconds, if enough samples lie beyond.
    pub(crate) fn microseconds(&self, quantile: f64) -> Option<f64> {
        let beyond = self.0.len() as f64 * (1.0 - quantile);
        (beyond >= SAMPLES_BEYOND).then(|| self.0.value_at_quantile(quantile) as f64 / 1000.0)
    }

    pub(crate) fn max_us(&self) -> Option<f64> {
        (!self.0.is_empty()).then(|| self.0.max() as f64 / 1000.0)
    }
}

/// What jobs of any kind bring, in several measurements.
#[derive(Debug)]
pub(crate) struct Jobs {
    tsc_khz: u32,
    pub(crate) rounds: u32,
    /// Requests, or frames.
    pub(crate) done: u64,
    ticks: u64,
    pub(crate) latency: Latencies,
    pub(crate) costs: Costs,
    pub(crate) features: Features,
    pub(crate) verified_bytes: u64,
    /// How many were done a second, by round.
    pub(crate) by_round: Vec<f64>,
}

impl Jobs {
    pub(crate) fn new(tsc_khz: u32) -> Result<Self> {
        Ok(Self {
            tsc_khz,
            rounds: 0,
            done: 0,
            ticks: 0,
            latency: Latencies::new()?,
            costs: Costs::default(),
            features: Features::empty(),
            verified_bytes: 0,
            by_round: Vec::new(),
        })
    }

    pub(crate) fn add(&mut self, report: &JobReport, latencies: &[u64], host: Option<&HostCounts>) {
        let ticks = report.end.get().saturating_sub(report.start.get());
        let done = report.requests.get();
        self.rounds += 1;
        self.done += done;
        self.ticks += ticks;
        self.by_round
            .push(done as f64 / self.seconds_of(ticks).max(1e-9));
        self.latency.add(latencies, self.tsc_khz);
        self.costs.add(report, host);
        self.features = Features::from_bits_retain(report.features.get());
        self.verified_bytes += report.verified_bytes.get();
    }

    fn seconds_of(&self, ticks: u64) -> f64 {
        ticks as f64 / (f64::from(self.tsc_khz.max(1)) * 1000.0)
    }

    /// How long all of it took, if anything was done and that was measured.
    pub(crate) fn seconds(&self) -> Option<f64> {
        let seconds = self.seconds_of(self.ticks);
        (self.done > 0 && seconds > 0.0).then_some(seconds)
    }

    /// So many of something, by what was done.
    pub(crate) fn each(&self, count: u64) -> f64 {
        count as f64 / self.done as f64
    }

    /// The CPU time of each, if the host knows.
    pub(crate) fn cpu(&self) -> Option<Cpu> {
        self.costs.cpu(self.done)
    }
}

/// The sum of several measurements of a row.
#[derive(Debug)]
pub struct Sum {
    row: Row,
    jobs: Jobs,
    rate: Option<f64>,
    /// Driver and device were in one process.
    stepped: bool,
}

impl Sum {
    /// Nothing measured yet. `tsc_khz` is `None` for the join, where times
    /// mean nothing.
    ///
    /// # Errors
    /// If there is no memory for a histogram.
    pub fn new(row: Row, tsc_khz: Option<u32>) -> Result<Self> {
        Ok(Self {
            row,
            stepped: tsc_khz.is_none(),
            jobs: Jobs::new(tsc_khz.unwrap_or(0))?,
            rate: None,
        })
    }

    /// Adds a measurement.
    pub fn add(&mut self, measurement: &Measurement, rate: Option<f64>) {
        let host = measurement.host.as_ref();
        self.jobs
            .add(&measurement.report, &measurement.latencies, host);
        self.rate = rate;
    }

    /// Requests a second, if that was measured.
    #[must_use]
    pub fn iops(&self) -> Option<f64> {
        let seconds = self.jobs.seconds()?;
        Some(self.jobs.done as f64 / seconds)
    }

    /// The figures of the row; `None` if nothing was measured.
    #[must_use]
    pub fn result(&self) -> Option<RowResult> {
        let Self { row, jobs, .. } = self;
        if jobs.done == 0 {
            return None;
        }
        let iops = self.iops();
        let per_request = |count: u64| jobs.each(count);
        let exits = jobs.costs.exits(true);
        let cpu = jobs.cpu();
        Some(RowResult {
            name: if self.stepped {
                row.to_string().replace("/pvkit", "/join")
            } else {
                row.to_string()
            },
            case: row.case(),
            device: row.device_name(),
            driver: row.driver.name(),
            vmm: if self.stepped { "join" } else { row.vmm.name() },
            transport: row.device.transport(),
            ring: row.device.is_virtio().then_some(row.ring.name()),
            features: feature_names(row.device, jobs.features),
            access: access_name(row.access),
            completion: completion_name(row.completion),
            loop_: row.looping.name(),
            rate: self.rate,
            depth: row.depth,
            block_bytes: row.block_bytes,
            rounds: jobs.rounds,
            samples: jobs.latency.samples(),
            spin_us: row.spin_us,
            guest_spin_us: row.guest_spin_us,
            iops,
            iops_by_round: jobs.by_round.clone(),
            mib_per_s: iops.map(|iops| iops * f64::from(row.block_bytes) / f64::from(1 << 20)),
            p50_us: jobs.latency.microseconds(0.5),
            p99_us: jobs.latency.microseconds(0.99),
            p999_us: jobs.latency.microseconds(0.999),
            max_us: jobs.latency.max_us(),
            exits_per_request: per_request(exits.values().sum()),
            exits,
            exits_counted_by: jobs.costs.counted_by(self.stepped),
            kicks_per_request: per_request(jobs.costs.kicks),
            interrupts_per_request: per_request(jobs.costs.interrupts),
            halts_per_request: per_request(jobs.costs.halts),
            host_cpu_us_per_request: cpu.map(|cpu| cpu.total()),
            cpu_us_per_request: cpu,
            verified: jobs.verified_bytes > 0,
            verified_bytes: jobs.verified_bytes,
        })
    }
}

/// CPU time of a request, by who spent it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cpu {
    /// The vCPU's thread, the guest included.
    pub vcpu_us: f64,
    /// The device's thread.
    pub worker_us: f64,
    /// The kernel's threads for io_uring.
    pub kernel_workers_us: f64,
    /// The part of all three that was spent in the kernel, by sampling.
    pub in_kernel_us: f64,
}

impl Cpu {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.vcpu_us + self.worker_us + self.kernel_workers_us
    }
}

/// The figures of a row, as they stand in the JSON file.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(
    missing_docs,
    reason = "the fields are named and explained in the README"
)]
pub struct RowResult {
    pub name: String,
    pub case: String,
    pub device: String,
    pub driver: &'static str,
    pub vmm: &'static str,
    pub transport: &'static str,
    pub ring: Option<&'static str>,
    pub features: Vec<String>,
    pub access: &'static str,
    pub completion: &'static str,
    #[serde(rename = "loop")]
    pub loop_: &'static str,
    pub rate: Option<f64>,
    pub depth: u32,
    pub block_bytes: u32,
    pub rounds: u32,
    pub samples: u64,
    pub spin_us: Option<u32>,
    pub guest_spin_us: u32,
    pub iops: Option<f64>,
    pub iops_by_round: Vec<f64>,
    pub mib_per_s: Option<f64>,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    pub p999_us: Option<f64>,
    pub max_us: Option<f64>,
    pub exits: BTreeMap<&'static str, u64>,
    pub exits_counted_by: &'static str,
    pub exits_per_request: f64,
    pub kicks_per_request: f64,
    pub interrupts_per_request: f64,
    pub halts_per_request: f64,
    pub host_cpu_us_per_request: Option<f64>,
    pub cpu_us_per_request: Option<Cpu>,
    pub verified: bool,
    pub verified_bytes: u64,
}

/// The first through the second.
pub(crate) fn ratio(a: f64, b: f64) -> Option<f64> {
    (b > 0.0).then(|| a / b)
}

/// The same, if there are both.
pub(crate) fn both(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    ratio(a?, b?)
}

/// Two rows side by side: all ratios are the first through the second.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[expect(
    missing_docs,
    reason = "the fields are named and explained in the README"
)]
pub struct Pair {
    pub a: String,
    pub b: String,
    pub iops: Option<f64>,
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    pub exits_per_request: Option<f64>,
    pub host_cpu: Option<f64>,
    pub a_exits_per_request: f64,
    pub b_exits_per_request: f64,
}

impl Pair {
    /// Compares two rows.
    #[must_use]
    pub fn new(a: &RowResult, b: &RowResult) -> Self {
        Self {
            a: a.name.clone(),
            b: b.name.clone(),
            iops: both(a.iops, b.iops),
            p50: both(a.p50_us, b.p50_us),
            p99: both(a.p99_us, b.p99_us),
            exits_per_request: ratio(a.exits_per_request, b.exits_per_request),
            host_cpu: both(a.host_cpu_us_per_request, b.host_cpu_us_per_request),
            a_exits_per_request: a.exits_per_request,
            b_exits_per_request: b.exits_per_request,
        }
    }
}

/// Names of the features in use.
fn feature_names(device: DeviceKind, features: Features) -> Vec<String> {
    if !device.is_virtio() {
        return Vec::new();
    }
    let block = BlockFeatures::from(features);
    names_of(features, block.into(), block.iter_names())
}

/// Names of `features`, of which `own`, which a type of device has for itself,
/// come last.
pub(crate) fn names_of<F>(
    features: Features,
    own: Features,
    own_names: impl Iterator<Item = (&'static str, F)>,
) -> Vec<String> {
    let rest = features - own;
    let names = rest.iter_names().map(|(name, _)| name);
    names
        .chain(own_names.map(|(name, _)| name))
        .map(str::to_owned)
        .collect()
}
