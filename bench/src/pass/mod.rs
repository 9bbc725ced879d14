//! One pass: a list of jobs, run once, by one monitor.

pub mod join;
pub mod kvm;
pub mod qemu;

use crate::row::{Loop, Ring, Row};
use crate::test_file::{HALF_SECTORS, WRITE_SECTOR};
use anyhow::{Context, Result, bail, ensure};
use pvkit_host::memory::{GuestMemory, Snapshot};
use pvkit_host::vmm::{ExitCounts, ThreadTime};
use pvkit_protocol::virtio::Features;
use pvkit_workload::pattern;
use pvkit_workload::report::{self, JobReport, OUTCOME_OK, Sample};
use pvkit_workload::script::{Header, Job, MAGIC, VERSION};
use std::sync::Arc;
use std::time::Duration;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Memory of the guests.
pub const MEMORY_BYTES: u64 = 256 << 20;
/// Where in it the report lies.
pub const REPORT_ADDR: u64 = 64 << 20;
/// Room for the report: the rest of memory but a piece for the script.
pub const REPORT_BYTES: u64 = 160 << 20;
/// Most requests of one measurement, so that all samples of a pass fit.
pub(crate) const MAX_SAMPLES: u64 = REPORT_BYTES / size_of::<Sample>() as u64;

/// A row that is to be measured in a pass.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    /// Its index in the plan.
    pub index: usize,
    /// What it is.
    pub row: Row,
    /// The number of this measurement, for the data that it writes.
    pub round: u32,
    /// Requests in a second, for open loops.
    pub rate: Option<f64>,
}

/// What all measurements have in common.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Ticks of the time stamp counter in a millisecond.
    pub tsc_khz: u32,
    /// Length of a measurement.
    pub duration: Duration,
    /// Features that the guest's drivers may use.
    pub allow: Features,
    /// MSI-X vectors of virtio functions; `None` for as many as the monitor
    /// gives them.
    pub vectors: Option<u16>,
    /// Devices offer to use requests in their order, and drivers accept.
    pub in_order: bool,
}

impl Settings {
    /// All features, and the monitor's own choice of vectors.
    #[must_use]
    pub fn new(tsc_khz: u32, duration: Duration) -> Self {
        Self {
            tsc_khz,
            duration,
            allow: Features::all(),
            vectors: None,
            in_order: false,
        }
    }
}

/// What a pass brought for one row.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// Its index in the plan.
    pub index: usize,
    /// What the guest reports.
    pub report: JobReport,
    /// Time from start to completion of each request, in ticks.
    pub latencies: Vec<u64>,
    /// What the host counted meanwhile, if it can.
    pub host: Option<HostCounts>,
}

/// What the host counts, from the start of a measurement to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostCounts {
    /// Returns to user space.
    pub exits: ExitCounts,
    /// CPU time of vCPU threads, the guest's included.
    pub vcpu: ThreadTime,
    /// CPU time of the devices' threads.
    pub worker: ThreadTime,
    /// CPU time of the kernel's threads for io_uring.
    pub kernel_workers: Duration,
}

impl HostCounts {
    /// What was added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            exits: self.exits.since(&earlier.exits),
            vcpu: self.vcpu.since(earlier.vcpu),
            worker: self.worker.since(earlier.worker),
            kernel_workers: self.kernel_workers.saturating_sub(earlier.kernel_workers),
        }
    }
}

/// A sink for progress: called with the number of jobs that are over.
pub type Progress<'a> = &'a (dyn Fn(usize) + Sync);

/// The script for a list of tasks.
#[must_use]
pub fn script(tasks: &[Task], settings: &Settings) -> Vec<u8> {
    let mut script = script_header(tasks.len(), 0).as_bytes().to_vec();
    let samples_each = (MAX_SAMPLES / (tasks.len() as u64 + 1)).max(1000);
    for task in tasks {
        script.extend_from_slice(job(task, settings, samples_each).as_bytes());
    }
    script
}

/// The start of a script with so many jobs on disks and on network cards.
pub(crate) fn script_header(jobs: usize, net_jobs: usize) -> Header {
    let mut header = Header::new_zeroed();
    header.magic = MAGIC;
    header.version = U32::new(VERSION);
    header.jobs = U32::new(jobs as u32);
    header.net_jobs = U32::new(net_jobs as u32);
    header.report_addr.set(REPORT_ADDR);
    header.report_bytes.set(REPORT_BYTES);
    header
}

/// A time in ticks.
pub(crate) fn ticks(settings: &Settings, time: Duration) -> u64 {
    (time.as_secs_f64() * f64::from(settings.tsc_khz) * 1000.0) as u64
}

