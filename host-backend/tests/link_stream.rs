//! Streams, with peers that behave, and peers that do not.

mod common;

use common::skipped;
use pvkit_host::event::is_readable;
use pvkit_host::link::stream::{Stream, StreamError, StreamOptions};
use pvkit_host::link::{
    Delivered, FrameSink, Link, LinkError, LinkEvents, LinkLane, Sent, TxFrame, Waits,
};
use pvkit_host::memory::IoBufs;
use pvkit_host::worker::{Interest, Signal, SignalCounter};
use pvkit_protocol::frame::{Checksum, FrameMeta, Offloads, SegmentKind, Segmentation};
use pvkit_protocol::inet::Headers;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Default)]
struct Got {
    frames: Vec<Vec<u8>>,
    full: bool,
}

impl FrameSink for Got {
    fn deliver(&mut self, frame: &[u8], meta: &FrameMeta) -> Delivered {
        if self.full {
            return Delivered::Full;
        }
        assert_eq!(*meta, FrameMeta::PLAIN);
        self.frames.push(frame.to_vec());
        Delivered::Taken
    }
}

#[derive(Debug, Default)]
struct Told(SignalCounter);

impl LinkEvents for Told {
    fn link_changed(&self) {
        self.0.signal();
    }
}

const RECEIVE: Waits = Waits {
    receive: true,
    send: false,
};
const SEND: Waits = Waits {
    receive: false,
    send: true,
};

fn put(lane: &mut dyn LinkLane, head: &[u8], meta: FrameMeta) -> Sent {
    let rest = IoBufs::new();
    lane.send(&TxFrame {
        head,
        rest: &rest,
        meta,
    })
}

fn receive(lane: &mut dyn LinkLane) -> Vec<Vec<u8>> {
    let mut got = Got::default();
    let taken = lane.receive(&mut got, 1000);
    assert_eq!(taken as usize, got.frames.len());
    got.frames
}

fn frame(bytes: usize, number: u8) -> Vec<u8> {
    let mut frame = vec![number; bytes];
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// A frame as it stands in the stream.
fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes(), frame].concat()
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn pair() -> (Stream, Box<dyn LinkLane>, UnixStream) {
    let (own, peer) = UnixStream::pair().unwrap();
    let stream = Stream::from_fd(own.into(), &StreamOptions::default()).unwrap();
    let lane = stream.lane(0).unwrap();
    (stream, lane, peer)
}

#[test]
fn frames_go_both_ways_in_batches() {
    let (stream, mut lane, mut peer) = pair();
    assert!(stream.is_up());
    let sent: Vec<Vec<u8>> = (0..100).map(|n| frame(14 + n * 15, n as u8)).collect();
    for one in &sent {
        assert_eq!(put(&mut *lane, one, FrameMeta::PLAIN), Sent::Done);
    }
    peer.set_nonblocking(true).unwrap();
    assert!(peer.read(&mut [0; 10]).is_err(), "the batch has not ended");
    lane.flush();
    let expected: Vec<u8> = sent.iter().flat_map(|one| framed(one)).collect();
    let mut bytes = vec![0; expected.len() + 1];
    // All of it came with one write, so one read gets it.
    assert_eq!(peer.read(&mut bytes).unwrap(), expected.len());
    assert_eq!(bytes[..expected.len()], expected);
    let counters = lane.counters();
    assert_eq!(counters.sent.get(), 100);
    assert_eq!(counters.sent_bytes.get() as usize, expected.len() - 400);

    peer.write_all(&expected).unwrap();
    let mut got = Got::default();
    assert_eq!(lane.receive(&mut got, 30), 30, "no more than asked for");
    assert!(lane.arm(RECEIVE), "there is more");
    got.full = true;
    assert_eq!(lane.receive(&mut got, 30), 0);
    got.full = false;
    assert_eq!(lane.receive(&mut got, 1000), 70);
    assert_eq!(got.frames, sent);
    assert!(!lane.arm(RECEIVE));
    assert_eq!(counters.received.get(), 100);
}

#[test]
fn a_peer_may_dribble() {
    let (_stream, mut lane, mut peer) = pair();
    let mut got = Vec::new();
    for byte in [framed(&frame(60, 1)), framed(&frame(14, 2))].concat() {
        peer.write_all(&[byte]).unwrap();
        got.extend(receive(&mut *lane));
    }
    assert_eq!(got, [frame(60, 1), frame(14, 2)]);
    assert_eq!(lane.counters().receive_errors.get(), 0);
}

