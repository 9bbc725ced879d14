//! IDENTIFY DEVICE data: 256 words that describe a drive (ATA-7 §6.17.8).
//!
//! The constants are word indices, unless they say otherwise.

/// Words in the answer.
pub const WORDS: usize = 256;
/// General configuration.
pub const CONFIG: usize = 0;
/// Default logical cylinders.
pub const CYLINDERS: usize = 1;
/// Default logical heads.
pub const HEADS: usize = 3;
/// Default logical sectors of a track.
pub const SECTORS: usize = 6;
/// Serial number: 10 words, bytes swapped.
pub const SERIAL: usize = 10;
/// Words of the serial number.
pub const SERIAL_WORDS: usize = 10;
/// Firmware revision: 4 words, bytes swapped.
pub const FIRMWARE: usize = 23;
/// Words of the firmware revision.
pub const FIRMWARE_WORDS: usize = 4;
/// Model: 20 words, bytes swapped.
pub const MODEL: usize = 27;
/// Words of the model.
pub const MODEL_WORDS: usize = 20;
/// 0x8000 and the most sectors of a MULTIPLE block.
pub const MAX_MULTIPLE: usize = 47;
/// Capabilities: DMA, LBA.
pub const CAPABILITIES: usize = 49;
/// Second word of capabilities: bit 14 one, bit 15 zero.
pub const CAPABILITIES_2: usize = 50;
/// PIO timing mode, in the high byte (obsolete since ATA-6).
pub const PIO_MODE: usize = 51;
/// Bits 0, 1 and 2: words 54-58, 64-70 and 88 are valid.
pub const VALIDITY: usize = 53;
/// Current logical cylinders; heads and sectors follow.
pub const CURRENT_CYLINDERS: usize = 54;
/// Current capacity in sectors by cylinders, low word.
pub const CURRENT_CAPACITY: usize = 57;
/// 0x100 if valid, and the current sectors of a MULTIPLE block.
pub const MULTIPLE: usize = 59;
/// Sectors that a 28-bit address can name, low word first.
pub const LBA28_SECTORS: usize = 60;
/// Multiword DMA modes: supported low, selected high.
pub const MULTIWORD_DMA: usize = 63;
/// Advanced PIO modes.
pub const ADVANCED_PIO: usize = 64;
/// Shortest multiword DMA cycle; three further timings follow.
pub const MIN_DMA_CYCLE: usize = 65;
/// Major version: one bit a standard.
pub const MAJOR_VERSION: usize = 80;
/// Command sets supported: three words, of which the second and the third
/// carry [`VALID`].
pub const COMMAND_SETS: usize = 82;
/// Command sets enabled: three words, of which the third carries [`VALID`].
pub const COMMAND_SETS_ENABLED: usize = 85;
/// Ultra DMA modes: supported low, selected high.
pub const ULTRA_DMA: usize = 88;
/// Result of the hardware reset.
pub const RESET_RESULT: usize = 93;
/// Sectors that a 48-bit address can name, four words, low first.
pub const LBA48_SECTORS: usize = 100;
/// Sector sizes: [`VALID`], bit 13 for several logical sectors in a physical
/// one, [`LONG_SECTORS`].
pub const SECTOR_SIZE: usize = 106;

