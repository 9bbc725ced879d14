//! Results are compared with frames that a slow model builds one by one, from
//! what their headers should say.

use super::*;
use pvkit_protocol::frame::MAX_SEGMENTED_FRAME_BYTES;

/// A packet, told by its fields.
#[derive(Clone)]
struct Packet {
    v6: bool,
    tags: usize,
    /// IPv4 options, or an IPv6 extension header, of 8 bytes.
    extended: bool,
    udp: bool,
    /// Bytes of TCP options.
    options: usize,
    identification: u16,
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
}

fn slow_sum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) * 256 + u32::from(*pair.get(1).unwrap_or(&0));
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    sum as u16
}

/// How a transport checksum is written.
#[derive(Clone, Copy, PartialEq)]
enum Written {
    Complete,
    Pseudo,
}

impl Packet {
    fn new(payload: usize) -> Self {
        Self {
            v6: false,
            tags: 0,
            extended: false,
            udp: false,
            options: 12,
            identification: 0xfffe,
            sequence: 0xffff_ff00,
            flags: 0x18,
            payload: (0..payload).map(|i| (i * 31 + i / 256) as u8).collect(),
        }
    }

    fn transport_at(&self) -> usize {
        14 + 4 * self.tags + if self.v6 { 40 } else { 20 } + if self.extended { 8 } else { 0 }
    }

    fn header_bytes(&self) -> usize {
        self.transport_at() + if self.udp { 8 } else { 20 + self.options }
    }

    fn checksum_offset(&self) -> u16 {
        if self.udp { 6 } else { 16 }
    }

    fn kind(&self) -> SegmentKind {
        match (self.udp, self.v6) {
            (true, _) => SegmentKind::Udp,
            (false, false) => SegmentKind::Tcp4,
            (false, true) => SegmentKind::Tcp6,
        }
    }

    fn meta(&self, size: u16) -> FrameMeta {
        FrameMeta {
            checksum: self.partial(),
            segments: Some(Segmentation {
                kind: self.kind(),
                ecn: self.flags & 0x80 != 0,
                size,
                header_bytes: self.header_bytes() as u16,
            }),
        }
    }

    fn partial(&self) -> Checksum {
        Checksum::Partial {
            start: self.transport_at() as u16,
            offset: self.checksum_offset(),
        }
    }

    fn build(&self, written: Written) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8];
        for tag in 0..self.tags {
            frame.extend([0x81, 0, 0x20, tag as u8 + 1]);
        }
        let transport = if self.udp { 8 } else { 20 + self.options } + self.payload.len();
        let protocol = if self.udp { 17 } else { 6 };
        let addresses: Vec<u8>;
        if self.v6 {
            let extension = if self.extended { 8 } else { 0 };
            frame.extend([0x86, 0xdd, 0x60, 0x12, 0x34, 0x56]);
            frame.extend(((transport + extension) as u16).to_be_bytes());
            frame.extend([if self.extended { 60 } else { protocol }, 64]);
            addresses = (0..32).map(|i| 0xf0 ^ i).collect();
            frame.extend(&addresses);
            if self.extended {
                frame.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
            }
        } else {
            let options = if self.extended { 8 } else { 0 };
            addresses = vec![10, 1, 2, 3, 192, 168, 255, 254];
            let mut ip = vec![0x45 + options as u8 / 4, 0x02];
            ip.extend(((20 + options + transport) as u16).to_be_bytes());
            ip.extend(self.identification.to_be_bytes());
            ip.extend([0x40, 0, 63, protocol, 0, 0]);
            ip.extend(&addresses);
            ip.extend(vec![1; options]);
            let checksum = !slow_sum(&[&ip]);
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
            frame.extend([8, 0]);
            frame.extend(ip);
        }
        assert_eq!(frame.len(), self.transport_at());
        let mut head = vec![0x12, 0x34, 0x56, 0x78];
        if self.udp {
            head.extend((transport as u16).to_be_bytes());
            head.extend([0, 0]);
        } else {
            head.extend(self.sequence.to_be_bytes());
            head.extend([9, 8, 7, 6, ((20 + self.options) / 4 * 16) as u8, self.flags]);
            head.extend([0x40, 0, 0, 0, 0, 0]);
            head.extend(vec![1; self.options]);
        }
        let pseudo = [
            addresses,
            (transport as u32).to_be_bytes().to_vec(),
            vec![0, 0, 0, protocol],
        ]
        .concat();
        let checksum = match written {
            Written::Pseudo => slow_sum(&[&pseudo]),
            Written::Complete => match !slow_sum(&[&pseudo, &head, &self.payload]) {
                0 if self.udp => 0xffff,
                checksum => checksum,
            },
        };
        let at = usize::from(self.checksum_offset());
        head[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        frame.extend(head);
        frame.extend(&self.payload);
        frame
    }

    /// The segments that this stands for.
    fn segments(&self, size: usize) -> Vec<Self> {
        let count = self.payload.len().div_ceil(size);
        let mut segments = Vec::new();
        for (index, chunk) in self.payload.chunks(size).enumerate() {
            let mut segment = self.clone();
            segment.payload = chunk.to_vec();
            segment.identification = self.identification.wrapping_add(index as u16);
            segment.sequence = self.sequence.wrapping_add((index * size) as u32);
            if index + 1 != count {
                segment.flags &= 0xf6;
            }
            if index != 0 {
                segment.flags &= 0x7f;
            }
            segments.push(segment);
        }
        segments
    }
}

