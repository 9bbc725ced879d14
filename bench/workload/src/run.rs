//! Running one job on one queue.

use crate::pattern::{self, Mismatch, Round, SECTOR_BYTES};
use crate::report::Sample;
use crate::script::{Access, Completion, Job, Mark};
use alloc::collections::TryReserveError;
use alloc::vec::Vec;
use core::hint::spin_loop;
use core::ops::DerefMut;
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Reason};
use pvkit_guest::dma::DmaBufMut;
use pvkit_guest::fault::Fault;
use thiserror::Error;
use zerocopy::little_endian::U64;

/// A disk and the driver that a job goes through.
pub trait Target<B: DmaBufMut> {
    /// The driver's queue.
    type Queue: BlockQueue<B>;
    /// The queue.
    fn queue(&mut self) -> &mut Self::Queue;
    /// What has to be done about an interrupt before completions are taken.
    fn acknowledge(&mut self);
    /// Doorbells rung so far.
    fn kicks(&self) -> u64;
}

/// The machine that a job runs on.
pub trait Machine {
    /// The time stamp counter.
    fn now(&self) -> u64;
    /// Sleeps until the target's interrupt has come since the last call; at
    /// once if it has.
    fn wait(&mut self);
    /// Tells the host where in the script the guest is.
    fn mark(&mut self, mark: Mark);
    /// All counts so far; doorbells are counted by the driver.
    fn counts(&self) -> Counts;
}

/// What a machine counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// See [`JobReport`](crate::report::JobReport), as for all fields.
    pub kicks: u64,
    /// Interrupts taken.
    pub interrupts: u64,
    /// Halts.
    pub halts: u64,
    /// Register reads.
    pub mmio_reads: u64,
    /// Register writes, without doorbells.
    pub mmio_writes: u64,
    /// Port reads.
    pub port_reads: u64,
    /// Port writes.
    pub port_writes: u64,
}

impl Counts {
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            kicks: self.kicks - earlier.kicks,
            interrupts: self.interrupts - earlier.interrupts,
            halts: self.halts - earlier.halts,
            mmio_reads: self.mmio_reads - earlier.mmio_reads,
            mmio_writes: self.mmio_writes - earlier.mmio_writes,
            port_reads: self.port_reads - earlier.port_reads,
            port_writes: self.port_writes - earlier.port_writes,
        }
    }
}