/// In [`CONFIG`]: a fixed drive (obsolete since ATA-6, but looked at).
pub const CONFIG_FIXED: u16 = 1 << 6;
/// In [`CONFIG`]: not an ATA drive.
pub const CONFIG_NOT_ATA: u16 = 1 << 15;
/// In [`CAPABILITIES`]: the drive can do DMA.
pub const CAPABILITY_DMA: u16 = 1 << 8;
/// In [`CAPABILITIES`]: the drive understands sector addresses.
pub const CAPABILITY_LBA: u16 = 1 << 9;
/// In [`CAPABILITIES`]: IORDY can be switched off.
pub const CAPABILITY_IORDY_OFF: u16 = 1 << 10;
/// In [`CAPABILITIES`]: the drive supports IORDY.
pub const CAPABILITY_IORDY: u16 = 1 << 11;
/// In [`MULTIPLE`]: the low byte is valid.
pub const MULTIPLE_VALID: u16 = 1 << 8;
/// In word 82 and 85: power management.
pub const COMMAND_SET_1_POWER: u16 = 1 << 3;
/// In word 82 and 85: a write cache.
pub const COMMAND_SET_1_WRITE_CACHE: u16 = 1 << 5;
/// In word 82 and 85: read look-ahead.
pub const COMMAND_SET_1_LOOK_AHEAD: u16 = 1 << 6;
/// In word 82 and 85: NOP.
pub const COMMAND_SET_1_NOP: u16 = 1 << 14;
/// In word 83 and 86: 48-bit addresses.
pub const COMMAND_SET_2_LBA48: u16 = 1 << 10;
/// In word 83 and 86: FLUSH CACHE.
pub const COMMAND_SET_2_FLUSH: u16 = 1 << 12;
/// In word 83 and 86: FLUSH CACHE EXT.
pub const COMMAND_SET_2_FLUSH_EXT: u16 = 1 << 13;
/// In [`SECTOR_SIZE`]: logical sectors are longer than 512 bytes.
pub const LONG_SECTORS: u16 = 1 << 12;
/// In words that carry it: bit 14 one and bit 15 zero say that the rest counts.
pub const VALID: u16 = 1 << 14;
/// The two bits of [`VALID`].
pub const VALID_MASK: u16 = 0b11 << 14;

/// Whether a word that carries [`VALID`] counts.
#[must_use]
pub const fn is_valid(word: u16) -> bool {
    word & VALID_MASK == VALID
}

/// The number in words that follow each other, low word first. At most four
/// are read.
#[must_use]
pub fn number(words: &[u16]) -> u64 {
    words
        .iter()
        .take(4)
        .rev()
        .fold(0, |number, &word| number << 16 | u64::from(word))
}

/// Stores a number in words that follow each other, low word first; bits that
/// do not fit are dropped.
pub fn set_number(words: &mut [u16], mut number: u64) {
    for word in words {
        *word = number as u16;
        number >>= 16;
    }
}

/// Reads text, two characters a word, the first one in the high byte. Returns
/// how many bytes of `out` the text takes without the spaces that pad it.
pub fn text(words: &[u16], out: &mut [u8]) -> usize {
    let bytes = words.iter().flat_map(|word| word.to_be_bytes());
    let mut len = 0;
    for (index, (to, from)) in out.iter_mut().zip(bytes).enumerate() {
        *to = from;
        if from != b' ' && from != 0 {
            len = index + 1;
        }
    }
    len
}

/// Stores text, padded with spaces and cut to what fits. Characters that are
/// not printable ASCII become question marks.
pub fn set_text(words: &mut [u16], text: &str) {
    let mut bytes = text.chars().map(|c| match c {
        ' '..='~' => c as u8,
        _ => b'?',
    });
    for word in words {
        let mut next = || bytes.next().unwrap_or(b' ');
        *word = u16::from_be_bytes([next(), next()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_numbers_round_trip() {
        let mut words = [0; 4];
        set_text(&mut words, "a bé\nd");
        assert_eq!(words, [0x6120, 0x623f, 0x3f64, 0x2020]);
        let mut out = [0xee; 10];
        assert_eq!(text(&words, &mut out), 6);
        assert_eq!(&out[..8], b"a b??d  ");
        set_text(&mut words, "longer than it can be");
        assert_eq!(text(&words, &mut out), 8);
        assert_eq!(&out[..8], b"longer t");
        assert_eq!(text(&[0x2020, 0], &mut out), 0);

        set_number(&mut words, 0x1234_5678_9abc);
        assert_eq!(words, [0x9abc, 0x5678, 0x1234, 0]);
        assert_eq!(number(&words), 0x1234_5678_9abc);
        assert_eq!(number(&words[..2]), 0x5678_9abc);
        assert!(is_valid(0x7fff) && !is_valid(0xffff) && !is_valid(0));
    }
}
