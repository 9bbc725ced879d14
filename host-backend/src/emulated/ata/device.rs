//! A drive as the channel sees it: its registers, and what its commands do.
//! How data moves is in [`super::transfer`].
#![forbid(unsafe_code)]

use super::AtaCounters;
use super::command::{Command, How};
use super::drive::{Drive, DriveOptions, Refused};
use super::transfer::{Buffer, Phase, Transfer, Work};
use crate::disk::{DiskError, DiskLane, DiskOp};
use crate::event::EventFd;
use crate::memory::IoBufs;
use pvkit_protocol::emulated::ata::{
    Control, DIAGNOSTIC_PASSED, Device as DeviceBits, Error, POWER_MODE_ACTIVE, Status, TaskFile,
    register, signature,
};
use std::fmt;
use std::sync::Arc;

/// The INTRQ signal: whether the drive wants to interrupt, and what its pin
/// showed last.
#[derive(Debug, Default)]
struct Intrq {
    wanted: bool,
    pin: bool,
}

impl Intrq {
    fn clear(&mut self) {
        *self = Self::default();
    }

    /// Shows `wanted` at the pin if the pin is driven; says whether it rose.
    fn rises(&mut self, driven: bool) -> bool {
        let before = self.pin;
        self.pin = self.wanted && driven;
        self.pin && !before
    }
}

/// Drive 0 of a channel. There is no drive 1.
pub(super) struct Device {
    pub(super) drive: Drive,
    pub(super) lane: Box<dyn DiskLane>,
    /// Where the disk's data goes to or comes from.
    pub(super) bufs: IoBufs,
    /// Where PIO data waits for the guest, or for the disk.
    pub(super) buffer: Buffer,
    pub(super) phase: Phase,
    /// What is left of the command that runs.
    pub(super) transfer: Transfer,
    /// A request for which the disk had no room.
    pub(super) stalled: Option<(DiskOp, u64)>,
    /// The lane has a request of which the host could not be told yet.
    pub(super) uncommitted: bool,
    /// The drive was reset while the disk had a request: its result is dropped
    /// and the reset finished once it comes back.
    pub(super) discard: bool,
    pub(super) kick: Arc<EventFd>,
    pub(super) counters: Arc<AtaCounters>,
    intrq: Intrq,
    file: TaskFile,
    /// The values that `file` had before the last write of each.
    previous: TaskFile,
    features: u8,
    select: u8,
    error: u8,
    /// The last command failed.
    failed: bool,
    control: Control,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("status", &self.status())
            .field("phase", &self.phase)
            .field("transfer", &self.transfer)
            .field("lane", &self.lane)
            .finish_non_exhaustive()
    }
}

impl Device {
    pub(super) fn new(
        options: &DriveOptions,
        buffer: Buffer,
        kick: Arc<EventFd>,
    ) -> Result<Self, DiskError> {
        let mut device = Self {
            drive: Drive::new(options),
            lane: options.disk.lane(1)?,
            bufs: IoBufs::new(),
            buffer,
            phase: Phase::Idle,
            transfer: Transfer::default(),
            stalled: None,
            uncommitted: false,
            discard: false,
            kick,
            counters: Arc::default(),
            intrq: Intrq::default(),
            file: TaskFile::default(),
            previous: TaskFile::default(),
            features: 0,
            select: 0,
            error: 0,
            failed: false,
            control: Control::empty(),
        };
        device.show_signature();
        Ok(device)
    }

    /// Whether the guest means the drive that is not there.
    pub(super) fn other_is_selected(&self) -> bool {
        self.select & DeviceBits::DEV.bits() != 0
    }

