//! Taps, with the host's own stack at the other end, each test in a network
//! namespace of its own.

mod common;
#[path = "common/namespace.rs"]
mod namespace;
#[path = "common/scattered.rs"]
mod scattered;

use namespace::{address_of, delete, in_namespace, make, packets, set_address, set_mtu, set_up};
use pvkit_host::event::is_readable;
use pvkit_host::link::tap::{Tap, TapError, TapOptions};
use pvkit_host::link::{
    Delivered, FrameSink, Link, LinkError, LinkEvents, LinkLane, Sent, TxFrame, Waits,
};
use pvkit_host::memory::IoBufs;
use pvkit_host::worker::{Signal, SignalCounter};
use pvkit_protocol::frame::{Checksum, FrameMeta, MacAddress, Offloads, SegmentKind, Segmentation};
use pvkit_protocol::inet::Headers;
use pvkit_protocol::virtio::net::NetHeader;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

#[derive(Default)]
struct Got {
    frames: Vec<(Vec<u8>, FrameMeta)>,
    full: bool,
}

impl FrameSink for Got {
    fn deliver(&mut self, frame: &[u8], meta: &FrameMeta) -> Delivered {
        if self.full {
            return Delivered::Full;
        }
        self.frames.push((frame.to_vec(), *meta));
        Delivered::Taken
    }
}

const RECEIVE: Waits = Waits {
    receive: true,
    send: false,
};

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn send(lane: &mut dyn LinkLane, head: &[u8], meta: FrameMeta) -> Sent {
    let rest = IoBufs::new();
    let sent = lane.send(&TxFrame {
        head,
        rest: &rest,
        meta,
    });
    lane.flush();
    sent
}

const OURS: MacAddress = MacAddress::local(2);

/// A packet over IPv4 from 10.9.0.2 to 10.9.0.1, its transport checksum
/// partial.
fn packet(to: MacAddress, protocol: u8, header: &[u8], payload: &[u8]) -> (Vec<u8>, Checksum) {
    let mut frame = [&to.0[..], &OURS.0, &[8, 0]].concat();
    let total = (20 + header.len() + payload.len()) as u16;
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 7, 0x40, 0, 64, protocol, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let sum: u32 = frame[14..34]
        .chunks(2)
        .map(|pair| u32::from(pair[0]) * 256 + u32::from(pair[1]))
        .sum();
    let checksum = !((sum >> 16) + (sum & 0xffff)) as u16;
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(header);
    frame.extend(payload);
    let headers = Headers::parse(&frame).unwrap();
    let pseudo = headers
        .pseudo_header(&frame, u32::from(total) - 20)
        .unwrap();
    let partial = headers.partial_checksum();
    let Checksum::Partial { start, offset } = partial else {
        panic!("neither TCP nor UDP");
    };
    let field = usize::from(start + offset);
    frame[field..field + 2].copy_from_slice(&pseudo.fold().to_be_bytes());
    (frame, partial)
}

fn udp(to: MacAddress, port: u16, payload: &[u8]) -> (Vec<u8>, FrameMeta) {
    let mut header = vec![0x30, 0x39];
    header.extend(port.to_be_bytes());
    header.extend((8 + payload.len() as u16).to_be_bytes());
    header.extend([0, 0]);
    let (frame, checksum) = packet(to, 17, &header, payload);
    let meta = FrameMeta {
        checksum,
        segments: None,
    };
    (frame, meta)
}

const TCP: [u8; 20] = [
    0x30, 0x39, 0, 9, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
];

fn tso(to: MacAddress, payload: usize) -> (Vec<u8>, FrameMeta) {
    let payload: Vec<u8> = (0..payload).map(|index| (index / 7) as u8).collect();
    let (frame, checksum) = packet(to, 6, &TCP, &payload);
    let meta = FrameMeta {
        checksum,
        segments: Some(Segmentation {
            kind: SegmentKind::Tcp4,
            ecn: false,
            size: 1460,
            header_bytes: 54,
        }),
    };
    (frame, meta)
}

fn up(name: &str) -> Tap {
    let tap = Tap::open(name, &TapOptions::default()).unwrap();
    set_address(name, [10, 9, 0, 1]);
    set_up(name, true);
    tap
}

