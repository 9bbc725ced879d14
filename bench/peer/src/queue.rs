//! The driver as a queue.

use crate::watched::{Watch, Watched};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;
use pvkit_guest::block::{
    BlockError, BlockLimits, BlockOp, BlockQueue, Done, Reason, Refused, SECTOR_BYTES,
};
use pvkit_guest::dma::DmaBufMut;
use pvkit_guest::fault::Fault;
use pvkit_protocol::virtio::Features;
use pvkit_workload::run::Target;
use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use virtio_drivers::transport::Transport;
use virtio_drivers::{Error, Hal, Result};

/// Descriptors of its queue.
pub const SIZE: u16 = 16;
/// Descriptors of a request without an indirect table.
const CHAIN: u16 = 3;

/// So many looks in vain, some milliseconds of them, and the doorbell is rung
/// once more.
///
/// The driver has no barrier between moving its index and reading whether the
/// device wants a doorbell, so that a device which goes to sleep at the same
/// moment may be left asleep for good. Somebody who uses it with care knows.
const LOOKS: u32 = 1_000_000;

/// A request, in memory that the device reads and writes.
struct Slot<B: DmaBufMut> {
    request: BlkReq,
    response: BlkResp,
    held: Option<Held<B>>,
}

/// What the device has.
struct Held<B: DmaBufMut> {
    raw: B::Raw,
    data: NonNull<[u8]>,
    op: BlockOp,
    tag: u64,
}

/// The driver of [`virtio_drivers`], with as many requests in flight as its
/// queue holds. It shows each request to the device at once, and rings for
/// each: there is nothing to publish.
///
/// Buffers in flight are leaked if the queue is dropped.
pub struct PeerQueue<B: DmaBufMut, H: Hal, T: Transport, R> {
    driver: VirtIOBlk<H, Watched<T>>,
    watch: Watch,
    limits: BlockLimits,
    depth: u16,
    slots: Box<[Slot<B>]>,
    free: Vec<u8>,
    /// The slot of each token, which is the number of a descriptor.
    slot_of: [u8; SIZE as usize],
    ring_again: R,
    in_vain: u32,
}

impl<B: DmaBufMut, H: Hal, T: Transport, R> fmt::Debug for PeerQueue<B, H, T, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerQueue")
            .field("watch", &self.watch)
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

impl<B: DmaBufMut, H: Hal, T: Transport, R: FnMut()> PeerQueue<B, H, T, R> {
    /// Takes the device, which has been reset, and asks for no interrupts as
    /// far as the driver can. `ring_again` rings the doorbell without the
    /// driver.
    ///
    /// # Errors
    /// What the driver says.
    pub fn open(transport: T, allow: Features, ring_again: R) -> Result<Self> {
        let transport = Watched::new(transport, allow);
        let watch = transport.watch();
        let mut driver = VirtIOBlk::<H, _>::new(transport)?;
        // Does nothing if EVENT_IDX was negotiated: then each completion asks
        // for the next interrupt.
        driver.disable_interrupts();
        let depth = if watch.features().contains(Features::INDIRECT_DESC) {
            SIZE
        } else {
            SIZE / CHAIN
        };
        let slots = (0..depth).map(|_| Slot {
            request: BlkReq::default(),
            response: BlkResp::default(),
            held: None,
        });
        Ok(Self {
            limits: BlockLimits {
                capacity: driver.capacity(),
                block_bytes: SECTOR_BYTES as u32,
                read_only: driver.readonly(),
                flush: false,
                max_segments: 1,
                max_segment_bytes: u32::MAX,
                max_bytes: u32::MAX - 511,
                discard: None,
                write_zeroes: None,
                secure_erase: None,
                lifetime: false,
                topology: None,
            },
            driver,
            watch,
            depth,
            slots: slots.collect(),
            free: (0..depth as u8).collect(),
            slot_of: [0; SIZE as usize],
            ring_again,
            in_vain: 0,
        })
    }

    /// The features in use.
    #[must_use]
    pub fn features(&self) -> Features {
        self.watch.features()
    }

    /// Looks in vain, and rings again after many of them.
    #[cold]
    fn ring(&mut self) {
        self.in_vain = 0;
        if self.free.len() < self.slots.len() {
            self.watch.kick();
            (self.ring_again)();
        }
    }
}

/// How a request ended, in the words of our contract.
fn outcome(result: Result) -> core::result::Result<(), BlockError> {
    result.map_err(|error| match error {
        Error::IoError => BlockError::Io,
        Error::Unsupported => BlockError::Unsupported,
        // What the driver puts there before the device does.
        _ => BlockError::Status(3),
    })
}

