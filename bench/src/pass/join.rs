//! A pass without a virtual machine: driver and device in one process, stepped
//! by hand. Counts only: they are the same at every run.

use super::{Measurement, Progress, Settings, Task, job};
use crate::row::{DeviceKind, Driver, Row};
use anyhow::{Context, Result, ensure};
use pvkit_guest::block::{BlockLimits, BlockOp, BlockQueue, Done, Refused};
use pvkit_guest::dma::DmaBufMut;
use pvkit_guest::dma::DmaSpace;
use pvkit_guest::emulated::ata::{self, Ata, AtaOptions, Mode};
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_guest::virtio::transport::{MmioTransport, Transport};
use pvkit_host::disk::MemoryDisk;
use pvkit_host::emulated::ata::DriveOptions;
use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
use pvkit_host::worker::SignalCounter;
use pvkit_join::arena::{Arena, ArenaBuf, ArenaSpace};
use pvkit_join::ide::IdeJoin;
use pvkit_join::port::{Access, PortWire};
use pvkit_join::stepped::Steps;
use pvkit_join::{Join, Kind};
use pvkit_peer::PeerQueue;
use pvkit_peer::join::{ArenaHal, MmioOverRegisters, PlatformRegisters, PlatformSpace};
use pvkit_peer::sides::driver_side;
use pvkit_protocol::virtio::Features;
use pvkit_workload::report::{JobReport, Sample};
use pvkit_workload::run::{Counts, Machine, Outcome, RunError, Target, run as run_job};
use pvkit_workload::script::{Completion, Job, Mark};
use std::cell::Cell;
use std::sync::Arc;
use zerocopy::FromZeros;

/// Requests of one measurement: enough for a stable count, and quick.
const REQUESTS: u32 = 2048;
/// Memory of the guest in the join.
const GUEST_BYTES: usize = 64 << 20;

/// The rows as they are without a virtual machine: there is no worker that
/// could spin, and no clock for open loops.
#[must_use]
pub fn rows(rows: &[Row]) -> Vec<Row> {
    let mut stepped: Vec<Row> = Vec::new();
    for row in rows {
        let row = Row {
            spin_us: row.spin_us.map(|_| 0),
            ..*row
        };
        let runs = row.vmm == crate::row::Vmm::Pvkit && row.looping == crate::row::Loop::Closed;
        if runs && !stepped.contains(&row) {
            stepped.push(row);
        }
    }
    stepped
}

/// Runs the tasks on `disk`.
///
/// # Errors
/// If a request fails, or data is wrong.
pub fn run(disk: &MemoryDisk, tasks: &[Task], progress: Progress<'_>) -> Result<Vec<Measurement>> {
    // Times mean nothing here.
    let settings = Settings::new(0, std::time::Duration::ZERO);
    let mut measurements = Vec::new();
    for (number, task) in tasks.iter().enumerate() {
        let mut job = job(task, &settings, u64::from(REQUESTS));
        job.duration_ticks.set(u64::MAX);
        let (outcome, features) =
            run_task(disk, task, &job).with_context(|| task.row.to_string())?;
        // Its times mean nothing, and there are no samples.
        let mut report = JobReport::new_zeroed();
        report.set_counts(&outcome, features);
        measurements.push(Measurement {
            index: task.index,
            report,
            latencies: Vec::new(),
            host: None,
        });
        progress(number + 1);
    }
    Ok(measurements)
}

fn run_task(disk: &MemoryDisk, task: &Task, job: &Job) -> Result<(Outcome, Features)> {
    let row = &task.row;
    if row.driver != Driver::PvkitGuest {
        ensure!(row.device == DeviceKind::VirtioBlk, "no such driver");
        return run_virtio_drivers(disk, job, REQUESTS);
    }
    match row.device {
        DeviceKind::VirtioBlk => run_virtio(disk, Kind::Mmio, job),
        DeviceKind::VirtioBlkPci => run_virtio(disk, Kind::Pci, job),
        DeviceKind::IdeDma => run_ide(disk, job, Mode::Dma),
        DeviceKind::IdePio => run_ide(disk, job, Mode::Pio),
    }
}

/// A virtio block device on `disk`.
fn joined(disk: &MemoryDisk, kind: Kind) -> (Join, Steps) {
    let disk = Arc::new(disk.clone());
    Join::stepped(kind, disk, DeviceOptions::default(), GUEST_BYTES)
}

