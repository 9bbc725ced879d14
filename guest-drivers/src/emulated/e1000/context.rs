//! What the chip is told of a frame's checksum and segments (SDM §3.3.6 and
//! §3.5), and what it wants to stand in the frame for that.
#![forbid(unsafe_code)]

use crate::net::{BadFrame, Checksum, FrameMeta, Offloads, SegmentKind, Segmentation};
use pvkit_protocol::emulated::e1000::{
    ContextDescriptor, PacketOptions, TuCommand, TxCommand, TxDescriptor,
};
use pvkit_protocol::frame::HEAD_BYTES;
use pvkit_protocol::inet::{
    Headers, IPV4_CHECKSUM, IPV4_HEADER_BYTES, IpVersion, Sum, TCP_CHECKSUM, UDP_CHECKSUM,
};
use zerocopy::little_endian::{U16, U32};

/// A descriptor as the two words that it is in memory.
pub(super) fn words(descriptor: impl Into<TxDescriptor>) -> [u64; 2] {
    let [low, high]: [[u8; 8]; 2] = zerocopy::transmute!(descriptor.into());
    [u64::from_le_bytes(low), u64::from_le_bytes(high)]
}

/// Numbers of 16 bits, big-endian, that are to stand in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Patch([Option<(usize, [u8; 2])>; 3]);

impl Patch {
    const NONE: Self = Self([None; 3]);

    fn one(at: usize, value: u16) -> Self {
        Self([Some((at, value.to_be_bytes())), None, None])
    }

    /// Puts them there, and remembers what stood there: once more undoes it.
    pub(super) fn swap(&mut self, frame: &mut [u8]) {
        for (at, bytes) in self.0.iter_mut().flatten() {
            if let Some(place) = frame.get_mut(*at..*at + 2) {
                place.swap_with_slice(bytes);
            }
        }
    }
}

/// How a frame is shown to the chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Work {
    /// The context that it needs.
    pub(super) context: Context,
    /// Command bits of its data descriptors.
    pub(super) command: TxCommand,
    /// Options of its data descriptors.
    pub(super) options: PacketOptions,
    /// What has to stand in it.
    pub(super) patch: Patch,
    /// The driver made its checksum.
    pub(super) by_software: bool,
}

/// The context that a frame needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// None.
    None,
    /// One that other frames can share: the chip keeps it until there is
    /// another of this kind.
    Checksum([u64; 2]),
    /// One of its own: the chip uses it up.
    Segmentation([u64; 2]),
}

impl Work {
    const PLAIN: Self = Self {
        context: Context::None,
        command: TxCommand::empty(),
        options: PacketOptions::empty(),
        patch: Patch::NONE,
        by_software: false,
    };

    /// What is to be done for a frame, which may be up to `max` bytes long if
    /// it is not segmented.
    ///
    /// # Errors
    /// [`BadFrame`] as the check of the metadata says, or if the chip cannot
    /// cut it.
    #[inline]
    pub(super) fn new(
        frame: &[u8],
        meta: &FrameMeta,
        max: usize,
        agreed: Offloads,
    ) -> Result<Self, BadFrame> {
        let head = frame.get(..HEAD_BYTES).unwrap_or(frame);
        let meta = meta.check(head, frame.len(), max, agreed)?;
        match (meta.segments, meta.checksum) {
            (Some(segments), _) => Self::segments(frame, head, &segments, max),
            (None, Checksum::Partial { start, offset }) => Ok(Self::checksum(frame, start, offset)),
            (None, _) => Ok(Self::PLAIN),
        }
    }

    /// The checksum alone: the chip adds up everything from `start` on, as the
    /// frame's field wants it.
    fn checksum(frame: &[u8], start: u16, offset: u16) -> Self {
        let field = start.saturating_add(offset);
        let (Ok(transport_start), Ok(transport_offset)) =
            (u8::try_from(start), u8::try_from(field))
        else {
            // Beyond where the chip's numbers reach.
            let data = frame.get(usize::from(start)..).unwrap_or(&[]);
            let sum = match Sum::new().bytes(data).finish() {
                // 0 says that there is none (RFC 768).
                0 if offset == UDP_CHECKSUM => u16::MAX,
                sum => sum,
            };
            return Self {
                patch: Patch::one(usize::from(field), sum),
                by_software: true,
                ..Self::PLAIN
            };
        };
        let tcp = if offset == TCP_CHECKSUM {
            TuCommand::TCP
        } else {
            TuCommand::empty()
        };
        let context = ContextDescriptor {
            transport_start,
            transport_offset,
            transport_end: U16::ZERO,
            command: ContextDescriptor::command_word(0, tcp),
            ..ContextDescriptor::default()
        };
        Self {
            context: Context::Checksum(words(context)),
            options: PacketOptions::TXSM,
            ..Self::PLAIN
        }
    }

