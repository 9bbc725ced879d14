//! As much of the Internet protocols as offloads need: where the headers of a
//! frame lie, and the checksum that IP, TCP and UDP share (RFC 1071).

use crate::frame::{Checksum, ETHERNET_HEADER_BYTES, VLAN_TAG_BYTES, ethertype};

/// Numbers of transport protocols, as they stand in an IP header.
pub mod protocol {
    /// Transmission Control Protocol.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol.
    pub const UDP: u8 = 17;
    /// Internet Control Message Protocol for IPv6.
    pub const ICMPV6: u8 = 58;
}

/// Where the checksum stands in a TCP header (RFC 9293 §3.1).
pub const TCP_CHECKSUM: u16 = 16;
/// Where it stands in a UDP header (RFC 768).
pub const UDP_CHECKSUM: u16 = 6;
/// Where it stands in an IPv4 header (RFC 791 §3.1).
pub const IPV4_CHECKSUM: usize = 10;
/// Bytes of a UDP header.
pub const UDP_HEADER_BYTES: u16 = 8;
/// Shortest TCP header, in bytes.
pub const TCP_HEADER_BYTES: u16 = 20;
/// Shortest IPv4 header, in bytes.
pub const IPV4_HEADER_BYTES: u16 = 20;
/// Bytes of an IPv6 header without extensions.
pub const IPV6_HEADER_BYTES: u16 = 40;

/// A ones' complement sum of 16-bit big-endian words (RFC 1071).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum(u64);

impl Sum {
    /// Nothing added yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(0)
    }

    /// Adds one word.
    #[must_use]
    pub const fn word(self, word: u16) -> Self {
        Self(self.0 + word as u64)
    }

    /// Adds bytes, the first of which is the high half of a word; an odd last
    /// one is followed by a zero. So all pieces but the last must be of even
    /// length.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        // Sums of larger words are congruent: 2^16 ≡ 1 (mod 2^16 − 1).
        let mut sum = u128::from(self.0);
        let (words, rest) = bytes.as_chunks::<8>();
        let mut wide: u128 = 0;
        for word in words {
            wide += u128::from(u64::from_be_bytes(*word));
        }
        sum += wide;
        let mut last = [0; 8];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        sum += u128::from(u64::from_be_bytes(last));
        while sum >> 32 != 0 {
            sum = (sum >> 32) + (sum & 0xffff_ffff);
        }
        Self(sum as u64)
    }

    /// The sum so far, folded to 16 bits: what a partial checksum's field
    /// holds.
    #[must_use]
    pub const fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    /// The checksum: the complement of the sum.
    #[must_use]
    pub const fn finish(self) -> u16 {
        !self.fold()
    }
}

/// Version of the Internet Protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpVersion {
    /// Version 4 (RFC 791).
    V4,
    /// Version 6 (RFC 8200).
    V6,
}

/// Where the headers of a frame lie, counted from its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Headers {
    /// Version of IP.
    pub version: IpVersion,
    /// The IP header: behind the Ethernet header and its tags.
    pub network: u16,
    /// The transport header: behind IP options and extension headers.
    pub transport: u16,
    /// Which protocol that is.
    pub protocol: u8,
    /// What follows the transport header, if that is TCP or UDP and complete.
    pub payload: Option<u16>,
    /// It is a fragment of a packet, not all of which has a transport header.
    pub fragment: bool,
    /// Where the IP packet ends, as its header says; it may be beyond the
    /// frame, or before padding. 0 in the length field of IPv6 (or of an IPv4
    /// packet that is to be segmented) leaves it to the frame: then 0.
    pub end: u32,
}

/// Most VLAN tags that are looked behind.
const TAGS: usize = 2;
/// Most extension headers of IPv6 that are looked behind.
const EXTENSIONS: usize = 8;

/// IPv6 extension headers (RFC 8200 §4, RFC 4302).
mod extension {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION: u8 = 60;
}