type Out = Vec<(Vec<u8>, FrameMeta)>;

fn run(frame: &[u8], meta: &FrameMeta, takes: Offloads) -> Result<(bool, Out), BadFrame> {
    let mut frame = frame.to_vec();
    let mut out = Vec::new();
    let worked = finish(&mut frame, meta, takes, |head, rest, meta| {
        out.push(([head, rest].concat(), *meta));
    })?;
    Ok((worked, out))
}

fn variants() -> Vec<Packet> {
    let mut packets = Vec::new();
    for bits in 0..16 {
        for payload in [1, 2, 999, 1000, 1001, 2999, 20_011] {
            let mut packet = Packet::new(payload);
            packet.v6 = bits & 1 != 0;
            packet.udp = bits & 2 != 0;
            packet.extended = bits & 4 != 0;
            packet.tags = bits >> 3;
            packet.options = if bits & 1 != 0 { 0 } else { 12 };
            // FIN, PSH, ACK, CWR, ECE.
            packet.flags = if bits & 4 != 0 && !packet.udp {
                0xd9
            } else {
                0x18
            };
            packets.push(packet);
        }
    }
    packets
}

#[test]
fn segments_are_those_of_the_slow_model() {
    for packet in variants() {
        for size in [1000, 999, 1] {
            if size == 1 && packet.payload.len() > 3000 {
                continue;
            }
            let mut frame = packet.build(Written::Pseudo);
            let meta = packet.meta(size);
            let checked = meta.check(&frame, frame.len(), 1518, Offloads::all());
            assert_eq!(checked, Ok(meta));
            // A field that is filled without the length, as some drivers do,
            // comes to the same.
            let at = packet.transport_at() + usize::from(packet.checksum_offset());
            frame[at] ^= 0x55;
            let expected = packet.segments(usize::from(size));
            let (frames, bytes) = cut_size(frame.len(), &meta.segments.unwrap());
            let (worked, out) = run(&frame, &meta, Offloads::empty()).unwrap();
            assert!(worked);
            assert_eq!(out.len(), expected.len());
            assert_eq!(out.len(), frames);
            assert_eq!(out.iter().map(|(f, _)| f.len()).sum::<usize>(), bytes);
            for ((frame, meta), segment) in out.iter().zip(&expected) {
                assert_eq!(*frame, segment.build(Written::Complete));
                assert_eq!(*meta, FrameMeta::PLAIN);
            }
            let (_, out) = run(&frame, &meta, Offloads::CHECKSUM).unwrap();
            for ((frame, meta), segment) in out.iter().zip(&expected) {
                assert_eq!(*frame, segment.build(Written::Pseudo));
                assert_eq!(meta.checksum, segment.partial());
                assert_eq!(meta.segments, None);
                let takes = Offloads::CHECKSUM;
                assert_eq!(meta.check(frame, frame.len(), 65536, takes), Ok(*meta));
            }
        }
    }
}

#[test]
fn checksums_are_those_of_the_slow_model() {
    for packet in variants() {
        let frame = packet.build(Written::Pseudo);
        let meta = FrameMeta {
            checksum: packet.partial(),
            segments: None,
        };
        let (worked, out) = run(&frame, &meta, Offloads::empty()).unwrap();
        assert!(worked);
        let complete = packet.build(Written::Complete);
        assert_eq!(out, [(complete, FrameMeta::PLAIN)]);
        let (worked, out) = run(&frame, &meta, Offloads::CHECKSUM).unwrap();
        assert!(!worked);
        assert_eq!(out, [(frame, meta)]);
    }
}

#[test]
fn a_udp_checksum_of_nothing_is_sent_as_its_other_value() {
    let mut packet = Packet::new(2);
    packet.udp = true;
    packet.payload = vec![0, 0];
    let rest = u16::from_be_bytes(
        packet.build(Written::Complete)[packet.transport_at() + 6..][..2]
            .try_into()
            .unwrap(),
    );
    // What was left to 0xffff makes the sum 0xffff, and its complement 0.
    packet.payload = rest.to_be_bytes().to_vec();
    let frame = packet.build(Written::Pseudo);
    for segments in [None, packet.meta(100).segments] {
        let meta = FrameMeta {
            checksum: packet.partial(),
            segments,
        };
        let (_, out) = run(&frame, &meta, Offloads::empty()).unwrap();
        let field = &out[0].0[packet.transport_at() + 6..][..2];
        assert_eq!(field, [0xff, 0xff]);
        assert_eq!(out[0].0, packet.build(Written::Complete));
    }
}

