//! virtio over PCI (virtio 1.3 §4.1), without the legacy interface.
#![allow(unsafe_code)]

mod find;

pub use find::PciTransportError;

use super::{
    Events, Field, QueueAddresses, ResetTimeout, Transport, VectorError, read_field, wait_zero,
    write_field,
};
use crate::doorbell::{Doorbell, Position};
use crate::pci::Msix;
use crate::quiesce::{QueueIdentity, Quiesced, ResetEpoch};
use crate::register::{OwnedRegisters, Registers};
use find::Structure;
use pvkit_protocol::pci::msix;
use pvkit_protocol::virtio::pci::{IsrStatus, NO_VECTOR, common};
use pvkit_protocol::virtio::{DeviceStatus, Features};

/// A device behind a PCI function.
///
/// ```no_run
/// # #[cfg(target_arch = "x86_64")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use core::ptr::{self, NonNull};
/// use pvkit_guest::dma::LinearSpace;
/// use pvkit_guest::pci::{MemoryBar, MemoryPool, MsiMessage, Msix, PciConfig};
/// use pvkit_guest::register::{CpuPorts, MmioRegisters};
/// use pvkit_guest::virtio::transport::PciTransport;
/// use pvkit_guest::virtio::{Block, BlockOptions};
///
/// // SAFETY: this program may use ports, and nobody else uses these.
/// let config = PciConfig::new(unsafe { CpuPorts::new() });
/// // For windows that firmware left without an address.
/// // SAFETY: neither memory nor devices are there.
/// let mut free = unsafe { MemoryPool::new(0xe000_0000, 0xefff_ffff) };
/// let map = |bar: MemoryBar| {
///     let base = NonNull::new(ptr::with_exposed_provenance_mut(bar.base as usize))?;
///     // SAFETY: all memory is identity mapped, and this part of it uncached;
///     // nobody else uses the window.
///     Some(unsafe { MmioRegisters::new(base, bar.size as usize) })
/// };
/// let disk = config.find(0x1af4, 0x1042).ok_or("no virtio-blk")?;
/// let transport = PciTransport::new(&config, &disk, &mut free, map)?;
/// let mut msix = Msix::enable(&config, disk.place, &mut free, map)?;
/// // SAFETY: interrupt 0x40 of CPU 0, which has a handler.
/// msix.set(0, unsafe { MsiMessage::new(0xfee0_0000, 0x40) })?;
/// // SAFETY: memory is identity mapped, for devices too.
/// let space = unsafe { LinearSpace::new(0) };
/// let options = BlockOptions {
///     queue_vector: Some(0),
///     ..BlockOptions::default()
/// };
/// // Buffers are boxed slices here, as in the tour of this crate.
/// let transport = transport.with_msix(&msix);
/// let (block, queue) = Block::open::<Box<[u8]>, _>(transport, space, options)?;
/// # let _ = (block, queue);
/// # Ok(())
/// # }
/// # #[cfg(not(target_arch = "x86_64"))]
/// # fn main() {}
/// ```
#[derive(Debug)]
pub struct PciTransport<R> {
    common: Structure<R>,
    notify: Structure<R>,
    /// Bytes between doorbells.
    multiplier: u32,
    isr: Structure<R>,
    device: Option<Structure<R>>,
    device_id: u32,
    epoch: ResetEpoch,
    reset_reads: u32,
    messages: Option<MessageVectors>,
    /// Doorbells say where the queue stands (NOTIFICATION_DATA).
    notification_data: bool,
}

/// Which vectors the driver has given to what, while MSI-X is on.
#[derive(Debug)]
struct MessageVectors {
    config: u16,
    /// One bit for each vector that a queue has, or has had.
    queues: [u64; msix::MOST as usize / 64],
}

impl MessageVectors {
    const NONE: Self = Self {
        config: NO_VECTOR,
        queues: [0; msix::MOST as usize / 64],
    };

    fn bit(vector: u16) -> (usize, u64) {
        (usize::from(vector / 64), 1 << (vector % 64))
    }

    fn add_queue(&mut self, vector: u16) {
        let (word, bit) = Self::bit(vector);
        if let Some(word) = self.queues.get_mut(word) {
            *word |= bit;
        }
    }

    /// Whether a queue shares the vector of configuration changes.
    fn are_shared(&self) -> bool {
        let (word, bit) = Self::bit(self.config);
        self.queues.get(word).is_some_and(|word| word & bit != 0)
    }
}

/// How often the status is read, at the most, before a reset counts as
/// failed. Each read usually leaves the virtual machine, for a microsecond or
/// more.
const RESET_READS: u32 = 1_000_000;

impl<R: Registers> PciTransport<R> {
    /// Sets how often the status is read, at the most, before a reset counts
    /// as failed (one million unless set).
    #[must_use]
    pub fn with_reset_reads(mut self, reads: u32) -> Self {
        self.reset_reads = reads;
        self
    }

