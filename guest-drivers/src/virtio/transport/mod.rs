//! Transports: how a driver finds, configures and resets a device.
//!
//! All of this is the cold path. What a queue needs while it works, its
//! doorbell, is made once.
#![allow(unsafe_code)]

mod mmio;
mod pci;

pub use mmio::{MmioDoorbell, MmioError, MmioTransport};
pub use pci::{PciDoorbell, PciTransport, PciTransportError};

use crate::doorbell::Doorbell;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicU32, Ordering};
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{DeviceStatus, Features};
use thiserror::Error;

/// Where the parts of a queue lie, as the device sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueAddresses {
    /// Number of descriptors.
    pub size: QueueSize,
    /// Descriptor area: the descriptor table (virtio 1.3 §2.6).
    pub descriptors: u64,
    /// Driver area: the available ring.
    pub driver: u64,
    /// Device area: the used ring.
    pub device: u64,
}

bitflags::bitflags! {
    /// Why a device interrupted.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Events: u8 {
        /// A queue has completions.
        const QUEUE = 1;
        /// The configuration changed.
        const CONFIG = 2;
        /// The device asks to be reset.
        const NEEDS_RESET = 4;
    }
}

/// A reset did not finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the device did not finish its reset: status still {status:#x} after {reads} reads")]
pub struct ResetTimeout {
    /// The last status that was read.
    pub status: u8,
    /// How often it was read.
    pub reads: u32,
}

/// A queue or the configuration does not get the vector that it was to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VectorError {
    /// The transport has one interrupt line for everything: virtio-mmio, or
    /// PCI without MSI-X.
    #[error("this transport has one interrupt line and no vectors")]
    OneLine,
    /// The device refuses.
    #[error("the device refuses vector {vector}, and reads back {read:#x}")]
    Refused {
        /// The vector.
        vector: u16,
        /// What the device says instead.
        read: u16,
    },
}

/// The life of a device between two resets. A queue belongs to the life in
/// which the device was told about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueIdentity {
    device: u32,
    life: u32,
    queue: u16,
}

impl QueueIdentity {
    /// Whether both are the same queue of the same device, in whatever life.
    pub(crate) fn is_queue(self, other: Self) -> bool {
        (self.device, self.queue) == (other.device, other.queue)
    }
}

/// Counts the lives of one device, for implementations of [`Transport`].
#[derive(Debug)]
pub struct Lives {
    device: u32,
    life: u32,
}

/// What every device is called after 2^32 - 1 others: no proof is about it.
const NAMELESS: u32 = u32::MAX;

impl Lives {
    /// A device that is not known to be in any life yet.
    #[must_use]
    pub fn new() -> Self {
        static DEVICES: AtomicU32 = AtomicU32::new(0);
        Self::named(&DEVICES)
    }

    /// The next device of a count, which never comes around: two devices of
    /// one name would free each other's memory.
    fn named(devices: &AtomicU32) -> Self {
        let next = |count: u32| count.checked_add(1);
        // Only tells devices apart: no order with other memory is needed.
        let device = devices.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        Self {
            device: device.unwrap_or(NAMELESS),
            life: 0,
        }
    }

    /// The identity of a queue that is set up now.
    #[must_use]
    pub fn queue(&self, queue: u16) -> QueueIdentity {
        QueueIdentity {
            device: self.device,
            life: self.life,
            queue,
        }
    }

    /// The device was reset: a new life begins, and this proves that the old
    /// ones are over.
    ///
    /// # Safety
    /// The device does not access any queue or buffer that it was told about
    /// before this call.
    pub unsafe fn over(&mut self) -> Quiesced {
        let ended = self.life;
        self.life = self.life.wrapping_add(1);
        Quiesced {
            device: self.device,
            ended,
            queue: None,
        }
    }

    /// One queue was reset; the others live on.
    ///
    /// # Safety
    /// The device does not access this queue, or a buffer in it, as it was
    /// told before this call.
    pub unsafe fn queue_over(&mut self, queue: u16) -> Quiesced {
        let ended = self.life;
        self.life = self.life.wrapping_add(1);
        Quiesced {
            device: self.device,
            ended,
            queue: Some(queue),
        }
    }
}

