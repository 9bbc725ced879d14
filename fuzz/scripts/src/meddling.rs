//! What is done to the memory and the registers between a driver and its
//! device, and the bytes that say so.
#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Result, Unstructured};

/// A part of guest memory that is worth meddling with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// The descriptor table, or the packed ring.
    Descriptors,
    /// The available ring, or what the driver wants to be told.
    Avail,
    /// The used ring, or what the device wants to be told.
    Used,
    /// Headers, status bytes and indirect tables.
    Slots,
    /// All of it, buffers included.
    Anywhere,
}

impl<'a> Arbitrary<'a> for Area {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(u)? % 5 {
            0 => Self::Descriptors,
            1 => Self::Avail,
            2 => Self::Used,
            3 => Self::Slots,
            _ => Self::Anywhere,
        })
    }
}

/// Something that changes behind the backs of driver and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meddling {
    /// One bit of guest memory changes.
    Flip {
        /// Where.
        area: Area,
        /// Byte of the area, modulo its size.
        offset: u16,
        /// Which bit.
        bit: u8,
    },
    /// A 16-bit word of guest memory changes.
    Word {
        /// Where.
        area: Area,
        /// Word of the area, modulo its size.
        offset: u16,
        /// To what.
        value: u16,
    },
    /// An index moves: the available one, or the used one. Of a packed ring,
    /// a descriptor changes hands.
    Index {
        /// Whose: that of the device.
        used: bool,
        /// By how much; which descriptor.
        by: i8,
    },
    /// A used element is rewritten; a packed descriptor is given back.
    Element {
        /// Which.
        slot: u8,
        /// Its id.
        id: u8,
        /// Its length; of a packed descriptor, the upper two bits are the wrap
        /// counter and WRITE.
        len: u16,
    },
    /// A descriptor is rewritten, of the table or of a slot's own.
    Descriptor {
        /// Which.
        index: u8,
        /// Page of guest memory that it names.
        page: u8,
        /// Its length.
        len: u16,
        /// Its flags; of a packed one, the upper two bits are AVAIL and USED.
        flags: u8,
        /// Its next one; of a packed one, its id.
        next: u8,
    },
    /// A word of what a descriptor names is rewritten: of a header, or of data.
    Payload {
        /// Which descriptor; the first of its table, if it names one.
        index: u8,
        /// Byte of what it names.
        offset: u8,
        /// To what.
        value: u16,
    },
    /// A register is written behind the driver's back.
    Write {
        /// Where; multiples of 4 are meant if `width` is 4.
        offset: u16,
        /// Bytes.
        width: u8,
        /// What.
        value: u32,
    },
    /// A register reads with bits flipped, for the next few reads. The status
    /// only gets bits that it does not have: a status of 0 is a proof.
    Lie {
        /// Which register.
        register: u8,
        /// Which bits.
        mask: u32,
        /// For so many reads.
        times: u8,
    },
}

impl Meddling {
    /// Kinds of meddling.
    pub(super) const KINDS: u8 = 8;

    /// The meddling of a kind below [`KINDS`](Self::KINDS), with what the
    /// bytes say of it.
    pub(super) fn of_kind(kind: u8, u: &mut Unstructured<'_>) -> Result<Self> {
        Ok(match kind {
            0 => Self::Flip {
                area: u.arbitrary()?,
                offset: u.arbitrary()?,
                bit: u.arbitrary()?,
            },
            1 => Self::Word {
                area: u.arbitrary()?,
                offset: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            2 => Self::Index {
                used: u8::arbitrary(u)? & 1 != 0,
                by: u.arbitrary()?,
            },
            3 => Self::Element {
                slot: u.arbitrary()?,
                id: u.arbitrary()?,
                len: u.arbitrary()?,
            },
            4 => Self::Descriptor {
                index: u.arbitrary()?,
                page: u.arbitrary()?,
                len: u.arbitrary()?,
                flags: u.arbitrary()?,
                next: u.arbitrary()?,
            },
            5 => Self::Write {
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            6 => Self::Lie {
                register: u.arbitrary()?,
                mask: u.arbitrary()?,
                times: u.arbitrary()?,
            },
            _ => Self::Payload {
                index: u.arbitrary()?,
                offset: u.arbitrary()?,
                value: u.arbitrary()?,
            },
        })
    }
}