#[test]
fn what_cannot_be_a_frame_is_counted() {
    let (stream, mut lane, mut peer) = pair();
    // Too short for a header, and longer than this link's frames: the stream
    // stays in step.
    for bad in [vec![0; 13], vec![0; 1519], vec![1]] {
        peer.write_all(&framed(&bad)).unwrap();
    }
    peer.write_all(&framed(&frame(1518, 3))).unwrap();
    assert_eq!(receive(&mut *lane), [frame(1518, 3)]);
    assert_eq!(lane.counters().receive_errors.get(), 3);
    assert!(stream.is_up());
    // Out of step: nothing that follows makes sense.
    for length in [0u32, 70_000, u32::MAX] {
        let (stream, mut lane, mut peer) = pair();
        let told = Arc::new(Told::default());
        stream.connect(told.clone());
        peer.write_all(&framed(&frame(20, 4))).unwrap();
        peer.write_all(&length.to_be_bytes()).unwrap();
        peer.write_all(&framed(&frame(20, 5))).unwrap();
        assert_eq!(receive(&mut *lane), [frame(20, 4)]);
        assert_eq!(lane.counters().receive_errors.get(), 1);
        assert!(!stream.is_up());
        assert_eq!(told.0.count(), 1);
        lane.sources(RECEIVE, &mut |_, _| panic!("nothing will come"));
        put(&mut *lane, &frame(20, 6), FrameMeta::PLAIN);
        assert_eq!(lane.counters().send_drops.get(), 1);
        let mut rest = Vec::new();
        peer.read_to_end(&mut rest).unwrap_or_default();
        assert!(rest.is_empty());
    }
}

#[test]
fn a_peer_that_closes_within_a_frame_is_counted() {
    let (stream, mut lane, mut peer) = pair();
    let bytes = [framed(&frame(60, 1)), framed(&frame(60, 2))].concat();
    peer.write_all(&bytes[..100]).unwrap();
    drop(peer);
    // The write finds out first; what came before is taken all the same.
    put(&mut *lane, &frame(60, 3), FrameMeta::PLAIN);
    lane.flush();
    assert!(!stream.is_up());
    assert_eq!(receive(&mut *lane), [frame(60, 1)]);
    let counters = lane.counters();
    assert_eq!(counters.receive_errors.get(), 1);
    assert_eq!((counters.sent.get(), counters.send_drops.get()), (0, 1));
    lane.sources(RECEIVE, &mut |_, _| panic!("nothing will come"));
    assert!(lane.deadline().is_none());
}

#[test]
fn a_full_socket_is_waited_for() {
    let (_stream, mut lane, mut peer) = pair();
    let mut put_in = 0u64;
    while put(&mut *lane, &frame(1500, put_in as u8), FrameMeta::PLAIN) == Sent::Done {
        put_in += 1;
        lane.flush();
        assert!(put_in < 10_000, "memory is bounded");
    }
    let counters = lane.counters();
    assert!(counters.sent.get() < put_in, "some wait in the lane");
    assert!(!lane.arm(SEND));
    let mut named = Vec::new();
    lane.sources(SEND, &mut |_, interest| named.push(interest));
    assert_eq!(named, [Interest::Writable]);
    // The peer reads, and nothing is lost or out of order.
    peer.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    wait_for("all comes through", || {
        while let Ok(count) = peer.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..count]);
        }
        receive(&mut *lane);
        (bytes.len() as u64 == put_in * 1504).then_some(())
    });
    for (number, one) in bytes.chunks(1504).enumerate() {
        assert_eq!(one, framed(&frame(1500, number as u8)));
    }
    assert_eq!(counters.sent.get(), put_in);
    assert_eq!(counters.send_drops.get(), 0);
    assert!(lane.arm(SEND), "there is room");
    named.clear();
    lane.sources(SEND, &mut |_, interest| named.push(interest));
    assert!(named.is_empty());

    // What is still in the lane when the peer goes is lost, and counted.
    let mut more = 0;
    while put(&mut *lane, &frame(1500, 0), FrameMeta::PLAIN) == Sent::Done {
        more += 1;
    }
    drop(peer);
    lane.flush();
    let done = counters.sent.get() - put_in + counters.send_drops.get();
    assert_eq!(done, more);
    assert!(lane.arm(SEND), "a frame that waits can be dropped now");
}

