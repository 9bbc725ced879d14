//! Ethernet frames, and what accompanies one on its way between a driver, a
//! device and a link: which work on it is left to the receiver.
//!
//! virtio's network header, the descriptors of an e1000, RNDIS and netfront
//! all say the same in different bits; [`FrameMeta`] is what they say.

use crate::inet::{Headers, IpVersion, protocol};
use core::fmt;
use core::str::FromStr;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of an Ethernet header: two addresses and a type (IEEE 802.3 §3.2).
pub const ETHERNET_HEADER_BYTES: usize = 14;
/// Bytes of a VLAN tag (IEEE 802.1Q §9.6).
pub const VLAN_TAG_BYTES: usize = 4;
/// Shortest frame on a wire, without its check sequence; links that are not
/// wires carry shorter ones.
pub const MIN_WIRE_FRAME_BYTES: usize = 60;
/// The usual largest payload of a frame.
pub const DEFAULT_MTU: u16 = 1500;
/// Longest frame of a link with this many bytes of payload: with header and
/// one VLAN tag, without check sequence.
#[must_use]
pub const fn max_frame_bytes(mtu: u16) -> usize {
    mtu as usize + ETHERNET_HEADER_BYTES + VLAN_TAG_BYTES
}
/// Longest frame that is to be segmented: an IP packet of 65,535 bytes, with
/// header and one VLAN tag.
pub const MAX_SEGMENTED_FRAME_BYTES: usize = max_frame_bytes(u16::MAX);

/// Types of payload ("EtherType"), as they stand in a header.
pub mod ethertype {
    /// Internet Protocol, version 4.
    pub const IPV4: u16 = 0x0800;
    /// Address Resolution Protocol.
    pub const ARP: u16 = 0x0806;
    /// A VLAN tag (IEEE 802.1Q).
    pub const VLAN: u16 = 0x8100;
    /// A VLAN tag of a provider, outside of others (IEEE 802.1Q §9.5).
    pub const SERVICE_VLAN: u16 = 0x88a8;
    /// Internet Protocol, version 6.
    pub const IPV6: u16 = 0x86dd;
    /// The first of two values for local experiments (IEEE 802 §9.2.4).
    pub const LOCAL_1: u16 = 0x88b5;
    /// The second.
    pub const LOCAL_2: u16 = 0x88b6;
}

/// An address of Ethernet.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it names a group of stations, broadcast included.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether one station can have it: no group, and not all zeros.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }

    /// An address of the range that everybody may use, which differs from
    /// others of this function by `low`.
    #[must_use]
    pub const fn local(low: u32) -> Self {
        let [a, b, c, d] = low.to_be_bytes();
        Self([0x02, 0x70, a, b, c, d])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadMacAddress;

impl fmt::Display for BadMacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address has six bytes in hexadecimal, such as 52:54:00:12:34:56")
    }
}

impl core::error::Error for BadMacAddress {}

impl FromStr for MacAddress {
    type Err = BadMacAddress;

    fn from_str(text: &str) -> Result<Self, BadMacAddress> {
        let mut parts = text.split(':');
        let mut address = [0; 6];
        for byte in &mut address {
            let part = parts.next().ok_or(BadMacAddress)?;
            let digits = part.bytes().all(|digit| digit.is_ascii_hexdigit());
            if !digits || part.len() > 2 {
                return Err(BadMacAddress);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| BadMacAddress)?;
        }
        match parts.next() {
            None => Ok(Self(address)),
            Some(_) => Err(BadMacAddress),
        }
    }
}

bitflags::bitflags! {
    /// Work on frames that one side can leave to the other.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Offloads: u8 {
        /// The checksum of a transport header ([`Checksum::Partial`]).
        const CHECKSUM = 1;
        /// Segmentation of TCP over IPv4.
        const TSO4 = 2;
        /// Segmentation of TCP over IPv6.
        const TSO6 = 4;
        /// Segmentation of TCP whose header says that congestion was
        /// experienced (ECN, RFC 3168), where the version is allowed.
        const TSO_ECN = 8;
        /// Segmentation of UDP over IPv4 into datagrams.
        const USO4 = 16;
        /// Segmentation of UDP over IPv6 into datagrams.
        const USO6 = 32;
    }
}

/// What is known of the checksum of a frame's transport header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Checksum {
    /// Nothing: it stands in the frame, right or wrong.
    #[default]
    Unknown,
    /// It stands in the frame, and was found right.
    Valid,
    /// It has yet to be made: the ones' complement sum of everything from
    /// `start` on, which includes what its field holds now (the sum of the
    /// pseudo header). Whoever gets such a frame from a link inside the host
    /// need not check it.
    Partial {
        /// Where in the frame the sum begins.
        start: u16,
        /// Where its field stands, from `start` on.
        offset: u16,
    },
}

/// How a frame is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SegmentKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either version of IP, into datagrams.
    Udp,
}

