//! What a network stack without offloads of its own leaves to a driver here:
//! partial checksums, segmentation, and the check of what nobody has checked.
#![forbid(unsafe_code)]

use super::{Checksum, FrameMeta, NetLimits, Offloads, SegmentKind, Segmentation};
use pvkit_protocol::inet::{Headers, IPV6_HEADER_BYTES, IpVersion, protocol};
use pvkit_protocol::inet::{TCP_CHECKSUM, UDP_CHECKSUM, UDP_HEADER_BYTES};

/// Where transport header and payload end in a frame of `bytes` bytes: before
/// padding.
fn end_of(headers: &Headers, bytes: usize) -> usize {
    match usize::try_from(headers.end) {
        Ok(end) if end != 0 => end,
        _ => bytes,
    }
}

/// Leaves the checksum of a TCP or UDP frame to the device: puts the sum of the
/// pseudo header into its field. With `segment`, the frame is to be cut into
/// segments of so many bytes of payload. Other frames are as they should be.
pub(super) fn leave(frame: &mut [u8], limits: &NetLimits, segment: Option<u16>) -> FrameMeta {
    if !limits.transmit.contains(Offloads::CHECKSUM) {
        return FrameMeta::PLAIN;
    }
    let Some(headers) = Headers::parse(frame) else {
        return FrameMeta::PLAIN;
    };
    let checksum = headers.partial_checksum();
    let Checksum::Partial { start, offset } = checksum else {
        return FrameMeta::PLAIN;
    };
    let end = end_of(&headers, frame.len());
    let Some(bytes) = end.checked_sub(start.into()).filter(|_| end <= frame.len()) else {
        return FrameMeta::PLAIN;
    };
    let Some(sum) = headers.pseudo_header(frame, bytes as u32) else {
        return FrameMeta::PLAIN;
    };
    let field = usize::from(start) + usize::from(offset);
    let Some(place) = frame.get_mut(field..field + 2) else {
        return FrameMeta::PLAIN;
    };
    place.copy_from_slice(&sum.fold().to_be_bytes());
    let payload = headers.payload.unwrap_or(u16::MAX);
    let kind = match headers.version {
        IpVersion::V4 => SegmentKind::Tcp4,
        IpVersion::V6 => SegmentKind::Tcp6,
    };
    // What fits one segment is an ordinary frame.
    let size = segment
        .filter(|size| headers.protocol == protocol::TCP && *size != 0)
        .filter(|size| end > usize::from(payload) + usize::from(*size));
    FrameMeta {
        checksum,
        segments: size.map(|size| Segmentation {
            kind,
            ecn: false,
            size,
            header_bytes: payload,
        }),
    }
}

/// Whether the checksum of a frame may be right: that of TCP or UDP is, or
/// there is none. For frames of which nobody has said so.
pub(super) fn is_right(frame: &[u8]) -> bool {
    let Some(headers) = Headers::parse(frame) else {
        return true;
    };
    let start = usize::from(headers.transport);
    let (field, optional) = match headers.protocol {
        _ if headers.fragment => return true,
        protocol::TCP => (usize::from(TCP_CHECKSUM), false),
        // Only IPv4 allows datagrams without (RFC 768, RFC 8200 §8.1).
        protocol::UDP => (usize::from(UDP_CHECKSUM), headers.version == IpVersion::V4),
        _ => return true,
    };
    let end = end_of(&headers, frame.len());
    let Some(packet) = frame.get(start..end) else {
        return false;
    };
    let Some(stored) = packet.get(field..field + 2) else {
        return false;
    };
    if optional && stored == [0, 0] {
        return true;
    }
    // What lies behind the end of a datagram is not part of it (RFC 768).
    let packet = match (headers.protocol, packet.get(4..6)) {
        (protocol::UDP, Some(&[high, low])) => {
            let bytes = usize::from(u16::from_be_bytes([high, low]));
            match packet.get(..bytes) {
                Some(packet) if bytes >= usize::from(UDP_HEADER_BYTES) => packet,
                _ => return false,
            }
        }
        _ => packet,
    };
    headers
        .pseudo_header(frame, packet.len() as u32)
        .is_some_and(|sum| sum.bytes(packet).finish() == 0)
}

/// Whether a stack that checks nothing may have this frame, where the device
/// was asked to say what it knows.
pub(super) fn may_pass(frame: &[u8], meta: &FrameMeta) -> bool {
    match meta.checksum {
        Checksum::Valid | Checksum::Partial { .. } => true,
        Checksum::Unknown => is_right(frame),
    }
}