fn run_virtio(disk: &MemoryDisk, kind: Kind, job: &Job) -> Result<(Outcome, Features)> {
    let (join, steps) = joined(disk, kind);
    let (transport, space) = (join.transport(), join.space());
    drive(&join, steps, transport, space, job, REQUESTS)
}

/// Reads by our driver, with all that is not the driver's work on the
/// platform's side.
pub(crate) fn run_sided(disk: &MemoryDisk, job: &Job, requests: u32) -> Result<Outcome> {
    let (join, steps) = joined(disk, Kind::Mmio);
    let transport = MmioTransport::new(PlatformRegisters(join.wire.clone()))?;
    let space = PlatformSpace::new(&join.arena);
    Ok(drive(&join, steps, transport, space, job, requests)?.0)
}

fn drive<T: Transport, S: DmaSpace<Addr = u64>>(
    join: &Join,
    steps: Steps,
    transport: T,
    space: S,
    job: &Job,
    requests: u32,
) -> Result<(Outcome, Features)> {
    let options = BlockOptions {
        queue_size: job.queue_size.get(),
        allow: Features::from_bits_retain(job.allow_features.get()),
        ..BlockOptions::default()
    };
    let (block, queue) = Block::open(transport, space, options)?;
    let features = block.features();
    let mut machine = stepper(join, steps.clone());
    let mut target = Virtio {
        block,
        queue: SteppedQueue::new(queue, steps, job),
    };
    let outcome = run_on(&join.arena, job, &mut target, &mut machine, requests)?;
    Ok((outcome, features))
}

/// Reads or writes by the driver of the crate `virtio-drivers`.
pub(crate) fn run_virtio_drivers(
    disk: &MemoryDisk,
    job: &Job,
    requests: u32,
) -> Result<(Outcome, Features)> {
    let (join, steps) = joined(disk, Kind::Mmio);
    ArenaHal::install(&join.arena);
    let registers = PlatformRegisters(join.wire.clone());
    let transport = MmioOverRegisters(registers.clone());
    let mut resets = MmioTransport::new(registers.clone())?;
    let allow = Features::from_bits_retain(job.allow_features.get());
    // Nothing is lost here: device and driver take turns.
    let ring_again = move || registers.notify(0);
    let queue = PeerQueue::<_, ArenaHal, _, _>::open(transport, allow, ring_again)
        .context("virtio-drivers")?;
    let features = queue.features();
    let mut machine = stepper(&join, steps.clone());
    // The device sends them, since this driver cannot always tell it not to;
    // in a virtual machine its pin is masked.
    machine.interrupts = Arc::default();
    let mut target = SteppedQueue::new(queue, steps, job);
    let outcome = run_on(&join.arena, job, &mut target, &mut machine, requests);
    // Before the driver's memory goes.
    resets.reset()?;
    drop(target);
    Ok((outcome?, features))
}

fn stepper(join: &Join, steps: Steps) -> Stepper {
    let wire = join.wire.clone();
    Stepper::new(join.interrupts.clone(), steps, move || Counts {
        mmio_reads: wire.reads(),
        mmio_writes: wire.writes(),
        ..Counts::default()
    })
}

fn run_ide(disk: &MemoryDisk, job: &Job, mode: Mode) -> Result<(Outcome, Features)> {
    let join = IdeJoin::new(
        [Some(DriveOptions::new(Arc::new(disk.clone()))), None],
        GUEST_BYTES,
    );
    let [primary, _] = join.channels();
    let completion = match Completion::from_code(job.completion) {
        Some(Completion::Interrupt) => ata::Completion::Interrupt,
        _ => ata::Completion::Polled,
    };
    let options = AtaOptions {
        mode,
        completion,
        ..AtaOptions::default()
    };
    let queue = Ata::open(join.wire.clone(), join.arena.space(), primary, options)?;
    let [interrupts, _] = join.interrupts.clone();
    let wire = join.wire.clone();
    let mut machine = Stepper::new(interrupts, pvkit_join::stepped::stepped().1, move || {
        let accesses = wire.all_accesses();
        let sum = |read: bool| {
            let of_kind = accesses
                .iter()
                .filter(|(a, _)| matches!(a, Access::Read(_)) == read);
            of_kind.map(|(_, count)| count).sum()
        };
        Counts {
            port_reads: sum(true),
            port_writes: sum(false),
            ..Counts::default()
        }
    });
    let outcome = run_on(&join.arena, job, &mut Ide(queue), &mut machine, REQUESTS)?;
    Ok((outcome, Features::empty()))
}

