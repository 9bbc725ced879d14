//! The EEPROM, read word by word (EERD) or over the wires of its bus (EECD).
#![forbid(unsafe_code)]

use pvkit_protocol::emulated::e1000::{Eecd, eeprom, register::eerd};
use pvkit_protocol::frame::MacAddress;

/// Bits of a whole operation on the bus: with the number of its word.
const COMMAND_BITS: u32 = eeprom::OPERATION_BITS + eeprom::ADDRESS_BITS;
const ADDRESS_MASK: u16 = (1 << eeprom::ADDRESS_BITS) - 1;

/// What the bus is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// An operation comes in; zeros before its start bit do not count.
    Command { bits: u16, count: u32 },
    /// A word goes out, and then the next one.
    Data { word: u16, left: u32 },
    /// An operation that is not supported is ignored to its end.
    Ignored,
}

const START: Phase = Phase::Command { bits: 0, count: 0 };

/// The EEPROM and its wires. It cannot be written.
#[derive(Debug)]
pub(super) struct Eeprom {
    words: [u16; eeprom::WORDS],
    /// What the driver last set.
    wires: Eecd,
    phase: Phase,
    /// What the EEPROM answers: high when it is idle.
    out: bool,
}

impl Eeprom {
    pub(super) fn new(mac: MacAddress) -> Self {
        Self {
            words: eeprom::image(mac),
            wires: Eecd::empty(),
            phase: START,
            out: true,
        }
    }

    fn word(&self, index: u16) -> u16 {
        let index = usize::from(index & ADDRESS_MASK);
        self.words.get(index).copied().unwrap_or(0xffff)
    }

    /// What EERD holds after a write of `value`.
    pub(super) fn read_word(&self, value: u32) -> u32 {
        if value & eerd::START == 0 {
            return value & !eerd::DONE;
        }
        let index = value >> eerd::ADDRESS_SHIFT & 0xff;
        let word = match u16::try_from(index) {
            Ok(index) if usize::from(index) < eeprom::WORDS => self.word(index),
            _ => 0xffff,
        };
        u32::from(word) << eerd::DATA_SHIFT | index << eerd::ADDRESS_SHIFT | eerd::DONE
    }

    /// A read of EECD.
    pub(super) fn wires(&self) -> Eecd {
        let mut wires = self.wires | Eecd::PRES | Eecd::FWE_DISABLED;
        wires.set(Eecd::GNT, self.wires.contains(Eecd::REQ));
        wires.set(Eecd::DO, self.out);
        wires
    }

    /// A write of EECD.
    pub(super) fn set_wires(&mut self, value: Eecd) {
        let before = self.wires;
        self.wires = value & (Eecd::SK | Eecd::CS | Eecd::DI | Eecd::REQ);
        if !self.wires.contains(Eecd::CS) {
            self.phase = START;
            self.out = true;
        } else if before.contains(Eecd::CS)
            && !before.contains(Eecd::SK)
            && self.wires.contains(Eecd::SK)
        {
            self.clock(self.wires.contains(Eecd::DI));
        }
    }

    /// The clock rises while the chip is selected.
    fn clock(&mut self, data: bool) {
        match self.phase {
            Phase::Command { count: 0, .. } if !data => {}
            Phase::Command { bits, count } => {
                let bits = bits << 1 | u16::from(data);
                let count = count + 1;
                if count < COMMAND_BITS {
                    self.phase = Phase::Command { bits, count };
                } else if bits >> eeprom::ADDRESS_BITS == eeprom::READ {
                    // A zero comes out before the word does.
                    self.out = false;
                    let word = bits & ADDRESS_MASK;
                    self.phase = Phase::Data { word, left: 16 };
                } else {
                    self.phase = Phase::Ignored;
                }
            }
            Phase::Data { word, left } => {
                let left = left.saturating_sub(1);
                self.out = self.word(word) >> left & 1 != 0;
                self.phase = match left {
                    0 => Phase::Data {
                        word: word.wrapping_add(1) & ADDRESS_MASK,
                        left: 16,
                    },
                    left => Phase::Data { word, left },
                };
            }
            Phase::Ignored => self.out = true,
        }
    }
}