/// What a job came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Start of the timed part.
    pub start: u64,
    /// Its end.
    pub end: u64,
    /// Requests in it.
    pub requests: u64,
    /// Counts in it.
    pub counts: Counts,
    /// Samples written.
    pub samples: usize,
    /// Bytes checked after it.
    pub verified_bytes: u64,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RunError {
    /// A field of the job makes no sense.
    #[error("the job's {field} = {value} makes no sense")]
    Job {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// There are too few buffers, or the queue is too short.
    #[error("depth {depth} is too much for this device: {most} at the most")]
    Depth {
        /// What was asked for.
        depth: u32,
        /// What is possible.
        most: usize,
    },
    /// No memory for the job's bookkeeping.
    #[error("no memory for the job")]
    Memory,
    /// The driver refused a request.
    #[error("the driver refused a request: {0}")]
    Refused(Reason),
    /// A request failed.
    #[error("sector {sector}: {error}")]
    Failed {
        /// Its first sector.
        sector: u64,
        /// How it ended.
        error: BlockError,
    },
    /// The device broke the protocol.
    #[error("the device is broken: {0}")]
    Fault(#[from] Fault),
    /// A buffer did not come back.
    #[error("a buffer did not come back")]
    BufferLost,
    /// The data is wrong.
    #[error("wrong data: {0}")]
    Data(#[from] Mismatch),
}

impl From<TryReserveError> for RunError {
    fn from(_: TryReserveError) -> Self {
        Self::Memory
    }
}

/// After so many completions the new requests are shown to the device, even
/// if there are more to take: otherwise it would run dry meanwhile.
const PUBLISH_EVERY: u32 = 8;

/// What is in flight under a tag.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    start: u64,
    sector: u64,
    seed: u32,
}

/// A buffer at rest, and what was last transferred with it.
struct Held<B> {
    buffer: B,
    slot: Slot,
    tag: usize,
}

/// The places that a job visits, by number.
#[derive(Debug, Clone, Copy)]
struct Places {
    first_sector: u64,
    sectors_each: u64,
    blocks: u64,
    random: bool,
    seed: u64,
}

impl Places {
    fn sector(&self, index: u64) -> u64 {
        let index = if self.random {
            pattern::mix(self.seed.wrapping_add(index))
        } else {
            index
        };
        self.first_sector + index % self.blocks * self.sectors_each
    }
}

struct Runner<'a, B, T, M> {
    target: &'a mut T,
    machine: &'a mut M,
    access: Access,
    completion: Completion,
    interval: u64,
    spin: u64,
    round: Round,
    places: Places,
    slots: Vec<Slot>,
    held: Vec<Held<B>>,
    /// Requests issued so far, the warm-up included: numbers of places.
    issued: u64,
}

/// Limits of one pass through the loop.
struct Limits {
    requests: u64,
    ticks: u64,
}

/// Runs a job: warm-up, timed part, verification. Every buffer has the length
/// of a request; as many as the job's depth are used, and all come back in
/// `buffers` unless the device breaks. Samples are written as far as there is
/// room, and the timed part ends when there is none.
///
/// # Errors
/// [`RunError`] says what went wrong.
pub fn run<B, T, M>(
    job: &Job,
    number: u32,
    target: &mut T,
    machine: &mut M,
    buffers: &mut Vec<B>,
    samples: &mut [Sample],
) -> Result<Outcome, RunError>
where
    B: DmaBufMut + DerefMut<Target = [u8]>,
    T: Target<B>,
    M: Machine,
{
    let mut runner = Runner::new(job, target, machine, buffers)?;
    let warmup = Limits {
        requests: u64::from(job.warmup.get()),
        ticks: u64::MAX,
    };
    runner.transfer(&warmup, &mut [])?;

    let most = u64::from(job.max_requests.get()).min(samples.len() as u64);
    let limits = Limits {
        requests: most,
        ticks: job.duration_ticks.get(),
    };
    let first_timed = runner.issued;
    runner.machine.mark(Mark::Start(number));
    let before = runner.counts();
    let (start, end) = runner.transfer(&limits, samples)?;
    let counts = runner.counts().since(&before);
    runner.machine.mark(Mark::End(number));
    let requests = runner.issued - first_timed;

    let earliest = Round(job.earliest_round.get());
    let verified_bytes = runner.verify(u64::from(job.verify.get()), earliest)?;
    let mut held = runner.held;
    held.sort_by_key(|held| held.tag);
    buffers.extend(held.into_iter().map(|held| held.buffer));
    Ok(Outcome {
        start,
        end,
        requests,
        counts,
        samples: requests as usize,
        verified_bytes,
    })
}

impl<'a, B, T, M> Runner<'a, B, T, M>
where
    B: DmaBufMut + DerefMut<Target = [u8]>,
    T: Target<B>,
    M: Machine,
{
    fn new(
        job: &Job,
        target: &'a mut T,
        machine: &'a mut M,
        buffers: &mut Vec<B>,
    ) -> Result<Self, RunError> {
        let bad = |field, value| RunError::Job { field, value };
        let code = |field, value: u32| bad(field, u64::from(value));
        let access = Access::from_code(job.access).ok_or(code("access", job.access.get()))?;
        let completion = Completion::from_code(job.completion)
            .ok_or(code("completion", job.completion.get()))?;
        let block_bytes = job.block_bytes.get() as usize;
        let sectors_each = (block_bytes / SECTOR_BYTES) as u64;
        if block_bytes == 0 || !block_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(bad("block_bytes", block_bytes as u64));
        }
        let blocks = job.sectors.get() / sectors_each;
        if blocks == 0 {
            return Err(bad("sectors", job.sectors.get()));
        }
        let first_sector = job.first_sector.get();
        if first_sector.checked_add(job.sectors.get()).is_none() {
            return Err(bad("first_sector", first_sector));
        }
        let depth = job.depth.get();
        let most = buffers.len().min(usize::from(target.queue().depth()));
        if depth == 0 || depth as usize > most {
            return Err(RunError::Depth { depth, most });
        }
        let mut slots = Vec::new();
        slots.try_reserve_exact(depth as usize)?;
        let mut held = Vec::new();
        held.try_reserve_exact(depth as usize)?;
        for (tag, mut buffer) in buffers.drain(..depth as usize).enumerate() {
            let seed = pattern::mix(job.seed.get() ^ tag as u64) as u32;
            let slot = Slot {
                seed,
                ..Slot::default()
            };
            if access.is_write() {
                pattern::fill_body(&mut buffer, seed);
            }
            slots.push(slot);
            held.push(Held { buffer, slot, tag });
        }
        Ok(Self {
            target,
            machine,
            access,
            completion,
            interval: job.interval_ticks.get(),
            spin: u64::from(job.spin_ticks.get()),
            round: Round(job.round.get()),
            places: Places {
                first_sector,
                sectors_each,
                blocks,
                random: access.is_random(),
                seed: job.seed.get(),
            },
            slots,
            held,
            issued: 0,
        })
    }

    fn counts(&self) -> Counts {
        Counts {
            kicks: self.target.kicks(),
            ..self.machine.counts()
        }
    }

    /// Submits the next request with `held`'s buffer.
    fn submit(&mut self, held: Held<B>, start: u64) -> Result<(), RunError> {
        let Held {
            mut buffer,
            slot,
            tag,
        } = held;
        let sector = self.places.sector(self.issued);
        let op = if self.access.is_write() {
            pattern::stamp_all(&mut buffer, sector, self.round, slot.seed);
            BlockOp::Write { sector }
        } else {
            BlockOp::Read { sector }
        };
        if let Some(place) = self.slots.get_mut(tag) {
            *place = Slot {
                start,
                sector,
                ..slot
            };
        }
        self.issued += 1;
        self.target
            .queue()
            .submit(op, Some(buffer), tag as u64)
            .map_err(|refused| RunError::Refused(refused.reason))
    }

    /// Takes one completion, if there is one.
    fn complete(&mut self) -> Result<Option<Held<B>>, RunError> {
        let Some(done) = self.target.queue().complete()? else {
            return Ok(None);
        };
        let tag = done.tag as usize;
        let slot = self.slots.get(tag).copied().unwrap_or_default();
        done.result.map_err(|error| RunError::Failed {
            sector: slot.sector,
            error,
        })?;
        let buffer = done.buffer.ok_or(RunError::BufferLost)?;
        Ok(Some(Held { buffer, slot, tag }))
    }

    /// Moves requests until a limit is reached and nothing is in flight.
    /// Returns when that began and ended.
    fn transfer(
        &mut self,
        limits: &Limits,
        samples: &mut [Sample],
    ) -> Result<(u64, u64), RunError> {
        let mut samples = samples.iter_mut();
        let last = self.issued + limits.requests;
        let start = self.machine.now();
        let deadline = start.saturating_add(limits.ticks);
        let mut next_start = start;
        let mut in_flight = 0u32;
        let mut now = start;
        let mut idle_since = start;
        loop {
            let mut batch = 0;
            while batch < PUBLISH_EVERY
                && let Some(held) = self.complete()?
            {
                now = self.machine.now();
                if let Some(sample) = samples.next() {
                    *sample = Sample {
                        start: U64::new(held.slot.start),
                        end: U64::new(now),
                    };
                }
                in_flight -= 1;
                batch += 1;
                if self.interval == 0 && self.issued < last && now < deadline {
                    self.submit(held, now)?;
                    in_flight += 1;
                } else {
                    self.held.push(held);
                }
            }
            if batch == 0 {
                now = self.machine.now();
            } else {
                idle_since = now;
            }
            // The first requests of a closed loop; those of an open loop when
            // their time has come, however late.
            while self.issued < last
                && now < deadline
                && (self.interval == 0 || next_start <= now)
                && let Some(held) = self.held.pop()
            {
                let start = if self.interval == 0 { now } else { next_start };
                next_start = next_start.saturating_add(self.interval);
                self.submit(held, start)?;
                in_flight += 1;
                batch += 1;
            }
            if batch > 0 {
                self.target.queue().publish();
                continue;
            }
            if in_flight == 0 && (self.issued == last || now >= deadline) {
                return Ok((start, now));
            }
            let may_sleep = self.completion == Completion::Interrupt && self.interval == 0;
            if may_sleep && now - idle_since >= self.spin {
                if !self.target.queue().arm() {
                    self.machine.wait();
                    self.target.acknowledge();
                }
                idle_since = self.machine.now();
            } else {
                spin_loop();
            }
        }
    }

    /// Checks the data that is still in memory, and `count` more requests.
    /// Returns how many bytes were right.
    fn verify(&mut self, count: u64, earliest: Round) -> Result<u64, RunError> {
        let earliest = if self.access.is_write() {
            self.round
        } else {
            earliest
        };
        let rounds = earliest..=self.round;
        let mut bytes = 0;
        if !self.access.is_write() && self.issued > 0 {
            for held in &self.held {
                // A buffer that was never used has no data.
                if held.slot.start != 0 {
                    pattern::check(&held.buffer, held.slot.sector, rounds.clone())?;
                    bytes += held.buffer.len() as u64;
                }
            }
        }
        // The same places again, spread over all that were visited.
        let count = count.min(self.issued);
        for number in 0..count {
            let sector = self.places.sector(number * self.issued / count);
            let Some(held) = self.held.pop() else {
                return Err(RunError::BufferLost);
            };
            let held = self.read_one(held, sector)?;
            pattern::check(&held.buffer, sector, rounds.clone())?;
            bytes += held.buffer.len() as u64;
            self.held.push(held);
        }
        Ok(bytes)
    }

    /// Reads one place and waits for it.
    fn read_one(&mut self, held: Held<B>, sector: u64) -> Result<Held<B>, RunError> {
        let Held {
            mut buffer,
            slot,
            tag,
        } = held;
        // What is read must come from the disk, and not from the request
        // before.
        buffer.fill(0);
        if let Some(place) = self.slots.get_mut(tag) {
            *place = Slot { sector, ..slot };
        }
        let queue = self.target.queue();
        queue
            .submit(BlockOp::Read { sector }, Some(buffer), tag as u64)
            .map_err(|refused| RunError::Refused(refused.reason))?;
        queue.publish();
        loop {
            if let Some(held) = self.complete()? {
                return Ok(held);
            }
            spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::boxed::Box;
    use alloc::collections::VecDeque;
    use alloc::vec;
    use core::cell::Cell;
    use pvkit_guest::block::{BlockLimits, Done, Refused};
    use zerocopy::FromZeros;

    type Buffer = Box<[u8]>;

    /// A disk that holds the first round everywhere, and is done at once.
    #[derive(Default)]
    struct Disk(VecDeque<Done<Buffer>>);

    impl BlockQueue<Buffer> for Disk {
        fn limits(&self) -> &BlockLimits {
            unreachable!("the workload knows what it may do")
        }
        fn depth(&self) -> u16 {
            4
        }
        fn submit(
            &mut self,
            op: BlockOp,
            mut buffer: Option<Buffer>,
            tag: u64,
        ) -> Result<(), Refused<Buffer>> {
            if let (BlockOp::Read { sector }, Some(buffer)) = (op, &mut buffer) {
                pattern::fill(buffer, sector, pattern::FIRST, 1);
            }
            self.0.push_back(Done {
                tag,
                op,
                buffer,
                result: Ok(()),
            });
            Ok(())
        }
        fn publish(&mut self) {}
        fn complete(&mut self) -> Result<Option<Done<Buffer>>, Fault> {
            Ok(self.0.pop_front())
        }
        fn arm(&mut self) -> bool {
            !self.0.is_empty()
        }
    }

    impl Target<Buffer> for Disk {
        type Queue = Self;
        fn queue(&mut self) -> &mut Self {
            self
        }
        fn acknowledge(&mut self) {}
        fn kicks(&self) -> u64 {
            0
        }
    }

    /// A clock that ticks when it is looked at.
    struct Clock(Cell<u64>);

    impl Machine for Clock {
        fn now(&self) -> u64 {
            self.0.set(self.0.get() + 1);
            self.0.get()
        }
        fn wait(&mut self) {}
        fn mark(&mut self, _mark: Mark) {}
        fn counts(&self) -> Counts {
            Counts::default()
        }
    }

    /// Reads of a sector, two at once.
    fn job(change: impl FnOnce(&mut Job)) -> Result<Outcome, RunError> {
        let mut job = Job::new_zeroed();
        job.depth.set(2);
        job.block_bytes.set(512);
        job.sectors.set(8);
        job.max_requests.set(100);
        job.duration_ticks.set(1000);
        change(&mut job);
        let mut buffers = vec![vec![0; 512].into_boxed_slice(); 2];
        let mut samples = vec![Sample::new_zeroed(); 100];
        let mut clock = Clock(Cell::new(0));
        run(
            &job,
            0,
            &mut Disk::default(),
            &mut clock,
            &mut buffers,
            &mut samples,
        )
    }

    #[test]
    fn an_open_loop_may_be_so_slow_that_nothing_follows() {
        assert_eq!(job(|_| {}).unwrap().requests, 100);
        for interval in [1 << 20, u64::MAX] {
            let outcome = job(|job| job.interval_ticks.set(interval)).unwrap();
            assert_eq!(outcome.requests, 1, "{interval}");
            assert_eq!(outcome.verified_bytes, 512);
        }
    }

    #[test]
    fn regions_that_reach_beyond_all_sectors_are_refused() {
        let last = u64::MAX - 8;
        assert_eq!(job(|job| job.first_sector.set(last)).unwrap().samples, 100);
        let error = job(|job| job.first_sector.set(last + 1)).unwrap_err();
        let field = "first_sector";
        assert_eq!(
            error,
            RunError::Job {
                field,
                value: last + 1
            }
        );
    }
}
