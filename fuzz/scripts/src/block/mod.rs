//! The virtio-blk driver and device: what the fuzz target `block_join` runs.
//!
//! The input decodes into a [`Setup`] and a list of [`Action`]s. Once somebody
//! has meddled, nothing need work any more, but:
//!
//! - nobody panics, and every call returns;
//! - a request comes back at most once, with the buffer that it came with;
//! - driver and device report one fault each between two resets;
//! - private memory beside the buffers stays as it is;
//! - once the meddling ends, recovering hands back every request, and the
//!   device works again;
//! - in the end all guest memory is free, or was counted as leaked.

mod action;

use super::buffer::{Buffer, EMPTY, Pool};
use super::forge::Forge;
use super::meddler::{Meddler, transport};
use super::{Area, clean_arena, keep_arena, play};
use action::{Action, Setup};
use arbitrary::{Arbitrary, Unstructured};
use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Done, Reason};
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_guest::virtio::transport::MmioTransport as GuestTransport;
use pvkit_host::bus::BusDevice;
use pvkit_host::virtio::block::{Block as Device, BlockOptions as DeviceOptions};
use pvkit_host::worker::Progress;
use pvkit_join::arena::{Arena, ArenaSpace};
use pvkit_join::disk::{Order, RecordingDisk, pattern};
use pvkit_join::stepped::Steps;
use pvkit_join::wire::Wire;
use pvkit_protocol::virtio::block::{RequestHeader, RequestType};
use std::collections::BTreeMap;
use std::sync::Arc;
use zerocopy::IntoBytes;

const ARENA_BYTES: usize = 256 * 1024;
const SECTORS: u64 = 64;
/// Longest script.
const ACTIONS: usize = 256;

type Transport = GuestTransport<Wire<Meddler>>;
type Queue = QueueOf<Buffer, ArenaSpace, Transport>;

/// The longest buffer.
const LONGEST: usize = 4 * 512;
/// Private buffers that a run may use.
const PLACES: usize = 32;

/// Plays the script that `data` holds.
///
/// # Panics
/// If an invariant does not hold.
pub fn block_join(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(setup) = Setup::arbitrary(&mut bytes) else {
        return;
    };
    let mut world = World::new(setup, clean_arena(ARENA_BYTES));
    play(&mut bytes, ACTIONS, |action| world.act(action));
    keep_arena(world.end());
}

/// What was submitted under a tag.
struct Sent {
    op: BlockOp,
    bytes: Option<usize>,
    /// Bytes of guest memory around the buffer.
    guards: usize,
}

struct World {
    setup: Setup,
    arena: Arena,
    pool: Pool,
    wire: Wire<Meddler>,
    steps: Steps,
    disk: RecordingDisk,
    block: Block<Transport>,
    queue: Queue,
    outstanding: BTreeMap<u64, Sent>,
    next_tag: u64,
    /// Whether anything was meddled with.
    meddled: bool,
    /// Whether the driver has reported a fault since it recovered.
    faulty: bool,
    /// Whether it has failed to recover since it last did.
    retired: bool,
}

impl World {
    fn new(setup: Setup, arena: Arena) -> Self {
        let mut disk = RecordingDisk::new(SECTORS);
        if setup.held {
            disk.allow(0);
        }
        if setup.narrow {
            disk.depth = 2;
        }
        if setup.oldest_first {
            disk.order = Order::OldestFirst;
        }
        let options = DeviceOptions {
            queue_size: setup.queue_size,
            indirect: setup.indirect,
            event_idx: setup.event_idx,
            packed: setup.packed,
            in_order: setup.in_order,
            ..DeviceOptions::default()
        };
        let device = Device::new(Arc::new(disk.clone()), options).expect("block options");
        let (wire, steps) = Meddler::over(Box::new(device), &arena);
        let transport = transport(&wire);
        let mut space = arena.space();
        if setup.segments {
            space = space.with_segments_of(512);
        }
        let options = BlockOptions {
            max_segments: 4,
            ..BlockOptions::default()
        };
        let (block, queue) = Block::open(transport, space, options).expect("an honest device");
        Self {
            setup,
            arena,
            pool: Pool::new(PLACES, LONGEST),
            wire,
            steps,
            disk,
            block,
            queue,
            outstanding: BTreeMap::new(),
            next_tag: 0,
            meddled: false,
            faulty: false,
            retired: false,
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Submit {
                kind,
                sector,
                shape,
            } => self.submit(kind, sector, shape),
            Action::Publish => self.queue.publish(),
            Action::Complete(count) => {
                for _ in 0..count % 32 {
                    if !self.complete() {
                        break;
                    }
                }
            }
            Action::ArmDriver => _ = self.queue.arm(),
            Action::Claim => _ = self.block.claim_events(),
            Action::Refresh => {
                let refreshed = self.block.refresh(&mut self.queue);
                assert!(self.meddled || refreshed.is_ok(), "{refreshed:?}");
            }
            Action::Recover => _ = self.recover(),
            Action::Poll(budget) => self.poll(u32::from(budget % 32) + 1),
            Action::Run => {
                if self.meddled {
                    // Rings that feed themselves are endless.
                    self.poll(64);
                } else {
                    self.steps.run();
                }
            }
            Action::ArmDevice => _ = self.steps.arm(),
            Action::Allow(count) => {
                if self.setup.held {
                    self.disk.allow(usize::from(count % 8));
                }
            }
            Action::Read { offset, width } => {
                let mut data = [0; 16];
                let offset = u64::from(offset % 0x240);
                let width = usize::from(width % 17);
                // Past the driver: it hears no lies meant for it.
                self.wire.device().device.read(offset, &mut data[..width]);
            }
            Action::Header {
                slot,
                kind,
                sector,
                shift,
            } => {
                self.meddled = true;
                self.forge_header(slot, kind, u64::from(sector) << (shift % 64));
            }
            Action::Meddle(meddling) => {
                self.meddled = true;
                self.forge().meddle(meddling);
            }
        }
    }