    fn is_busy(&self) -> bool {
        self.waits_for_disk() || self.control.contains(Control::SRST)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Whether INTRQ rose since the last call: an interrupt.
    pub(super) fn interrupts(&mut self) -> bool {
        let driven = !self.other_is_selected() && !self.control.contains(Control::NIEN);
        self.intrq.rises(driven)
    }

    /// Wants to interrupt.
    pub(super) fn raise(&mut self) {
        self.intrq.wanted = true;
    }

    fn status(&self) -> Status {
        if self.is_busy() {
            return Status::BSY;
        }
        let mut status = Status::DRDY | Status::DSC;
        status.set(Status::DRQ, self.phase != Phase::Idle);
        status.set(Status::ERR, self.failed);
        status
    }

    /// The status register without acknowledging the interrupt.
    pub(super) fn alternate_status(&self) -> u8 {
        if self.other_is_selected() {
            return 0;
        }
        self.status().bits()
    }

    /// A read of a register other than the data register.
    pub(super) fn read_register(&mut self, offset: u16) -> u8 {
        if offset == register::DEVICE {
            return self.select | DeviceBits::OBSOLETE.bits();
        }
        if self.other_is_selected() {
            return 0;
        }
        let file = if self.control.contains(Control::HOB) {
            self.previous
        } else {
            self.file
        };
        match offset {
            register::ERROR => self.error,
            register::SECTOR_COUNT => file.count,
            register::LBA_LOW => file.low,
            register::LBA_MID => file.mid,
            register::LBA_HIGH => file.high,
            register::STATUS => {
                self.intrq.clear();
                self.status().bits()
            }
            _ => 0xff,
        }
    }

    /// A write of a register other than the data register.
    pub(super) fn write_register(&mut self, offset: u16, value: u8) {
        if self.is_busy() {
            // The drive owns its registers.
            return;
        }
        self.control.remove(Control::HOB);
        let (now, before) = (&mut self.file, &mut self.previous);
        let (now, before) = match offset {
            register::FEATURES => {
                self.features = value;
                return;
            }
            register::SECTOR_COUNT => (&mut now.count, &mut before.count),
            register::LBA_LOW => (&mut now.low, &mut before.low),
            register::LBA_MID => (&mut now.mid, &mut before.mid),
            register::LBA_HIGH => (&mut now.high, &mut before.high),
            register::DEVICE => {
                self.select = value;
                return;
            }
            register::COMMAND => {
                self.command(value);
                return;
            }
            _ => return,
        };
        *before = *now;
        *now = value;
    }

    /// The device control register.
    pub(super) fn write_control(&mut self, value: u8) {
        self.control = Control::from_bits_truncate(value);
        if self.control.contains(Control::SRST) {
            self.reset();
        }
    }

    /// A software reset begins. Until the disk has returned what it has, the
    /// drive stays busy.
    fn reset(&mut self) {
        self.intrq.clear();
        let disk_has_it = self.waits_for_disk() && self.stalled.take().is_none();
        if disk_has_it {
            self.discard = true;
        } else {
            self.finish_reset();
        }
    }

    pub(super) fn finish_reset(&mut self) {
        self.discard = false;
        self.phase = Phase::Idle;
        self.drive.reset();
        self.show_signature();
    }

    /// Registers as after a reset or diagnostics.
    fn show_signature(&mut self) {
        self.file = signature::DISK;
        self.previous = TaskFile::default();
        self.select = 0;
        self.error = DIAGNOSTIC_PASSED;
        self.failed = false;
    }

    /// The command succeeded.
    pub(super) fn succeed(&mut self) {
        self.phase = Phase::Idle;
        self.raise();
    }

    /// The command failed.
    pub(super) fn fail(&mut self, error: Error) {
        self.counters.errors.add(1);
        self.phase = Phase::Idle;
        self.failed = true;
        self.error = error.bits();
        self.raise();
    }

    /// Shows the sector at which the command failed.
    pub(super) fn show_sector(&mut self, sector: u64, left: u32) {
        if self.transfer.ext {
            [self.previous, self.file] = TaskFile::from_lba48(sector, left);
        } else if self.select & DeviceBits::LBA.bits() != 0 {
            let (file, top) = TaskFile::from_lba28(sector, left);
            self.file = file;
            self.select = self.select & 0xf0 | top;
        }
    }

    fn command(&mut self, code: u8) {
        let command = Command::decode(code);
        if self.other_is_selected() && command != Some(Command::Diagnose) {
            return;
        }
        self.intrq.clear();
        if self.phase != Phase::Idle {
            log::debug!("ata: command {code:#04x} while the last one wants to move data");
            return;
        }
        self.counters.commands.add(1);
        self.failed = false;
        self.error = 0;
        let done = match command {
            Some(Command::Transfer { write, how, ext }) => return self.begin(write, how, ext),
            Some(Command::Verify { ext }) => match self.range(ext) {
                Some(_) => Ok(()),
                None => return self.fail(Error::IDNF),
            },
            Some(Command::Flush) => return self.flush(),
            Some(Command::Identify) => return self.identify(),
            Some(Command::IdentifyPacket) => {
                self.show_signature();
                Err(Refused)
            }
            Some(Command::SetFeatures) => self.drive.set_feature(self.features, self.file.count),
            Some(Command::SetMultiple) => self.drive.set_multiple(self.file.count),
            Some(Command::SetGeometry) => {
                let heads = (self.select & 0x0f) + 1;
                self.drive.set_geometry(heads, self.file.count)
            }
            Some(Command::Diagnose) => {
                self.show_signature();
                Ok(())
            }
            Some(Command::NativeMax { ext }) => {
                self.show_native_max(ext);
                Ok(())
            }
            Some(Command::PowerMode) => {
                self.file.count = POWER_MODE_ACTIVE;
                Ok(())
            }
            Some(Command::Nothing) => Ok(()),
            None => {
                log::debug!("ata: unknown command {code:#04x}");
                Err(Refused)
            }
        };
        match done {
            Ok(()) => self.succeed(),
            Err(Refused) => self.fail(Error::ABRT),
        }
    }

    fn show_native_max(&mut self, ext: bool) {
        let last = self.drive.native_max(ext);
        let count = self.file.count;
        if ext {
            [self.previous, self.file] = TaskFile::from_lba48(last, 0);
        } else {
            let (file, top) = TaskFile::from_lba28(last, 0);
            self.file = file;
            self.select = self.select & 0xf0 | top;
        }
        self.file.count = count;
    }

    fn range(&self, ext: bool) -> Option<(u64, u32)> {
        self.drive.range(self.file, self.previous, self.select, ext)
    }

    /// Begins a command that moves sectors.
    fn begin(&mut self, write: bool, how: How, ext: bool) {
        let block = match how {
            How::Sectors => 1,
            How::Multiple => u32::from(self.drive.multiple()),
            How::Dma => u32::MAX,
        };
        if block == 0 || (write && self.drive.read_only()) {
            return self.fail(Error::ABRT);
        }
        let Some((sector, left)) = self.range(ext) else {
            return self.fail(Error::IDNF);
        };
        self.transfer = Transfer {
            sector,
            left,
            block,
            write,
            ext,
        };
        match how {
            How::Dma => self.phase = Phase::Dma,
            // The guest is not interrupted for the first block that it writes.
            How::Sectors | How::Multiple if write => self.ask_for_block(),
            How::Sectors | How::Multiple => self.read_block(),
        }
    }

    fn identify(&mut self) {
        let mut data = [0; 512];
        for (to, word) in data.chunks_mut(2).zip(self.drive.identify()) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.transfer = Transfer {
            left: 1,
            block: 1,
            ..Transfer::default()
        };
        if self.buffer.put(&data) {
            self.offer_block();
        } else {
            self.fail(Error::ABRT);
        }
    }

    fn flush(&mut self) {
        self.transfer = Transfer::default();
        self.bufs.clear();
        self.submit(Work::Flush, DiskOp::Flush, 0);
    }
}
