//! What the bytes of an input of `net_join` mean.
#![forbid(unsafe_code)]

use crate::Meddling;
use arbitrary::{Arbitrary, Result, Unstructured};
use pvkit_protocol::frame::{Checksum, FrameMeta, Offloads, SegmentKind, Segmentation};

/// How driver and device are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Setup {
    /// Offer packed rings.
    pub packed: bool,
    /// Offer to merge receive buffers.
    pub mergeable: bool,
    /// Offer indirect descriptors.
    pub indirect: bool,
    /// Offer event indices.
    pub event_idx: bool,
    /// Offer to use buffers in their order.
    pub in_order: bool,
    /// Receive buffers lie in guest memory.
    pub inside: bool,
    /// Drop the queues in the end, without proof that the device let go.
    pub drop: bool,
    /// Offer a control queue.
    pub control: bool,
    /// What each side may leave to the other.
    pub offloads: Offloads,
    /// Buffers come in two segments.
    pub segments: bool,
    /// Pairs of queues: 1, or 2 if there is a control queue.
    pub pairs: u16,
    /// The other end of the link takes every offload.
    pub host_takes: bool,
    /// Size of each queue: 4, 8 or 16.
    pub queue_size: u16,
    /// Bytes of each receive buffer.
    pub buffer_bytes: usize,
    /// Receive buffers of each pair.
    pub receive_buffers: u16,
}

impl<'a> Arbitrary<'a> for Setup {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let [bits, more, sizes]: [u8; 3] = u.arbitrary()?;
        let mut offloads = Offloads::empty();
        offloads.set(Offloads::CHECKSUM, more & 1 != 0);
        offloads.set(Offloads::TSO4, more & 2 != 0);
        offloads.set(Offloads::TSO6, more & 4 != 0);
        offloads.set(Offloads::TSO_ECN, more & 8 != 0);
        offloads.set(Offloads::USO4 | Offloads::USO6, more & 16 != 0);
        let mergeable = bits & 2 != 0;
        let control = bits & 128 == 0;
        let queue_size = 4 << (sizes % 3);
        // Some rings are never full.
        let receive_buffers = if sizes & 0x80 == 0 {
            queue_size
        } else {
            queue_size / 2
        };
        let buffer_bytes = match (sizes >> 2) % 4 {
            // As short as they can be.
            0 if mergeable => 1600 / usize::from(receive_buffers),
            // Long enough for whatever there is.
            1 if queue_size == 4 => 65_600,
            2 if mergeable => 8192,
            _ => 2048,
        };
        Ok(Self {
            packed: bits & 1 != 0,
            mergeable,
            indirect: bits & 4 != 0,
            event_idx: bits & 8 != 0,
            in_order: bits & 16 != 0,
            inside: bits & 32 != 0,
            drop: bits & 64 != 0,
            control,
            offloads,
            segments: more & 32 != 0,
            pairs: if more & 64 != 0 && control { 2 } else { 1 },
            host_takes: more & 128 != 0,
            queue_size,
            buffer_bytes,
            receive_buffers,
        })
    }
}

/// A frame, and what is said of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    /// No packet of IP, but so many bytes.
    pub raw: bool,
    /// A packet of IPv6 instead of IPv4.
    pub v6: bool,
    /// UDP instead of TCP.
    pub udp: bool,
    /// To lie in guest memory.
    pub inside: bool,
    /// Bytes of the frame, or of the packet's payload.
    pub bytes: u16,
    /// To be cut to segments of so many bytes, if that is not 0.
    pub segment: u16,
    /// What is said instead of the truth.
    pub lie: Option<Lie>,
}

impl Frame {
    /// A short frame that is no packet.
    pub(crate) const fn plain() -> Self {
        Self {
            raw: true,
            v6: false,
            udp: false,
            inside: false,
            bytes: 100,
            segment: 0,
            lie: None,
        }
    }
}

impl<'a> Arbitrary<'a> for Frame {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let bits: u8 = u.arbitrary()?;
        let bytes: u16 = u.arbitrary()?;
        let raw = bits & 1 != 0;
        let segmented = bits & 8 != 0 && !raw;
        Ok(Self {
            raw,
            v6: bits & 2 != 0,
            udp: bits & 4 != 0,
            inside: bits & 16 != 0,
            bytes,
            segment: match segmented {
                true => u.arbitrary()?,
                false => 0,
            },
            lie: match bits & 32 != 0 {
                true => Some(u.arbitrary()?),
                false => None,
            },
        })
    }
}

/// What is said of a frame, whatever it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lie {
    /// Say the truth about the checksum.
    honest_checksum: bool,
    meta: FrameMeta,
}

impl Lie {
    /// What is said of a frame of which `truth` is true.
    pub(super) fn about(&self, truth: &FrameMeta) -> FrameMeta {
        let mut meta = self.meta;
        if self.honest_checksum {
            meta.checksum = truth.checksum;
        }
        meta
    }
}

