//! What a drive is: its size, its name, and what commands have set.
#![forbid(unsafe_code)]

use crate::disk::Disk;
use pvkit_protocol::emulated::ata::{
    Device as DeviceBits, LIMIT_LBA28, TaskFile, feature, identify, transfer_mode,
};
use std::fmt;
use std::sync::Arc;

/// A drive for the controller.
#[derive(Clone)]
pub struct DriveOptions {
    /// Where its sectors are. Its blocks must be of 512 bytes.
    pub disk: Arc<dyn Disk>,
    /// Serial number; cut after 20 characters.
    pub serial: String,
    /// Model; cut after 40 characters.
    pub model: String,
}

impl DriveOptions {
    /// A drive over `disk`, with a name that says what it is.
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        Self {
            disk,
            serial: "pvkit".to_owned(),
            model: "pvkit IDE disk".to_owned(),
        }
    }
}

impl fmt::Debug for DriveOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriveOptions")
            .field("disk", &self.disk.shape())
            .field("serial", &self.serial)
            .field("model", &self.model)
            .finish()
    }
}

/// Most sectors of a block for the MULTIPLE commands.
pub(super) const MAX_MULTIPLE: u8 = 128;
/// What the block size is until SET MULTIPLE MODE changes it.
const DEFAULT_MULTIPLE: u8 = 16;
/// Sectors that cylinder addresses can reach, by custom: 16,383 × 16 × 63.
const LIMIT_CHS: u64 = 16_383 * 16 * 63;
/// Most sectors of a drive: what IDENTIFY DEVICE can say with 48 bits.
const MAX_SECTORS: u64 = (1 << 48) - 1;
/// The same with 28 bits.
const MAX_SECTORS_28: u64 = LIMIT_LBA28 - 1;

/// How cylinder addresses count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    cylinders: u16,
    /// 1 to 16.
    heads: u8,
    /// Sectors of a track, at least 1.
    sectors: u8,
}

impl Geometry {
    /// As many cylinders as the drive has room for.
    fn new(capacity: u64, heads: u8, sectors: u8) -> Self {
        let cylinders = capacity.min(LIMIT_CHS) / (u64::from(heads) * u64::from(sectors)).max(1);
        Self {
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
            heads,
            sectors,
        }
    }

    fn capacity(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors)
    }
}

/// What commands change, and a reset may undo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Settings {
    geometry: Geometry,
    multiple: u8,
    write_cache: bool,
    look_ahead: bool,
    transfer_mode: u8,
}

/// A request that the drive refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused;

/// What a drive knows about itself.
#[derive(Debug)]
pub(super) struct Drive {
    sectors: u64,
    read_only: bool,
    serial: String,
    model: String,
    settings: Settings,
    defaults: Settings,
    /// Whether a reset undoes the settings.
    revert: bool,
}

