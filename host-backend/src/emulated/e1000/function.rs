//! The PCI function: configuration space, and accesses to registers through
//! memory and through ports.
#![forbid(unsafe_code)]

use super::interrupt::{Clock, HostClock, Interrupts};
use super::registers::Registers;
use super::settings::Settings;
use super::shared::{Events, Shared};
use super::worker::E1000Worker;
use super::{E1000Counters, E1000Error, E1000Options};
use crate::event::EventFd;
use crate::link::{Link, LinkLane};
use crate::memory::GuestMemory;
use crate::pci::{Bar, ConfigError, ConfigSpace, FunctionId, PciFunction};
use pvkit_protocol::emulated::e1000::{pci as ids, ports};
use pvkit_protocol::frame::Offloads;
use pvkit_protocol::pci::{Command, class, header};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// An 82540EM.
#[derive(Debug)]
pub struct E1000 {
    config: ConfigSpace,
    registers: Registers,
    /// The register that the data port means.
    io_address: u32,
    shared: Arc<Shared>,
    /// Until the worker takes it.
    lane: Option<Box<dyn LinkLane>>,
}

impl E1000 {
    /// A card that is plugged into `link`, whose first lane it opens. It does
    /// nothing until the guest lets it use memory, and its
    /// [worker](Self::worker) is polled.
    ///
    /// # Errors
    /// [`E1000Error`] says what the link or the host refuses.
    pub fn new(
        memory: GuestMemory,
        link: Arc<dyn Link>,
        options: &E1000Options,
    ) -> Result<Self, E1000Error> {
        Self::with_clock(memory, link, options, Arc::new(HostClock))
    }

    pub(super) fn with_clock(
        memory: GuestMemory,
        link: Arc<dyn Link>,
        options: &E1000Options,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, E1000Error> {
        if !options.mac.is_unicast() {
            return Err(E1000Error::Address(options.mac));
        }
        let config = Self::config_space()?;
        let counters = Arc::new(E1000Counters::default());
        let interrupts = Interrupts::new(config.intx(), clock, counters.clone());
        let lane = link.lane(0)?;
        link.use_lanes(1)?;
        link.set_receive(Offloads::CHECKSUM)?;
        let shared = Shared::new(
            memory,
            link.clone(),
            lane.counters(),
            interrupts,
            counters,
            Settings::new(options.mac),
            EventFd::new().map_err(E1000Error::Event)?,
        );
        link.connect(Arc::new(Events(Arc::downgrade(&shared))));
        // It may have changed since it was asked, and before it could tell.
        shared.link_changed.store(true, Ordering::Release);
        Ok(Self {
            config,
            registers: Registers::new(shared.clone(), options.mac),
            io_address: 0,
            shared,
            lane: Some(lane),
        })
    }

    fn config_space() -> Result<ConfigSpace, ConfigError> {
        let mut config = ConfigSpace::new(FunctionId {
            vendor: ids::VENDOR,
            device: ids::DEVICE,
            revision: ids::REVISION,
            class: class::ETHERNET,
            prog_if: 0,
        });
        config.set(
            header::SUBSYSTEM_VENDOR,
            &ids::SUBSYSTEM_VENDOR.to_le_bytes(),
        );
        config.set(header::SUBSYSTEM, &ids::SUBSYSTEM.to_le_bytes());
        config.add_bar(
            ids::MEMORY_BAR,
            Bar::Memory {
                size: ids::MEMORY_BYTES,
                prefetchable: false,
            },
        )?;
        config.add_bar(ids::PORT_BAR, Bar::Port { size: ids::PORTS })?;
        config.set_interrupt_pin(1);
        Ok(config)
    }

    /// The worker that sends and receives. There is one: `None` if it was
    /// taken before.
    pub fn worker(&mut self) -> Option<E1000Worker> {
        let lane = self.lane.take()?;
        Some(E1000Worker::new(self.shared.clone(), lane))
    }

    /// What the device has done.
    #[must_use]
    pub fn counters(&self) -> Arc<E1000Counters> {
        self.shared.counters.clone()
    }

    /// [`Shared::wake_late`].
    #[cfg(test)]
    pub(super) fn wake_late(&self, meanwhile: impl FnOnce()) {
        self.shared.wake_late(meanwhile);
    }

    /// The register at `offset`, if it begins there.
    fn register(offset: u64) -> Option<u32> {
        let offset = u32::try_from(offset).ok()?;
        (offset < ids::MEMORY_BYTES && offset.is_multiple_of(4)).then_some(offset)
    }

    fn read_ports(&mut self, offset: u64) -> Option<u32> {
        match u16::try_from(offset).ok()? {
            ports::IOADDR => Some(self.io_address),
            ports::IODATA => {
                let register = Self::register(u64::from(self.io_address))?;
                Some(self.registers.read(register))
            }
            _ => None,
        }
    }

    fn write_ports(&mut self, offset: u64, value: u32) {
        match u16::try_from(offset) {
            Ok(ports::IOADDR) => self.io_address = value,
            Ok(ports::IODATA) => {
                if let Some(register) = Self::register(u64::from(self.io_address)) {
                    self.registers.write(register, value);
                }
            }
            _ => {}
        }
    }
}

impl PciFunction for E1000 {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config.write(offset, data);
        let may_master = self.config.command().contains(Command::BUS_MASTER);
        self.registers.set_master(may_master);
    }

    /// Registers have 32 bits, and are read as such: an access of another
    /// width reads each that it touches from its start.
    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let inside = (at % 4) as usize;
            let start = at - at % 4;
            let value = match bar {
                ids::MEMORY_BAR => {
                    Self::register(start).map(|register| self.registers.read(register))
                }
                _ => self.read_ports(start),
            };
            let bytes = value.unwrap_or(u32::MAX).to_le_bytes();
            let count = rest.len().min(4 - inside);
            let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
            for (to, from) in now.iter_mut().zip(bytes.iter().skip(inside)) {
                *to = *from;
            }
            rest = later;
            at = at.wrapping_add(count as u64);
        }
    }

    /// Only whole registers can be written (SDM §13.2.1).
    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) {
            return;
        }
        let (words, _) = data.as_chunks::<4>();
        let mut next = offset;
        for word in words {
            let at = next;
            next = at.wrapping_add(4);
            let value = u32::from_le_bytes(*word);
            match bar {
                ids::MEMORY_BAR => {
                    if let Some(register) = Self::register(at) {
                        self.registers.write(register, value);
                    }
                }
                _ => self.write_ports(at, value),
            }
        }
    }
}