#[test]
fn the_kernel_completes_checksums_and_answers() {
    in_namespace(|| {
        let tap = up("tap0");
        let mut lane = tap.lane(0).unwrap();
        let host = UdpSocket::bind("10.9.0.1:4000").unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let to = address_of("tap0");
        let (frame, meta) = udp(to, 4000, b"from the device");
        assert_eq!(send(&mut *lane, &frame, meta), Sent::Done);
        let mut data = [0; 100];
        let (bytes, from) = host.recv_from(&mut data).unwrap();
        assert_eq!(&data[..bytes], b"from the device");
        assert_eq!(from.to_string(), "10.9.0.2:12345");
        assert!(tap.is_up());
        let counters = lane.counters();
        assert_eq!(counters.sent.get(), 1);
        assert_eq!(counters.sent_bytes.get(), frame.len() as u64);

        // The stack asks who that is, and gets an answer, and answers.
        host.send_to(b"from the host", from).unwrap();
        let mut got = Got::default();
        wait_for("the host asks", || {
            lane.receive(&mut got, 64);
            let (ask, _) = got.frames.iter().find(|(f, _)| f[12..14] == [8, 6])?;
            let mut answer = ask.clone();
            answer.truncate(42);
            answer[..6].copy_from_slice(&to.0);
            answer[6..12].copy_from_slice(&OURS.0);
            answer[21] = 2;
            answer[22..28].copy_from_slice(&OURS.0);
            answer[28..32].copy_from_slice(&[10, 9, 0, 2]);
            answer[32..38].copy_from_slice(&to.0);
            answer[38..42].copy_from_slice(&[10, 9, 0, 1]);
            send(&mut *lane, &answer, FrameMeta::PLAIN);
            Some(())
        });
        let datagram = |got: &Got| -> Option<(Vec<u8>, FrameMeta)> {
            let frames = got.frames.iter();
            let mut udp = frames.filter(|(f, _)| f[12..14] == [8, 0] && f[23] == 17);
            udp.next().cloned()
        };
        let (frame, meta) = wait_for("the host answers", || {
            lane.receive(&mut got, 64);
            datagram(&got)
        });
        assert_eq!(&frame[42..], b"from the host");
        assert_eq!(meta.needs(), Offloads::empty());
        let headers = Headers::parse(&frame).unwrap();
        let sum = headers.pseudo_header(&frame, 21).unwrap();
        assert_eq!(sum.bytes(&frame[34..]).finish(), 0, "it is complete");

        // A device that completes checksums itself is left to do so.
        tap.set_receive(Offloads::CHECKSUM).unwrap();
        host.send_to(b"once more", from).unwrap();
        let mut got = Got::default();
        let (_, meta) = wait_for("the host answers again", || {
            lane.receive(&mut got, 64);
            datagram(&got)
        });
        assert_eq!(meta.needs(), Offloads::CHECKSUM);
        assert_eq!(counters.receive_errors.get(), 0);
    });
}

/// Frames of a kind that a raw socket got, with their headers.
fn drain_packets(raw: &OwnedFd, protocol: u8) -> Vec<(NetHeader, Vec<u8>)> {
    let mut buffer = vec![0; 1 << 17];
    let mut out = Vec::new();
    while let Ok(bytes) = rustix::io::read(raw, &mut *buffer) {
        let mut header = [0; 12];
        header[..10].copy_from_slice(&buffer[..10]);
        let frame = buffer[10..bytes].to_vec();
        if frame[12..14] == [8, 0] && frame[23] == protocol {
            out.push((NetHeader::read_from_bytes(&header).unwrap(), frame));
        }
    }
    out
}

