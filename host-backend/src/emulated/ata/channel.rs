//! One of the two channels: a drive, a bus master, and an interrupt.
#![forbid(unsafe_code)]

use super::AtaCounters;
use super::bus_master::{BusMaster, Table};
use super::device::Device;
use crate::memory::{GuestMemory, Snapshot};
use crate::worker::Signal;
use pvkit_protocol::emulated::ata::register;
use std::sync::Arc;

/// A channel.
#[derive(Debug)]
pub(super) struct Channel {
    /// Drive 0, if there is one. Without, the ports float.
    device: Option<Device>,
    bus_master: BusMaster,
    signal: Arc<dyn Signal>,
    memory: GuestMemory,
    snapshot: Arc<Snapshot>,
    counters: Arc<AtaCounters>,
    /// The controller answers for the ports of the drives.
    pub(super) decodes: bool,
    /// The controller may read and write memory.
    pub(super) may_master: bool,
}

impl Channel {
    pub(super) fn new(
        device: Option<Device>,
        memory: GuestMemory,
        signal: Arc<dyn Signal>,
    ) -> Self {
        Self {
            counters: device
                .as_ref()
                .map(|device| device.counters.clone())
                .unwrap_or_default(),
            device,
            bus_master: BusMaster::default(),
            signal,
            snapshot: memory.snapshot(),
            memory,
            decodes: false,
            may_master: false,
        }
    }

    pub(super) fn counters(&self) -> Arc<AtaCounters> {
        self.counters.clone()
    }

    /// The drive, if its ports answer.
    fn selected(&mut self) -> Option<&mut Device> {
        self.device.as_mut().filter(|_| self.decodes)
    }

    /// A read in the command block; `data` holds all ones.
    pub(super) fn read(&mut self, offset: u64, data: &mut [u8]) {
        let Some(device) = self.selected() else {
            return;
        };
        if offset == u64::from(register::DATA) {
            return self.read_data(data);
        }
        // An access that is wider than the registers is one to each of them.
        for (byte, offset) in data.iter_mut().zip(offset..u64::from(register::COUNT)) {
            *byte = device.read_register(offset as u16);
        }
        self.settle();
    }

    /// A write in the command block.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == u64::from(register::DATA) {
            return self.write_data(data);
        }
        let Some(device) = self.selected() else {
            return;
        };
        for (byte, offset) in data.iter().zip(offset..u64::from(register::COUNT)) {
            device.write_register(offset as u16, *byte);
        }
        self.settle();
    }

    /// Reads of the data register; `data` holds all ones.
    pub(super) fn read_data(&mut self, data: &mut [u8]) {
        if let Some(device) = self.selected() {
            device.read_data(data);
            self.settle();
        }
    }

    /// Writes of the data register.
    pub(super) fn write_data(&mut self, data: &[u8]) {
        if let Some(device) = self.selected() {
            device.write_data(data);
            self.settle();
        }
    }

    /// A read of the alternate status register.
    pub(super) fn alternate_status(&mut self) -> u8 {
        self.selected()
            .map_or(0xff, |device| device.alternate_status())
    }

    /// A write of the device control register.
    pub(super) fn write_control(&mut self, value: u8) {
        if let Some(device) = self.selected() {
            device.write_control(value);
            self.settle();
        }
    }

    /// A read of the bus-master register at `offset`, from 0 to 7.
    pub(super) fn read_bus_master(&self, offset: u16) -> u8 {
        self.bus_master.read(offset)
    }

    /// A write of the bus-master register at `offset`, from 0 to 7.
    pub(super) fn write_bus_master(&mut self, offset: u16, value: u8) {
        self.bus_master.write(offset, value);
        self.settle();
    }

    /// Takes back what the disk has done.
    pub(super) fn reap(&mut self) -> bool {
        let worked = self.device.as_mut().is_some_and(Device::reap);
        if worked {
            self.settle();
        }
        worked
    }

    /// Whether the disk has a request, or had no room for it.
    pub(super) fn waits_for_disk(&self) -> bool {
        self.device.as_ref().is_some_and(Device::waits_for_disk)
    }

    /// Whether the disk had no room for a request.
    pub(super) fn is_stalled(&self) -> bool {
        self.device.as_ref().is_some_and(Device::is_stalled)
    }

    pub(super) fn device(&self) -> Option<&Device> {
        self.device.as_ref()
    }

    /// What follows from an access, in every case: a transfer for which
    /// command and bus master are ready begins, one that is over shows in the
    /// bus master, and an interrupt that has risen is sent.
    fn settle(&mut self) {
        let Some(device) = &mut self.device else {
            return;
        };
        if self.bus_master.is_active()
            && let Some((bytes, write)) = device.wants_dma()
        {
            if self.snapshot.epoch() != self.memory.epoch() {
                self.snapshot = self.memory.snapshot();
            }
            let table = if self.may_master && write == self.bus_master.is_writing() {
                self.bus_master
                    .gather(&self.snapshot, bytes, &mut device.bufs)
                    .inspect_err(|error| log::debug!("ata: table of regions: {error}"))
                    .ok()
            } else {
                None
            };
            match table {
                Some(Table::Enough { exhausted }) => {
                    self.bus_master.begin(exhausted);
                    device.start_dma();
                }
                Some(Table::Short) => self.bus_master.run_out(),
                None => {
                    self.bus_master.fail();
                    device.fail_dma();
                }
            }
        }
        if self.bus_master.is_running() && !device.is_doing_dma() {
            self.bus_master.end(!device.has_failed());
        }
        if device.interrupts() {
            self.bus_master.interrupt();
            self.counters.interrupts.add(1);
            self.signal.signal();
        }
    }
}
