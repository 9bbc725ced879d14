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
use crate::quiesce::{QueueIdentity, Quiesced};
use core::hint::spin_loop;
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

/// virtio's control plane: everything but moving requests (virtio 1.3 §4).
///
/// # Safety
/// [`reset`](Transport::reset) and [`reset_queue`](Transport::reset_queue)
/// return a proof only once the device has let go of its queues (see
/// [`ResetEpoch`](crate::quiesce::ResetEpoch)), and queues reach the device at exactly
/// the addresses given.
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
    fn doorbell(&mut self, queue: u16) -> Self::Doorbell;

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
