//! The common configuration (virtio 1.3 §4.1.4.3).
#![forbid(unsafe_code)]

use super::PciTransport;
use crate::virtio::transport::control::QueueRegister;
use pvkit_protocol::virtio::DeviceStatus;
use pvkit_protocol::virtio::pci::common;

/// The three addresses of a queue: their low halves, and the high ones.
const ADDRESSES: [(usize, QueueRegister, QueueRegister); 3] = [
    (
        common::QUEUE_DESC,
        QueueRegister::Descriptors { high: false },
        QueueRegister::Descriptors { high: true },
    ),
    (
        common::QUEUE_DRIVER,
        QueueRegister::Driver { high: false },
        QueueRegister::Driver { high: true },
    ),
    (
        common::QUEUE_DEVICE,
        QueueRegister::Device { high: false },
        QueueRegister::Device { high: true },
    ),
];

/// Two fields of 16 bits that lie in one word.
fn pair(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

impl PciTransport {
    /// A read of any width: the bytes of the fields that lie there. Beyond
    /// them there are zeros.
    pub(super) fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            // `offset` is below a page.
            let at = offset as usize + index;
            let word = self.word(at & !3).to_le_bytes();
            *byte = word.get(at & 3).copied().unwrap_or(0);
        }
    }

    /// The 32 bits at `offset`, a multiple of 4.
    fn word(&mut self, offset: usize) -> u32 {
        let select = self.queue_select;
        let queue = u32::from(select);
        let exists = select < self.control.queues();
        for (place, low, high) in ADDRESSES {
            if offset == place {
                return self.control.queue(queue, low);
            }
            if offset == place + 4 {
                return self.control.queue(queue, high);
            }
        }
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select,
            common::DEVICE_FEATURE => {
                let features = self.control.identity().features;
                features.window(self.device_feature_select)
            }
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select,
            common::DRIVER_FEATURE => {
                let features = self.control.driver_features();
                features.window(self.driver_feature_select)
            }
            common::CONFIG_MSIX_VECTOR => {
                let vector = self.signals.lock().config_vector();
                pair(vector, self.control.queues())
            }
            common::DEVICE_STATUS => {
                let status = self.control.status().bits();
                let generation = self.control.config_generation() as u8;
                pair(u16::from_le_bytes([status, generation]), select)
            }
            common::QUEUE_SIZE => {
                let vector = self.signals.lock().queue_vector(select);
                pair(self.queue_size(), vector)
            }
            common::QUEUE_ENABLE => {
                let enabled = u16::from(self.control.queue_ready(queue));
                // The unit is one doorbell.
                pair(enabled, if exists { select } else { 0 })
            }
            // NOTIF_CONFIG_DATA is not offered.
            common::QUEUE_NOTIF_CONFIG_DATA => {
                pair(0, u16::from(self.control.queue_resetting(queue)))
            }
            _ => 0,
        }
    }

    /// The size of the selected queue: what the driver chose, or else the
    /// largest one.
    fn queue_size(&self) -> u16 {
        let queue = u32::from(self.queue_select);
        let size = match self.control.queue(queue, QueueRegister::Size) {
            0 => self.control.queue_size_max(queue),
            size => size,
        };
        // The driver writes 16 bits, and devices have no more.
        size as u16
    }

    /// A write. A field takes accesses of its own width, and one of 64 bits
    /// also halves (§4.1.3.1); others are ignored.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        let queue = u32::from(self.queue_select);
        match *data {
            [a] if at == common::DEVICE_STATUS => {
                self.write_status(DeviceStatus::from_bits_retain(a));
            }
            [a, b] => self.write_u16(at, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_u32(at, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                let found = ADDRESSES.iter().find(|(place, ..)| *place == at);
                if let Some((_, low, high)) = found {
                    let (first, second) = ([a, b, c, d], [e, f, g, h]);
                    let (first, second) = (u32::from_le_bytes(first), u32::from_le_bytes(second));
                    self.control.set_queue(queue, *low, first);
                    self.control.set_queue(queue, *high, second);
                }
            }
            _ => log::debug!("virtio-pci: odd write of {} bytes at {at:#x}", data.len()),
        }
    }

    fn write_status(&mut self, status: DeviceStatus) {
        self.control.set_status(status);
        if status.is_empty() {
            self.device_feature_select = 0;
            self.driver_feature_select = 0;
            self.queue_select = 0;
        }
    }

    fn write_u16(&mut self, at: usize, value: u16) {
        let select = self.queue_select;
        let queue = u32::from(select);
        match at {
            common::CONFIG_MSIX_VECTOR => self.signals.lock().set_config_vector(value),
            common::QUEUE_SELECT => self.queue_select = value,
            common::QUEUE_SIZE => {
                let size = u32::from(value);
                self.control.set_queue(queue, QueueRegister::Size, size);
            }
            common::QUEUE_MSIX_VECTOR => self.signals.lock().set_queue_vector(select, value),
            // Only a reset disables a queue (§4.1.4.3.2).
            common::QUEUE_ENABLE if value == 1 => {
                let size = u32::from(self.queue_size());
                self.control.set_queue(queue, QueueRegister::Size, size);
                self.control.set_queue_ready(queue, true);
            }
            common::QUEUE_RESET if value == 1 => self.control.reset_queue(queue),
            _ => log::debug!("virtio-pci: write of {value:#x} to {at:#x}"),
        }
    }

    fn write_u32(&mut self, at: usize, value: u32) {
        let queue = u32::from(self.queue_select);
        for (place, low, high) in ADDRESSES {
            if at == place {
                return self.control.set_queue(queue, low, value);
            }
            if at == place + 4 {
                return self.control.set_queue(queue, high, value);
            }
        }
        match at {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE => {
                let features = self.control.driver_features();
                let features = features.with_window(self.driver_feature_select, value);
                self.control.set_driver_features(features);
            }
            _ => log::debug!("virtio-pci: write of {value:#x} to {at:#x}"),
        }
    }
}
