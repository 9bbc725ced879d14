//! The PCI function: configuration space, and bus-master registers in BAR 4.
#![forbid(unsafe_code)]

use super::AtaCounters;
use super::channel::Channel;
use super::device::Device;
use super::drive::DriveOptions;
use super::transfer::{Buffer, BufferError};
use crate::disk::{DiskError, SECTOR_BYTES};
use crate::event::EventFd;
use crate::memory::GuestMemory;
use crate::pci::{Bar, ConfigError, ConfigSpace, FunctionId, PciFunction};
use crate::worker::{Interest, Signal};
use pvkit_protocol::emulated::ata::{bus_master, piix3};
use pvkit_protocol::pci::{Bdf, Command, class};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use thiserror::Error;

/// One of the two channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Ports 0x1f0 and 0x3f6, interrupt line 14.
    Primary,
    /// Ports 0x170 and 0x376, interrupt line 15.
    Secondary,
}

/// A controller that cannot be.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum IdeError {
    /// The disk's blocks are not of 512 bytes, as those of the drives are.
    #[error("the disk has blocks of {0} bytes: a drive here has sectors of 512")]
    BlockBytes(u32),
    /// The disk refuses.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The host has no more memory for buffers.
    #[error("no memory for a drive's buffer: {0}")]
    Buffer(#[source] io::Error),
    /// The host has no more file descriptors.
    #[error("no event counter: {0}")]
    Event(#[source] io::Error),
    /// The configuration space cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl From<BufferError> for IdeError {
    fn from(error: BufferError) -> Self {
        Self::Buffer(io::Error::other(error))
    }
}

/// A PIIX3 IDE controller.
#[derive(Debug)]
pub struct Ide {
    config: ConfigSpace,
    primary: Channel,
    secondary: Channel,
    /// Wakes the worker for what no source of a disk tells.
    kick: Arc<EventFd>,
}

impl Ide {
    /// Where the function stands, beside the ISA bridge.
    pub const PLACE: Bdf = Bdf::new(1, 1);

    /// A controller with a drive on each channel for which there is one. The
    /// interrupts are edges: one signal each time a drive's INTRQ rises.
    ///
    /// It starts as firmware would leave it: port decoding is on, for each
    /// channel with a drive. BAR 4 is not assigned.
    ///
    /// # Errors
    /// [`IdeError`] says what is wrong with a disk, or what the host lacks.
    pub fn new(
        memory: GuestMemory,
        drives: [Option<DriveOptions>; 2],
        interrupts: [Arc<dyn Signal>; 2],
    ) -> Result<Arc<Mutex<Self>>, IdeError> {
        let kick = Arc::new(EventFd::new().map_err(IdeError::Event)?);
        let device = |options: &DriveOptions| {
            let block_bytes = options.disk.shape().block_bytes;
            if u64::from(block_bytes) != SECTOR_BYTES {
                return Err(IdeError::BlockBytes(block_bytes));
            }
            Ok(Device::new(options, Buffer::new()?, kick.clone())?)
        };
        let [first, second] = drives;
        let (first, second) = (
            first.as_ref().map(device).transpose()?,
            second.as_ref().map(device).transpose()?,
        );
        let [irq14, irq15] = interrupts;
        let mut ide = Self {
            config: Self::config_space([first.is_some(), second.is_some()])?,
            primary: Channel::new(first, memory.clone(), irq14),
            secondary: Channel::new(second, memory, irq15),
            kick,
        };
        ide.follow_config();
        Ok(Arc::new(Mutex::new(ide)))
    }

    fn config_space(has_drive: [bool; 2]) -> Result<ConfigSpace, ConfigError> {
        let mut config = ConfigSpace::new(FunctionId {
            vendor: piix3::VENDOR,
            device: piix3::DEVICE,
            revision: 0,
            class: class::IDE,
            prog_if: piix3::PROG_IF,
        });
        config.add_bar(
            piix3::BUS_MASTER_BAR,
            Bar::Port {
                size: bus_master::PORTS,
            },
        )?;
        let timing = [piix3::IDETIM_PRIMARY, piix3::IDETIM_SECONDARY];
        for (offset, has_drive) in timing.into_iter().zip(has_drive) {
            if has_drive {
                config.set(offset, &piix3::IDETIM_DECODE_ENABLE.to_le_bytes());
            }
            config.allow(offset, &[0xff; 2]);
        }
        config.allow(piix3::SIDETIM, &[0xff]);
        config.set_command(Command::IO);
        Ok(config)
    }

    /// Tells the channels what the configuration space says about them.
    fn follow_config(&mut self) {
        let command = self.config.command();
        for (channel, timing) in [
            (&mut self.primary, piix3::IDETIM_PRIMARY),
            (&mut self.secondary, piix3::IDETIM_SECONDARY),
        ] {
            let enabled = self.config.u16_at(timing) & piix3::IDETIM_DECODE_ENABLE != 0;
            channel.decodes = enabled && command.contains(Command::IO);
            channel.may_master = command.contains(Command::BUS_MASTER);
        }
    }

    /// What a channel has done.
    #[must_use]
    pub fn counters(&self, which: Which) -> Arc<AtaCounters> {
        match which {
            Which::Primary => self.primary.counters(),
            Which::Secondary => self.secondary.counters(),
        }
    }

    pub(super) fn channel(&mut self, which: Which) -> &mut Channel {
        match which {
            Which::Primary => &mut self.primary,
            Which::Secondary => &mut self.secondary,
        }
    }

    /// Takes back what the disks have done.
    pub(super) fn reap(&mut self) -> bool {
        let primary = self.primary.reap();
        self.secondary.reap() | primary
    }

    /// Whether a disk has a request, or had no room for one.
    pub(super) fn waits_for_disk(&self) -> bool {
        self.primary.waits_for_disk() || self.secondary.waits_for_disk()
    }

    /// Whether a disk had no room for a request.
    pub(super) fn is_stalled(&self) -> bool {
        self.primary.is_stalled() || self.secondary.is_stalled()
    }

    pub(super) fn kick(&self) -> Arc<EventFd> {
        self.kick.clone()
    }

    /// What becomes ready when a disk has done something.
    pub(super) fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        for channel in [&self.primary, &self.secondary] {
            if let Some(device) = channel.device() {
                device.lane.sources(each);
            }
        }
    }

    /// The channel and the register that an offset in BAR 4 means.
    fn bus_master(&mut self, offset: u64) -> Option<(&mut Channel, u16)> {
        let offset = u16::try_from(offset).ok()?;
        let register = offset % bus_master::CHANNEL_PORTS;
        match offset / bus_master::CHANNEL_PORTS {
            0 => Some((&mut self.primary, register)),
            1 => Some((&mut self.secondary, register)),
            _ => None,
        }
    }
}

impl PciFunction for Ide {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config.write(offset, data);
        self.follow_config();
    }

    fn read_bar(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        for (byte, offset) in data.iter_mut().zip(offset..) {
            *byte = self.bus_master(offset).map_or(0xff, |(channel, register)| {
                channel.read_bus_master(register)
            });
        }
    }

    fn write_bar(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        for (byte, offset) in data.iter().zip(offset..) {
            if let Some((channel, register)) = self.bus_master(offset) {
                channel.write_bus_master(register, *byte);
            }
        }
    }
}
