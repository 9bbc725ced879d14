//! Any frame, and anything that is said of it, through the check that every
//! side does and through what a link does in software: what the fuzz target
//! `frame_offload` runs.
//!
//! What is found to be true of a frame is true, and stays so; what comes of
//! the frame has the bytes that went in, and the checksums that a sum made word
//! by word finds.
#![forbid(unsafe_code)]

use super::net::meta;
use arbitrary::{Arbitrary, Result, Unstructured};
use pvkit_host::link::offload::{cut_size, finish, is_taken, needs};
use pvkit_join::packets::{completed, sums_up};
use pvkit_protocol::frame::{
    BadFrame, Checksum, DEFAULT_MTU, FrameMeta, HEAD_BYTES, Offloads, SegmentKind, max_frame_bytes,
};
use pvkit_protocol::inet::Headers;

/// Checks and finishes the frame that `data` holds, with what is said of it in
/// front.
///
/// # Panics
/// If an invariant does not hold.
pub fn frame_offload(data: &[u8]) {
    let _ = offload(Unstructured::new(data));
}

fn offload(mut u: Unstructured<'_>) -> Result<()> {
    let [takes, agreed, bits]: [u8; 3] = u.arbitrary()?;
    let takes = Offloads::from_bits_truncate(takes);
    let agreed = Offloads::from_bits_truncate(agreed);
    let mut said = meta(bits, &mut u)?;
    let repeat = match bits & 0x40 != 0 {
        true => usize::from(u16::arbitrary(&mut u)?),
        false => 0,
    };
    let mut frame = u.take_rest().to_vec();
    // Long frames need no long inputs.
    let last = frame.last().copied().unwrap_or(0);
    frame.extend((0..repeat).map(|index| last.wrapping_add(index as u8)));
    let headers = Headers::parse(&frame);
    if let Some(headers) = headers {
        let end = usize::from(headers.transport).max(usize::from(headers.network));
        assert!(end <= usize::from(u16::MAX));
        assert!(
            headers
                .payload
                .is_none_or(|at| usize::from(at) <= frame.len())
        );
        if bits & 0x80 != 0 {
            // What such a frame would say.
            said.checksum = headers.partial_checksum();
        }
    }
    let max = max_frame_bytes(DEFAULT_MTU);
    let head = &frame[..frame.len().min(HEAD_BYTES)];
    let checked = said.check(head, frame.len(), max, agreed);
    assert_eq!(
        checked,
        said.check(&frame, frame.len(), max, agreed),
        "the head is enough"
    );
    // Nobody may rely on a check: whatever is said, it ends, without a panic
    // and without more than it says.
    let mut copy = frame.clone();
    let mut count = (0, 0);
    let most = match &said.segments {
        Some(segments) if !is_taken(&frame, &said, takes) => cut_size(frame.len(), segments),
        _ => (1, frame.len()),
    };
    let unchecked = finish(&mut copy, &said, takes, |head, rest, _| {
        count = (count.0 + 1, count.1 + head.len() + rest.len());
    });
    assert!(
        count.0 <= most.0 && count.1 <= most.1,
        "{count:?} of {most:?}"
    );
    assert!(
        unchecked.is_ok() || count.0 == 0,
        "an error comes before all frames"
    );
    let Ok(truth) = checked else {
        return Ok(());
    };
    assert_eq!(truth.check(&frame, frame.len(), max, agreed), Ok(truth));
    assert!(agreed.contains(needs(&frame, &truth)));
    finished(&frame, &truth, takes);
    Ok(())
}

/// A frame that is what is said of it, finished for somebody who takes `takes`.
fn finished(frame: &[u8], truth: &FrameMeta, takes: Offloads) {
    let mut copy = frame.to_vec();
    let mut out = Vec::new();
    let result = finish(&mut copy, truth, takes, |head, rest, meta| {
        out.push(([head, rest].concat(), *meta));
    });
    match result {
        Err(error) => {
            // A segment that is longer than its header can say.
            assert_eq!(error, BadFrame::Segmentation);
            let segments = truth.segments.expect("a frame to be cut");
            let longest = usize::from(segments.size) + usize::from(segments.header_bytes);
            assert!(longest.min(frame.len()) > usize::from(u16::MAX));
        }
        Ok(false) => {
            assert_eq!(out.len(), 1);
            assert_eq!(out[0].0, frame, "nothing changes");
            assert!(takes.contains(needs(frame, &out[0].1)));
        }
        Ok(true) => {
            for (one, meta) in &out {
                assert!(takes.contains(needs(one, meta)), "{meta:?}");
                assert_eq!(meta.segments, None);
            }
            match (truth.segments, truth.checksum) {
                (Some(segments), _) => {
                    segments_are_right(frame, segments.kind, usize::from(segments.size), &out);
                }
                (None, Checksum::Partial { start, offset }) => {
                    assert_eq!(out.len(), 1);
                    assert_eq!(out[0].0, completed(frame, start, offset));
                }
                _ => panic!("there was nothing to do"),
            }
        }
    }
}

fn segments_are_right(frame: &[u8], kind: SegmentKind, size: usize, out: &[(Vec<u8>, FrameMeta)]) {
    let headers = Headers::parse(frame).expect("a packet");
    let payload = usize::from(headers.payload.expect("a transport header"));
    let transport = usize::from(headers.transport);
    let mut data = Vec::<u8>::new();
    for (index, (one, meta)) in out.iter().enumerate() {
        let own = Headers::parse(one).expect("a packet");
        assert_eq!(own.end as usize, one.len(), "its length is right");
        assert_eq!(own.payload, headers.payload);
        assert_eq!(own.protocol, headers.protocol);
        sums_up(one, &own, meta);
        if kind == SegmentKind::Udp {
            let bytes = u16::from_be_bytes([one[transport + 4], one[transport + 5]]);
            assert_eq!(usize::from(bytes), one.len() - transport);
        } else {
            let sequence = |frame: &[u8]| {
                u32::from_be_bytes(*frame[transport + 4..].first_chunk().expect("four bytes"))
            };
            let from = sequence(one).wrapping_sub(sequence(frame));
            assert_eq!(from as usize, data.len(), "its place is right");
        }
        let own = &one[payload..];
        assert!(own.len() == size || index + 1 == out.len() && own.len() < size);
        data.extend(own);
    }
    // A packet may end before its frame.
    let end = match headers.end as usize {
        end if end > payload && end < frame.len() => end,
        _ => frame.len(),
    };
    assert_eq!(data, frame[payload..end], "no byte is lost");
}
