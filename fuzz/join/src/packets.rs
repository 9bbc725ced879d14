//! Packets of TCP and UDP for tests of offloads, and a check of what comes out
//! of them that knows nothing of how they were made.
#![forbid(unsafe_code)]

use pvkit_protocol::frame::{
    Checksum, ETHERNET_HEADER_BYTES, FrameMeta, MacAddress, SegmentKind, Segmentation, ethertype,
};
use pvkit_protocol::inet::{
    Headers, IPV4_CHECKSUM, IpVersion, TCP_CHECKSUM, UDP_CHECKSUM, protocol,
};

/// A packet: IP of either version, TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// IPv6 instead of IPv4.
    pub v6: bool,
    /// UDP instead of TCP.
    pub udp: bool,
    /// Bytes of payload.
    pub payload: usize,
    /// The first byte of the payload; the others follow from it.
    pub seed: u8,
    /// Tells flows apart.
    pub port: u16,
}

/// The payload of a packet.
#[must_use]
pub fn payload(seed: u8, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|index| seed.wrapping_add((index ^ (index >> 8)) as u8))
        .collect()
}

/// A sum of big-endian words, carry by carry.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The bytes of a pseudo header, for a transport header and payload of so many
/// bytes.
fn pseudo(addresses: &[u8], protocol: u8, bytes: usize) -> Vec<u8> {
    let mut all = addresses.to_vec();
    all.extend([0, protocol]);
    all.extend((bytes as u16).to_be_bytes());
    all
}

impl Packet {
    fn ip_bytes(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    fn transport_bytes(&self) -> usize {
        if self.udp { 8 } else { 32 }
    }

    fn checksum_at(&self) -> u16 {
        if self.udp { UDP_CHECKSUM } else { TCP_CHECKSUM }
    }

    /// Bytes of all headers.
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        ETHERNET_HEADER_BYTES + self.ip_bytes() + self.transport_bytes()
    }