impl<'a> Arbitrary<'a> for Lie {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let bits: u8 = u.arbitrary()?;
        Ok(Self {
            honest_checksum: bits & 0x20 != 0,
            meta: meta(bits, u)?,
        })
    }
}

/// Any metadata of a frame: what there is in `bits`, with numbers as they come.
pub(crate) fn meta(bits: u8, u: &mut Unstructured<'_>) -> Result<FrameMeta> {
    let checksum = match bits & 3 {
        0 => Checksum::Unknown,
        1 => Checksum::Valid,
        _ => Checksum::Partial {
            start: u.arbitrary()?,
            offset: u.arbitrary()?,
        },
    };
    let kind = match (bits >> 2) & 3 {
        0 => None,
        1 => Some(SegmentKind::Tcp4),
        2 => Some(SegmentKind::Tcp6),
        _ => Some(SegmentKind::Udp),
    };
    let segments = match kind {
        None => None,
        Some(kind) => Some(Segmentation {
            kind,
            ecn: bits & 0x10 != 0,
            size: u.arbitrary()?,
            header_bytes: u.arbitrary()?,
        }),
    };
    Ok(FrameMeta { checksum, segments })
}

/// One step of a script. Pairs are counted modulo those that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// The driver queues a frame.
    Send {
        /// By which pair.
        pair: u8,
        /// Which.
        frame: Frame,
    },
    /// The other end of the link sends a frame.
    HostSend(Frame),
    /// The driver shows what it has queued.
    PublishTx(u8),
    /// The driver shows all buffers to receive.
    PublishRx(u8),
    /// The driver takes up to so many buffers back that were sent.
    Complete {
        /// Of which pair.
        pair: u8,
        /// How many.
        count: u8,
    },
    /// The driver takes up to so many frames.
    Receive {
        /// Of which pair.
        pair: u8,
        /// How many; the upper bit: it forgets to give their buffers back.
        count: u8,
    },
    /// The other end takes up to so many frames.
    HostReceive(u8),
    /// The driver asks for an interrupt of a transmit queue.
    ArmTx(u8),
    /// Of a receive queue.
    ArmRx(u8),
    /// The driver looks at why it was interrupted.
    Claim,
    /// The driver reads the state of the link.
    Refresh,
    /// The driver gives a command.
    Command {
        /// Which.
        which: u8,
        /// What about.
        value: u8,
    },
    /// The driver looks for the answer.
    PollCommand,
    /// The driver gives up and recovers.
    Recover,
    /// The driver resets one queue.
    Reset(u8),
    /// The other end of the link goes away.
    Unplug,
    /// There is another end.
    Plug,
    /// Each lane of the device works on up to so many frames.
    Poll(u8),
    /// The device works as long as something wakes it.
    Run,
    /// The device asks for doorbells.
    ArmDevice,
    /// A register is read, of any width and at any offset.
    Read {
        /// Where.
        offset: u16,
        /// Bytes.
        width: u8,
    },
    /// Memory or registers change.
    Meddle {
        /// The queue that is meant.
        queue: u8,
        /// How.
        how: Meddling,
    },
}

impl<'a> Arbitrary<'a> for Action {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        const MEDDLE: u8 = 26;
        Ok(match u8::arbitrary(u)? % (MEDDLE + Meddling::KINDS) {
            // What makes progress comes up more often.
            0 | 1 => Self::Send {
                pair: u.arbitrary()?,
                frame: u.arbitrary()?,
            },
            2 | 3 => Self::HostSend(u.arbitrary()?),
            4 => Self::PublishTx(u.arbitrary()?),
            5 => Self::PublishRx(u.arbitrary()?),
            6 => Self::Complete {
                pair: u.arbitrary()?,
                count: u.arbitrary()?,
            },
            7 | 8 => Self::Receive {
                pair: u.arbitrary()?,
                count: u.arbitrary()?,
            },
            9 | 10 => Self::HostReceive(u.arbitrary()?),
            11 => Self::ArmTx(u.arbitrary()?),
            12 => Self::ArmRx(u.arbitrary()?),
            13 => Self::Claim,
            14 => Self::Refresh,
            15 => Self::Command {
                which: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            16 => Self::PollCommand,
            17 => Self::Recover,
            18 => Self::Reset(u.arbitrary()?),
            19 => Self::Unplug,
            20 => Self::Plug,
            21 => Self::Poll(u.arbitrary()?),
            22 | 23 => Self::Run,
            24 => Self::ArmDevice,
            25 => Self::Read {
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
            },
            kind => Self::Meddle {
                queue: u.arbitrary()?,
                how: Meddling::of_kind(kind - MEDDLE, u)?,
            },
        })
    }
}