#[test]
fn offloads_are_done_in_software() {
    let (stream, mut lane, mut peer) = pair();
    assert_eq!(stream.shape().cheap, Offloads::empty());
    stream.set_receive(Offloads::all()).unwrap();
    let payload: Vec<u8> = (0..60_000u32).map(|index| (index % 251) as u8).collect();
    let mut big = vec![2; 12];
    big.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    big.extend((20 + 60_000u16).to_be_bytes());
    big.extend([6, 64]);
    big.extend([0x20; 32]);
    big.extend([
        0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
    ]);
    big.extend(&payload);
    let mut meta = FrameMeta {
        checksum: Checksum::Partial {
            start: 54,
            offset: 16,
        },
        segments: Some(Segmentation {
            kind: SegmentKind::Tcp6,
            ecn: false,
            size: 1440,
            header_bytes: 74,
        }),
    };
    assert_eq!(put(&mut *lane, &big, meta), Sent::Done);
    // Cut so small that it would take more memory than there is for all.
    if let Some(segments) = &mut meta.segments {
        segments.size = 1;
    }
    assert_eq!(put(&mut *lane, &big, meta), Sent::Done);
    lane.flush();
    let counters = lane.counters();
    assert_eq!((counters.sent.get(), counters.finished.get()), (1, 1));
    assert_eq!(counters.send_drops.get(), 1);
    let mut came = Vec::new();
    for _ in 0..60_000usize.div_ceil(1440) {
        let mut length = [0; 4];
        peer.read_exact(&mut length).unwrap();
        let mut one = vec![0; u32::from_be_bytes(length) as usize];
        peer.read_exact(&mut one).unwrap();
        let headers = Headers::parse(&one).unwrap();
        let sum = headers.pseudo_header(&one, one.len() as u32 - 54).unwrap();
        assert_eq!(sum.bytes(&one[54..]).finish(), 0);
        came.extend_from_slice(&one[74..]);
    }
    assert_eq!(came, payload);
}

#[test]
fn who_connects_tries_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net");
    let listener = UnixListener::bind(&path).unwrap();
    let stream = Stream::connect(&path, &StreamOptions::default()).unwrap();
    let told = Arc::new(Told::default());
    Link::connect(&stream, told.clone());
    let mut lane = stream.lane(0).unwrap();
    assert!(stream.is_up() && lane.deadline().is_none());
    drop(listener.accept().unwrap());
    drop(listener);
    assert!(receive(&mut *lane).is_empty());
    assert!(!stream.is_up());
    let next = lane.deadline().unwrap();
    assert!(next > Instant::now() + Duration::from_millis(500));
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    wait_for("it connects again", || {
        receive(&mut *lane);
        stream.is_up().then_some(())
    });
    assert!(Instant::now() >= next, "not before its time");
    assert_eq!(told.0.count(), 2);
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(&framed(&frame(20, 7))).unwrap();
    assert_eq!(receive(&mut *lane), [frame(20, 7)]);

    // A lane that is closed and opened again goes on where it was.
    peer.write_all(&framed(&frame(20, 8))[..10]).unwrap();
    assert!(receive(&mut *lane).is_empty());
    assert!(matches!(stream.lane(0), Err(LinkError::Host { .. })));
    assert!(matches!(stream.lane(1), Err(LinkError::NoLane { .. })));
    drop(lane);
    let mut lane = stream.lane(0).unwrap();
    peer.write_all(&framed(&frame(20, 8))[10..]).unwrap();
    assert_eq!(receive(&mut *lane), [frame(20, 8)]);
}

#[test]
fn who_listens_takes_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net");
    let stream = Stream::listen(&path, &StreamOptions::default()).unwrap();
    let mut lane = stream.lane(0).unwrap();
    let ready = |lane: &dyn LinkLane| {
        let mut ready = 0;
        lane.sources(RECEIVE, &mut |fd, _| ready += u32::from(is_readable(fd)));
        ready
    };
    assert!(!stream.is_up());
    assert_eq!(ready(&*lane), 0);
    for round in 0..3 {
        let mut peer = UnixStream::connect(&path).unwrap();
        assert_eq!(ready(&*lane), 1);
        assert!(receive(&mut *lane).is_empty());
        assert!(stream.is_up());
        peer.write_all(&framed(&frame(30, round))).unwrap();
        assert_eq!(receive(&mut *lane), [frame(30, round)]);
        drop(peer);
        assert_eq!(ready(&*lane), 1);
        assert!(receive(&mut *lane).is_empty());
        assert!(!stream.is_up());
    }
    drop(lane);
    assert!(path.exists());
    drop(stream);
    assert!(!path.exists(), "it cleans up");
}