    /// From now on, the device interrupts by message: the function's MSI-X was
    /// [switched on](Msix::enable). Queues and configuration get their vectors
    /// from the driver. Without this, all of them share the function's pin.
    #[must_use]
    pub fn with_msix<W: Registers>(mut self, _msix: &Msix<W>) -> Self {
        self.messages = Some(MessageVectors::NONE);
        self
    }

    fn select(&mut self, queue: u16) {
        self.common.write_u16(common::QUEUE_SELECT, queue);
    }

    fn write_u64(&mut self, offset: usize, value: u64) {
        self.common.write_u32(offset, value as u32);
        self.common.write_u32(offset + 4, (value >> 32) as u32);
    }

    /// Where the doorbell of the selected queue is in the window of
    /// notifications, if it is there at all.
    fn selected_doorbell(&self) -> Option<usize> {
        let unit = self.common.read_u16(common::QUEUE_NOTIFY_OFF);
        let offset = u64::from(unit) * u64::from(self.multiplier);
        let offset = usize::try_from(offset).ok()?;
        // §4.1.4.4.1: the structure reaches to the end of the last doorbell.
        let bytes = if self.notification_data {
            size_of::<u32>()
        } else {
            size_of::<u16>()
        };
        self.notify.place(offset, bytes)
    }

    /// The events of a configuration change.
    fn config_events(&self) -> Events {
        let mut events = Events::CONFIG;
        events.set(
            Events::NEEDS_RESET,
            self.status().contains(DeviceStatus::DEVICE_NEEDS_RESET),
        );
        events
    }

    /// Reads why the device interrupted, which clears it.
    fn claim_isr(&self) -> Events {
        let cause = IsrStatus::from_bits_truncate(self.isr.read_u8(0));
        let mut events = Events::empty();
        events.set(Events::QUEUE, cause.contains(IsrStatus::QUEUE));
        if cause.contains(IsrStatus::CONFIG_CHANGE) {
            events |= self.config_events();
        }
        events
    }

    /// Maps an event of `field` to a vector.
    fn set_vector(&self, field: usize, vector: Option<u16>) -> Result<(), VectorError> {
        if self.messages.is_none() {
            // The fields mean nothing then.
            return match vector {
                None => Ok(()),
                Some(_) => Err(VectorError::OneLine),
            };
        }
        let wanted = vector.unwrap_or(NO_VECTOR);
        self.common.write_u16(field, wanted);
        // §4.1.5.1.2.2: whether the device agrees has to be read back.
        let read = self.common.read_u16(field);
        match vector {
            Some(vector) if read != wanted || vector == NO_VECTOR => {
                Err(VectorError::Refused { vector, read })
            }
            _ => Ok(()),
        }
    }
}

// SAFETY: a device that follows virtio lets go of all its queues before its
// status reads 0 after a reset (§2.4.1), and of a queue before `queue_reset`
// reads 0 (§2.6.1); proofs are made only then. Addresses are passed on
// unchanged.
unsafe impl<R: Registers> Transport for PciTransport<R> {
    type Doorbell = PciDoorbell<R>;

