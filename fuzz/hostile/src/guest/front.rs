//! The registers that a hostile guest writes, whatever the transport: a function
//! of PCI looks like virtio-mmio to it, so that one script plays on both.
#![forbid(unsafe_code)]

use pvkit_host::bus::BusDevice;
use pvkit_host::executor::Executor;
use pvkit_host::memory::GuestMemory;
use pvkit_host::pci::PciFunction;
use pvkit_host::virtio::device::Device;
use pvkit_host::virtio::transport::{MmioTransport, PciOptions, PciTransport};
use pvkit_host::worker::SignalCounter;
use pvkit_join::pci::{Interrupts, MESSAGE_ADDRESS};
use pvkit_join::wire::Window;
use pvkit_protocol::pci::{capability, msix};
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::pci::common;
use pvkit_protocol::virtio::{Features, device_id};
use std::sync::Arc;

/// What a hostile guest has in front of it.
pub trait Front: Window {
    /// The features that the device has been told.
    fn driver_features(&self) -> Features;
}

impl Front for MmioTransport {
    fn driver_features(&self) -> Features {
        self.driver_features()
    }
}

impl BusDevice for Box<dyn Front> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        (**self).read(offset, data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        (**self).write(offset, data);
    }
}

impl Window for Box<dyn Front> {}

const DEVICE: u64 = 0x2000;
const DOORBELL: u64 = 0x3000;
const ISR: u64 = 0x1000;

/// A function of PCI behind the registers of virtio-mmio. All events have
/// vector 0.
#[derive(Debug)]
pub(super) struct PciFront {
    function: PciTransport,
    interrupts: Arc<Interrupts>,
    /// Bits of the interrupt status that are not acknowledged.
    causes: InterruptStatus,
    seen: u64,
}