impl Default for Lives {
    fn default() -> Self {
        Self::new()
    }
}

/// The proof that a device has let go of queues and buffers that it was told
/// about before.
#[derive(Debug)]
pub struct Quiesced {
    device: u32,
    ended: u32,
    queue: Option<u16>,
}

impl Quiesced {
    /// Whether the proof is about this queue, in this life or an earlier one.
    pub(crate) fn covers(&self, queue: QueueIdentity) -> bool {
        self.device == queue.device
            && self.device != NAMELESS
            && self.ended.wrapping_sub(queue.life) < u32::MAX / 2
            && self.queue.is_none_or(|index| index == queue.queue)
    }
}

/// virtio's control plane: everything but moving requests (virtio 1.3 §4).
///
/// # Safety
/// [`reset`](Transport::reset) and [`reset_queue`](Transport::reset_queue)
/// return a proof only once the device has let go of its queues (see
/// [`Lives`]), and queues reach the device at exactly the addresses given.
pub unsafe trait Transport: Send {
    /// How queues of this transport notify the device.
    type Doorbell: Doorbell;

    /// The device type (virtio 1.3 §5).
    fn device_id(&self) -> u32;

    /// The device status.
    fn status(&self) -> DeviceStatus;

    /// Sets the device status. Never to 0: that is [`reset`](Transport::reset).
    fn set_status(&mut self, status: DeviceStatus);

    /// Resets the device and waits until it has finished (§2.4.1).
    ///
    /// # Errors
    /// [`ResetTimeout`] if the status does not become 0.
    fn reset(&mut self) -> Result<Quiesced, ResetTimeout>;

    /// Resets one queue and waits. Needs
    /// [`RING_RESET`](Features::RING_RESET).
    ///
    /// # Errors
    /// [`ResetTimeout`] if the device does not finish.
    fn reset_queue(&mut self, queue: u16) -> Result<Quiesced, ResetTimeout>;

    /// The identity of a queue that is set up now.
    fn identity(&self, queue: u16) -> QueueIdentity;

    /// All features that the device offers.
    fn device_features(&mut self) -> Features;

    /// Accepts features.
    fn set_driver_features(&mut self, features: Features);

    /// Changes whenever the configuration space may have changed.
    fn config_generation(&self) -> u32;

    /// Reads the field at `offset` of configuration space, with accesses as
    /// wide as it is, or of 32 bits if it is wider; bytes beyond the end of the
    /// space read as ones.
    fn read_config(&self, offset: usize, out: &mut [u8]);

    /// Writes the field at `offset` of configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// The largest size of a queue; 0 if there is no such queue.
    fn queue_max_size(&mut self, queue: u16) -> u32;

    /// Tells the device where a queue lies, and enables it.
    ///
    /// ```compile_fail,E0133
    /// # use pvkit_guest::virtio::transport::{QueueAddresses, Transport};
    /// fn anywhere(transport: &mut impl Transport, at: QueueAddresses) {
    ///     transport.set_up_queue(0, at);
    /// }
    /// ```
    ///
    /// # Safety
    /// The device may read and write the ring at these addresses, and the
    /// buffers that the ring names, until a reset proves that it has let go.
    unsafe fn set_up_queue(&mut self, queue: u16, at: QueueAddresses);

    /// Gives configuration changes a vector, or with `None` no interrupt. A
    /// reset takes it away. Transports with one line take `None` only.
    ///
    /// # Errors
    /// [`VectorError`] if the transport has no vectors, or the device refuses.
    fn set_config_vector(&mut self, vector: Option<u16>) -> Result<(), VectorError> {
        vector.map_or(Ok(()), |_| Err(VectorError::OneLine))
    }

    /// Gives a queue a vector, which it may share, or with `None` no interrupt.
    /// A reset takes it away. Transports with one line take `None` only.
    ///
    /// # Errors
    /// [`VectorError`] if the transport has no vectors, or the device refuses.
    fn set_queue_vector(&mut self, queue: u16, vector: Option<u16>) -> Result<(), VectorError> {
        let _ = queue;
        vector.map_or(Ok(()), |_| Err(VectorError::OneLine))
    }

