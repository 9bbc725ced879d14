//! What a drive says about itself. None of it is trusted.
#![forbid(unsafe_code)]

use super::{AtaError, AtaOptions, Mode};
use crate::block::{BlockLimits, ID_BYTES, SECTOR_BYTES};
use pvkit_protocol::emulated::ata::{LIMIT_LBA28, MAX_SECTORS_LBA28, MAX_SECTORS_LBA48, identify};

/// What the driver has to know about a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) limits: BlockLimits,
    /// Padded with zeros.
    pub(super) serial: [u8; ID_BYTES],
    /// Most sectors of a block for the MULTIPLE commands; 0 if the drive has
    /// none.
    pub(super) max_multiple: u8,
    /// FLUSH CACHE EXT and not FLUSH CACHE.
    pub(super) flush_ext: bool,
    /// The drive caches writes.
    pub(super) write_cache: bool,
}

impl Info {
    /// Reads IDENTIFY DEVICE data.
    pub(super) fn parse(
        words: &[u16; identify::WORDS],
        options: &AtaOptions,
    ) -> Result<Self, AtaError> {
        let word = |index: usize| words.get(index).copied().unwrap_or(0);
        let part = |index: usize, len: usize| words.get(index..index + len).unwrap_or(&[]);
        let bad = |index: usize| {
            Err(AtaError::Identify {
                word: index,
                value: u64::from(word(index)),
            })
        };
        if word(identify::CONFIG) & identify::CONFIG_NOT_ATA != 0 {
            return bad(identify::CONFIG);
        }
        let capabilities = word(identify::CAPABILITIES);
        let no_dma = capabilities & identify::CAPABILITY_DMA == 0;
        if capabilities & identify::CAPABILITY_LBA == 0 || (options.mode == Mode::Dma && no_dma) {
            return bad(identify::CAPABILITIES);
        }
        let sector_size = word(identify::SECTOR_SIZE);
        if identify::is_valid(sector_size) && sector_size & identify::LONG_SECTORS != 0 {
            return bad(identify::SECTOR_SIZE);
        }

        let supported = word(identify::COMMAND_SETS + 1);
        let has = |bit: u16| identify::is_valid(supported) && supported & bit != 0;
        let lba48 = has(identify::COMMAND_SET_2_LBA48);
        let (index, len, limit) = if lba48 {
            (identify::LBA48_SECTORS, 4, 1 << 48)
        } else {
            (identify::LBA28_SECTORS, 2, LIMIT_LBA28)
        };
        let capacity = identify::number(part(index, len));
        if capacity == 0 || capacity >= limit {
            return Err(AtaError::Identify {
                word: index,
                value: capacity,
            });
        }
        let most = if lba48 {
            MAX_SECTORS_LBA48
        } else {
            MAX_SECTORS_LBA28
        };
        let sectors = (options.max_bytes / SECTOR_BYTES as u32).clamp(1, most);

        let [max_multiple, _] = word(identify::MAX_MULTIPLE).to_le_bytes();
        let flush_ext = has(identify::COMMAND_SET_2_FLUSH_EXT);
        let enabled_is_valid = identify::is_valid(word(identify::COMMAND_SETS_ENABLED + 2));
        let enabled = word(identify::COMMAND_SETS_ENABLED);
        Ok(Self {
            limits: BlockLimits {
                capacity,
                block_bytes: SECTOR_BYTES as u32,
                // A drive does not say; writes to one that is fail.
                read_only: false,
                flush: flush_ext || has(identify::COMMAND_SET_2_FLUSH),
                max_segments: match options.mode {
                    Mode::Pio => u16::MAX,
                    Mode::Dma => options.max_segments.max(1),
                },
                max_segment_bytes: u32::MAX,
                max_bytes: sectors * SECTOR_BYTES as u32,
                // The commands of ACS that would do these came long after the
                // drives that this driver is for.
                discard: None,
                write_zeroes: None,
                secure_erase: None,
                lifetime: false,
                topology: None,
            },
            serial: serial(part(identify::SERIAL, identify::SERIAL_WORDS)),
            // Blocks are powers of two, of which 128 is the largest.
            max_multiple: max_multiple.checked_ilog2().map_or(0, |power| 1 << power),
            flush_ext,
            write_cache: enabled_is_valid && enabled & identify::COMMAND_SET_1_WRITE_CACHE != 0,
        })
    }
}

