//! virtio over memory-mapped registers (virtio 1.3 §4.2).
#![forbid(unsafe_code)]

use super::control::{Control, ControlState, QueueRegister, TransportSignals};
use crate::bus::BusDevice;
use crate::event::EventFd;
use crate::executor::Executor;
use crate::memory::GuestMemory;
use crate::state::{RestoreError, SavedState, Stateful};
use crate::virtio::device::Device;
use crate::worker::Signal;
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The kind of the saved state.
const KIND: &str = "virtio-mmio";
const STATE_VERSION: u32 = 1;

/// The value of [`mmio::VENDOR_ID`]: "PVKT".
const VENDOR: u32 = u32::from_le_bytes(*b"PVKT");

/// One interrupt line for all queues and for configuration changes, with a
/// register that tells the cause.
#[derive(Debug)]
struct MmioSignals {
    status: AtomicU32,
    line: Arc<dyn Signal>,
}

impl MmioSignals {
    fn raise(&self, cause: InterruptStatus) {
        self.status.fetch_or(cause.bits(), Ordering::AcqRel);
        self.line.signal();
    }
}

impl TransportSignals for MmioSignals {
    fn config(&self) {
        self.raise(InterruptStatus::CONFIG_CHANGE);
    }

    fn queue(self: Arc<Self>, _queue: u16) -> Arc<dyn Signal> {
        Arc::new(QueueSignal(self))
    }

    fn reset(&self) {
        self.status.store(0, Ordering::Release);
    }
}

#[derive(Debug)]
struct QueueSignal(Arc<MmioSignals>);

impl Signal for QueueSignal {
    fn signal(&self) {
        self.0.raise(InterruptStatus::USED_BUFFER);
    }
}

/// A virtio device behind a window of registers.
#[derive(Debug)]
pub struct MmioTransport {
    control: Control<MmioSignals>,
    signals: Arc<MmioSignals>,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl MmioTransport {
    /// Bytes of the window: registers and configuration space.
    pub const WINDOW_BYTES: u64 = 0x200;

    /// A window in front of `device`, whose lanes `executor` drives, and which
    /// interrupts through `line`.
    ///
    /// # Errors
    /// The host's error if there are no more file descriptors.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        executor: Box<dyn Executor>,
        line: Arc<dyn Signal>,
    ) -> io::Result<Self> {
        let signals = Arc::new(MmioSignals {
            status: AtomicU32::new(0),
            line,
        });
        Ok(Self {
            control: Control::new(device, memory, executor, signals.clone())?,
            signals,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        })
    }

