//! What the bytes of an input of `block_join` mean.
#![forbid(unsafe_code)]

use crate::Meddling;
use arbitrary::{Arbitrary, Result, Unstructured};

/// How driver and device are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Setup {
    /// Offer indirect descriptors.
    pub indirect: bool,
    /// Offer event indices.
    pub event_idx: bool,
    /// Cut buffers into segments of 512 bytes.
    pub segments: bool,
    /// The disk holds requests until an [`Action::Allow`].
    pub held: bool,
    /// The disk takes two requests at a time.
    pub narrow: bool,
    /// The disk finishes the oldest request first.
    pub oldest_first: bool,
    /// Drop the queue in the end, without proof that the device let go.
    pub drop: bool,
    /// Offer packed rings.
    pub packed: bool,
    /// Offer to use requests in their order.
    pub in_order: bool,
    /// Size of the queue: 4, 8 or 16.
    pub queue_size: u16,
}

impl<'a> Arbitrary<'a> for Setup {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let bits: u8 = u.arbitrary()?;
        let more: u8 = u.arbitrary()?;
        Ok(Self {
            indirect: bits & 1 != 0,
            event_idx: bits & 2 != 0,
            segments: bits & 4 != 0,
            held: bits & 8 != 0,
            narrow: bits & 16 != 0,
            oldest_first: bits & 32 != 0,
            drop: bits & 64 != 0,
            packed: bits & 128 != 0,
            in_order: more & 128 != 0,
            queue_size: 4 << ((more & 127) % 3),
        })
    }
}

/// One step of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// The driver submits a request: kind, sector and length in sectors, with
    /// a buffer inside or outside guest memory.
    Submit {
        /// Read, write, flush or id.
        kind: u8,
        /// First sector.
        sector: u8,
        /// Length, and where the buffer is.
        shape: u8,
    },
    /// The driver shows what it has submitted.
    Publish,
    /// The driver takes up to so many completions.
    Complete(u8),
    /// The driver asks for an interrupt.
    ArmDriver,
    /// The driver looks at why it was interrupted.
    Claim,
    /// The driver reads the configuration again.
    Refresh,
    /// The driver gives up and recovers.
    Recover,
    /// The device works on up to so many requests.
    Poll(u8),
    /// The device works as long as a doorbell wakes it.
    Run,
    /// The device asks for doorbells.
    ArmDevice,
    /// The disk may finish so many more requests.
    Allow(u8),
    /// Memory or registers change.
    Meddle(Meddling),
    /// A request's header is rewritten.
    Header {
        /// Of which slot.
        slot: u8,
        /// The kind of request.
        kind: u8,
        /// The sector, before it is shifted.
        sector: u16,
        /// By how many bits it is shifted left.
        shift: u8,
    },
    /// A register is read, of any width and at any offset.
    Read {
        /// Where.
        offset: u16,
        /// Bytes.
        width: u8,
    },
}

impl<'a> Arbitrary<'a> for Action {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(u)? % 25 {
            // What makes progress comes up more often.
            0..3 => Self::Submit {
                kind: u.arbitrary()?,
                sector: u.arbitrary()?,
                shape: u.arbitrary()?,
            },
            3 | 4 => Self::Publish,
            5 | 6 => Self::Complete(u.arbitrary()?),
            7 => Self::ArmDriver,
            8 => Self::Claim,
            9 => Self::Refresh,
            10 => Self::Recover,
            11 | 12 => Self::Poll(u.arbitrary()?),
            13 => Self::Run,
            14 => Self::ArmDevice,
            15 => Self::Allow(u.arbitrary()?),
            kind @ 16..=20 => Self::Meddle(Meddling::of_kind(kind - 16, u)?),
            21 => Self::Read {
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
            },
            kind @ (22 | 23) => Self::Meddle(Meddling::of_kind(kind - 17, u)?),
            _ => Self::Header {
                slot: u.arbitrary()?,
                kind: u.arbitrary()?,
                sector: u.arbitrary()?,
                shift: u.arbitrary()?,
            },
        })
    }
}