fn byte(frame: &[u8], at: usize) -> Option<u8> {
    frame.get(at).copied()
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

impl Headers {
    /// Finds the headers of an IP packet in the start of a frame. `None` if it
    /// is none, or its headers are not all there, or make no sense.
    #[must_use]
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let mut network = ETHERNET_HEADER_BYTES;
        let mut kind = word(frame, network - 2)?;
        for _ in 0..TAGS {
            if !matches!(kind, ethertype::VLAN | ethertype::SERVICE_VLAN) {
                break;
            }
            network += VLAN_TAG_BYTES;
            kind = word(frame, network - 2)?;
        }
        match kind {
            ethertype::IPV4 => Self::parse_v4(frame, network),
            ethertype::IPV6 => Self::parse_v6(frame, network),
            _ => None,
        }
    }

    fn parse_v4(frame: &[u8], network: usize) -> Option<Self> {
        let first = byte(frame, network)?;
        let header = usize::from(first & 0xf) * 4;
        if first >> 4 != 4 || header < usize::from(IPV4_HEADER_BYTES) {
            return None;
        }
        let transport = network + header;
        frame.get(network..transport)?;
        let total = word(frame, network + 2)?;
        // More fragments follow, or others came before.
        let fragment = word(frame, network + 6)? & 0x3fff != 0;
        let protocol = byte(frame, network + 9)?;
        let end = match total {
            0 => 0,
            total => network as u32 + u32::from(total),
        };
        Self::with_transport(
            frame,
            IpVersion::V4,
            network,
            transport,
            protocol,
            fragment,
            end,
        )
    }

    fn parse_v6(frame: &[u8], network: usize) -> Option<Self> {
        if byte(frame, network)? >> 4 != 6 {
            return None;
        }
        let payload_bytes = word(frame, network + 4)?;
        let mut next = byte(frame, network + 6)?;
        let mut at = network + usize::from(IPV6_HEADER_BYTES);
        let end = match payload_bytes {
            0 => 0,
            bytes => at as u32 + u32::from(bytes),
        };
        frame.get(network..at)?;
        let mut fragment = false;
        for _ in 0..EXTENSIONS {
            let length = match next {
                extension::HOP_BY_HOP | extension::ROUTING | extension::DESTINATION => {
                    8 + 8 * usize::from(byte(frame, at + 1)?)
                }
                extension::FRAGMENT => {
                    fragment = true;
                    8
                }
                extension::AUTHENTICATION => 8 + 4 * usize::from(byte(frame, at + 1)?),
                _ => break,
            };
            next = byte(frame, at)?;
            at += length;
        }
        Self::with_transport(frame, IpVersion::V6, network, at, next, fragment, end)
    }

    fn with_transport(
        frame: &[u8],
        version: IpVersion,
        network: usize,
        transport: usize,
        protocol: u8,
        fragment: bool,
        end: u32,
    ) -> Option<Self> {
        let payload = match protocol {
            protocol::TCP => byte(frame, transport + 12)
                .map(|word| usize::from(word >> 4) * 4)
                .filter(|bytes| *bytes >= usize::from(TCP_HEADER_BYTES)),
            protocol::UDP => Some(usize::from(UDP_HEADER_BYTES)),
            _ => None,
        };
        let payload = payload
            .map(|bytes| transport + bytes)
            .filter(|end| *end <= frame.len() && !fragment);
        Some(Self {
            version,
            network: u16::try_from(network).ok()?,
            transport: u16::try_from(transport).ok()?,
            protocol,
            payload: payload.and_then(|payload| u16::try_from(payload).ok()),
            fragment,
            end,
        })
    }

    /// How a frame with these headers leaves its transport checksum to the
    /// receiver; [`Checksum::Unknown`] if it has none that could be left.
    #[must_use]
    pub fn partial_checksum(&self) -> Checksum {
        let start = self.transport;
        match (self.protocol, self.payload) {
            (protocol::TCP, Some(_)) => Checksum::Partial {
                start,
                offset: TCP_CHECKSUM,
            },
            (protocol::UDP, Some(_)) => Checksum::Partial {
                start,
                offset: UDP_CHECKSUM,
            },
            _ => Checksum::Unknown,
        }
    }

    /// The sum of the pseudo header of the packet's transport checksum
    /// (RFC 9293 §3.1, RFC 8200 §8.1), for a transport header with payload of
    /// `bytes` bytes. `None` if `frame` is not the one that was parsed.
    #[must_use]
    pub fn pseudo_header(&self, frame: &[u8], bytes: u32) -> Option<Sum> {
        let network = usize::from(self.network);
        let addresses = match self.version {
            IpVersion::V4 => frame.get(network + 12..network + 20)?,
            IpVersion::V6 => frame.get(network + 8..network + 40)?,
        };
        let [high, low] = [(bytes >> 16) as u16, bytes as u16];
        Some(
            Sum::new()
                .bytes(addresses)
                .word(u16::from(self.protocol))
                .word(high)
                .word(low),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, IPv4 with 4 bytes of options, UDP, 3 bytes of payload.
    const UDP4: [u8; 14 + 24 + 8 + 3] = [
        2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, //
        0x46, 0, 0, 35, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 0, //
        0, 1, 0, 2, 0, 11, 0, 0, //
        b'a', b'b', b'c',
    ];

    #[test]
    fn the_example_of_the_rfc() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::new().bytes(&bytes).fold(), 0xddf2);
        assert_eq!(Sum::new().bytes(&bytes).finish(), 0x220d);
    }

    #[test]
    fn sums_do_not_depend_on_how_even_pieces_are_cut() {
        let bytes: [u8; 101] = core::array::from_fn(|index| (index * 37) as u8 | 0x80);
        let whole = Sum::new().bytes(&bytes).fold();
        for cut in (0..=100).step_by(2) {
            let (one, two) = bytes.split_at(cut);
            assert_eq!(Sum::new().bytes(one).bytes(two).fold(), whole);
        }
        let slow = bytes.chunks(2).fold(0u32, |sum, pair| {
            let word = u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            let sum = sum + word;
            (sum & 0xffff) + (sum >> 16)
        });
        assert_eq!(u32::from(whole), slow);
    }

    #[test]
    fn headers_are_found_or_refused() {
        let headers = Headers::parse(&UDP4).unwrap();
        assert_eq!(
            headers,
            Headers {
                version: IpVersion::V4,
                network: 14,
                transport: 38,
                protocol: protocol::UDP,
                payload: Some(46),
                fragment: false,
                end: 49,
            }
        );
        for cut in 0..38 {
            assert_eq!(Headers::parse(&UDP4[..cut]), None, "{cut}");
        }
        assert_eq!(Headers::parse(&UDP4[..45]).unwrap().payload, None);
        let mut fragment = UDP4;
        fragment[20] = 0x20;
        let headers = Headers::parse(&fragment).unwrap();
        assert!(headers.fragment && headers.payload.is_none());
    }

    #[test]
    fn extensions_and_tags_are_looked_behind() {
        let mut frame = [0u8; 14 + 4 + 40 + 8 + 20];
        frame[12..18].copy_from_slice(&[0x81, 0, 0, 5, 0x86, 0xdd]);
        frame[18] = 0x60;
        frame[22..25].copy_from_slice(&[0, 28, 0]);
        frame[58] = protocol::TCP;
        frame[66 + 12] = 0x50;
        let headers = Headers::parse(&frame).unwrap();
        assert_eq!(headers.version, IpVersion::V6);
        assert_eq!((headers.network, headers.transport), (18, 66));
        assert_eq!(headers.payload, Some(86));
        assert_eq!(headers.end, 58 + 28);
        // An extension that leads out of the frame.
        frame[59] = 0xff;
        assert_eq!(Headers::parse(&frame).unwrap().payload, None);
    }

    #[test]
    fn tags_of_providers_are_looked_behind() {
        let mut frame = [0u8; 14 + 4 + 4 + UDP4.len() - 14];
        frame[..12].copy_from_slice(&UDP4[..12]);
        frame[12..20].copy_from_slice(&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5]);
        frame[20..].copy_from_slice(&UDP4[12..]);
        let headers = Headers::parse(&frame).unwrap();
        assert_eq!((headers.network, headers.payload), (22, Some(54)));
        // Linux segments behind one tag of either kind.
        frame.copy_within(16.., 12);
        frame[12..14].copy_from_slice(&[0x88, 0xa8]);
        assert_eq!(Headers::parse(&frame).unwrap().network, 18);
    }

    #[test]
    fn a_datagram_sums_to_what_its_field_should_be() {
        let headers = Headers::parse(&UDP4).unwrap();
        let sum = headers.pseudo_header(&UDP4, 11).unwrap();
        let checksum = sum.bytes(&UDP4[38..]).finish();
        let mut complete = UDP4;
        complete[44..46].copy_from_slice(&checksum.to_be_bytes());
        let all = headers.pseudo_header(&complete, 11).unwrap();
        assert_eq!(all.bytes(&complete[38..]).finish(), 0);
    }
}