    /// The eventfds that the driver kicks, by queue. A monitor can register each
    /// as an ioeventfd for a 32-bit write of the queue's index to
    /// [`mmio::QUEUE_NOTIFY`].
    #[must_use]
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        self.control.kicks()
    }

    /// The features that the driver accepted.
    #[must_use]
    pub fn driver_features(&self) -> Features {
        self.control.driver_features()
    }

    fn read_register(&mut self, offset: usize) -> u32 {
        match offset {
            mmio::MAGIC_VALUE => mmio::MAGIC,
            mmio::VERSION => mmio::CURRENT_VERSION,
            mmio::DEVICE_ID => self.control.identity().device_id,
            mmio::VENDOR_ID => VENDOR,
            mmio::DEVICE_FEATURES => self
                .control
                .identity()
                .features
                .window(self.device_features_sel),
            mmio::QUEUE_SIZE_MAX => self.control.queue_size_max(self.queue_sel),
            mmio::QUEUE_READY => u32::from(self.control.queue_ready(self.queue_sel)),
            mmio::QUEUE_RESET => u32::from(self.control.queue_resetting(self.queue_sel)),
            mmio::INTERRUPT_STATUS => self.signals.status.load(Ordering::Acquire),
            mmio::STATUS => u32::from(self.control.status().bits()),
            mmio::CONFIG_GENERATION => self.control.config_generation(),
            // There are no shared memory regions: length and base are all ones
            // (§4.2.2).
            mmio::SHM_LEN_LOW | mmio::SHM_LEN_HIGH | mmio::SHM_BASE_LOW | mmio::SHM_BASE_HIGH => {
                u32::MAX
            }
            _ => {
                log::debug!("virtio-mmio: read of register {offset:#x}");
                0
            }
        }
    }

    fn write_register(&mut self, offset: usize, value: u32) {
        let queue = self.queue_sel;
        let mut set = |register| self.control.set_queue(queue, register, value);
        match offset {
            mmio::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            mmio::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            mmio::DRIVER_FEATURES => {
                let features = self.control.driver_features();
                let features = features.with_window(self.driver_features_sel, value);
                self.control.set_driver_features(features);
            }
            mmio::QUEUE_SEL => self.queue_sel = value,
            mmio::QUEUE_SIZE => set(QueueRegister::Size),
            mmio::QUEUE_DESC_LOW => set(QueueRegister::Descriptors { high: false }),
            mmio::QUEUE_DESC_HIGH => set(QueueRegister::Descriptors { high: true }),
            mmio::QUEUE_DRIVER_LOW => set(QueueRegister::Driver { high: false }),
            mmio::QUEUE_DRIVER_HIGH => set(QueueRegister::Driver { high: true }),
            mmio::QUEUE_DEVICE_LOW => set(QueueRegister::Device { high: false }),
            mmio::QUEUE_DEVICE_HIGH => set(QueueRegister::Device { high: true }),
            mmio::QUEUE_READY if value & 1 == 0 => self.control.disable_queue(queue),
            mmio::QUEUE_READY => self.control.set_queue_ready(queue, true),
            mmio::QUEUE_RESET if value == 1 => self.control.reset_queue(queue),
            mmio::QUEUE_NOTIFY => self.control.kick(value),
            mmio::INTERRUPT_ACK => {
                self.signals.status.fetch_and(!value, Ordering::AcqRel);
            }
            mmio::STATUS => {
                // The field has 8 bits (§2.1).
                let status = DeviceStatus::from_bits_retain(value as u8);
                self.control.set_status(status);
                if status.is_empty() {
                    self.control.wait_for_reset();
                    self.device_features_sel = 0;
                    self.driver_features_sel = 0;
                    self.queue_sel = 0;
                }
            }
            mmio::SHM_SEL => {}
            _ => log::debug!("virtio-mmio: write of {value:#x} to register {offset:#x}"),
        }
    }
}

/// The saved state of a window.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MmioState {
    control: ControlState,
    interrupt_status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl Stateful for MmioTransport {
    fn begin_pause(&mut self) {
        self.control.begin_pause();
    }

    fn poll_paused(&mut self) -> bool {
        self.control.poll_paused()
    }

    fn resume(&mut self) {
        self.control.resume();
        // An edge before the restore is not known to have arrived.
        if self.signals.status.load(Ordering::Acquire) != 0 {
            self.signals.line.signal();
        }
    }

    fn save(&self) -> SavedState {
        let Self {
            control,
            signals,
            device_features_sel,
            driver_features_sel,
            queue_sel,
        } = self;
        let state = MmioState {
            control: control.save(),
            interrupt_status: signals.status.load(Ordering::Acquire),
            device_features_sel: *device_features_sel,
            driver_features_sel: *driver_features_sel,
            queue_sel: *queue_sel,
        };
        SavedState::new(KIND, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let MmioState {
            control,
            interrupt_status,
            device_features_sel,
            driver_features_sel,
            queue_sel,
        } = state.open(KIND, STATE_VERSION)?;
        let status = InterruptStatus::from_bits(interrupt_status)
            .ok_or_else(|| RestoreError::invalid(KIND, "unknown bits of the interrupt status"))?;
        // Kept first: restoring the device may raise more.
        self.signals.status.store(status.bits(), Ordering::Release);
        self.control.restore(&control)?;
        self.device_features_sel = device_features_sel;
        self.driver_features_sel = driver_features_sel;
        self.queue_sel = queue_sel;
        Ok(())
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(config) = offset.checked_sub(mmio::CONFIG as u64) {
            let Ok(config) = u32::try_from(config) else {
                return;
            };
            self.control.read_config(config, data);
            return;
        }
        // Registers are 32 bits wide (§4.2.2.2).
        match <&mut [u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => {
                *data = self.read_register(offset as usize).to_le_bytes();
            }
            _ => log::debug!("virtio-mmio: odd read at {offset:#x}"),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config) = offset.checked_sub(mmio::CONFIG as u64) {
            let Ok(config) = u32::try_from(config) else {
                return;
            };
            self.control.write_config(config, data);
            return;
        }
        match <[u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => {
                self.write_register(offset as usize, u32::from_le_bytes(data));
            }
            _ => log::debug!(
                "virtio-mmio: odd write of {} bytes at {offset:#x}",
                data.len()
            ),
        }
    }
}