    fn forge(&self) -> Forge<'_> {
        Forge {
            arena: &self.arena,
            wire: &self.wire,
            packed: self.setup.packed,
            queue: 0,
            size: self.setup.queue_size,
            slots: u64::MAX,
        }
    }

    /// Rewrites a request's header.
    fn forge_header(&self, slot: u8, kind: u8, sector: u64) {
        let forge = self.forge();
        let (start, len) = forge.area(Area::Slots);
        let size = u64::from(self.setup.queue_size);
        let addr = start + u64::from(slot) % size * (len / size);
        let kind = match kind % 5 {
            0 => RequestType::IN,
            1 => RequestType::OUT,
            2 => RequestType::FLUSH,
            3 => RequestType::GET_ID,
            _ => RequestType(u32::from(kind)),
        };
        forge.poke(addr, RequestHeader::new(kind, sector).as_bytes());
    }

    fn submit(&mut self, kind: u8, sector: u8, shape: u8) {
        let first = u64::from(sector) % (SECTORS + 2);
        let (op, bytes) = match kind % 8 {
            0..4 => (
                BlockOp::Read { sector: first },
                Some(512 * usize::from(shape % 5)),
            ),
            4 | 5 => (
                BlockOp::Write { sector: first },
                Some(512 * usize::from(shape % 5)),
            ),
            6 => (BlockOp::Flush, None),
            _ => (BlockOp::GetId, Some(20)),
        };
        let buffer = match bytes {
            None => None,
            Some(bytes) => {
                debug_assert!(bytes <= LONGEST);
                let buffer = if shape & 0x80 == 0 {
                    Buffer::outside(&mut self.pool, bytes)
                } else {
                    Buffer::inside(&self.arena, bytes)
                };
                let Some(mut buffer) = buffer else { return };
                match op {
                    // Every write writes what is there already, so that what a
                    // read finds does not depend on the order.
                    BlockOp::Write { sector } => {
                        buffer.bytes_mut().copy_from_slice(&pattern(sector, bytes));
                    }
                    _ => buffer.bytes_mut().fill(EMPTY),
                }
                Some(buffer)
            }
        };
        let tag = self.next_tag;
        self.next_tag += 1;
        let guards = buffer.as_ref().map_or(0, Buffer::guards);
        match self.queue.submit(op, buffer, tag) {
            Ok(()) => {
                assert!(!self.faulty && !self.retired, "the queue is retired");
                self.outstanding.insert(tag, Sent { op, bytes, guards });
            }
            Err(refused) => {
                let len = refused.buffer.as_ref().map(pvkit_guest::dma::DmaBuf::bytes);
                assert_eq!(len, bytes, "the buffer comes back");
                if let Some(buffer) = refused.buffer {
                    buffer.free();
                }
                let retired = refused.reason == Reason::Retired;
                assert!(!retired || self.meddled, "{:?}", refused.reason);
            }
        }
    }

    /// Takes a completion; whether there may be more.
    fn complete(&mut self) -> bool {
        match self.queue.complete() {
            Ok(Some(done)) => {
                assert!(!self.faulty && !self.retired, "the queue is retired");
                self.take(done, false);
                true
            }
            Ok(None) => false,
            Err(fault) => {
                assert!(self.meddled, "{fault}");
                assert!(!self.faulty, "a fault is reported once, and not {fault}");
                self.faulty = true;
                false
            }
        }
    }

    /// A request is back.
    fn take(&mut self, done: Done<Buffer>, reset: bool) {
        let Self {
            outstanding,
            meddled,
            ..
        } = self;
        take(outstanding, *meddled, done, reset);
    }

    fn recover(&mut self) -> bool {
        let Self {
            block,
            queue,
            outstanding,
            meddled,
            ..
        } = self;
        let result = block.recover(queue, &mut |done| {
            take(outstanding, *meddled, done, true);
        });
        let over = result.is_ok();
        if over {
            assert!(outstanding.is_empty(), "a reset hands everything back");
            self.faulty = false;
        } else {
            // A disk that holds requests holds up the reset. From here on the
            // driver has a fault to report.
            assert!(*meddled || self.setup.held, "{result:?}");
            *meddled = true;
        }
        self.retired = !over;
        over
    }

    fn poll(&mut self, budget: u32) {
        for progress in self.steps.poll(budget) {
            if let Progress::Broken(fault) = progress {
                assert!(self.meddled, "{fault}");
            }
        }
    }

    /// The meddling ends: everything comes back, everything works.
    fn end(mut self) -> Arena {
        self.wire.device().tell_the_truth();
        if self.setup.held {
            self.disk.allow(usize::MAX);
        }
        if !self.meddled {
            // Nobody has to recover. A disk that holds requests wakes nobody,
            // so its device is polled.
            self.queue.publish();
            for _ in 0..2 * ACTIONS {
                self.steps.run();
                if self.setup.held {
                    self.poll(64);
                }
                while self.complete() {}
            }
            assert!(self.outstanding.is_empty(), "everything is answered");
        }
        if self.setup.drop {
            return self.end_without_proof();
        }
        assert!(self.recover(), "an honest device recovers");
        self.works();
        let Self {
            arena,
            pool,
            block,
            queue,
            wire,
            ..
        } = self;
        block
            .close(queue, &mut |_| panic!("nothing is outstanding"))
            .expect("an honest device resets");
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
        drop(wire);
        // SAFETY: driver and device are gone, and all buffers with them.
        unsafe { pool.free() };
        arena
    }

    /// One request, from start to end.
    fn works(&mut self) {
        let mut buffer = Buffer::outside(&mut self.pool, 512);
        if buffer.is_none() {
            buffer = Buffer::inside(&self.arena, 512);
        }
        let bytes = Some(512);
        let op = BlockOp::Read { sector: 5 };
        let buffer = Some(buffer.expect("a buffer"));
        let guards = 0;
        self.outstanding
            .insert(self.next_tag, Sent { op, bytes, guards });
        self.queue
            .submit(op, buffer, self.next_tag)
            .map_err(|refused| refused.reason)
            .expect("a queue that works");
        self.queue.publish();
        for _ in 0..4 {
            self.poll(4);
        }
        let done = self.queue.complete().expect("no fault");
        let done = done.expect("a completion");
        assert_eq!(done.result, Ok(()), "the device works again");
        self.take(done, false);
    }

    /// The queue is dropped while the device has it.
    fn end_without_proof(self) -> Arena {
        let Self {
            arena,
            pool,
            block,
            queue,
            wire,
            outstanding,
            ..
        } = self;
        drop(queue);
        // The guards of buffers are no business of the driver.
        let guards: usize = outstanding.values().map(|sent| sent.guards).sum();
        assert_eq!(arena.leaked() + guards, arena.in_use());
        drop(block);
        drop(wire);
        // SAFETY: driver and device are gone, and nobody else knows of the
        // memory.
        unsafe {
            arena.take_back();
            pool.free();
        }
        arena
    }
}

fn take(outstanding: &mut BTreeMap<u64, Sent>, meddled: bool, mut done: Done<Buffer>, reset: bool) {
    let sent = outstanding
        .remove(&done.tag)
        .unwrap_or_else(|| panic!("request {} comes back once", done.tag));
    assert_eq!(done.op, sent.op);
    assert_eq!(
        done.buffer.as_ref().map(pvkit_guest::dma::DmaBuf::bytes),
        sent.bytes,
        "the buffer is its own"
    );
    assert_eq!(done.result == Err(BlockError::Reset), reset);
    if !meddled {
        if !reset {
            assert_eq!(done.result, Ok(()));
        }
        if let Some(buffer) = &mut done.buffer {
            assert!(buffer.guards_hold(), "guest memory beside a buffer");
            let bytes = buffer.bytes_mut();
            match done.op {
                BlockOp::Read { sector } if !reset => {
                    assert_eq!(bytes, pattern(sector, bytes.len()));
                }
                BlockOp::Write { sector } => {
                    assert_eq!(bytes, pattern(sector, bytes.len()));
                }
                _ => {}
            }
        }
    }
    if let Some(buffer) = done.buffer {
        buffer.free();
    }
}