#[test]
fn large_frames_pass_through_whole() {
    in_namespace(|| {
        let tap = up("tap0");
        let mut lane = tap.lane(0).unwrap();
        let raw = packets("tap0");
        let (frame, meta) = tso(address_of("tap0"), 65_000);
        let checked = meta.check(&frame, frame.len(), 1518, tap.shape().cheap);
        assert_eq!(checked, Ok(meta));
        assert_eq!(send(&mut *lane, &frame, meta), Sent::Done);
        assert_eq!(lane.counters().sent.get(), 1);
        assert_eq!(
            lane.counters().finished.get(),
            0,
            "the kernel cuts, if anybody"
        );
        let came = drain_packets(&raw, 6);
        assert_eq!(came.len(), 1);
        assert_eq!(came[0].1, frame);
        assert_eq!(came[0].0.meta(), Some(meta));
        // From a guest's memory, in few pieces, and in more than one system
        // call takes.
        for piece in [4096, 50] {
            let sent = scattered::send(&mut *lane, &frame, piece, meta);
            assert_eq!(sent, Sent::Done);
            let came = drain_packets(&raw, 6);
            assert_eq!(came.len(), 1);
            assert!(came[0].1 == frame);
        }
        assert_eq!(lane.counters().sent.get(), 3);
        let (datagrams, mut meta) = udp(address_of("tap0"), 9, &[7; 9000]);
        meta.segments = Some(Segmentation {
            kind: SegmentKind::Udp,
            ecn: false,
            size: 1000,
            header_bytes: 42,
        });
        assert_eq!(send(&mut *lane, &datagrams, meta), Sent::Done);
        let came = drain_packets(&raw, 17);
        let bytes: usize = came.iter().map(|(_, frame)| frame.len() - 42).sum();
        assert_eq!(bytes, 9000, "whole, or cut for a kernel that cannot");

        // The other way, a device gets what it said it takes.
        let (frame, meta) = tso(OURS, 65_000);
        let header = NetHeader::new(&meta, 0);
        let out = [&header.as_bytes()[..10], &frame].concat();
        let receive = |lane: &mut dyn LinkLane| {
            let mut got = Got::default();
            wait_for("it comes in", || {
                rustix::io::write(&raw, &out).unwrap();
                lane.receive(&mut got, 1000);
                let tcp = |(f, _): &&(Vec<u8>, FrameMeta)| f[12..14] == [8, 0] && f[23] == 6;
                let frames: Vec<_> = got.frames.iter().filter(tcp).cloned().collect();
                (!frames.is_empty()).then_some(frames)
            })
        };
        for takes in [Offloads::empty(), Offloads::CHECKSUM] {
            tap.set_receive(takes).unwrap();
            let came = receive(&mut *lane);
            assert_eq!(came.len(), 65_000usize.div_ceil(1460));
            let payload: Vec<u8> = came.iter().flat_map(|(f, _)| f[54..].to_vec()).collect();
            assert_eq!(payload, frame[54..]);
            for (frame, meta) in &came {
                assert!(takes.contains(meta.needs()));
                let checked = meta.check(frame, frame.len(), 1518, takes);
                assert_eq!(checked, Ok(*meta));
            }
        }
        tap.set_receive(Offloads::all()).unwrap();
        let came = receive(&mut *lane);
        assert_eq!(came, [(frame, meta)]);
        assert_eq!(lane.counters().receive_errors.get(), 0);
    });
}

#[test]
fn a_frame_that_is_not_taken_is_kept() {
    in_namespace(|| {
        let tap = up("tap0");
        let mut lane = tap.lane(0).unwrap();
        let raw = packets("tap0");
        let plain = |number: u8| {
            let header = [0; 10];
            [
                &header[..],
                &OURS.0,
                &[2, 0, 0, 0, 0, 1, 0x88, 0xb5, number],
            ]
            .concat()
        };
        let ours = |got: &Got| -> Vec<u8> {
            let frames = got.frames.iter().filter(|(f, _)| f[12..14] == [0x88, 0xb5]);
            frames.map(|(frame, _)| frame[14]).collect()
        };
        rustix::io::write(&raw, &plain(1)).unwrap();
        rustix::io::write(&raw, &plain(2)).unwrap();
        let mut got = Got {
            full: true,
            ..Got::default()
        };
        wait_for("one is there", || {
            assert_eq!(lane.receive(&mut got, 1), 0);
            lane.arm(RECEIVE).then_some(())
        });
        got.full = false;
        wait_for("both come in, in order", || {
            assert!(lane.receive(&mut got, 1) <= 1);
            (ours(&got) == [1, 2]).then_some(())
        });
        assert_eq!(lane.counters().received.get(), got.frames.len() as u64);
        assert!(matches!(tap.lane(0), Err(LinkError::Host { .. })));
        assert!(matches!(tap.lane(1), Err(LinkError::NoLane { .. })));
        drop(lane);
        assert!(tap.lane(0).is_ok());
    });
}

