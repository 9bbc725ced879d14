//! Which device answers a port or an address.
#![forbid(unsafe_code)]

use super::lock;
use crate::bus::BusDevice;
use std::sync::{Arc, Mutex};

/// A port space or an address space.
#[derive(Debug)]
pub(super) struct Bus {
    name: &'static str,
    ranges: Vec<Range>,
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
    pub(super) fn new(name: &'static str) -> Self {
        Self {
            name,
            ranges: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, base: u64, count: u64, device: Arc<Mutex<dyn BusDevice>>) {
        self.ranges.push(Range {
            base,
            count,
            device,
        });
    }

    /// Performs an access. What nobody answers reads as all ones.
    pub(super) fn access(&self, at: u64, width: usize, access: Access<'_>) {
        let found = self.ranges.iter().find_map(|range| {
            let offset = at.wrapping_sub(range.base);
            (offset < range.count).then_some((offset, &range.device))
        });
        let Some((offset, device)) = found else {
            match access {
                Access::Read(data) => {
                    log::trace!("nobody answers a read of {} {at:#x}", self.name);
                    data.fill(0xff);
                }
                Access::Write(_) => log::trace!("nobody takes a write of {} {at:#x}", self.name),
            }
            return;
        };
        let mut device = lock(device);
        match access {
            Access::Read(data) if data.len() == width => device.read(offset, data),
            Access::Read(data) => device.read_string(offset, width, data),
            Access::Write(data) if data.len() == width => device.write(offset, data),
            Access::Write(data) => device.write_string(offset, width, data),
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
        let mut bus = Bus::new("port");
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
