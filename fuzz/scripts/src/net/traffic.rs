//! Frames on their way: what was sent, and has to come in.
//!
//! Each frame has a number, in the address that it comes from: what is done to
//! a frame on its way changes no byte of that.
#![forbid(unsafe_code)]

use super::action::Frame;
use pvkit_join::packets::{Packet, completed, payload};
use pvkit_protocol::frame::{Checksum, FrameMeta, MacAddress, Segmentation, ethertype};
use std::collections::BTreeMap;

/// Most bytes of a packet's payload.
pub(crate) const MOST_PAYLOAD: usize = 8192;
/// Most bytes of a frame that is no packet: a few more than are allowed.
const MOST_RAW: usize = 1530;
/// Segments of up to 64 bytes more, with any of the headers, are not too long.
const MOST_SEGMENT: u16 = 1368;
/// Addresses below this are not those of numbered frames.
const FIRST: u32 = 0x1_0000;

/// What comes in.
#[derive(Debug)]
enum What {
    /// The frame, but for its checksum, that was to be completed as `meta` says.
    Whole { frame: Vec<u8>, meta: FrameMeta },
    /// The packet, in one or several pieces.
    Packet(Packet),
}

/// A frame that was sent.
#[derive(Debug)]
struct Sent {
    what: What,
    /// It must come in. Others may.
    sure: bool,
    /// Bytes of payload that came in already.
    got: usize,
    /// Bytes that it takes where it waits, at the most.
    cost: usize,
    /// The lane that it was sent by, if the other side has several.
    lane: Option<usize>,
}

/// A frame that can be sent.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) bytes: Vec<u8>,
    pub(crate) meta: FrameMeta,
    /// Nobody lies about it.
    pub(crate) honest: bool,
    number: u32,
    packet: Option<Packet>,
}

/// Frames in one direction.
#[derive(Debug)]
pub(crate) struct Traffic {
    to: MacAddress,
    next: u32,
    sent: BTreeMap<u32, Sent>,
    /// What came in last, of each lane.
    last: [u32; 2],
}

impl Traffic {
    pub(crate) fn new(to: MacAddress) -> Self {
        Self {
            to,
            next: FIRST,
            sent: BTreeMap::new(),
            last: [0; 2],
        }
    }

    /// Makes a frame. One that is too short for a number is none of these.
    pub(crate) fn make(&mut self, frame: &Frame) -> Made {
        let number = self.next;
        self.next += 1;
        let from = MacAddress::local(number);
        let mut packet = None;
        let (mut bytes, mut meta);
        if frame.raw {
            bytes = [self.to.0, from.0].concat();
            bytes.extend(ethertype::LOCAL_1.to_be_bytes());
            bytes.extend(payload(number as u8, MOST_RAW));
            bytes.truncate(usize::from(frame.bytes) % (MOST_RAW + 1));
            meta = FrameMeta::PLAIN;
        } else {
            let made = Packet {
                v6: frame.v6,
                udp: frame.udp,
                payload: usize::from(frame.bytes) % (MOST_PAYLOAD + 1),
                seed: number as u8,
                port: number as u16,
            };
            let segment = match frame.segment {
                0 => 0,
                some => 64 + some % MOST_SEGMENT,
            };
            (bytes, meta) = made.frame(self.to, from, segment);
            packet = Some(made);
        }
        let truth = meta;
        if let Some(lie) = frame.lie {
            meta = lie.about(&truth);
        }
        Made {
            bytes,
            meta,
            honest: meta == truth,
            number,
            packet,
        }
    }

    /// Bytes on their way, at the most.
    pub(crate) fn cost(&self) -> usize {
        self.sent.values().map(|sent| sent.cost).sum()
    }

    /// The frame was sent, by a lane if there are several, by somebody who
    /// found it to be what is said of it. It comes in for sure, if that is so
    /// and nobody loses it.
    pub(crate) fn sent(&mut self, made: Made, lane: Option<usize>, sure: bool) {
        let cost = match &made.meta.segments {
            // Headers of each segment, and what a switch keeps about it.
            Some(segments) => made.bytes.len() * (2 + 100 / usize::from(segments.size.max(1))),
            None => made.bytes.len() + 64,
        };
        let what = match (made.packet, &made.meta.segments) {
            (Some(packet), Some(_)) => What::Packet(packet),
            (Some(packet), None) if made.honest => What::Packet(packet),
            _ => What::Whole {
                frame: made.bytes,
                meta: made.meta,
            },
        };
        // Whoever cuts it finds that its segments are too long.
        let long = |segments: Segmentation| segments.size >= 64 + MOST_SEGMENT;
        let sent = Sent {
            what,
            sure: sure && !made.meta.segments.is_some_and(long),
            got: 0,
            cost,
            lane,
        };
        self.sent.insert(made.number, sent);
    }

    /// Nothing is on its way any more.
    pub(crate) fn forget(&mut self) {
        self.sent.clear();
    }

    /// Whatever is on its way may be lost.
    pub(crate) fn doubt(&mut self) {
        for sent in self.sent.values_mut() {
            sent.sure = false;
        }
    }

    /// A frame came in at a lane, and nobody has meddled with it.
    pub(crate) fn came_in(&mut self, lane: usize, frame: &[u8], meta: &FrameMeta) {
        let number = u32::from_be_bytes(*frame[8..].first_chunk().expect("an address"));
        let sent = self.sent.get_mut(&number);
        let sent = sent.unwrap_or_else(|| panic!("frame {number:#x} comes in once"));
        let last = &mut self.last[sent.lane.unwrap_or(lane)];
        assert!(number >= *last, "frames stay in order");
        *last = number;
        let over = match &sent.what {
            What::Whole {
                frame: whole,
                meta: said,
            } => {
                let kept = meta.checksum == said.checksum;
                match said.checksum {
                    Checksum::Partial { start, offset } if !kept => {
                        assert_eq!(frame, completed(whole, start, offset));
                    }
                    _ => assert_eq!(frame, whole),
                }
                true
            }
            What::Packet(packet) => {
                let (from, data) = packet.check(frame, meta);
                if !sent.sure {
                    // Some segments may be lost. Those of TCP say where they
                    // were.
                    sent.got = match packet.udp {
                        true => return,
                        false => from,
                    };
                }
                assert!(
                    packet.udp || from == sent.got,
                    "segments of {number:#x} stay in order: {from}, not {}",
                    sent.got
                );
                let all = payload(packet.seed, packet.payload);
                assert_eq!(&all[sent.got..sent.got + data.len()], data);
                sent.got += data.len();
                sent.got == packet.payload
            }
        };
        if over {
            self.sent.remove(&number);
        }
    }

    /// Everything came in that had to.
    pub(crate) fn check_end(&self) {
        let lost = self.sent.iter().find(|(_, sent)| sent.sure);
        assert!(lost.is_none(), "lost: {lost:?}");
    }
}