impl Drive {
    pub(super) fn new(options: &DriveOptions) -> Self {
        let shape = options.disk.shape();
        let sectors = shape.sectors.min(MAX_SECTORS);
        let defaults = Settings {
            geometry: Geometry::new(sectors, 16, 63),
            multiple: DEFAULT_MULTIPLE,
            write_cache: true,
            look_ahead: true,
            transfer_mode: *transfer_mode::MULTIWORD_DMA.end(),
        };
        Self {
            sectors,
            read_only: shape.read_only,
            serial: options.serial.clone(),
            model: options.model.clone(),
            settings: defaults,
            defaults,
            revert: true,
        }
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Sectors of a block for the MULTIPLE commands; 0 if they are off.
    pub(super) fn multiple(&self) -> u8 {
        self.settings.multiple
    }

    /// Whether each write has to be durable when it completes.
    pub(super) fn write_through(&self) -> bool {
        !self.settings.write_cache
    }

    /// A software reset.
    pub(super) fn reset(&mut self) {
        if self.revert {
            self.settings = self.defaults;
        }
    }

    /// SET FEATURES.
    pub(super) fn set_feature(&mut self, feature: u8, count: u8) -> Result<(), Refused> {
        match feature {
            feature::ENABLE_WRITE_CACHE => self.settings.write_cache = true,
            feature::DISABLE_WRITE_CACHE => self.settings.write_cache = false,
            feature::ENABLE_LOOK_AHEAD => self.settings.look_ahead = true,
            feature::DISABLE_LOOK_AHEAD => self.settings.look_ahead = false,
            feature::ENABLE_REVERT => self.revert = true,
            feature::DISABLE_REVERT => self.revert = false,
            feature::SET_TRANSFER_MODE => {
                let dma = transfer_mode::MULTIWORD_DMA.contains(&count)
                    || transfer_mode::ULTRA_DMA.contains(&count);
                let pio = transfer_mode::PIO_DEFAULT.contains(&count)
                    || transfer_mode::PIO.contains(&count);
                if dma {
                    self.settings.transfer_mode = count;
                } else if !pio {
                    return Err(Refused);
                }
            }
            _ => return Err(Refused),
        }
        Ok(())
    }

    /// SET MULTIPLE MODE; 0 switches the MULTIPLE commands off.
    pub(super) fn set_multiple(&mut self, sectors: u8) -> Result<(), Refused> {
        if sectors != 0 && (!sectors.is_power_of_two() || sectors > MAX_MULTIPLE) {
            return Err(Refused);
        }
        self.settings.multiple = sectors;
        Ok(())
    }

    /// INITIALIZE DEVICE PARAMETERS: `heads` from 1 to 16.
    pub(super) fn set_geometry(&mut self, heads: u8, sectors: u8) -> Result<(), Refused> {
        if sectors == 0 {
            return Err(Refused);
        }
        self.settings.geometry = Geometry::new(self.sectors, heads, sectors);
        Ok(())
    }

    /// First sector and number of sectors that a command names. `None` if the
    /// drive does not have them all.
    pub(super) fn range(
        &self,
        file: TaskFile,
        previous: TaskFile,
        device: u8,
        ext: bool,
    ) -> Option<(u64, u32)> {
        let (sector, count) = if ext {
            (file.lba48(previous), file.count48(previous))
        } else if device & DeviceBits::LBA.bits() != 0 {
            (file.lba28(device), file.count28())
        } else {
            (self.chs(file, device)?, file.count28())
        };
        let end = sector.checked_add(u64::from(count))?;
        (end <= self.sectors).then_some((sector, count))
    }

    fn chs(&self, file: TaskFile, device: u8) -> Option<u64> {
        let (cylinder, head, sector) = file.chs(device);
        let Geometry {
            cylinders,
            heads,
            sectors,
        } = self.settings.geometry;
        if cylinder >= cylinders || head >= heads || sector == 0 || sector > sectors {
            return None;
        }
        let track = u64::from(cylinder) * u64::from(heads) + u64::from(head);
        Some(track * u64::from(sectors) + u64::from(sector) - 1)
    }

    /// The last sector that an address can name.
    pub(super) fn native_max(&self, ext: bool) -> u64 {
        let limit = if ext { MAX_SECTORS } else { MAX_SECTORS_28 };
        self.sectors.min(limit).saturating_sub(1)
    }

    /// IDENTIFY DEVICE data.
    pub(super) fn identify(&self) -> [u16; identify::WORDS] {
        let now = self.settings;
        let lba28 = self.sectors.min(MAX_SECTORS_28);
        let mode = now.transfer_mode;
        // One bit a mode that is supported, and in the high byte the selected
        // one.
        let modes = |range: std::ops::RangeInclusive<u8>| {
            let count = range.end() - range.start() + 1;
            let supported = (1u16 << count) - 1;
            let selected = if range.contains(&mode) {
                0x100 << (mode - range.start())
            } else {
                0
            };
            supported | selected
        };
        let always = identify::COMMAND_SET_1_POWER | identify::COMMAND_SET_1_NOP;
        let set = |on: bool, bit: u16| if on { bit } else { 0 };
        let command_set_2 = identify::VALID
            | identify::COMMAND_SET_2_LBA48
            | identify::COMMAND_SET_2_FLUSH
            | identify::COMMAND_SET_2_FLUSH_EXT;
        let words = [
            (identify::CONFIG, identify::CONFIG_FIXED),
            (identify::CYLINDERS, self.defaults.geometry.cylinders),
            (identify::HEADS, u16::from(self.defaults.geometry.heads)),
            (identify::SECTORS, u16::from(self.defaults.geometry.sectors)),
            (identify::MAX_MULTIPLE, 0x8000 | u16::from(MAX_MULTIPLE)),
            (
                identify::CAPABILITIES,
                identify::CAPABILITY_DMA
                    | identify::CAPABILITY_LBA
                    | identify::CAPABILITY_IORDY
                    | identify::CAPABILITY_IORDY_OFF,
            ),
            (identify::CAPABILITIES_2, identify::VALID),
            // PIO mode 2 for hosts that look no further.
            (identify::PIO_MODE, 2 << 8),
            (identify::VALIDITY, 0b111),
            (identify::CURRENT_CYLINDERS, now.geometry.cylinders),
            (
                identify::CURRENT_CYLINDERS + 1,
                u16::from(now.geometry.heads),
            ),
            (
                identify::CURRENT_CYLINDERS + 2,
                u16::from(now.geometry.sectors),
            ),
            (
                identify::MULTIPLE,
                set(now.multiple != 0, identify::MULTIPLE_VALID) | u16::from(now.multiple),
            ),
            (identify::MULTIWORD_DMA, modes(transfer_mode::MULTIWORD_DMA)),
            // PIO modes 3 and 4.
            (identify::ADVANCED_PIO, 0b11),
            // Cycles of 120 ns: multiword DMA 2 and PIO 4, with and without
            // flow control.
            (identify::MIN_DMA_CYCLE, 120),
            (identify::MIN_DMA_CYCLE + 1, 120),
            (identify::MIN_DMA_CYCLE + 2, 120),
            (identify::MIN_DMA_CYCLE + 3, 120),
            // ATA-4 to ATA-7.
            (identify::MAJOR_VERSION, 0xf0),
            (
                identify::COMMAND_SETS,
                always | identify::COMMAND_SET_1_WRITE_CACHE | identify::COMMAND_SET_1_LOOK_AHEAD,
            ),
            (identify::COMMAND_SETS + 1, command_set_2),
            (identify::COMMAND_SETS + 2, identify::VALID),
            (
                identify::COMMAND_SETS_ENABLED,
                always
                    | set(now.write_cache, identify::COMMAND_SET_1_WRITE_CACHE)
                    | set(now.look_ahead, identify::COMMAND_SET_1_LOOK_AHEAD),
            ),
            (
                identify::COMMAND_SETS_ENABLED + 1,
                command_set_2 & !identify::VALID,
            ),
            (identify::COMMAND_SETS_ENABLED + 2, identify::VALID),
            (identify::ULTRA_DMA, modes(transfer_mode::ULTRA_DMA)),
            // Drive 0, found by jumper, on a cable of 80 wires.
            (identify::RESET_RESULT, 0x600b),
        ];
        let mut data = [0; identify::WORDS];
        for (index, word) in words {
            if let Some(place) = data.get_mut(index) {
                *place = word;
            }
        }
        let mut part = |index: usize, len: usize, fill: &dyn Fn(&mut [u16])| {
            fill(data.get_mut(index..index + len).unwrap_or(&mut []));
        };
        part(identify::SERIAL, identify::SERIAL_WORDS, &|words| {
            identify::set_text(words, &self.serial);
        });
        part(identify::FIRMWARE, identify::FIRMWARE_WORDS, &|words| {
            identify::set_text(words, env!("CARGO_PKG_VERSION"));
        });
        part(identify::MODEL, identify::MODEL_WORDS, &|words| {
            identify::set_text(words, &self.model);
        });
        part(identify::CURRENT_CAPACITY, 2, &|words| {
            identify::set_number(words, now.geometry.capacity());
        });
        part(identify::LBA28_SECTORS, 2, &|words| {
            identify::set_number(words, lba28);
        });
        part(identify::LBA48_SECTORS, 4, &|words| {
            identify::set_number(words, self.sectors);
        });
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;

    fn drive(sectors: u64) -> Drive {
        Drive::new(&DriveOptions::new(Arc::new(MemoryDisk::new(sectors))))
    }

    fn chs(cylinder: u16, head: u8, sector: u8) -> (TaskFile, u8) {
        let [mid, high] = cylinder.to_le_bytes();
        let file = TaskFile {
            count: 1,
            low: sector,
            mid,
            high,
        };
        (file, 0xa0 | head)
    }

    #[test]
    fn cylinder_addresses_count_heads_and_sectors() {
        let mut drive = drive(16 * 63 * 3);
        let at = |drive: &Drive, cylinder, head, sector| {
            let (file, device) = chs(cylinder, head, sector);
            drive
                .range(file, TaskFile::default(), device, false)
                .map(|(sector, _)| sector)
        };
        assert_eq!(at(&drive, 0, 0, 1), Some(0));
        assert_eq!(at(&drive, 0, 1, 1), Some(63));
        assert_eq!(at(&drive, 2, 15, 63), Some(16 * 63 * 3 - 1));
        for (cylinder, head, sector) in [(0, 0, 0), (0, 0, 64), (3, 0, 1), (65535, 15, 255)] {
            assert_eq!(at(&drive, cylinder, head, sector), None);
        }
        drive.set_geometry(4, 10).unwrap();
        assert_eq!(at(&drive, 0, 4, 1), None);
        assert_eq!(at(&drive, 1, 0, 1), Some(40));
        assert_eq!(drive.set_geometry(4, 0), Err(Refused));
        drive.reset();
        assert_eq!(at(&drive, 1, 0, 1), Some(16 * 63));
    }

    #[test]
    fn ranges_end_with_the_drive() {
        let drive = drive(1000);
        let range = |sector, count, ext| {
            let (file, device) = TaskFile::from_lba28(sector, count);
            let [previous, current] = TaskFile::from_lba48(sector, count);
            if ext {
                drive.range(current, previous, 0, true)
            } else {
                drive.range(file, TaskFile::default(), 0xe0 | device, false)
            }
        };
        for ext in [false, true] {
            assert_eq!(range(999, 1, ext), Some((999, 1)));
            assert_eq!(range(744, 256, ext), Some((744, 256)));
            assert_eq!(range(745, 256, ext), None);
            assert_eq!(range(1000, 1, ext), None);
        }
        assert_eq!(range((1 << 48) - 1, 65_536, true), None);
    }

    #[test]
    fn settings_show_in_identify_and_a_reset_undoes_them() {
        let mut drive = drive(4096);
        let before = drive.identify();
        assert_eq!(before[59], 0x110);
        assert_eq!((before[63], before[88]), (0x0407, 0x003f));
        drive.set_multiple(128).unwrap();
        drive.set_feature(feature::DISABLE_WRITE_CACHE, 0).unwrap();
        drive.set_feature(feature::DISABLE_LOOK_AHEAD, 0).unwrap();
        drive.set_feature(feature::SET_TRANSFER_MODE, 0x45).unwrap();
        let after = drive.identify();
        assert_eq!(after[59], 0x180);
        assert_eq!((after[63], after[88]), (0x0007, 0x203f));
        assert_eq!(after[82], before[82]);
        assert_eq!(before[85] & !after[85], 0x60);
        assert!(drive.write_through());
        for (feature, count) in [
            (3, 0x46),
            (3, 0x23),
            (3, 0x0d),
            (3, 0xff),
            (0x99, 0),
            (0, 0),
        ] {
            assert_eq!(drive.set_feature(feature, count), Err(Refused));
        }
        for pio in [0, 1, 8, 12] {
            drive.set_feature(feature::SET_TRANSFER_MODE, pio).unwrap();
        }
        for count in [3, 127, 129, 255] {
            assert_eq!(drive.set_multiple(count), Err(Refused));
        }
        drive.set_feature(feature::DISABLE_REVERT, 0).unwrap();
        drive.reset();
        assert_eq!(drive.identify(), after);
        drive.set_feature(feature::ENABLE_REVERT, 0).unwrap();
        drive.reset();
        assert_eq!(drive.identify(), before);
    }

    #[test]
    fn sizes_beyond_an_address_form_are_cut_to_it() {
        #[derive(Debug)]
        struct Huge(u64);
        impl Disk for Huge {
            fn shape(&self) -> crate::disk::DiskShape {
                crate::disk::DiskShape::new(self.0)
            }
            fn lane(
                &self,
                _depth: u16,
            ) -> Result<Box<dyn crate::disk::DiskLane>, crate::disk::DiskError> {
                Err(crate::disk::DiskError::Truncated)
            }
        }
        for (sectors, lba28, lba48) in [
            (0, 0, 0),
            (100, 100, 100),
            (1 << 40, (1 << 28) - 1, 1 << 40),
            (u64::MAX, (1 << 28) - 1, (1 << 48) - 1),
        ] {
            let drive = Drive::new(&DriveOptions::new(Arc::new(Huge(sectors))));
            let words = drive.identify();
            assert_eq!(identify::number(&words[60..62]), lba28);
            assert_eq!(identify::number(&words[100..104]), lba48);
            assert!(identify::number(&words[57..59]) <= lba28);
            assert_eq!(drive.native_max(true), lba48.saturating_sub(1));
            assert_eq!(drive.native_max(false), lba28.saturating_sub(1));
        }
    }
}
