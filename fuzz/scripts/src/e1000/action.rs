//! What the bytes of an input of `e1000` mean.
#![forbid(unsafe_code)]

use crate::net::Frame;
use arbitrary::{Arbitrary, Result, Unstructured};
use pvkit_protocol::emulated::e1000::register as r;

/// Registers that are worth writing and lying about.
const REGISTERS: [u32; 40] = [
    r::CTRL,
    r::STATUS,
    r::EECD,
    r::EERD,
    r::FCTTV,
    r::MDIC,
    r::VET,
    r::ICR,
    r::ITR,
    r::ICS,
    r::IMS,
    r::IMC,
    r::RCTL,
    r::TCTL,
    r::TIPG,
    r::RDBAL,
    r::RDBAH,
    r::RDLEN,
    r::RDH,
    r::RDT,
    r::RDTR,
    r::RADV,
    r::RXDCTL,
    r::RSRPD,
    r::TDBAL,
    r::TDBAH,
    r::TDLEN,
    r::TDH,
    r::TDT,
    r::TIDV,
    r::TADV,
    r::TXDCTL,
    r::TSPMT,
    r::RXCSUM,
    r::MTA,
    r::RAL,
    r::RAH,
    r::VFTA,
    r::RDT,
    r::TDT,
];

/// A register: a known one, or any.
pub(super) fn register(number: u8) -> u32 {
    match REGISTERS.get(usize::from(number)) {
        Some(register) => *register,
        // All that there are, in steps that miss none of their blocks.
        None => u32::from(number) * 0x204 % 0x2_0000 / 4 * 4,
    }
}

/// Something that changes behind the backs of driver and card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meddling {
    /// A register is written.
    Write { register: u8, value: u32 },
    /// A register reads with bits flipped, for the next few reads.
    Lie { register: u8, mask: u32, times: u8 },
    /// A word of a descriptor is rewritten: of 4 bytes, the first of which
    /// name memory of the guest.
    Descriptor { which: u8, word: u8, value: u32 },
    /// One bit of guest memory changes.
    Flip { offset: u32, bit: u8 },
}

impl<'a> Arbitrary<'a> for Meddling {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(u)? % 6 {
            0 => Self::Write {
                register: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            1 => Self::Lie {
                register: u.arbitrary()?,
                mask: u.arbitrary()?,
                times: u.arbitrary()?,
            },
            2..5 => Self::Descriptor {
                which: u.arbitrary()?,
                word: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            _ => Self::Flip {
                offset: u.arbitrary()?,
                bit: u.arbitrary()?,
            },
        })
    }
}

/// One step of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// The driver queues a frame.
    Send(Frame),
    /// The other end of the link sends a frame.
    HostSend(Frame),
    /// The driver shows what it has queued.
    PublishTx,
    /// The driver shows all buffers to receive.
    PublishRx,
    /// The driver takes up to so many buffers back.
    Complete(u8),
    /// The driver takes up to so many frames.
    Receive(u8),
    /// The other end takes up to so many frames.
    HostReceive(u8),
    /// The driver asks for an interrupt of a half, or no longer.
    Arm(u8),
    /// The driver looks at why it was interrupted.
    Claim,
    /// The driver reads the state of the link.
    Link,
    /// The driver gives up and recovers.
    Recover,
    /// The other end of the link goes away.
    Unplug,
    /// There is another end.
    Plug,
    /// The card works on up to so many frames.
    Poll(u8),
    /// The card works as long as something wakes it.
    Run,
    /// The card is about to wait.
    ArmDevice,
    /// A register is read, of any width and at any offset, or a port.
    Read { bar: u8, offset: u32, width: u8 },
    /// A register is written, of any width and at any offset, or a port.
    WriteBar {
        bar: u8,
        offset: u32,
        width: u8,
        value: u64,
    },
    /// Memory or registers change.
    Meddle(Meddling),
}

impl<'a> Arbitrary<'a> for Action {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(u)? % 28 {
            // What makes progress comes up more often.
            0 | 1 => Self::Send(u.arbitrary()?),
            2 | 3 => Self::HostSend(u.arbitrary()?),
            4 | 5 => Self::PublishTx,
            6 => Self::PublishRx,
            7 => Self::Complete(u.arbitrary()?),
            8 => Self::Receive(u.arbitrary()?),
            9 => Self::HostReceive(u.arbitrary()?),
            10 => Self::Arm(u.arbitrary()?),
            11 => Self::Claim,
            12 => Self::Link,
            13 => Self::Recover,
            14 => Self::Unplug,
            15 => Self::Plug,
            16 => Self::Poll(u.arbitrary()?),
            17 | 18 => Self::Run,
            19 => Self::ArmDevice,
            20 => Self::Read {
                bar: u.arbitrary()?,
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
            },
            21 => Self::WriteBar {
                bar: u.arbitrary()?,
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            _ => Self::Meddle(u.arbitrary()?),
        })
    }
}
