//! What the bytes of a fuzzing input mean.
#![forbid(unsafe_code)]

use arbitrary::{Arbitrary, Result, Unstructured};

/// How driver and device are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
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

/// One step of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
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
            16 => Self::Flip {
                area: u.arbitrary()?,
                offset: u.arbitrary()?,
                bit: u.arbitrary()?,
            },
            17 => Self::Word {
                area: u.arbitrary()?,
                offset: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            18 => Self::Index {
                used: u8::arbitrary(u)? & 1 != 0,
                by: u.arbitrary()?,
            },
            19 => Self::Element {
                slot: u.arbitrary()?,
                id: u.arbitrary()?,
                len: u.arbitrary()?,
            },
            20 => Self::Descriptor {
                index: u.arbitrary()?,
                page: u.arbitrary()?,
                len: u.arbitrary()?,
                flags: u.arbitrary()?,
                next: u.arbitrary()?,
            },
            21 => Self::Read {
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
            },
            22 => Self::Write {
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            23 => Self::Lie {
                register: u.arbitrary()?,
                mask: u.arbitrary()?,
                times: u.arbitrary()?,
            },
            _ => Self::Header {
                slot: u.arbitrary()?,
                kind: u.arbitrary()?,
                sector: u.arbitrary()?,
                shift: u.arbitrary()?,
            },
        })
    }
}
