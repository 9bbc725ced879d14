//! The ports of old at which the drives' registers stand in compatibility
//! mode.
#![forbid(unsafe_code)]

use super::controller::{Ide, Which};
use crate::bus::BusDevice;
use crate::sync::lock;
use pvkit_protocol::emulated::ata::{PRIMARY, SECONDARY, register};
use std::sync::{Arc, Mutex};

/// The command block of a channel: 8 ports.
#[derive(Debug)]
pub struct CommandBlock {
    ide: Arc<Mutex<Ide>>,
    which: Which,
}

impl CommandBlock {
    /// The ports of `which` channel.
    #[must_use]
    pub fn new(ide: Arc<Mutex<Ide>>, which: Which) -> Self {
        Self { ide, which }
    }
}

impl BusDevice for CommandBlock {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        lock(&self.ide).channel(self.which).read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.ide).channel(self.which).write(offset, data);
    }

    fn read_string(&mut self, offset: u64, width: usize, data: &mut [u8]) {
        data.fill(0xff);
        let mut ide = lock(&self.ide);
        let channel = ide.channel(self.which);
        if offset == u64::from(register::DATA) {
            return channel.read_data(data);
        }
        for element in data.chunks_mut(width.max(1)) {
            channel.read(offset, element);
        }
    }

    fn write_string(&mut self, offset: u64, width: usize, data: &[u8]) {
        let mut ide = lock(&self.ide);
        let channel = ide.channel(self.which);
        if offset == u64::from(register::DATA) {
            return channel.write_data(data);
        }
        for element in data.chunks(width.max(1)) {
            channel.write(offset, element);
        }
    }
}

/// The control block of a channel: 1 port.
#[derive(Debug)]
pub struct ControlBlock {
    ide: Arc<Mutex<Ide>>,
    which: Which,
}

impl ControlBlock {
    /// The port of `which` channel.
    #[must_use]
    pub fn new(ide: Arc<Mutex<Ide>>, which: Which) -> Self {
        Self { ide, which }
    }
}

impl BusDevice for ControlBlock {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (0, [first, ..]) = (offset, data) {
            *first = lock(&self.ide).channel(self.which).alternate_status();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, [first, ..]) = (offset, data) {
            lock(&self.ide).channel(self.which).write_control(*first);
        }
    }
}

/// Ports, and the device behind them.
#[derive(Debug)]
pub struct LegacyPorts {
    /// First port.
    pub base: u16,
    /// Number of ports.
    pub count: u16,
    /// What answers there.
    pub device: Box<dyn BusDevice>,
}

/// All that a port bus needs for compatibility mode: two blocks for each
/// channel.
#[must_use]
pub fn legacy_ports(ide: &Arc<Mutex<Ide>>) -> Vec<LegacyPorts> {
    [(PRIMARY, Which::Primary), (SECONDARY, Which::Secondary)]
        .into_iter()
        .flat_map(|(ports, which)| {
            [
                LegacyPorts {
                    base: ports.command,
                    count: register::COUNT,
                    device: Box::new(CommandBlock::new(ide.clone(), which)),
                },
                LegacyPorts {
                    base: ports.control,
                    count: 1,
                    device: Box::new(ControlBlock::new(ide.clone(), which)),
                },
            ]
        })
        .collect()
}
