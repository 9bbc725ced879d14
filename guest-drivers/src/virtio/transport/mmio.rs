//! virtio over memory-mapped registers (virtio 1.3 §4.2).
#![allow(unsafe_code)]

use super::{
    Events, Field, QueueAddresses, ResetTimeout, Transport, read_field, wait_zero, write_field,
};
use crate::doorbell::{Doorbell, Position};
use crate::quiesce::{QueueIdentity, Quiesced, ResetEpoch};
use crate::register::{OwnedRegisters, Registers};
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::{DeviceStatus, Features, device_id};
use thiserror::Error;

/// A device behind a window of registers.
#[derive(Debug)]
pub struct MmioTransport<R> {
    registers: OwnedRegisters<R>,
    device_id: u32,
    epoch: ResetEpoch,
    reset_reads: u32,
    /// Doorbells say where the queue stands (NOTIFICATION_DATA).
    notification_data: bool,
}

/// Why a window holds no usable device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MmioError {
    /// The window is too small for virtio's registers.
    #[error("a window of {bytes} bytes is too small for virtio-mmio, which needs 256")]
    Window {
        /// Its size.
        bytes: usize,
    },
    /// The window does not start with the magic value: there is no virtio
    /// device.
    #[error("magic value {0:#x} instead of {magic:#x}", magic = mmio::MAGIC)]
    Magic(u32),
    /// The device follows another version of the transport; 1 is legacy.
    #[error("virtio-mmio version {0} instead of {current}", current = mmio::CURRENT_VERSION)]
    Version(u32),
    /// The slot is empty.
    #[error("no device stands behind this virtio-mmio window")]
    Empty,
}

/// How often the status is read, at the most, before a reset counts as
/// failed. Each read usually leaves the virtual machine, for a microsecond or
/// more.
const RESET_READS: u32 = 1_000_000;

impl<R: Registers> MmioTransport<R> {
    /// The device behind a window, if there is one. Changes nothing in it.
    ///
    /// # Errors
    /// [`MmioError`] says what is there instead.
    pub fn new(registers: R) -> Result<Self, MmioError> {
        let registers = OwnedRegisters::new(registers);
        if registers.len() < mmio::REGISTERS_BYTES {
            return Err(MmioError::Window {
                bytes: registers.len(),
            });
        }
        let magic = registers.read_u32(mmio::MAGIC_VALUE);
        if magic != mmio::MAGIC {
            return Err(MmioError::Magic(magic));
        }
        let version = registers.read_u32(mmio::VERSION);
        if version != mmio::CURRENT_VERSION {
            return Err(MmioError::Version(version));
        }
        let device_id = registers.read_u32(mmio::DEVICE_ID);
        if device_id == device_id::NONE {
            return Err(MmioError::Empty);
        }
        Ok(Self {
            registers,
            device_id,
            epoch: ResetEpoch::new(),
            reset_reads: RESET_READS,
            notification_data: false,
        })
    }

    /// Sets how often the status is read, at the most, before a reset counts
    /// as failed (one million unless set).
    #[must_use]
    pub fn with_reset_reads(mut self, reads: u32) -> Self {
        self.reset_reads = reads;
        self
    }

    fn select(&mut self, queue: u16) {
        self.registers.write_u32(mmio::QUEUE_SEL, u32::from(queue));
    }

    fn write_u64(&mut self, low: usize, high: usize, value: u64) {
        self.registers.write_u32(low, value as u32);
        self.registers.write_u32(high, (value >> 32) as u32);
    }
}

// SAFETY: a device that follows virtio lets go of all its queues before its
// status reads 0 after a reset (§2.4.1), and of a queue before `QueueReset`
// reads 0 (§2.6.1); proofs are made only then. Addresses are passed on
// unchanged.
unsafe impl<R: Registers> Transport for MmioTransport<R> {
    type Doorbell = MmioDoorbell<R>;

    fn device_id(&self) -> u32 {
        self.device_id
    }