impl PciFront {
    pub(super) fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        executor: Box<dyn Executor>,
    ) -> Self {
        let interrupts = Arc::new(Interrupts::default());
        let options = PciOptions::default().with_vectors(1);
        let function = PciTransport::new(device, memory, executor, interrupts.clone(), options);
        let mut function = function.expect("a function");
        // The capability of MSI-X is the last one.
        let config = function.config();
        let at = (0x40..=0xf0u8).step_by(4);
        let mut at = at.filter(|at| config.u8_at(*at) == capability::MSIX);
        let control = at.next_back().expect("MSI-X") + msix::CONTROL;
        function.write_config(control, &msix::Control::ENABLE.bits().to_le_bytes());
        function.write_bar(2, 0, &MESSAGE_ADDRESS.to_le_bytes());
        function.write_bar(2, 8, &[0; 8]);
        Self {
            function,
            interrupts,
            causes: InterruptStatus::empty(),
            seen: 0,
        }
    }

    pub(super) fn interrupts(&self) -> Arc<SignalCounter> {
        self.interrupts.all.clone()
    }

    fn get<const N: usize>(&mut self, field: usize) -> u32 {
        let mut data = [0; 4];
        let (part, _) = data.split_at_mut(N);
        self.function.read_bar(0, field as u64, part);
        u32::from_le_bytes(data)
    }

    fn set<const N: usize>(&mut self, field: usize, value: u32) {
        let data = value.to_le_bytes();
        let (part, _) = data.split_at(N);
        self.function.write_bar(0, field as u64, part);
    }

    /// A value for a field of 16 bits; what does not fit is none that is
    /// possible.
    fn narrow(value: u32) -> u32 {
        value.min(0xffff)
    }

    /// Why the device interrupted, as virtio-mmio would say it.
    fn causes(&mut self) -> InterruptStatus {
        let mut isr = [0];
        self.function.read_bar(0, ISR, &mut isr);
        self.causes |= InterruptStatus::from_bits_truncate(u32::from(isr[0]));
        let count = self.interrupts.all.count();
        if std::mem::replace(&mut self.seen, count) != count
            && !self.causes.contains(InterruptStatus::CONFIG_CHANGE)
        {
            self.causes |= InterruptStatus::USED_BUFFER;
        }
        self.causes
    }

    fn read_register(&mut self, offset: usize) -> u32 {
        match offset {
            mmio::MAGIC_VALUE => mmio::MAGIC,
            mmio::VERSION => mmio::CURRENT_VERSION,
            mmio::DEVICE_ID => device_id::BLOCK,
            mmio::DEVICE_FEATURES => self.get::<4>(common::DEVICE_FEATURE),
            mmio::QUEUE_SIZE_MAX => self.get::<2>(common::QUEUE_SIZE),
            mmio::QUEUE_READY => self.get::<2>(common::QUEUE_ENABLE),
            mmio::QUEUE_RESET => self.get::<2>(common::QUEUE_RESET),
            mmio::INTERRUPT_STATUS => self.causes().bits(),
            mmio::STATUS => {
                let status = self.get::<1>(common::DEVICE_STATUS);
                if status == 0 {
                    self.causes();
                    self.causes = InterruptStatus::empty();
                }
                status
            }
            mmio::CONFIG_GENERATION => self.get::<1>(common::CONFIG_GENERATION),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: usize, value: u32) {
        match offset {
            mmio::DEVICE_FEATURES_SEL => self.set::<4>(common::DEVICE_FEATURE_SELECT, value),
            mmio::DRIVER_FEATURES_SEL => self.set::<4>(common::DRIVER_FEATURE_SELECT, value),
            mmio::DRIVER_FEATURES => self.set::<4>(common::DRIVER_FEATURE, value),
            mmio::QUEUE_SEL => self.set::<2>(common::QUEUE_SELECT, Self::narrow(value)),
            mmio::QUEUE_SIZE => self.set::<2>(common::QUEUE_SIZE, Self::narrow(value)),
            mmio::QUEUE_DESC_LOW => self.set::<4>(common::QUEUE_DESC, value),
            mmio::QUEUE_DESC_HIGH => self.set::<4>(common::QUEUE_DESC + 4, value),
            mmio::QUEUE_DRIVER_LOW => self.set::<4>(common::QUEUE_DRIVER, value),
            mmio::QUEUE_DRIVER_HIGH => self.set::<4>(common::QUEUE_DRIVER + 4, value),
            mmio::QUEUE_DEVICE_LOW => self.set::<4>(common::QUEUE_DEVICE, value),
            mmio::QUEUE_DEVICE_HIGH => self.set::<4>(common::QUEUE_DEVICE + 4, value),
            mmio::QUEUE_READY => {
                self.set::<2>(common::QUEUE_MSIX_VECTOR, 0);
                self.set::<2>(common::QUEUE_ENABLE, Self::narrow(value));
            }
            mmio::QUEUE_RESET => self.set::<2>(common::QUEUE_RESET, Self::narrow(value)),
            mmio::QUEUE_NOTIFY => {
                let place = DOORBELL + 4 * u64::from(value);
                self.function.write_bar(0, place, &value.to_le_bytes());
            }
            mmio::INTERRUPT_ACK => {
                self.causes();
                self.causes.remove(InterruptStatus::from_bits_retain(value));
            }
            mmio::STATUS => {
                self.set::<1>(common::DEVICE_STATUS, value);
                self.set::<2>(common::CONFIG_MSIX_VECTOR, 0);
            }
            _ => {}
        }
    }
}

impl BusDevice for PciFront {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(config) = offset.checked_sub(mmio::CONFIG as u64) {
            self.function
                .read_bar(0, DEVICE.saturating_add(config), data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset as usize).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config) = offset.checked_sub(mmio::CONFIG as u64) {
            self.function
                .write_bar(0, DEVICE.saturating_add(config), data);
        } else if let Ok(data) = data.try_into() {
            self.write_register(offset as usize, u32::from_le_bytes(data));
        }
    }
}

impl Window for PciFront {}

impl Front for PciFront {
    fn driver_features(&self) -> Features {
        self.function.driver_features()
    }
}