/// A frame that stands for several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Segmentation {
    /// How it is to be cut.
    pub kind: SegmentKind,
    /// The TCP header has its "congestion window reduced" flag set: only the
    /// first segment keeps it.
    pub ecn: bool,
    /// Most bytes of payload of each segment; not 0.
    pub size: u16,
    /// Bytes of the headers that every segment repeats: up to the end of the
    /// transport header. [`FrameMeta::check`] sets it from the headers.
    pub header_bytes: u16,
}

/// What accompanies a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FrameMeta {
    /// The checksum of its transport header.
    pub checksum: Checksum,
    /// Set for a frame that stands for several; its checksum is then
    /// [`Checksum::Partial`].
    pub segments: Option<Segmentation>,
}

/// What a peer says of a frame, and cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BadFrame {
    /// It has no Ethernet header.
    Short {
        /// Its length.
        bytes: usize,
    },
    /// It is longer than frames may be here.
    Long {
        /// Its length.
        bytes: usize,
        /// The longest.
        max: usize,
    },
    /// It leaves work to the receiver that was not agreed on.
    NotAgreed(Offloads),
    /// The field of its checksum does not lie in it.
    Checksum {
        /// Where the sum is said to begin.
        start: u16,
        /// Where the field is said to stand from there.
        offset: u16,
    },
    /// It is to be cut, and has no such headers; or its segments would be
    /// empty; or its checksum is not left to be made, as that of each segment
    /// has to be. Headers that end behind [`HEAD_BYTES`] count as none.
    Segmentation,
}

impl fmt::Display for BadFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short { bytes } => write!(f, "a frame of {bytes} bytes has no header"),
            Self::Long { bytes, max } => {
                write!(f, "a frame of {bytes} bytes, where {max} is the longest")
            }
            Self::NotAgreed(what) => write!(f, "a frame that needs {what:?}, which was not agreed"),
            Self::Checksum { start, offset } => {
                write!(f, "a checksum at {start} + {offset}, outside of its frame")
            }
            Self::Segmentation => f.write_str("a frame that cannot be cut as it says"),
        }
    }
}

impl core::error::Error for BadFrame {}

/// Most bytes at the start of a frame that [`FrameMeta::check`] may have to
/// see: tags, the longest IP header of either version that is understood, and
/// the longest TCP header.
pub const HEAD_BYTES: usize = 192;

impl FrameMeta {
    /// A frame about which nothing is said.
    pub const PLAIN: Self = Self {
        checksum: Checksum::Unknown,
        segments: None,
    };

    /// The agreement that a frame with this needs. UDP segmentation counts as
    /// that of IPv4 until [`check`](Self::check) has seen the frame.
    #[must_use]
    pub fn needs(&self) -> Offloads {
        let mut needs = Offloads::empty();
        if matches!(self.checksum, Checksum::Partial { .. }) {
            needs |= Offloads::CHECKSUM;
        }
        if let Some(segments) = &self.segments {
            needs |= match segments.kind {
                SegmentKind::Tcp4 => Offloads::TSO4,
                SegmentKind::Tcp6 => Offloads::TSO6,
                SegmentKind::Udp => Offloads::USO4,
            };
            needs.set(Offloads::TSO_ECN, segments.ecn);
        }
        needs
    }

    /// Checks what a peer says of a frame of `bytes` bytes against the frame:
    /// `head` is its start, at least its first [`HEAD_BYTES`] bytes or all of
    /// it, as a private copy. Frames that are not segmented may be up to `max`
    /// bytes long. Returns what is true of it, and a segmentation with the
    /// length of the headers that are there.
    ///
    /// # Errors
    /// [`BadFrame`] says what cannot be.
    #[inline]
    pub fn check(
        &self,
        head: &[u8],
        bytes: usize,
        max: usize,
        agreed: Offloads,
    ) -> Result<Self, BadFrame> {
        // Most frames, where many are short, leave no work to anybody: there is
        // nothing to look for.
        let partial = matches!(self.checksum, Checksum::Partial { .. });
        let fits = (ETHERNET_HEADER_BYTES..=max).contains(&bytes);
        if !partial && self.segments.is_none() && fits && head.len() >= ETHERNET_HEADER_BYTES {
            return Ok(*self);
        }
        self.check_work(head, bytes, max, agreed)
    }