    /// Segments of TCP (SDM §3.5.4 to §3.5.7). The chip puts lengths into the
    /// headers of each, and adds the length to the pseudo header's sum: it
    /// wants zeros, and a sum without it.
    fn segments(
        frame: &[u8],
        head: &[u8],
        segments: &Segmentation,
        max: usize,
    ) -> Result<Self, BadFrame> {
        let headers = Headers::parse(head).ok_or(BadFrame::Segmentation)?;
        let sum = headers
            .pseudo_header(head, 0)
            .ok_or(BadFrame::Segmentation)?;
        let segment = usize::from(segments.header_bytes) + usize::from(segments.size);
        // A frame of one segment may say any size.
        if segment.min(frame.len()) > max {
            return Err(BadFrame::Long {
                bytes: segment,
                max,
            });
        }
        let small = |at: u16| u8::try_from(at).map_err(|_| BadFrame::Segmentation);
        let field = headers.transport.saturating_add(TCP_CHECKSUM);
        let network = usize::from(headers.network);
        let v4 = match (segments.kind, headers.version) {
            (SegmentKind::Tcp4, IpVersion::V4) => true,
            (SegmentKind::Tcp6, IpVersion::V6) => false,
            _ => return Err(BadFrame::Segmentation),
        };
        let mut command = TuCommand::TSE | TuCommand::TCP;
        let mut context = ContextDescriptor {
            ip_start: small(headers.network)?,
            transport_start: small(headers.transport)?,
            transport_offset: small(field)?,
            transport_end: U16::ZERO,
            header_bytes: small(segments.header_bytes)?,
            segment_bytes: U16::new(segments.size),
            ..ContextDescriptor::default()
        };
        let checksum = Some((usize::from(field), sum.fold().to_be_bytes()));
        let (options, patch) = if v4 {
            command |= TuCommand::IP;
            context.ip_offset = small(headers.network.saturating_add(IPV4_CHECKSUM as u16))?;
            // The last byte, not the one behind it.
            context.ip_end = U16::new(headers.transport.saturating_sub(1));
            let zeros = [IPV4_LENGTH, IPV4_CHECKSUM].map(|at| Some((network + at, [0; 2])));
            let [length, sum] = zeros;
            (
                PacketOptions::IXSM | PacketOptions::TXSM,
                Patch([length, sum, checksum]),
            )
        } else {
            let length = Some((network + IPV6_LENGTH, [0; 2]));
            (PacketOptions::TXSM, Patch([length, checksum, None]))
        };
        // At most 65,553 (the check).
        let payload = frame.len().saturating_sub(segments.header_bytes.into()) as u32;
        context.command = ContextDescriptor::command_word(payload, command);
        Ok(Self {
            context: Context::Segmentation(words(context)),
            command: TxCommand::TSE,
            options,
            patch,
            by_software: false,
        })
    }
}

/// Where the length of a packet stands in an IPv4 header (RFC 791 §3.1).
const IPV4_LENGTH: usize = 2;
/// Where the length of the payload stands in an IPv6 header (RFC 8200 §3).
const IPV6_LENGTH: usize = 4;