    /// The doorbell of a queue.
    fn doorbell(&self, queue: u16) -> Self::Doorbell;

    /// Says why the device interrupted by a line, or by the vector of a queue,
    /// and acknowledges that. Touches no register where the vector says it
    /// all.
    fn claim_events(&self) -> Events;

    /// The same for an interrupt by the vector of configuration changes.
    fn claim_config_events(&self) -> Events {
        self.claim_events()
    }
}

/// Reads a field of configuration space with accesses of its own width, and one
/// of 64 bits as two halves; all are aligned to that. `read` gets a place and a
/// width of 1, 2 or 4 bytes.
fn read_field(offset: usize, out: &mut [u8], read: impl Fn(usize, usize) -> u32) {
    let mut place = offset;
    let mut rest = out;
    while !rest.is_empty() {
        let width = match rest.len() {
            4.. if place.is_multiple_of(4) => 4,
            2.. if place.is_multiple_of(2) => 2,
            _ => 1,
        };
        let (now, later) = rest.split_at_mut(width);
        for (byte, value) in now.iter_mut().zip(read(place, width).to_le_bytes()) {
            *byte = value;
        }
        rest = later;
        place = place.saturating_add(width);
    }
}

/// One access to configuration space.
enum Field {
    U8(u8),
    U16(u16),
    U32(u32),
}

/// Writes a field of configuration space with one access if there is one of
/// its width, and byte by byte otherwise.
fn write_field(offset: usize, data: &[u8], write: impl Fn(usize, Field)) {
    match *data {
        [a, b] => write(offset, Field::U16(u16::from_le_bytes([a, b]))),
        [a, b, c, d] => write(offset, Field::U32(u32::from_le_bytes([a, b, c, d]))),
        _ => {
            for (index, byte) in data.iter().enumerate() {
                write(offset.saturating_add(index), Field::U8(*byte));
            }
        }
    }
}

/// Waits until `read` says 0, for at most so many reads.
fn wait_zero(reads: u32, read: impl Fn() -> u32) -> Result<(), ResetTimeout> {
    let mut value = 0;
    for _ in 0..reads {
        value = read();
        if value == 0 {
            return Ok(());
        }
        spin_loop();
    }
    Err(ResetTimeout {
        status: value as u8,
        reads,
    })
}

#[cfg(test)]
mod tests {
    use super::{AtomicU32, Lives};

    #[test]
    fn devices_without_a_name_of_their_own_are_never_proved_over() {
        let devices = AtomicU32::new(u32::MAX - 1);
        let [last, mut one, mut two] = [(); 3].map(|()| Lives::named(&devices));
        assert_ne!(last.queue(0), one.queue(0));
        for queue in [last.queue(0), one.queue(0), two.queue(0)] {
            // SAFETY: there is no device.
            let proofs = unsafe { [one.over(), two.over()] };
            assert!(proofs.iter().all(|proof| !proof.covers(queue)));
        }
    }

    #[test]
    fn a_proof_covers_what_was_set_up_before_it() {
        let (mut one, mut two) = (Lives::new(), Lives::new());
        let (old, other) = (one.queue(0), two.queue(0));
        // SAFETY: there is no device.
        let (proof, foreign) = unsafe { (one.over(), two.over()) };
        let new = one.queue(0);
        assert!(proof.covers(old));
        assert!(!proof.covers(new), "the queue was set up after the reset");
        assert!(!proof.covers(other), "another device");
        assert!(foreign.covers(other));

        let (kept, gone) = (one.queue(1), one.queue(2));
        // SAFETY: there is no device.
        let proof = unsafe { one.queue_over(2) };
        assert!(proof.covers(gone));
        assert!(!proof.covers(kept));
        assert!(!proof.covers(one.queue(2)));
        // SAFETY: there is no device.
        let proof = unsafe { one.over() };
        assert!(proof.covers(kept), "a later reset covers earlier lives");
    }
}