    /// [`check`](Self::check) of a frame that leaves work, or does not fit.
    fn check_work(
        &self,
        head: &[u8],
        bytes: usize,
        max: usize,
        agreed: Offloads,
    ) -> Result<Self, BadFrame> {
        if bytes < ETHERNET_HEADER_BYTES || head.len() < ETHERNET_HEADER_BYTES {
            return Err(BadFrame::Short { bytes });
        }
        let max = if self.segments.is_some() {
            MAX_SEGMENTED_FRAME_BYTES
        } else {
            max
        };
        if bytes > max {
            return Err(BadFrame::Long { bytes, max });
        }
        if let Checksum::Partial { start, offset } = self.checksum {
            let field = usize::from(start) + usize::from(offset);
            if usize::from(start) < ETHERNET_HEADER_BYTES || field + 2 > bytes {
                return Err(BadFrame::Checksum { start, offset });
            }
        }
        let mut needs = self.needs();
        let mut checked = *self;
        if let Some(segments) = &mut checked.segments {
            // No more than all who check a frame have seen of it: they are to
            // agree.
            let head = head.get(..HEAD_BYTES).unwrap_or(head);
            let headers = Headers::parse(head).ok_or(BadFrame::Segmentation)?;
            let (version, transport) = match segments.kind {
                SegmentKind::Tcp4 => (IpVersion::V4, protocol::TCP),
                SegmentKind::Tcp6 => (IpVersion::V6, protocol::TCP),
                SegmentKind::Udp => (headers.version, protocol::UDP),
            };
            if needs.contains(Offloads::USO4) && headers.version == IpVersion::V6 {
                needs.remove(Offloads::USO4);
                needs.insert(Offloads::USO6);
            }
            let payload = headers.payload.ok_or(BadFrame::Segmentation)?;
            let as_said = headers.version == version
                && headers.protocol == transport
                && !headers.fragment
                && segments.size != 0
                // UDP knows no such flag.
                && !(segments.ecn && segments.kind == SegmentKind::Udp)
                && usize::from(payload) < bytes
                && self.checksum == headers.partial_checksum();
            if !as_said {
                return Err(BadFrame::Segmentation);
            }
            segments.header_bytes = payload;
        }
        let missing = needs - agreed;
        if missing.is_empty() {
            Ok(checked)
        } else {
            Err(BadFrame::NotAgreed(missing))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_printed() {
        let text = "52:54:00:12:ab:56";
        let address: MacAddress = text.parse().unwrap();
        assert_eq!(address.0, [0x52, 0x54, 0, 0x12, 0xab, 0x56]);
        let mut out = [0u8; 17];
        let mut at = 0;
        struct To<'a>(&'a mut [u8], &'a mut usize);
        impl fmt::Write for To<'_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                self.0[*self.1..*self.1 + text.len()].copy_from_slice(text.as_bytes());
                *self.1 += text.len();
                Ok(())
            }
        }
        fmt::write(&mut To(&mut out, &mut at), format_args!("{address}")).unwrap();
        assert_eq!(&out, text.as_bytes());
        for bad in [
            "",
            "52:54:00:12:ab",
            "52:54:00:12:ab:56:1",
            "5g:1:1:1:1:1",
            "+1:1:1:1:1:1",
        ] {
            assert_eq!(bad.parse::<MacAddress>(), Err(BadMacAddress), "{bad}");
        }
        assert!(MacAddress::BROADCAST.is_multicast());
        assert!(MacAddress::local(7).is_unicast());
        assert!(!MacAddress::default().is_unicast());
    }

    #[test]
    fn headers_count_as_far_as_everybody_sees_them() {
        // IPv6 with an extension header, then UDP.
        for (units, fits) in [(15, true), (16, false)] {
            let mut frame = [0; 300];
            frame[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
            frame[20] = 60;
            frame[54..56].copy_from_slice(&[protocol::UDP, units]);
            let transport = 14 + 40 + 8 * (u16::from(units) + 1);
            let meta = |ecn| FrameMeta {
                checksum: Checksum::Partial {
                    start: transport,
                    offset: 6,
                },
                segments: Some(Segmentation {
                    kind: SegmentKind::Udp,
                    ecn,
                    size: 10,
                    header_bytes: 0,
                }),
            };
            let all = Offloads::all();
            assert_eq!(usize::from(transport) + 8 <= HEAD_BYTES, fits);
            for head in [&frame[..HEAD_BYTES], &frame] {
                assert_eq!(meta(false).check(head, 300, 1518, all).is_ok(), fits);
                assert!(meta(true).check(head, 300, 1518, all).is_err());
            }
        }
    }

    #[test]
    fn a_checksum_must_lie_in_its_frame() {
        let head = [0; 64];
        let meta = |start, offset| FrameMeta {
            checksum: Checksum::Partial { start, offset },
            segments: None,
        };
        let check = |meta: FrameMeta| meta.check(&head, 64, 1518, Offloads::CHECKSUM);
        assert!(check(meta(34, 28)).is_ok());
        for (start, offset) in [(34, 29), (0, 20), (u16::MAX, u16::MAX), (62, 1)] {
            let bad = BadFrame::Checksum { start, offset };
            assert_eq!(check(meta(start, offset)), Err(bad));
        }
        assert_eq!(
            meta(34, 16).check(&head, 64, 1518, Offloads::empty()),
            Err(BadFrame::NotAgreed(Offloads::CHECKSUM))
        );
        let plain = FrameMeta::PLAIN;
        assert_eq!(
            plain.check(&head, 1519, 1518, Offloads::all()),
            Err(BadFrame::Long {
                bytes: 1519,
                max: 1518
            })
        );
        assert_eq!(
            plain.check(&head[..13], 13, 1518, Offloads::all()),
            Err(BadFrame::Short { bytes: 13 })
        );
    }
}