#[test]
fn queues_are_attached_and_detached() {
    in_namespace(|| {
        let mut options = TapOptions::default();
        options.lanes = 4;
        let tap = Tap::open("multi", &options).unwrap();
        assert_eq!(tap.shape().lanes, 4);
        set_up("multi", true);
        let mut lanes: Vec<_> = (0..4).map(|lane| tap.lane(lane).unwrap()).collect();
        let raw = packets("multi");
        let mut spread = |sources: u16| -> Vec<usize> {
            for source in 0..sources {
                let (mut frame, _) = udp(OURS, 5, b"flow");
                frame[34..36].copy_from_slice(&(2000 + source).to_be_bytes());
                rustix::io::write(&raw, &[&[0; 10][..], &frame].concat()).unwrap();
            }
            let mut counts = vec![0; 4];
            wait_for("all come in", || {
                for (lane, count) in lanes.iter_mut().zip(&mut counts) {
                    let mut got = Got::default();
                    lane.receive(&mut got, 1000);
                    let udp = |(f, _): &&(Vec<u8>, FrameMeta)| f[12..14] == [8, 0];
                    *count += got.frames.iter().filter(udp).count();
                }
                (counts.iter().sum::<usize>() == usize::from(sources)).then_some(())
            });
            counts
        };
        assert_eq!(spread(100), [100, 0, 0, 0]);
        tap.use_lanes(4).unwrap();
        let counts = spread(400);
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
        tap.use_lanes(2).unwrap();
        let counts = spread(100);
        assert_eq!(counts[2..], [0, 0]);
        tap.use_lanes(1).unwrap();
        assert_eq!(spread(100), [100, 0, 0, 0]);
        assert!(matches!(
            tap.use_lanes(5),
            Err(LinkError::NoLane { index: 4, lanes: 4 })
        ));
    });
}

#[derive(Debug, Default)]
struct Told(SignalCounter);

impl LinkEvents for Told {
    fn link_changed(&self) {
        self.0.signal();
    }
}

#[test]
fn an_interface_goes_down_and_comes_back() {
    in_namespace(|| {
        let tap = Tap::open("tap0", &TapOptions::default()).unwrap();
        let told = Arc::new(Told::default());
        tap.connect(told.clone());
        assert!(!tap.is_up(), "nobody has set it up yet");
        let mut lane = tap.lane(0).unwrap();
        let (frame, meta) = udp(MacAddress::BROADCAST, 9, b"lost");
        for lost in 1..=3 {
            assert_eq!(send(&mut *lane, &frame, meta), Sent::Done);
            assert_eq!(lane.counters().send_drops.get(), lost);
        }
        assert!(lane.deadline().is_some(), "it is looked at again");
        set_up("tap0", true);
        let mut got = Got::default();
        wait_for("it is up", || {
            lane.receive(&mut got, 64);
            tap.is_up().then_some(())
        });
        assert_eq!(told.0.count(), 1);
        assert!(lane.deadline().is_none());
        assert_eq!(send(&mut *lane, &frame, meta), Sent::Done);
        assert_eq!(lane.counters().sent.get(), 1);
        set_up("tap0", false);
        assert_eq!(send(&mut *lane, &frame, meta), Sent::Done);
        assert_eq!(lane.counters().send_drops.get(), 4);
        assert!(!tap.is_up());
        assert_eq!(told.0.count(), 2);
        // A frame that goes through says as much.
        set_up("tap0", true);
        assert_eq!(send(&mut *lane, &frame, meta), Sent::Done);
        assert!(tap.is_up());
    });
}