fn run_on<T: Target<ArenaBuf>>(
    arena: &Arena,
    job: &Job,
    target: &mut T,
    machine: &mut Stepper,
    requests: u32,
) -> Result<Outcome> {
    let bytes = job.block_bytes.get() as usize;
    let mut buffers = (0..job.depth.get())
        .map(|_| {
            arena
                .buffer(bytes)
                .context("the guest's memory is too small")
        })
        .collect::<Result<Vec<_>>>()?;
    let mut samples = vec![Sample::new_zeroed(); requests as usize];
    Ok(run_job(job, 0, target, machine, &mut buffers, &mut samples)
        .map_err(|error: RunError| error)?)
}

/// The machine of the join: a clock that counts how often it was looked at.
struct Stepper {
    ticks: Cell<u64>,
    interrupts: Arc<SignalCounter>,
    seen: u64,
    steps: Steps,
    accesses: Box<dyn Fn() -> Counts>,
}

impl Stepper {
    fn new(
        interrupts: Arc<SignalCounter>,
        steps: Steps,
        accesses: impl Fn() -> Counts + 'static,
    ) -> Self {
        let accesses = Box::new(accesses);
        Self {
            ticks: Cell::new(0),
            interrupts,
            seen: 0,
            steps,
            accesses,
        }
    }
}

impl Machine for Stepper {
    fn now(&self) -> u64 {
        self.ticks.set(self.ticks.get() + 1);
        self.ticks.get()
    }

    fn wait(&mut self) {
        // The device works while the guest sleeps.
        if self.interrupts.count() == self.seen {
            self.steps.run();
        }
        self.seen = self.interrupts.count();
    }

    fn mark(&mut self, _mark: Mark) {}

    fn counts(&self) -> Counts {
        Counts {
            interrupts: self.interrupts.count(),
            ..(self.accesses)()
        }
    }
}

struct Virtio<B: DmaBufMut, S: DmaSpace<Addr = u64>, T: Transport> {
    block: Block<T>,
    queue: SteppedQueue<QueueOf<B, S, T>>,
}

/// A queue whose device works when the driver finds nothing to complete.
struct SteppedQueue<Q> {
    queue: Q,
    steps: Steps,
    /// The driver sleeps instead of looking again and again: the device works
    /// meanwhile, and not before.
    lazy: bool,
    empty: u32,
}

/// A driver that looks so often in vain does not sleep.
const POLLS: u32 = 3;

impl<Q> SteppedQueue<Q> {
    fn new(queue: Q, steps: Steps, job: &Job) -> Self {
        Self {
            queue,
            steps,
            lazy: Completion::from_code(job.completion) == Some(Completion::Interrupt),
            empty: 0,
        }
    }
}

impl<B: DmaBufMut, Q: BlockQueue<B>> BlockQueue<B> for SteppedQueue<Q> {
    fn limits(&self) -> &BlockLimits {
        self.queue.limits()
    }
    fn depth(&self) -> u16 {
        self.queue.depth()
    }
    fn submit(&mut self, op: BlockOp, buffer: Option<B>, tag: u64) -> Result<(), Refused<B>> {
        driver_side(|| self.queue.submit(op, buffer, tag))
    }
    fn publish(&mut self) {
        driver_side(|| self.queue.publish());
    }
    fn complete(&mut self) -> Result<Option<Done<B>>, Fault> {
        let mut done = driver_side(|| self.queue.complete())?;
        if done.is_none() {
            self.empty += 1;
            if self.lazy && self.empty < POLLS {
                return Ok(None);
            }
            self.steps.run();
            done = driver_side(|| self.queue.complete())?;
        }
        if done.is_some() {
            self.empty = 0;
        }
        Ok(done)
    }
    fn arm(&mut self) -> bool {
        // The driver goes to sleep: that is not looking in vain.
        self.empty = 0;
        self.queue.arm()
    }
}

impl<B: DmaBufMut, S: DmaSpace<Addr = u64>, T: Transport> Target<B> for Virtio<B, S, T> {
    type Queue = SteppedQueue<QueueOf<B, S, T>>;
    fn queue(&mut self) -> &mut Self::Queue {
        &mut self.queue
    }
    fn acknowledge(&mut self) {
        self.block.claim_events();
    }
    fn kicks(&self) -> u64 {
        self.queue.queue.counters().kicks
    }
}

/// Drivers that are their own target.
impl<B: DmaBufMut, Q: Target<B, Queue = Q> + BlockQueue<B>> Target<B> for SteppedQueue<Q> {
    type Queue = Self;
    fn queue(&mut self) -> &mut Self {
        self
    }
    fn acknowledge(&mut self) {
        self.queue.acknowledge();
    }
    fn kicks(&self) -> u64 {
        self.queue.kicks()
    }
}