impl<B: DmaBufMut, H: Hal, T: Transport, R: FnMut()> BlockQueue<B> for PeerQueue<B, H, T, R> {
    fn limits(&self) -> &BlockLimits {
        &self.limits
    }

    fn depth(&self) -> u16 {
        self.depth
    }

    /// The buffer is in one piece, of whole sectors.
    #[inline]
    fn submit(
        &mut self,
        op: BlockOp,
        buffer: Option<B>,
        tag: u64,
    ) -> core::result::Result<(), Refused<B>> {
        let (reason, buffer) = match (buffer, self.free.pop()) {
            (Some(buffer), Some(index)) => {
                let slot = &mut self.slots[usize::from(index)];
                let raw = buffer.into_raw();
                let mut data = NonNull::slice_from_raw_parts(NonNull::dangling(), 0);
                B::segments(&raw, &mut |piece| data = piece);
                // SAFETY: request, buffer and response are left alone until the
                // driver says that this token is used: slots never move, and a
                // raw buffer is nobody else's. Those that are in flight when
                // the queue is dropped are leaked.
                let token = unsafe {
                    let (request, response) = (&mut slot.request, &mut slot.response);
                    match op {
                        BlockOp::Read { sector } => self.driver.read_blocks_nb(
                            sector as usize,
                            request,
                            data.as_mut(),
                            response,
                        ),
                        BlockOp::Write { sector } => self.driver.write_blocks_nb(
                            sector as usize,
                            request,
                            data.as_ref(),
                            response,
                        ),
                        _ => Err(Error::Unsupported),
                    }
                };
                match token {
                    Ok(token) => {
                        slot.held = Some(Held { raw, data, op, tag });
                        self.slot_of[usize::from(token)] = index;
                        return Ok(());
                    }
                    Err(error) => {
                        self.free.push(index);
                        // SAFETY: the device was not told about it.
                        let buffer = unsafe { B::from_raw(raw) };
                        let reason = match error {
                            Error::QueueFull => Reason::Full,
                            _ => Reason::Unsupported,
                        };
                        (reason, Some(buffer))
                    }
                }
            }
            (None, Some(index)) => {
                self.free.push(index);
                (Reason::Unsupported, None)
            }
            (buffer, None) => (Reason::Full, buffer),
        };
        Err(Refused { reason, buffer })
    }

    fn publish(&mut self) {}

    #[inline]
    fn complete(&mut self) -> core::result::Result<Option<Done<B>>, Fault> {
        let Some(token) = self.driver.peek_used() else {
            self.in_vain += 1;
            if self.in_vain == LOOKS {
                self.ring();
            }
            return Ok(None);
        };
        self.in_vain = 0;
        let index = self.slot_of.get(usize::from(token));
        let index = *index.ok_or(Fault::UsedId {
            id: u32::from(token),
            size: SIZE,
        })?;
        let slot = &mut self.slots[usize::from(index)];
        let Some(held) = slot.held.take() else {
            return Err(Fault::NotInFlight { id: token });
        };
        let Held {
            raw,
            mut data,
            op,
            tag,
        } = held;
        // SAFETY: the device has used the token, and these are what was handed
        // over when the driver gave it out.
        let result = unsafe {
            let (request, response) = (&slot.request, &mut slot.response);
            match op {
                BlockOp::Write { .. } => {
                    let data = data.as_ref();
                    self.driver
                        .complete_write_blocks(token, request, data, response)
                }
                _ => {
                    let data = data.as_mut();
                    self.driver
                        .complete_read_blocks(token, request, data, response)
                }
            }
        };
        self.free.push(index);
        Ok(Some(Done {
            tag,
            op,
            // SAFETY: the device is done with it.
            buffer: Some(unsafe { B::from_raw(raw) }),
            result: outcome(result),
        }))
    }

    /// Not for sleeping: rows of this driver are polled.
    fn arm(&mut self) -> bool {
        true
    }
}

impl<B: DmaBufMut, H: Hal, T: Transport, R: FnMut()> Target<B> for PeerQueue<B, H, T, R> {
    type Queue = Self;
    fn queue(&mut self) -> &mut Self {
        self
    }
    fn acknowledge(&mut self) {
        self.driver.ack_interrupt();
    }
    fn kicks(&self) -> u64 {
        self.watch.kicks()
    }
}

impl<B: DmaBufMut, H: Hal, T: Transport, R> Drop for PeerQueue<B, H, T, R> {
    fn drop(&mut self) {
        for slot in &mut self.slots {
            core::mem::forget(slot.held.take());
        }
    }
}
