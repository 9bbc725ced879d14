//! Which device answers a port or an address.
#![forbid(unsafe_code)]

use crate::bus::BusDevice;
use crate::pci::PciRoot;
use crate::sync::lock;
use std::sync::{Arc, Mutex};

/// Which of the two spaces a bus is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Space {
    Port,
    Memory,
}

/// A port space or an address space: devices at fixed places first, then
/// whatever the base address registers of PCI functions decode.
#[derive(Debug)]
pub(super) struct Bus {
    space: Space,
    ranges: Vec<Range>,
    pci: Option<Arc<PciRoot>>,
}

#[derive(Debug)]
struct Range {
    base: u64,
    count: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// An access as the guest made it: `data` is one or more elements of `width`
/// bytes, all to the same place.
pub(super) enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Bus {
    pub(super) fn new(space: Space) -> Self {
        Self {
            space,
            ranges: Vec::new(),
            pci: None,
        }
    }

    pub(super) fn add(&mut self, base: u64, count: u64, device: Arc<Mutex<dyn BusDevice>>) {
        self.ranges.push(Range {
            base,
            count,
            device,
        });
    }

    pub(super) fn set_pci(&mut self, root: Arc<PciRoot>) {
        self.pci = Some(root);
    }

    /// Performs an access. What nobody answers reads as all ones.
    pub(super) fn access(&self, at: u64, width: usize, access: Access<'_>) {
        let found = self.ranges.iter().find_map(|range| {
            let offset = at.wrapping_sub(range.base);
            (offset < range.count).then_some((offset, &range.device))
        });
        let Some((offset, device)) = found else {
            return self.access_pci(at, width, access);
        };
        let mut device = lock(device);
        match access {
            Access::Read(data) if data.len() == width => device.read(offset, data),
            Access::Read(data) => device.read_string(offset, width, data),
            Access::Write(data) if data.len() == width => device.write(offset, data),
            Access::Write(data) => device.write_string(offset, width, data),
        }
    }

    fn access_pci(&self, at: u64, width: usize, access: Access<'_>) {
        // Ports have 16 bits.
        let port = at as u16;
        let taken = match (&self.pci, self.space, access) {
            (Some(root), Space::Port, Access::Read(data)) if data.len() == width => {
                data.fill(0xff);
                root.io_read(port, data)
            }
            (Some(root), Space::Port, Access::Read(data)) => {
                data.fill(0xff);
                root.io_read_string(port, width, data)
            }
            (Some(root), Space::Port, Access::Write(data)) if data.len() == width => {
                root.io_write(port, data)
            }
            (Some(root), Space::Port, Access::Write(data)) => {
                root.io_write_string(port, width, data)
            }
            (Some(root), Space::Memory, Access::Read(data)) => {
                data.fill(0xff);
                root.mmio_read(at, data)
            }
            (Some(root), Space::Memory, Access::Write(data)) => root.mmio_write(at, data),
            (None, _, Access::Read(data)) => {
                data.fill(0xff);
                false
            }
            (None, _, Access::Write(_)) => false,
        };
        if !taken {
            log::trace!("nobody answers at {:?} {at:#x}", self.space);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            self.0.push((offset, vec![]));
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_find_their_device_and_strings_their_elements() {
        let one = Arc::new(Mutex::new(Recorder::default()));
        let two = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = Bus::new(Space::Port);
        bus.add(0x10, 4, one.clone());
        bus.add(0x12, 8, two.clone());
        let mut data = [0; 4];
        bus.access(0x13, 1, Access::Read(&mut data[..1]));
        assert_eq!(data, [3, 0, 0, 0], "the first that was added");
        bus.access(0x14, 2, Access::Read(&mut data));
        assert_eq!(data, [2; 4]);
        bus.access(0x19, 2, Access::Write(&[1, 2, 3, 4]));
        for nobody in [0xf, 0x1a, 0, u64::MAX] {
            bus.access(nobody, 1, Access::Write(&[9]));
            bus.access(nobody, 4, Access::Read(&mut data));
            assert_eq!(data, [0xff; 4]);
        }
        assert_eq!(lock(&one).0, [(3, vec![])]);
        assert_eq!(
            lock(&two).0,
            [(2, vec![]), (2, vec![]), (7, vec![1, 2]), (7, vec![3, 4])],
            "two elements each"
        );
    }
}