/// The serial number, without the spaces around it.
fn serial(words: &[u16]) -> [u8; ID_BYTES] {
    let mut text = [0; ID_BYTES];
    let len = identify::text(words, &mut text);
    let text = text.get(..len).unwrap_or(&[]);
    let mut serial = [0; ID_BYTES];
    for (to, from) in serial.iter_mut().zip(text.trim_ascii_start()) {
        *to = *from;
    }
    serial
}

#[cfg(test)]
mod tests {
    use super::*;

    const DMA: AtaOptions = AtaOptions {
        mode: Mode::Dma,
        completion: super::super::Completion::Polled,
        drive: super::super::Drive::Zero,
        max_segments: 4,
        max_bytes: 1 << 20,
        max_polls: 1,
    };

    fn words(changes: &[(usize, u16)]) -> [u16; 256] {
        let mut words = [0; 256];
        words[49] = 0x300;
        words[60] = 1000;
        identify::set_text(&mut words[10..20], "   serial 1");
        for &(index, word) in changes {
            words[index] = word;
        }
        words
    }

    #[test]
    fn an_old_drive_has_short_addresses_and_no_flush() {
        let info = Info::parse(&words(&[]), &DMA).unwrap();
        assert_eq!(info.limits.capacity, 1000);
        assert_eq!(info.limits.max_bytes, 256 * 512);
        assert!(!info.limits.flush && !info.write_cache);
        assert_eq!(&info.serial, b"serial 1\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(info.max_multiple, 0);
    }

    #[test]
    fn words_without_their_mark_do_not_count() {
        for mark in [0, 0x8000, 0xc000] {
            let info = Info::parse(
                &words(&[(83, 0x3400 | mark), (100, 5), (106, 0x1000 | mark)]),
                &DMA,
            );
            let info = info.unwrap();
            assert_eq!(info.limits.capacity, 1000, "{mark:#x}");
            assert!(!info.limits.flush);
        }
        let info = Info::parse(&words(&[(83, 0x7400), (102, 5)]), &DMA).unwrap();
        assert_eq!(info.limits.capacity, 5 << 32);
        assert!(info.limits.flush && info.flush_ext);
        assert_eq!(info.limits.max_bytes, 1 << 20);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let parse = |changes: &[(usize, u16)]| Info::parse(&words(changes), &DMA);
        let bad = |word, value| Err(AtaError::Identify { word, value });
        assert_eq!(parse(&[(0, 0x8000)]), bad(0, 0x8000));
        assert_eq!(parse(&[(49, 0x100)]), bad(49, 0x100));
        assert_eq!(parse(&[(49, 0x200)]), bad(49, 0x200));
        assert_eq!(parse(&[(60, 0)]), bad(60, 0));
        assert_eq!(parse(&[(61, 0x1000)]), bad(60, 0x1000_03e8));
        assert_eq!(parse(&[(83, 0x4400)]), bad(100, 0));
        let huge = [(83, 0x4400), (103, 1)];
        assert_eq!(parse(&huge), bad(100, 1 << 48));
        assert_eq!(parse(&[(106, 0x5000)]), bad(106, 0x5000));
        let pio = AtaOptions {
            mode: Mode::Pio,
            ..DMA
        };
        assert!(Info::parse(&words(&[(49, 0x200)]), &pio).is_ok());
    }

    #[test]
    fn blocks_and_requests_are_bounded_whatever_the_drive_and_the_caller_say() {
        for (says, multiple) in [(0, 0), (1, 1), (3, 2), (16, 16), (0x80ff, 128), (0xff00, 0)] {
            let info = Info::parse(&words(&[(47, says)]), &DMA).unwrap();
            assert_eq!(info.max_multiple, multiple, "{says:#x}");
        }
        for (asked, bytes) in [(0, 512), (1, 512), (1023, 512), (u32::MAX, 65_536 * 512)] {
            let options = AtaOptions {
                max_bytes: asked,
                ..DMA
            };
            let info = Info::parse(&words(&[(83, 0x7400), (100, 5)]), &options).unwrap();
            assert_eq!(info.limits.max_bytes, bytes);
        }
    }
}