struct Ide<B: DmaBufMut>(Ata<B, PortWire, ArenaSpace>);

impl<B: DmaBufMut> Target<B> for Ide<B> {
    type Queue = Ata<B, PortWire, ArenaSpace>;
    fn queue(&mut self) -> &mut Self::Queue {
        &mut self.0
    }
    fn acknowledge(&mut self) {}
    fn kicks(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use crate::plan::Plan;
    use crate::test_file;
    use clap::Parser;

    fn measure(args: &[&str]) -> Vec<(Row, JobReport)> {
        let args = std::iter::once("pvkit-bench").chain(args.iter().copied());
        let plan = Plan::new(&Cli::parse_from(args)).unwrap();
        let rows = rows(&plan.rows);
        let tasks: Vec<Task> = rows
            .iter()
            .enumerate()
            .map(|(index, row)| Task {
                index,
                row: *row,
                round: 1 + index as u32,
                rate: None,
            })
            .collect();
        let disk = MemoryDisk::from_bytes(test_file::content());
        let measurements = run(&disk, &tasks, &|_| {}).unwrap();
        assert_eq!(measurements.len(), tasks.len());
        let reports = measurements.into_iter().map(|m| m.report);
        rows.into_iter().zip(reports).collect()
    }

    /// What each driver rings, exactly: ours once for all that is in flight,
    /// the other for every request, whatever features it has.
    #[test]
    fn our_driver_rings_once_for_many_and_virtio_drivers_for_each_request() {
        let measured = measure(&["--vs", "virtio-drivers"]);
        assert_eq!(measured.len(), 10);
        let requests = u64::from(REQUESTS);
        for (row, report) in measured {
            assert_eq!(report.requests.get(), requests, "{row}");
            assert!(report.verified_bytes.get() > 0, "{row}");
            let expected = match row.driver {
                // The device sleeps until all are done, and the first doorbell
                // woke it.
                Driver::PvkitGuest => requests / u64::from(row.depth),
                Driver::VirtioDrivers | Driver::VirtioDriversTuned => requests,
            };
            assert_eq!(report.kicks.get(), expected, "{row}");
            assert_eq!(report.interrupts.get(), 0, "{row}");
            let features = Features::from_bits_retain(report.features.get());
            let hidden = row.driver.hidden_features(row.depth);
            assert_eq!(features & hidden, Features::empty(), "{row}");
            let both = Features::EVENT_IDX | Features::INDIRECT_DESC;
            assert_eq!(features & both, both - hidden, "{row}");
        }
    }

    /// The counts of every row of the quick set. They are exact, so they are
    /// asserted: what the README says a request costs.
    #[test]
    fn every_row_runs_and_costs_what_it_must() {
        for (row, report) in measure(&[]) {
            let requests = report.requests.get();
            assert_eq!(requests, u64::from(REQUESTS), "{row}");
            assert!(report.verified_bytes.get() > 0, "{row}");
            let accesses = report.port_reads.get() + report.port_writes.get();
            let sleeps = row.completion == Completion::Interrupt;
            match row.device {
                DeviceKind::VirtioBlk | DeviceKind::VirtioBlkPci => {
                    let batch = u64::from(row.depth.min(8));
                    assert!(
                        report.kicks.get() <= requests / batch + 1,
                        "{row}: {report:?}"
                    );
                    assert_eq!(report.interrupts.get() > 0, sleeps, "{row}");
                    let mmio = report.mmio_reads.get() + report.mmio_writes.get();
                    // By message, an interrupt is over when it has come.
                    let each = if row.device == DeviceKind::VirtioBlk {
                        2
                    } else {
                        0
                    };
                    assert!(mmio <= each * report.interrupts.get(), "{row}");
                    assert_eq!(accesses, 0, "{row}");
                }
                DeviceKind::IdeDma => assert_eq!(accesses, 10 * requests, "{row}"),
                DeviceKind::IdePio if row.block_bytes == 4096 && !row.access.is_write() => {
                    assert_eq!(accesses, 11 * requests, "{row}");
                }
                DeviceKind::IdePio => {}
            }
            if !row.device.is_virtio() && row.block_bytes == 4096 {
                let expected = if sleeps { requests } else { 0 };
                assert_eq!(report.interrupts.get(), expected, "{row}");
            }
        }
    }
}