pub(crate) fn job(task: &Task, settings: &Settings, samples: u64) -> Job {
    let Task {
        row, round, rate, ..
    } = task;
    let write = row.access.is_write();
    let mut job = Job::new_zeroed();
    job.device = row.device.script_device().code();
    // The device that spins is the first, the one that does not the second.
    job.index.set(u32::from(row.spin_us == Some(0)));
    job.access = row.access.code();
    job.completion = row.completion.code();
    job.depth.set(row.depth);
    job.block_bytes.set(row.block_bytes);
    job.first_sector.set(if write { WRITE_SECTOR } else { 0 });
    job.sectors.set(HALF_SECTORS);
    job.round.set(if write { *round } else { 0 });
    if let Some(rate) = rate.filter(|_| row.looping == Loop::Open) {
        job.interval_ticks
            .set(ticks(settings, Duration::from_secs_f64(1.0 / rate)));
    }
    job.duration_ticks.set(ticks(settings, settings.duration));
    job.max_requests
        .set(u32::try_from(samples).unwrap_or(u32::MAX));
    let guest_spin = Duration::from_micros(u64::from(row.guest_spin_us));
    job.spin_ticks.set(ticks(settings, guest_spin) as u32);
    job.warmup.set(2 * row.depth);
    // A fixed number of bytes, whatever the size of a request.
    job.verify.set((512 * 1024 / row.block_bytes).clamp(4, 64));
    job.seed.set(pattern::mix(u64::from(*round)));
    job.driver = row.driver.script_driver().code();
    let mut allow = settings.allow - row.driver.hidden_features(row.depth);
    allow.set(Features::IN_ORDER, settings.in_order);
    if row.ring == Ring::Split {
        allow.remove(Features::RING_PACKED);
    }
    job.allow_features.set(allow.bits());
    job.queue_size.set(256);
    job
}

/// Takes the report out of a guest's memory.
///
/// # Errors
/// If there is none, or it makes no sense.
pub fn read_report(memory: &GuestMemory, tasks: &[Task]) -> Result<Vec<Measurement>> {
    let source = Report::open(memory)?;
    let mut measurements = Vec::new();
    for (number, task) in tasks.iter().enumerate() {
        let at = size_of::<report::Header>() + number * size_of::<JobReport>();
        let report: JobReport = source.read(at)?;
        check_outcome(&report).with_context(|| task.row.to_string())?;
        let features = Features::from_bits_retain(report.features.get());
        let packed = features.contains(Features::RING_PACKED);
        ensure!(
            !task.row.device.is_virtio() || packed == (task.row.ring == Ring::Packed),
            "{}: the ring is another one",
            task.row
        );
        let samples = report::samples_offset(tasks.len(), 0);
        let latencies = source
            .latencies(&report, samples)
            .with_context(|| task.row.to_string())?;
        measurements.push(Measurement {
            index: task.index,
            report,
            latencies,
            host: None,
        });
    }
    Ok(measurements)
}

/// Whether a job went well.
pub(crate) fn check_outcome(report: &JobReport) -> Result<()> {
    match report.outcome.get() {
        OUTCOME_OK => Ok(()),
        0 => bail!("the guest did not get that far"),
        _ => bail!("{}", report.message()),
    }
}

/// The report in a guest's memory.
pub(crate) struct Report(Arc<Snapshot>);

impl Report {
    pub(crate) fn open(memory: &GuestMemory) -> Result<Self> {
        let report = Self(memory.snapshot());
        let header: report::Header = report.read(0)?;
        ensure!(header.magic == report::MAGIC, "the guest left no report");
        Ok(report)
    }

    /// What stands at an offset.
    pub(crate) fn read<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        self.0
            .read(REPORT_ADDR + offset as u64, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Times from start to end of a job's samples; those of all jobs begin at
    /// `samples`.
    pub(crate) fn latencies(&self, report: &JobReport, samples: usize) -> Result<Vec<u64>> {
        let count = report.samples.get() as usize;
        let first = report.first_sample.get() as usize;
        let offset = samples + first * size_of::<Sample>();
        let bytes = count * size_of::<Sample>();
        ensure!((offset + bytes) as u64 <= REPORT_BYTES, "too many samples");
        let mut samples = vec![0; bytes];
        self.0.read(REPORT_ADDR + offset as u64, &mut samples)?;
        let samples = <[Sample]>::ref_from_bytes(&samples)
            .ok()
            .context("samples are cut short")?;
        Ok(samples
            .iter()
            .map(|s| s.end.get().saturating_sub(s.start.get()))
            .collect())
    }
}

/// How long a pass may take before it counts as hung.
#[must_use]
pub fn patience(tasks: usize, settings: &Settings) -> Duration {
    // Verification of slow devices takes about as long as the measurement.
    let each = 4 * settings.duration + Duration::from_secs(2);
    each * tasks as u32 + Duration::from_secs(20)
}