    fn status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.registers.read_u32(mmio::STATUS) as u8)
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.registers
            .write_u32(mmio::STATUS, u32::from(status.bits()));
    }

    fn reset(&mut self) -> Result<Quiesced, ResetTimeout> {
        self.registers.write_u32(mmio::STATUS, 0);
        wait_zero(self.reset_reads, || self.registers.read_u32(mmio::STATUS))?;
        // SAFETY: the status reads 0: the reset is over.
        Ok(unsafe { self.epoch.end() })
    }

    fn reset_queue(&mut self, queue: u16) -> Result<Quiesced, ResetTimeout> {
        self.select(queue);
        self.registers.write_u32(mmio::QUEUE_RESET, 1);
        wait_zero(self.reset_reads, || {
            self.registers.read_u32(mmio::QUEUE_RESET)
        })?;
        // The registers of this queue are to say so, not those of another one
        // that was selected meanwhile: the proof is about this one. After its
        // reset a queue is not ready (§4.2.2.1).
        self.select(queue);
        let left =
            self.registers.read_u32(mmio::QUEUE_RESET) | self.registers.read_u32(mmio::QUEUE_READY);
        if left != 0 {
            return Err(ResetTimeout {
                status: left as u8,
                reads: 1,
            });
        }
        // SAFETY: both registers read 0: the queue's reset is over.
        Ok(unsafe { self.epoch.end_queue(queue) })
    }

    fn identity(&self, queue: u16) -> QueueIdentity {
        self.epoch.queue(queue)
    }

    fn device_features(&mut self) -> Features {
        let mut features = Features::empty();
        for select in 0..2 {
            self.registers.write_u32(mmio::DEVICE_FEATURES_SEL, select);
            features = features.with_window(select, self.registers.read_u32(mmio::DEVICE_FEATURES));
        }
        features
    }

    fn set_driver_features(&mut self, features: Features) {
        self.notification_data = features.contains(Features::NOTIFICATION_DATA);
        for select in 0..2 {
            self.registers.write_u32(mmio::DRIVER_FEATURES_SEL, select);
            self.registers
                .write_u32(mmio::DRIVER_FEATURES, features.window(select));
        }
    }

    fn config_generation(&self) -> u32 {
        self.registers.read_u32(mmio::CONFIG_GENERATION)
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        // §4.2.2.2.
        read_field(
            mmio::CONFIG.saturating_add(offset),
            out,
            |place, width| match width {
                4 => self.registers.read_u32(place),
                2 => u32::from(self.registers.read_u16(place)),
                _ => u32::from(self.registers.read_u8(place)),
            },
        );
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        write_field(
            mmio::CONFIG.saturating_add(offset),
            data,
            |place, field| match field {
                Field::U32(value) => self.registers.write_u32(place, value),
                Field::U16(value) => self.registers.write_u16(place, value),
                Field::U8(value) => self.registers.write_u8(place, value),
            },
        );
    }

    fn queue_max_size(&mut self, queue: u16) -> u32 {
        self.select(queue);
        self.registers.read_u32(mmio::QUEUE_SIZE_MAX)
    }

    unsafe fn set_up_queue(&mut self, queue: u16, at: QueueAddresses) {
        self.select(queue);
        self.registers
            .write_u32(mmio::QUEUE_SIZE, u32::from(at.size.get()));
        self.write_u64(mmio::QUEUE_DESC_LOW, mmio::QUEUE_DESC_HIGH, at.descriptors);
        self.write_u64(mmio::QUEUE_DRIVER_LOW, mmio::QUEUE_DRIVER_HIGH, at.driver);
        self.write_u64(mmio::QUEUE_DEVICE_LOW, mmio::QUEUE_DEVICE_HIGH, at.device);
        self.registers.write_u32(mmio::QUEUE_READY, 1);
    }

    fn doorbell(&mut self, _queue: u16) -> MmioDoorbell<R> {
        MmioDoorbell {
            registers: self.registers.clone(),
            notification_data: self.notification_data,
        }
    }

    fn claim_events(&self) -> Events {
        let cause =
            InterruptStatus::from_bits_truncate(self.registers.read_u32(mmio::INTERRUPT_STATUS));
        let mut events = Events::empty();
        if cause.is_empty() {
            return events;
        }
        self.registers.write_u32(mmio::INTERRUPT_ACK, cause.bits());
        events.set(Events::QUEUE, cause.contains(InterruptStatus::USED_BUFFER));
        if cause.contains(InterruptStatus::CONFIG_CHANGE) {
            events |= Events::CONFIG;
            events.set(
                Events::NEEDS_RESET,
                self.status().contains(DeviceStatus::DEVICE_NEEDS_RESET),
            );
        }
        events
    }
}