#[test]
fn what_is_taken_is_passed_on() {
    let both = Offloads::CHECKSUM | Offloads::TSO4;
    let mut packet = Packet::new(5000);
    let frame = packet.build(Written::Pseudo);
    let (worked, out) = run(&frame, &packet.meta(1000), both).unwrap();
    assert!(!worked && out.len() == 1 && out[0].1 == packet.meta(1000));
    // Congestion flags have an agreement of their own.
    packet.flags |= 0x80;
    let frame = packet.build(Written::Pseudo);
    assert_eq!(run(&frame, &packet.meta(1000), both).unwrap().1.len(), 5);
    let ecn = both | Offloads::TSO_ECN;
    assert_eq!(run(&frame, &packet.meta(1000), ecn).unwrap().1.len(), 1);
    // And so has each version of IP under UDP.
    packet.udp = true;
    packet.flags = 0;
    for (v6, uso) in [(false, Offloads::USO4), (true, Offloads::USO6)] {
        packet.v6 = v6;
        let frame = packet.build(Written::Pseudo);
        for takes in [Offloads::USO4, Offloads::USO6] {
            let frames = if takes == uso { 1 } else { 5 };
            let takes = takes | Offloads::CHECKSUM;
            let (_, out) = run(&frame, &packet.meta(1000), takes).unwrap();
            assert_eq!(out.len(), frames, "{v6} {takes:?}");
        }
    }
    let valid = FrameMeta {
        checksum: Checksum::Valid,
        segments: None,
    };
    let (_, out) = run(&frame, &valid, Offloads::empty()).unwrap();
    assert_eq!(out[0].1, FrameMeta::PLAIN);
    let (_, out) = run(&frame, &valid, Offloads::CHECKSUM).unwrap();
    assert_eq!(out[0].1, valid);
}

#[test]
fn padding_is_not_payload() {
    let packet = Packet::new(3);
    let mut frame = packet.build(Written::Pseudo);
    frame.extend([0xee; 20]);
    let (_, out) = run(&frame, &packet.meta(1000), Offloads::empty()).unwrap();
    assert_eq!(out, [(packet.build(Written::Complete), FrameMeta::PLAIN)]);
}

#[test]
fn a_segment_that_no_header_can_tell_is_refused() {
    let mut packet = Packet::new(65_535 - 52);
    packet.payload.extend([1; 4]);
    let mut frame = packet.build(Written::Pseudo);
    frame[16..18].fill(0);
    assert!(frame.len() <= MAX_SEGMENTED_FRAME_BYTES);
    let meta = packet.meta(u16::MAX);
    let checked = meta.check(&frame, frame.len(), 1518, Offloads::all());
    assert_eq!(checked, Ok(meta));
    let refused = run(&frame, &meta, Offloads::empty());
    assert_eq!(refused, Err(BadFrame::Segmentation));
    let (_, out) = run(&frame, &packet.meta(1448), Offloads::empty()).unwrap();
    assert_eq!(out.len(), 46);
}

/// A small generator of numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }
}

#[test]
fn whatever_comes_in_comes_to_an_end() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let packets = variants();
    let mut finished = 0;
    for _ in 0..20_000 {
        let packet = &packets[random.below(packets.len())];
        if packet.payload.len() > 3000 {
            continue;
        }
        let mut frame = packet.build(Written::Pseudo);
        for _ in 0..random.below(4) {
            let at = random.below(frame.len().min(100));
            frame[at] = random.below(256) as u8;
        }
        frame.truncate(random.below(frame.len() * 2));
        let mut meta = packet.meta(random.below(2000) as u16);
        if random.below(4) == 0 {
            meta.segments = None;
        }
        if random.below(4) == 0 {
            meta.checksum = Checksum::Partial {
                start: random.below(70_000) as u16,
                offset: random.below(70_000) as u16,
            };
        }
        if let Some(segments) = &mut meta.segments
            && random.below(4) == 0
        {
            segments.header_bytes = random.below(300) as u16;
        }
        let takes = Offloads::from_bits_truncate(random.below(64) as u8);
        let checked = meta.check(&frame, frame.len(), 65_536, Offloads::all());
        match run(&frame, &meta, takes) {
            Ok((_, out)) => {
                finished += 1;
                for (frame, left) in out {
                    if checked.is_ok() {
                        let checked = left.check(&frame, frame.len(), 65_536, takes);
                        assert!(checked.is_ok(), "{checked:?} of {left:?}");
                    }
                }
            }
            Err(_) => assert!(checked != Ok(meta)),
        }
    }
    assert!(finished > 1000);
}