/// Longest frame to be cut that a device takes, Ethernet header included: an IP
/// packet whose length field holds.
#[cfg_attr(not(feature = "smoltcp"), allow(dead_code))]
pub(super) const fn longest_segmented(version: IpVersion) -> usize {
    let header = match version {
        IpVersion::V4 => 0,
        // The field does not count the header.
        IpVersion::V6 => IPV6_HEADER_BYTES as usize,
    };
    pvkit_protocol::frame::ETHERNET_HEADER_BYTES + u16::MAX as usize + header
}

#[cfg(test)]
mod tests {
    use super::{is_right, leave, may_pass};
    use crate::net::{Checksum, FrameMeta, NetLimits, Offloads};
    use pvkit_protocol::inet::{Headers, Sum};

    const LIMITS: NetLimits = NetLimits {
        mac: None,
        mtu: 1500,
        transmit: Offloads::all(),
        receive: Offloads::all(),
        pairs: 1,
    };

    /// IPv4 and TCP, with this many bytes of payload, and padding.
    fn tcp4<const N: usize>(payload: usize) -> [u8; N] {
        let mut frame: [u8; N] = core::array::from_fn(|index| index as u8);
        frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        frame[16..18].copy_from_slice(&(40 + payload as u16).to_be_bytes());
        frame[20..24].copy_from_slice(&[0x40, 0, 64, 6]);
        frame[46] = 0x50;
        frame[50..52].fill(0);
        frame
    }

    #[test]
    fn what_is_left_to_the_device_comes_out_right() {
        let mut frame: [u8; 70] = tcp4(10);
        assert!(!is_right(&frame));
        let meta = leave(&mut frame, &LIMITS, None);
        let checksum = Checksum::Partial {
            start: 34,
            offset: 16,
        };
        assert_eq!(
            meta,
            FrameMeta {
                checksum,
                segments: None
            }
        );
        assert!(may_pass(&frame, &meta), "as it is");
        assert!(!may_pass(&frame, &FrameMeta::PLAIN));
        // As the device does it, without the six bytes of padding.
        let sum = Sum::new().bytes(&frame[34..64]).finish();
        frame[50..52].copy_from_slice(&sum.to_be_bytes());
        assert!(is_right(&frame));
        frame[69] ^= 1;
        assert!(is_right(&frame), "padding");
        frame[60] ^= 1;
        assert!(!is_right(&frame));
    }

    /// A datagram may end before its packet does.
    #[test]
    fn a_datagram_is_checked_as_far_as_it_goes() {
        let mut frame: [u8; 64] = core::array::from_fn(|index| index as u8);
        frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        frame[16..18].copy_from_slice(&50u16.to_be_bytes());
        frame[20..24].copy_from_slice(&[0x40, 0, 64, 17]);
        frame[38..42].copy_from_slice(&[0, 20, 0, 0]);
        let headers = Headers::parse(&frame).unwrap();
        let sum = headers.pseudo_header(&frame, 20).unwrap();
        let sum = sum.bytes(&frame[34..54]).finish();
        frame[40..42].copy_from_slice(&sum.to_be_bytes());
        assert!(is_right(&frame));
        frame[60] ^= 1;
        assert!(is_right(&frame), "behind it");
        frame[50] ^= 1;
        assert!(!is_right(&frame));
        for length in [7u16, 31] {
            frame[38..40].copy_from_slice(&length.to_be_bytes());
            assert!(!is_right(&frame), "{length}");
        }
    }

    #[test]
    fn only_what_is_longer_than_a_segment_is_cut() {
        let mut frame: [u8; 54 + 100] = tcp4(100);
        assert_eq!(leave(&mut frame, &LIMITS, Some(100)).segments, None);
        let meta = leave(&mut frame, &LIMITS, Some(99));
        let checked = meta.check(&frame, frame.len(), 1518, Offloads::all());
        assert_eq!(checked, Ok(meta));
        assert_eq!(meta.segments.map(|segments| segments.size), Some(99));
    }

    #[test]
    fn frames_that_are_none_of_this_stay_as_they_are() {
        let none = NetLimits {
            transmit: Offloads::empty(),
            ..LIMITS
        };
        let original: [u8; 64] = tcp4(10);
        let mut frame = original;
        assert_eq!(leave(&mut frame, &none, None), FrameMeta::PLAIN);
        assert_eq!(frame, original);
        for bytes in 0..54 {
            let mut short = original;
            let meta = leave(&mut short[..bytes], &LIMITS, None);
            assert_eq!(meta, FrameMeta::PLAIN, "{bytes}");
            assert_eq!(short, original, "{bytes}");
        }
        // A packet that says it is longer than its frame.
        let mut long: [u8; 64] = tcp4(1000);
        assert_eq!(leave(&mut long, &LIMITS, None), FrameMeta::PLAIN);
        assert!(!is_right(&long));
        // ARP.
        frame[12..14].copy_from_slice(&[8, 6]);
        assert!(is_right(&frame));
    }
}