    fn device_id(&self) -> u32 {
        self.device_id
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.common.read_u8(common::DEVICE_STATUS))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.common.write_u8(common::DEVICE_STATUS, status.bits());
    }

    fn reset(&mut self) -> Result<Quiesced, ResetTimeout> {
        self.common.write_u8(common::DEVICE_STATUS, 0);
        wait_zero(self.reset_reads, || {
            u32::from(self.common.read_u8(common::DEVICE_STATUS))
        })?;
        if let Some(messages) = &mut self.messages {
            // A reset takes all vectors away (§4.1.5.1.2).
            *messages = MessageVectors::NONE;
        }
        // SAFETY: the status reads 0: the reset is over.
        Ok(unsafe { self.epoch.end() })
    }

    fn reset_queue(&mut self, queue: u16) -> Result<Quiesced, ResetTimeout> {
        self.select(queue);
        if self.common.place(common::QUEUE_RESET, 2).is_none() {
            // A device without the field cannot do it.
            return Err(ResetTimeout {
                status: self.status().bits(),
                reads: 0,
            });
        }
        self.common.write_u16(common::QUEUE_RESET, 1);
        wait_zero(self.reset_reads, || {
            u32::from(self.common.read_u16(common::QUEUE_RESET))
        })?;
        // The fields of this queue are to say so, not those of another one that
        // was selected meanwhile: the proof is about this one. After its reset
        // a queue is not enabled (§4.1.4.3.1).
        self.select(queue);
        let selected = self.common.read_u16(common::QUEUE_SELECT);
        let left = self.common.read_u16(common::QUEUE_RESET)
            | self.common.read_u16(common::QUEUE_ENABLE)
            | (selected ^ queue);
        if left != 0 {
            return Err(ResetTimeout {
                status: self.status().bits(),
                reads: 1,
            });
        }
        // SAFETY: both fields read 0: the queue's reset is over.
        Ok(unsafe { self.epoch.end_queue(queue) })
    }

    fn identity(&self, queue: u16) -> QueueIdentity {
        self.epoch.queue(queue)
    }

    fn device_features(&mut self) -> Features {
        let mut features = Features::empty();
        for select in 0..2 {
            self.common.write_u32(common::DEVICE_FEATURE_SELECT, select);
            let window = self.common.read_u32(common::DEVICE_FEATURE);
            features = features.with_window(select, window);
        }
        features
    }

    fn set_driver_features(&mut self, features: Features) {
        self.notification_data = features.contains(Features::NOTIFICATION_DATA);
        for select in 0..2 {
            self.common.write_u32(common::DRIVER_FEATURE_SELECT, select);
            self.common
                .write_u32(common::DRIVER_FEATURE, features.window(select));
        }
    }

    fn config_generation(&self) -> u32 {
        u32::from(self.common.read_u8(common::CONFIG_GENERATION))
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        let Some(device) = &self.device else {
            out.fill(0xff);
            return;
        };
        // §4.1.3.1. A field that reaches beyond the structure reads as ones,
        // however much of it is there.
        read_field(offset, out, |place, width| match width {
            4 => device.read_u32(place),
            2 => u32::from(device.read_u16(place)),
            _ => u32::from(device.read_u8(place)),
        });
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let Some(device) = &self.device else {
            return;
        };
        write_field(offset, data, |place, field| match field {
            Field::U32(value) => device.write_u32(place, value),
            Field::U16(value) => device.write_u16(place, value),
            Field::U8(value) => device.write_u8(place, value),
        });
    }

    fn queue_max_size(&mut self, queue: u16) -> u32 {
        self.select(queue);
        let size = self.common.read_u16(common::QUEUE_SIZE);
        // A queue without a doorbell cannot be used.
        match self.selected_doorbell() {
            Some(_) => u32::from(size),
            None => 0,
        }
    }

    unsafe fn set_up_queue(&mut self, queue: u16, at: QueueAddresses) {
        self.select(queue);
        self.common.write_u16(common::QUEUE_SIZE, at.size.get());
        self.write_u64(common::QUEUE_DESC, at.descriptors);
        self.write_u64(common::QUEUE_DRIVER, at.driver);
        self.write_u64(common::QUEUE_DEVICE, at.device);
        self.common.write_u16(common::QUEUE_ENABLE, 1);
    }

    fn set_config_vector(&mut self, vector: Option<u16>) -> Result<(), VectorError> {
        self.set_vector(common::CONFIG_MSIX_VECTOR, vector)?;
        if let Some(messages) = &mut self.messages {
            messages.config = vector.unwrap_or(NO_VECTOR);
        }
        Ok(())
    }

    fn set_queue_vector(&mut self, queue: u16, vector: Option<u16>) -> Result<(), VectorError> {
        if self.messages.is_some() {
            self.select(queue);
        }
        self.set_vector(common::QUEUE_MSIX_VECTOR, vector)?;
        if let (Some(messages), Some(vector)) = (&mut self.messages, vector) {
            messages.add_queue(vector);
        }
        Ok(())
    }

    fn doorbell(&mut self, queue: u16) -> PciDoorbell<R> {
        self.select(queue);
        PciDoorbell {
            registers: self.notify.registers(),
            // A place where nothing is: such a queue has no size either.
            offset: self.selected_doorbell().unwrap_or(usize::MAX),
            notification_data: self.notification_data,
        }
    }

    fn claim_events(&self) -> Events {
        match &self.messages {
            None => self.claim_isr(),
            Some(messages) if messages.are_shared() => self.claim_isr() | Events::QUEUE,
            // The vector says it all.
            Some(_) => Events::QUEUE,
        }
    }

    fn claim_config_events(&self) -> Events {
        match &self.messages {
            Some(messages) if !messages.are_shared() => self.config_events(),
            _ => self.claim_events(),
        }
    }
}

/// The doorbell of one queue.
#[derive(Debug)]
pub struct PciDoorbell<R> {
    registers: OwnedRegisters<R>,
    offset: usize,
    notification_data: bool,
}

impl<R: Registers> Doorbell for PciDoorbell<R> {
    #[inline]
    fn ring(&mut self, at: Position) {
        if self.notification_data {
            self.registers
                .write_u32(self.offset, at.notification_data());
        } else {
            self.registers.write_u16(self.offset, at.queue);
        }
    }
}