/// The notification register of a device.
#[derive(Debug)]
pub struct MmioDoorbell<R> {
    registers: OwnedRegisters<R>,
    notification_data: bool,
}

impl<R: Registers> Doorbell for MmioDoorbell<R> {
    #[inline]
    fn ring(&mut self, at: Position) {
        let value = if self.notification_data {
            at.notification_data()
        } else {
            u32::from(at.queue)
        };
        self.registers.write_u32(mmio::QUEUE_NOTIFY, value);
    }
}

#[cfg(all(test, feature = "alloc"))]
mod tests {
    use super::{MmioTransport, Transport};
    use crate::register::Registers;
    use alloc::rc::Rc;
    use alloc::vec;
    use alloc::vec::Vec;
    use core::cell::{Cell, RefCell};
    use pvkit_protocol::virtio::mmio;

    /// A device with two queues. After a queue's reset has begun, something
    /// else may move the selector, or the device may leave the queue ready.
    struct Device {
        ready: RefCell<Vec<u32>>,
        selected: Cell<u32>,
        /// The queue that is selected as soon as a reset was asked for.
        moved_to: Option<u32>,
        stays_ready: bool,
    }

    #[derive(Clone)]
    struct Window(Rc<Device>);

    // SAFETY: the device is a value of the test. It stays on one thread.
    unsafe impl Send for Window {}

    // SAFETY: touches only the device's own cells.
    unsafe impl Registers for Window {
        fn len(&self) -> usize {
            0x200
        }
        fn read_u8(&self, _: usize) -> u8 {
            0
        }
        fn read_u16(&self, _: usize) -> u16 {
            0
        }
        fn read_u32(&self, offset: usize) -> u32 {
            match offset {
                mmio::MAGIC_VALUE => mmio::MAGIC,
                mmio::VERSION => mmio::CURRENT_VERSION,
                mmio::DEVICE_ID => 2,
                mmio::QUEUE_READY => self.0.ready.borrow()[self.0.selected.get() as usize],
                _ => 0,
            }
        }
        unsafe fn write_u8(&self, _: usize, _: u8) {}
        unsafe fn write_u16(&self, _: usize, _: u16) {}
        unsafe fn write_u32(&self, offset: usize, value: u32) {
            let device = &self.0;
            match offset {
                mmio::QUEUE_SEL => device.selected.set(value),
                mmio::QUEUE_RESET => {
                    let queue = device.moved_to.unwrap_or(device.selected.get());
                    device.selected.set(queue);
                    if !device.stays_ready {
                        device.ready.borrow_mut()[queue as usize] = 0;
                    }
                }
                _ => {}
            }
        }
        unsafe fn alias(&self) -> Self {
            self.clone()
        }
    }

    fn reset(moved_to: Option<u32>, stays_ready: bool) -> bool {
        let device = Rc::new(Device {
            ready: RefCell::new(vec![1, 1]),
            selected: Cell::new(0),
            moved_to,
            stays_ready,
        });
        let mut transport = MmioTransport::new(Window(device)).unwrap();
        let queue = transport.identity(1);
        let proof = transport.reset_queue(1);
        proof.is_ok_and(|proof| proof.covers(queue))
    }

    #[test]
    fn queue_reset_is_proved_for_its_own_queue() {
        assert!(reset(None, false));
        assert!(!reset(Some(0), false), "the other queue was reset");
        assert!(!reset(None, true), "the queue is still ready");
    }
}