    /// The frame, from one station to another, with what is left to do on it:
    /// its checksum, and to be cut to pieces of `segment` bytes of payload if
    /// that is not 0.
    #[must_use]
    pub fn frame(&self, to: MacAddress, from: MacAddress, segment: u16) -> (Vec<u8>, FrameMeta) {
        let Self { v6, udp, .. } = *self;
        let data = payload(self.seed, self.payload);
        let transport_bytes = self.transport_bytes() + data.len();
        let proto = if udp { protocol::UDP } else { protocol::TCP };
        let mut frame = [to.0, from.0].concat();
        let addresses = if v6 {
            frame.extend(ethertype::IPV6.to_be_bytes());
            frame.extend([0x60, 0, 0, 0]);
            frame.extend((transport_bytes as u16).to_be_bytes());
            frame.extend([proto, 64]);
            let mut addresses = [0xfd; 32];
            addresses[15] = 1;
            addresses[31] = 2;
            addresses.to_vec()
        } else {
            frame.extend(ethertype::IPV4.to_be_bytes());
            let total = (20 + transport_bytes) as u16;
            let mut header = vec![0x45, 0];
            header.extend(total.to_be_bytes());
            header.extend([
                0x12, 0x34, 0x40, 0, 64, proto, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
            ]);
            let checksum = !sum(&header);
            header[IPV4_CHECKSUM..IPV4_CHECKSUM + 2].copy_from_slice(&checksum.to_be_bytes());
            let addresses = header[12..].to_vec();
            frame.extend(&header[..12]);
            addresses
        };
        frame.extend(&addresses);
        let partial = sum(&pseudo(&addresses, proto, transport_bytes)).to_be_bytes();
        frame.extend(self.port.to_be_bytes());
        frame.extend(80u16.to_be_bytes());
        if udp {
            frame.extend((transport_bytes as u16).to_be_bytes());
            frame.extend(partial);
        } else {
            // Sequence and acknowledgement; 8 words; PSH and ACK; window.
            frame.extend(1000u32.to_be_bytes());
            frame.extend(2000u32.to_be_bytes());
            frame.extend([0x80, 0x18, 0x10, 0]);
            frame.extend(partial);
            frame.extend([0, 0]);
            // A timestamp option.
            frame.extend([1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
        }
        frame.extend(data);
        let meta = FrameMeta {
            checksum: Checksum::Partial {
                start: (ETHERNET_HEADER_BYTES + self.ip_bytes()) as u16,
                offset: self.checksum_at(),
            },
            segments: (segment != 0).then_some(Segmentation {
                kind: match (udp, v6) {
                    (true, _) => SegmentKind::Udp,
                    (false, false) => SegmentKind::Tcp4,
                    (false, true) => SegmentKind::Tcp6,
                },
                ecn: false,
                size: segment,
                header_bytes: self.header_bytes() as u16,
            }),
        };
        (frame, meta)
    }

    /// Checks a frame that came out of this packet: all lengths and checksums,
    /// but not one that is left to the receiver as `meta` says. Returns where
    /// in the packet's payload it begins (of TCP) and its payload.
    ///
    /// # Panics
    /// If anything is wrong: this is for tests.
    #[must_use]
    pub fn check<'a>(&self, frame: &'a [u8], meta: &FrameMeta) -> (usize, &'a [u8]) {
        let ip = &frame[ETHERNET_HEADER_BYTES..];
        let transport = &ip[self.ip_bytes()..];
        let addresses = if self.v6 {
            assert_eq!(&frame[12..14], &[0x86, 0xdd]);
            assert_eq!(
                usize::from(u16::from_be_bytes([ip[4], ip[5]])),
                transport.len()
            );
            &ip[8..40]
        } else {
            assert_eq!(&frame[12..14], &[8, 0]);
            assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
            assert_eq!(sum(&ip[..20]), 0xffff, "the IP header's checksum");
            &ip[12..20]
        };
        let proto = if self.udp {
            protocol::UDP
        } else {
            protocol::TCP
        };
        let before = pseudo(addresses, proto, transport.len());
        let at = usize::from(self.checksum_at());
        match meta.checksum {
            Checksum::Partial { start, offset } => {
                assert_eq!(usize::from(start), frame.len() - transport.len());
                assert_eq!(usize::from(offset), at);
                assert_eq!(&transport[at..at + 2], &sum(&before).to_be_bytes());
            }
            _ => {
                let all = [&before, transport].concat();
                assert_eq!(sum(&all), 0xffff, "the checksum");
            }
        }
        assert_eq!(u16::from_be_bytes([transport[0], transport[1]]), self.port);
        let from = if self.udp {
            let bytes = u16::from_be_bytes([transport[4], transport[5]]);
            assert_eq!(usize::from(bytes), transport.len());
            0
        } else {
            let sequence = u32::from_be_bytes(transport[4..8].try_into().expect("four bytes"));
            (sequence - 1000) as usize
        };
        (from, &transport[self.transport_bytes()..])
    }
}

/// A frame with its checksum completed, as [`Checksum::Partial`] says.
///
/// # Panics
/// If its field is outside of the frame.
#[must_use]
pub fn completed(frame: &[u8], start: u16, offset: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let field = usize::from(start) + usize::from(offset);
    let checksum = match !sum(&frame[usize::from(start)..]) {
        // 0 means that there is none (RFC 768).
        0 if offset == UDP_CHECKSUM => 0xffff,
        checksum => checksum,
    };
    frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// Checks the sums of a packet of TCP or UDP whose headers stand where `headers`
/// says: that of an IPv4 header, and that of everything behind it, or what it
/// begins with if it is left to the receiver.
///
/// # Panics
/// If one is wrong.
pub fn sums_up(frame: &[u8], headers: &Headers, meta: &FrameMeta) {
    let (network, transport) = (headers.network.into(), usize::from(headers.transport));
    let addresses = match headers.version {
        IpVersion::V4 => {
            assert_eq!(sum(&frame[network..transport]), 0xffff, "the IP header's");
            &frame[network + 12..network + 20]
        }
        IpVersion::V6 => &frame[network + 8..network + 40],
    };
    let behind = &frame[transport..];
    let before = pseudo(addresses, headers.protocol, behind.len());
    match meta.checksum {
        Checksum::Partial { start, offset } => {
            assert_eq!(
                headers.partial_checksum(),
                Checksum::Partial { start, offset }
            );
            let at = usize::from(offset);
            assert_eq!(&behind[at..at + 2], &sum(&before).to_be_bytes());
        }
        _ => assert_eq!(sum(&[&before, behind].concat()), 0xffff, "the transport's"),
    }
}