const _: () = {
    // Headers that the check lets through are in reach of the chip's numbers.
    assert!(HEAD_BYTES <= u8::MAX as usize);
    assert!(IPV4_CHECKSUM < IPV4_HEADER_BYTES as usize);
    assert!(size_of::<U32>() == 4);
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, IPv4, TCP with 12 bytes of options, 3,000 bytes of payload.
    fn tcp4() -> [u8; 14 + 20 + 32 + 3000] {
        let mut frame = [0xa5; 14 + 20 + 32 + 3000];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14..34].copy_from_slice(&[
            0x45, 0, 0x0b, 0xec, 1, 2, 0x40, 0, 64, 6, 0xab, 0xcd, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        frame[34 + 12] = 0x80;
        frame
    }

    fn meta(kind: SegmentKind, start: u16) -> FrameMeta {
        FrameMeta {
            checksum: Checksum::Partial {
                start,
                offset: TCP_CHECKSUM,
            },
            segments: Some(Segmentation {
                kind,
                ecn: false,
                size: 1448,
                header_bytes: 0,
            }),
        }
    }

    /// Table 3-13 and 3-14 of the manual, bit by bit.
    #[test]
    fn the_context_of_segments_has_the_bits_of_the_manual() {
        let mut frame = tcp4();
        let before = frame;
        let mut work =
            Work::new(&frame, &meta(SegmentKind::Tcp4, 34), 1518, Offloads::all()).unwrap();
        let Context::Segmentation([low, high]) = work.context else {
            panic!("{work:?}");
        };
        // IPCSS, IPCSO, IPCSE, TUCSS, TUCSO, TUCSE.
        assert_eq!(low, 14 | 24 << 8 | 33 << 16 | 34 << 32 | 50 << 40);
        // PAYLEN, DTYP 0, TUCMD (TCP, IP, TSE, DEXT), STA, HDRLEN, MSS.
        let tucmd = 1 | 1 << 1 | 1 << 2 | 1 << 5;
        assert_eq!(high, 3000 | tucmd << 24 | 66 << 40 | 1448 << 48);
        assert_eq!(work.command.bits(), 1 << 2);
        assert_eq!(work.options.bits(), 0b11);

        work.patch.swap(&mut frame);
        assert_eq!(frame[16..18], [0, 0], "the length");
        assert_eq!(frame[24..26], [0, 0], "the sum of the header");
        let sum = Sum::new().bytes(&before[26..34]).word(6).fold();
        assert_eq!(frame[50..52], sum.to_be_bytes(), "without a length");
        work.patch.swap(&mut frame);
        assert_eq!(frame, before);
    }

    #[test]
    fn the_context_of_segments_over_ipv6() {
        let mut frame = [0; 14 + 40 + 20 + 2000];
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14] = 0x60;
        frame[18..21].copy_from_slice(&[7, 0xe4, 6]);
        frame[54 + 12] = 0x50;
        let mut work =
            Work::new(&frame, &meta(SegmentKind::Tcp6, 54), 1522, Offloads::all()).unwrap();
        let Context::Segmentation([low, high]) = work.context else {
            panic!("{work:?}");
        };
        assert_eq!(low, 14 | 54 << 32 | 70 << 40);
        let tucmd = 1 | 1 << 2 | 1 << 5;
        assert_eq!(high, 2000 | tucmd << 24 | 74 << 40 | 1448 << 48);
        assert_eq!(work.options.bits(), 0b10);
        work.patch.swap(&mut frame);
        assert_eq!(frame[18..20], [0, 0]);
        assert_eq!(frame[70..72], [0, 6]);
    }

    #[test]
    fn segments_that_do_not_fit_the_link_are_refused() {
        let frame = tcp4();
        let mut meta = meta(SegmentKind::Tcp4, 34);
        meta.segments.as_mut().unwrap().size = 1453;
        assert_eq!(
            Work::new(&frame, &meta, 1518, Offloads::all()),
            Err(BadFrame::Long {
                bytes: 1519,
                max: 1518
            })
        );
        assert_eq!(
            Work::new(&frame, &meta, 1518, Offloads::CHECKSUM),
            Err(BadFrame::NotAgreed(Offloads::TSO4))
        );
    }

    #[test]
    fn a_checksum_out_of_the_chips_reach_is_made_by_the_driver() {
        let mut frame = [1u8; 400];
        let partial = |start, offset| FrameMeta {
            checksum: Checksum::Partial { start, offset },
            segments: None,
        };
        let near = Work::new(&frame, &partial(239, 16), 1518, Offloads::all()).unwrap();
        assert!(matches!(near.context, Context::Checksum(_)) && !near.by_software);
        let mut far = Work::new(&frame, &partial(240, 16), 1518, Offloads::all()).unwrap();
        assert_eq!(far.context, Context::None);
        assert!(far.by_software && far.options.is_empty());
        far.patch.swap(&mut frame);
        let sum = !Sum::new().bytes(&[1u8; 160]).fold();
        assert_eq!(frame[256..258], sum.to_be_bytes());
    }
}