#[test]
fn a_deleted_interface_is_waited_for() {
    in_namespace(|| {
        let more = libc::IFF_MULTI_QUEUE;
        drop(make("tap0", more).unwrap());
        let mut options = TapOptions::default();
        options.lanes = 2;
        let tap = Tap::open("tap0", &options).unwrap();
        set_up("tap0", true);
        tap.use_lanes(2).unwrap();
        tap.set_receive(Offloads::all()).unwrap();
        let mut lane = tap.lane(0).unwrap();
        let mut second = tap.lane(1).unwrap();
        let mut got = Got::default();
        wait_for("it is up", || {
            lane.receive(&mut got, 64);
            tap.is_up().then_some(())
        });
        delete("tap0");
        let sources = |lane: &dyn LinkLane| {
            let mut count = 0;
            lane.sources(RECEIVE, &mut |_, _| count += 1);
            count
        };
        lane.sources(RECEIVE, &mut |fd, _| {
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                fd,
                rustix::event::PollFlags::IN,
            )];
            assert!(rustix::event::poll(&mut fds, None).unwrap() > 0);
            let _ = is_readable(fd);
        });
        lane.receive(&mut got, 64);
        assert!(!tap.is_up());
        for lane in [&lane, &second] {
            assert_eq!(sources(&**lane), 0, "it would be ready for ever");
            assert!(lane.deadline().is_some());
        }
        let (frame, meta) = udp(MacAddress::BROADCAST, 9, b"lost");
        assert_eq!(send(&mut *second, &frame, meta), Sent::Done);
        assert_eq!(second.counters().send_drops.get(), 1);
        // Both are settings for when it is back.
        tap.use_lanes(1).unwrap();
        tap.set_receive(Offloads::CHECKSUM).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        lane.receive(&mut got, 64);
        assert!(!tap.is_up(), "it is not made again by this");

        drop(make("tap0", more).unwrap());
        set_up("tap0", true);
        wait_for("it is back", || {
            lane.receive(&mut got, 64);
            tap.is_up().then_some(())
        });
        assert_eq!((sources(&*lane), sources(&*second)), (1, 1));
        let raw = packets("tap0");
        assert_eq!(send(&mut *lane, &frame, meta), Sent::Done);
        assert_eq!(drain_packets(&raw, 17).len(), 1);
        // The header is as long as before, and so is what is left to do.
        let (big, big_meta) = tso(OURS, 4000);
        let header = NetHeader::new(&big_meta, 0);
        rustix::io::write(&raw, &[&header.as_bytes()[..10], &big].concat()).unwrap();
        let mut got = Got::default();
        let count = wait_for("it comes in", || {
            lane.receive(&mut got, 64);
            let tcp = got.frames.iter().filter(|(f, _)| f[12..14] == [8, 0]);
            let tcp = tcp.filter(|(f, meta)| f[23] == 6 && meta.needs() == Offloads::CHECKSUM);
            let count = tcp.count();
            (count > 0).then_some(count)
        });
        assert_eq!(count, 3);
        assert_eq!(lane.counters().receive_errors.get(), 0);
    });
}

#[test]
fn errors_name_the_interface_and_the_way_out() {
    in_namespace(|| {
        for bad in ["", "sixteen_letters_", "a/b", "a b"] {
            let opened = Tap::open(bad, &TapOptions::default());
            assert!(matches!(opened, Err(TapError::BadName { .. })), "{bad:?}");
        }
        let first = Tap::open("tap0", &TapOptions::default()).unwrap();
        let error = Tap::open("tap0", &TapOptions::default()).unwrap_err();
        assert!(matches!(error, TapError::Taken { .. }), "{error}");
        assert_eq!(error.to_string(), "tap0 is taken by another process");
        drop(first);
        let error = Tap::open("lo", &TapOptions::default()).unwrap_err();
        assert!(matches!(error, TapError::OtherKind { .. }), "{error}");
        assert!(error.to_string().contains("ip -details link show lo"));
        drop(make("single", 0).unwrap());
        let mut options = TapOptions::default();
        options.lanes = 2;
        let error = Tap::open("single", &options).unwrap_err();
        assert!(matches!(error, TapError::OtherKind { lanes: 2, .. }));
        // One queue of an interface for several will do.
        drop(make("several", libc::IFF_MULTI_QUEUE).unwrap());
        assert!(Tap::open("several", &TapOptions::default()).is_ok());
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = Tap::from_fd(file.into(), "tap0").unwrap_err();
        assert!(matches!(error, TapError::NotATap { .. }), "{error}");
    });
}

#[test]
fn descriptors_are_taken_over() {
    in_namespace(|| {
        let fd = make("mine", 0).unwrap();
        set_mtu("mine", 9000);
        set_up("mine", true);
        let other = fd.try_clone().unwrap();
        let error = Tap::from_fd(other, "yours").unwrap_err();
        assert!(matches!(error, TapError::NotATap { .. }), "{error}");
        let tap = Tap::from_fd(fd, "mine").unwrap();
        assert_eq!((tap.interface(), tap.shape().mtu), ("mine", 9000));
        assert!(tap.is_up());
        let mut lane = tap.lane(0).unwrap();
        let raw = packets("mine");
        let (frame, meta) = udp(MacAddress::BROADCAST, 9, &[1; 8000]);
        assert_eq!(send(&mut *lane, &frame, meta), Sent::Done);
        assert_eq!(drain_packets(&raw, 17).len(), 1);
        let mut got = Got::default();
        lane.receive(&mut got, 64);
    });
}