#[test]
fn errors_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net");
    let options = StreamOptions::default();
    let error = Stream::connect(&path, &options).unwrap_err();
    assert!(matches!(error, StreamError::Nobody { .. }), "{error}");
    assert!(error.to_string().contains("start the other end first"));
    let mut patient = StreamOptions::default();
    patient.must_connect = false;
    let stream = Stream::connect(&path, &patient).unwrap();
    assert!(!stream.is_up());
    let mut lane = stream.lane(0).unwrap();
    assert!(receive(&mut *lane).is_empty());
    assert!(lane.deadline().is_some());

    // A socket that nobody listens at any more.
    drop(UnixListener::bind(&path).unwrap());
    let error = Stream::connect(&path, &options).unwrap_err();
    assert!(matches!(error, StreamError::Nobody { .. }), "{error}");
    let first = Stream::listen(&path, &options).unwrap();
    let error = Stream::listen(&path, &options).unwrap_err();
    assert!(matches!(error, StreamError::Taken { .. }), "{error}");
    drop(first);

    std::fs::write(&path, "not a socket").unwrap();
    for error in [
        Stream::listen(&path, &options).unwrap_err(),
        Stream::connect(&path, &patient).unwrap_err(),
    ] {
        assert!(matches!(error, StreamError::NotASocket { .. }), "{error}");
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"not a socket");
    let long = folder.path().join("x".repeat(108));
    let error = Stream::listen(&long, &options).unwrap_err();
    assert!(matches!(error, StreamError::LongPath { max: 107, .. }));
    let nowhere = folder.path().join("none/net");
    let error = Stream::listen(&nowhere, &options).unwrap_err();
    assert!(matches!(error, StreamError::Host { .. }), "{error}");
}

/// Ends a process with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU joins a stream that it listens at with one that it connects to, in a
/// hub; no machine runs.
#[test]
fn qemu_speaks_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let listening = Stream::listen(&two, &StreamOptions::default()).unwrap();
    let mut args: Vec<String> = ["-M", "none", "-nodefaults", "-display", "none"]
        .map(str::to_owned)
        .to_vec();
    for netdev in [
        format!(
            "stream,id=a,server=on,addr.type=unix,addr.path={}",
            one.display()
        ),
        "hubport,id=ha,hubid=0,netdev=a".to_owned(),
        format!(
            "stream,id=b,server=off,addr.type=unix,addr.path={}",
            two.display()
        ),
        "hubport,id=hb,hubid=0,netdev=b".to_owned(),
    ] {
        args.extend(["-netdev".to_owned(), netdev]);
    }
    let child = Command::new("qemu-system-x86_64")
        .args(&args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut qemu = match child {
        Ok(child) => Running(child),
        Err(error) => return skipped(&format!("no QEMU: {error}")),
    };
    let end = Instant::now() + Duration::from_secs(20);
    let connecting = loop {
        if let Ok(Some(_)) = qemu.0.try_wait() {
            let mut why = String::new();
            if let Some(stderr) = &mut qemu.0.stderr {
                let _ = stderr.read_to_string(&mut why);
            }
            // QEMU before 7.2 has no streams.
            return skipped(&format!("QEMU does not do this: {}", why.trim()));
        }
        match Stream::connect(&one, &StreamOptions::default()) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut lanes = [connecting.lane(0).unwrap(), listening.lane(0).unwrap()];
    wait_for("QEMU connects", || {
        receive(&mut *lanes[1]);
        listening.is_up().then_some(())
    });
    for (from, to) in [(0, 1), (1, 0)] {
        let sent: Vec<Vec<u8>> = (0..200).map(|n| frame(60 + n * 7, n as u8)).collect();
        let mut came = Vec::new();
        // A few at a time: a hub of QEMU whose socket is full for a moment
        // sends later frames before those that wait.
        for batch in sent.chunks(10) {
            for one in batch {
                assert_eq!(put(&mut *lanes[from], one, FrameMeta::PLAIN), Sent::Done);
            }
            lanes[from].flush();
            let due = came.len() + batch.len();
            wait_for("all come through", || {
                came.extend(receive(&mut *lanes[to]));
                (came.len() >= due).then_some(())
            });
        }
        assert!(came == sent);
    }
}
