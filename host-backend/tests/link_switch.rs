//! The switch: who gets which frame, how much, and what is lost where.

use pvkit_host::event::is_readable;
use pvkit_host::link::switch::{Endpoint, Switch, SwitchOptions};
use pvkit_host::link::{
    Delivered, FrameSink, Link, LinkError, LinkEvents, LinkLane, Sent, TxFrame, Waits,
};
use pvkit_host::memory::IoBufs;
use pvkit_host::worker::Signal;
use pvkit_host::worker::SignalCounter;
use pvkit_protocol::frame::{
    BadFrame, Checksum, FrameMeta, MacAddress, Offloads, SegmentKind, Segmentation,
};
use pvkit_protocol::inet::Headers;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Frames that came in, up to a number.
struct Got {
    frames: Vec<(Vec<u8>, FrameMeta)>,
    room: usize,
}

impl Got {
    fn new() -> Self {
        Self {
            frames: Vec::new(),
            room: usize::MAX,
        }
    }
}

impl FrameSink for Got {
    fn deliver(&mut self, frame: &[u8], meta: &FrameMeta) -> Delivered {
        if self.frames.len() >= self.room {
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

fn frame(to: MacAddress, from: u32, payload: &[u8]) -> Vec<u8> {
    let from = MacAddress::local(from);
    [&to.0[..], &from.0, &[0x88, 0xb5], payload].concat()
}

fn send(lane: &mut dyn LinkLane, frame: &[u8], meta: FrameMeta) {
    let rest = IoBufs::new();
    let frame = TxFrame {
        head: frame,
        rest: &rest,
        meta,
    };
    assert_eq!(lane.send(&frame), Sent::Done);
    lane.flush();
}

fn drain(lane: &mut dyn LinkLane) -> Vec<Vec<u8>> {
    let mut got = Got::new();
    let count = lane.receive(&mut got, u32::MAX);
    assert_eq!(count as usize, got.frames.len());
    got.frames.into_iter().map(|(frame, _)| frame).collect()
}

fn drain_endpoint(endpoint: &mut Endpoint) -> Vec<Vec<u8>> {
    let mut got = Got::new();
    endpoint.receive(&mut got, u32::MAX);
    got.frames.into_iter().map(|(frame, _)| frame).collect()
}

#[test]
fn frames_are_flooded_until_it_is_known_where_to() {
    let switch = Switch::new(SwitchOptions::default());
    let ports: Vec<_> = (0..3).map(|_| switch.port().unwrap()).collect();
    let mut lanes: Vec<_> = ports.iter().map(|port| port.lane(0).unwrap()).collect();
    let mut host = switch.endpoint().unwrap();

    let unknown = frame(MacAddress::local(2), 1, b"flooded");
    send(&mut *lanes[0], &unknown, FrameMeta::PLAIN);
    assert!(drain(&mut *lanes[0]).is_empty(), "never back to its sender");
    assert_eq!(drain(&mut *lanes[1]), std::slice::from_ref(&unknown));
    assert_eq!(drain(&mut *lanes[2]), std::slice::from_ref(&unknown));
    assert_eq!(drain_endpoint(&mut host), [unknown]);

    // The answer teaches where 2 is; 1 is known.
    let answer = frame(MacAddress::local(1), 2, b"answer");
    send(&mut *lanes[1], &answer, FrameMeta::PLAIN);
    assert_eq!(drain(&mut *lanes[0]), [answer]);
    assert!(drain(&mut *lanes[2]).is_empty());
    let known = frame(MacAddress::local(2), 1, b"known");
    send(&mut *lanes[0], &known, FrameMeta::PLAIN);
    assert_eq!(drain(&mut *lanes[1]), [known]);
    assert!(drain(&mut *lanes[2]).is_empty());
    assert!(drain_endpoint(&mut host).is_empty());

    // To all, from the host; and to a group.
    for to in [MacAddress::BROADCAST, MacAddress([1, 0, 0x5e, 0, 0, 1])] {
        let all = frame(to, 9, b"all");
        host.send(&all, &FrameMeta::PLAIN).unwrap();
        host.flush();
        for lane in &mut lanes {
            assert_eq!(drain(&mut **lane), std::slice::from_ref(&all));
        }
    }

    // 2 moves to the third port.
    send(
        &mut *lanes[2],
        &frame(MacAddress::local(1), 2, b"moved"),
        FrameMeta::PLAIN,
    );
    assert_eq!(drain(&mut *lanes[0]).len(), 1);
    send(
        &mut *lanes[0],
        &frame(MacAddress::local(2), 1, b"there"),
        FrameMeta::PLAIN,
    );
    assert_eq!(drain(&mut *lanes[1]).len(), 0);
    assert_eq!(drain(&mut *lanes[2]).len(), 1);

    // To itself: the switch has nothing to do.
    send(
        &mut *lanes[0],
        &frame(MacAddress::local(1), 1, b"self"),
        FrameMeta::PLAIN,
    );
    for lane in &mut lanes {
        assert!(drain(&mut **lane).is_empty());
    }
    let counters = lanes[0].counters();
    assert_eq!(counters.sent.get(), 4);
    assert_eq!(counters.sent_bytes.get(), 4 * 14 + 7 + 5 + 5 + 4);
    assert_eq!(counters.received.get(), 4);
    assert_eq!(counters.send_drops.get(), 0);
}

#[derive(Debug, Default)]
struct Told(SignalCounter);

impl LinkEvents for Told {
    fn link_changed(&self) {
        self.0.signal();
    }
}

#[test]
fn a_port_is_up_while_there_is_another() {
    let switch = Switch::new(SwitchOptions::default());
    let port = switch.port().unwrap();
    let told = Arc::new(Told::default());
    port.connect(told.clone());
    let mut lane = port.lane(0).unwrap();
    assert!(!port.is_up());
    let lost = frame(MacAddress::BROADCAST, 1, b"nobody");
    send(&mut *lane, &lost, FrameMeta::PLAIN);
    assert_eq!(lane.counters().send_drops.get(), 1);

    let mut host = switch.endpoint().unwrap();
    assert!(port.is_up() && host.is_up());
    assert_eq!(told.0.count(), 1);
    send(&mut *lane, &lost, FrameMeta::PLAIN);
    assert_eq!(drain_endpoint(&mut host), std::slice::from_ref(&lost));
    let third = switch.port().unwrap();
    drop(third);
    assert_eq!(told.0.count(), 1, "that changes nothing for the first");
    drop(host);
    assert!(!port.is_up());
    assert_eq!(told.0.count(), 2);

    // Comes back; what was known of the port that had its number is not.
    let back = switch.port().unwrap();
    assert!(port.is_up());
    // Nobody listens there yet.
    send(&mut *lane, &lost, FrameMeta::PLAIN);
    assert_eq!(back.counters(0).unwrap().receive_drops.get(), 1);

    assert!(matches!(
        port.lane(1),
        Err(LinkError::NoLane { index: 1, lanes: 1 })
    ));
    assert!(matches!(port.lane(0), Err(LinkError::Host { .. })));
    drop(lane);
    assert!(port.lane(0).is_ok());
}

#[test]
fn what_does_not_fit_is_dropped_there_and_counted() {
    let mut options = SwitchOptions::default();
    options.inbox_bytes = 10_000;
    let switch = Switch::new(options);
    let (from, slow, quick) = (
        switch.port().unwrap(),
        switch.port().unwrap(),
        switch.port().unwrap(),
    );
    let mut from = from.lane(0).unwrap();
    let mut slow = slow.lane(0).unwrap();
    let mut quick = quick.lane(0).unwrap();
    let mut sink = Got::new();
    for number in 0..10_000u32 {
        let flooded = frame(MacAddress::BROADCAST, 1, &number.to_be_bytes());
        send(&mut *from, &flooded, FrameMeta::PLAIN);
        quick.receive(&mut sink, 1);
    }
    assert_eq!(sink.frames.len(), 10_000, "the slow one holds up nobody");
    assert_eq!(quick.counters().receive_drops.get(), 0);
    assert_eq!(from.counters().sent.get(), 10_000);
    let kept = drain(&mut *slow);
    assert!((100..=10_000 / 18).contains(&kept.len()), "{}", kept.len());
    for (number, frame) in kept.iter().enumerate() {
        assert_eq!(frame[14..], (number as u32).to_be_bytes());
    }
    let counters = slow.counters();
    assert_eq!(
        counters.receive_drops.get() + counters.received.get(),
        10_000
    );
    assert_eq!(counters.received.get(), kept.len() as u64);

    // What nobody took when the lane closes is lost too, on either side of the
    // swap.
    for number in 0..5u32 {
        let flooded = frame(MacAddress::BROADCAST, 1, &number.to_be_bytes());
        send(&mut *from, &flooded, FrameMeta::PLAIN);
        if number == 2 {
            let mut one = Got::new();
            assert_eq!(slow.receive(&mut one, 1), 1);
        }
    }
    let before = counters.receive_drops.get();
    drop(slow);
    assert_eq!(counters.receive_drops.get(), before + 4);
}

#[test]
fn a_frame_that_is_not_taken_stays_the_next() {
    let switch = Switch::new(SwitchOptions::default());
    let port = switch.port().unwrap();
    let mut lane = port.lane(0).unwrap();
    let mut host = switch.endpoint().unwrap();
    for number in 0..4u8 {
        let sent = frame(MacAddress::BROADCAST, 1, &[number]);
        host.send(&sent, &FrameMeta::PLAIN).unwrap();
    }
    let mut got = Got::new();
    got.room = 2;
    assert_eq!(lane.receive(&mut got, 10), 2);
    assert_eq!(lane.receive(&mut got, 10), 0);
    assert!(lane.arm(RECEIVE), "there is more");
    got.room = 4;
    assert_eq!(lane.receive(&mut got, 1), 1);
    assert_eq!(lane.receive(&mut got, 10), 1);
    let numbers: Vec<u8> = got.frames.iter().map(|(frame, _)| frame[14]).collect();
    assert_eq!(numbers, [0, 1, 2, 3]);
}

#[test]
fn the_sleeping_are_woken_once_a_batch() {
    let switch = Switch::new(SwitchOptions::default());
    let mut host = switch.endpoint().unwrap();
    let port = switch.port().unwrap();
    let mut lane = port.lane(0).unwrap();
    let sent = frame(MacAddress::BROADCAST, 1, b"wake");

    host.send(&sent, &FrameMeta::PLAIN).unwrap();
    host.flush();
    let readable = |lane: &dyn LinkLane| {
        let mut readable = false;
        lane.sources(RECEIVE, &mut |fd, _| readable = is_readable(fd));
        readable
    };
    assert!(!readable(&*lane), "nobody sleeps");
    assert!(lane.arm(RECEIVE), "something is there already");
    assert_eq!(drain(&mut *lane).len(), 1);
    for _ in 0..3 {
        assert!(!lane.arm(RECEIVE));
        assert!(!readable(&*lane));
        for _ in 0..10 {
            host.send(&sent, &FrameMeta::PLAIN).unwrap();
        }
        assert!(!readable(&*lane), "the batch has not ended");
        host.flush();
        assert!(readable(&*lane));
        assert_eq!(drain(&mut *lane).len(), 10);
    }
    // The other way, for code of the host.
    assert!(!host.arm());
    send(&mut *lane, &sent, FrameMeta::PLAIN);
    assert!(is_readable(host.as_fd()));
    assert_eq!(drain_endpoint(&mut host), [sent]);
}

/// A TCP packet over IPv4 to be cut.
fn big(payload: usize) -> (Vec<u8>, FrameMeta) {
    let mut packet = frame(MacAddress::BROADCAST, 1, &[]);
    packet[12..14].copy_from_slice(&[8, 0]);
    let total = (40 + payload) as u16;
    let [high, low] = total.to_be_bytes();
    packet.extend([0x45, 0, high, low, 0, 1, 0x40, 0, 64, 6, 0, 0]);
    packet.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([
        0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0,
    ]);
    packet.extend((0..payload).map(|index| index as u8));
    let meta = FrameMeta {
        checksum: Checksum::Partial {
            start: 34,
            offset: 16,
        },
        segments: Some(Segmentation {
            kind: SegmentKind::Tcp4,
            ecn: false,
            size: 1000,
            header_bytes: 54,
        }),
    };
    (packet, meta)
}

#[test]
fn each_receiver_gets_what_it_takes() {
    let switch = Switch::new(SwitchOptions::default());
    let port = switch.port().unwrap();
    let mut lane = port.lane(0).unwrap();
    let mut all = switch.endpoint().unwrap();
    all.set_receive(Offloads::all());
    let mut sums = switch.endpoint().unwrap();
    sums.set_receive(Offloads::CHECKSUM);
    let mut none = switch.endpoint().unwrap();

    let (packet, meta) = big(4500);
    send(&mut *lane, &packet, meta);
    let mut got = Got::new();
    all.receive(&mut got, 100);
    assert_eq!(got.frames, [(packet.clone(), meta)]);
    for (endpoint, partial) in [(&mut sums, true), (&mut none, false)] {
        let mut got = Got::new();
        assert_eq!(endpoint.receive(&mut got, 100), 5);
        let mut payload: Vec<u8> = Vec::new();
        for (frame, meta) in &got.frames {
            let checksum = meta.checksum != Checksum::Unknown;
            assert_eq!((checksum, meta.segments), (partial, None));
            payload.extend(&frame[54..]);
            let headers = Headers::parse(frame).unwrap();
            let bytes = frame.len() - 34;
            let sum = headers.pseudo_header(frame, bytes as u32).unwrap();
            if partial {
                assert_eq!(frame[50..52], sum.fold().to_be_bytes());
            } else {
                assert_eq!(sum.bytes(&frame[34..]).finish(), 0);
            }
        }
        assert_eq!(payload, packet[54..]);
    }
    let counters = lane.counters();
    assert_eq!((counters.sent.get(), counters.finished.get()), (1, 1));

    let mut lie = meta;
    lie.checksum = Checksum::Unknown;
    assert_eq!(all.send(&packet, &lie), Err(BadFrame::Segmentation));
    assert_eq!(
        all.send(&packet[..10], &FrameMeta::PLAIN),
        Err(BadFrame::Short { bytes: 10 })
    );
    assert!(matches!(
        all.send(&packet, &FrameMeta::PLAIN),
        Err(BadFrame::Long { .. })
    ));
}

#[test]
fn flows_spread_over_lanes_and_stay_on_theirs() {
    let mut options = SwitchOptions::default();
    options.lanes = 4;
    let switch = Switch::new(options);
    let port = switch.port().unwrap();
    let mut lanes: Vec<_> = (0..4).map(|lane| port.lane(lane).unwrap()).collect();
    let mut host = switch.endpoint().unwrap();
    let mut run = |lanes: &mut Vec<Box<dyn LinkLane>>| -> Vec<usize> {
        for source in 0..64u16 {
            let (mut packet, _) = big(10);
            packet[34..36].copy_from_slice(&(1024 + source).to_be_bytes());
            for _ in 0..2 {
                host.send(&packet, &FrameMeta::PLAIN).unwrap();
            }
        }
        let each = lanes.iter_mut().map(|lane| drain(&mut **lane).len());
        each.collect()
    };
    assert_eq!(run(&mut lanes), [128, 0, 0, 0]);
    port.use_lanes(4).unwrap();
    let spread = run(&mut lanes);
    assert_eq!(spread.iter().sum::<usize>(), 128);
    for lane in &spread {
        assert!(*lane >= 8 && lane % 2 == 0, "{spread:?}");
    }
    assert_eq!(run(&mut lanes), spread);
    assert!(port.use_lanes(5).is_err());
}

#[test]
fn two_threads_lose_nothing_that_is_not_counted() {
    const FRAMES: u32 = 300_000;
    let mut options = SwitchOptions::default();
    options.inbox_bytes = 1 << 16;
    let switch = Switch::new(options);
    let receiver = switch.port().unwrap();
    let mut lane = receiver.lane(0).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let senders: Vec<_> = (0..2u32)
        .map(|sender| {
            let mut host = switch.endpoint().unwrap();
            std::thread::spawn(move || {
                let mut sent = frame(MacAddress::BROADCAST, sender, &[0; 50]);
                sent[..6].copy_from_slice(&MacAddress::local(77).0);
                for number in 0..FRAMES {
                    sent[14..18].copy_from_slice(&number.to_be_bytes());
                    host.send(&sent, &FrameMeta::PLAIN).unwrap();
                    if number % 64 == 63 {
                        host.flush();
                    }
                }
                host.flush();
                host.counters().sent.get()
            })
        })
        .collect();
    struct Ordered {
        next: [u32; 2],
        count: u64,
    }
    impl FrameSink for Ordered {
        fn deliver(&mut self, frame: &[u8], _: &FrameMeta) -> Delivered {
            let sender = usize::from(frame[11]);
            let number = u32::from_be_bytes(frame[14..18].try_into().unwrap());
            assert!(number >= self.next[sender], "frames stay in order");
            self.next[sender] = number + 1;
            self.count += 1;
            Delivered::Taken
        }
    }
    // It sleeps whenever it can: a wake-up that is lost would hang it.
    let receiving = std::thread::spawn({
        let done = done.clone();
        move || {
            let mut sink = Ordered {
                next: [0; 2],
                count: 0,
            };
            let counters = lane.counters();
            let end = Instant::now() + Duration::from_secs(60);
            loop {
                if lane.receive(&mut sink, 256) > 0 {
                    continue;
                }
                if done.load(Ordering::Acquire) && lane.receive(&mut sink, 256) == 0 {
                    break;
                }
                assert!(Instant::now() < end, "no wake-up came");
                if !lane.arm(RECEIVE) {
                    lane.sources(RECEIVE, &mut |fd, _| {
                        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
                            fd,
                            rustix::event::PollFlags::IN,
                        )];
                        let limit = rustix::event::Timespec {
                            tv_sec: 10,
                            tv_nsec: 0,
                        };
                        let ready = rustix::event::poll(&mut fds, Some(&limit)).unwrap();
                        assert_eq!(ready, 1, "no wake-up came");
                    });
                }
            }
            (sink.count, counters)
        }
    });
    // Also a sender that the receiver learns from, and that ends it.
    let sent: u64 = senders.into_iter().map(|one| one.join().unwrap()).sum();
    done.store(true, Ordering::Release);
    let mut last = switch.endpoint().unwrap();
    last.send(
        &frame(
            MacAddress::BROADCAST,
            0,
            &u32::MAX.wrapping_sub(1).to_be_bytes(),
        ),
        &FrameMeta::PLAIN,
    )
    .unwrap();
    last.flush();
    let (count, counters) = receiving.join().unwrap();
    assert_eq!(sent, u64::from(FRAMES) * 2);
    assert_eq!(counters.received.get(), count);
    assert_eq!(count + counters.receive_drops.get(), sent + 1);
}

/// How long a frame takes, for those who want to know.
#[test]
#[ignore = "prints a figure, and checks nothing"]
fn speed() {
    let switch = Switch::new(SwitchOptions::default());
    let port = switch.port().unwrap();
    let mut lane = port.lane(0).unwrap();
    let other = switch.port().unwrap();
    let mut from = other.lane(0).unwrap();
    struct Copied([u8; 2048]);
    impl FrameSink for Copied {
        fn deliver(&mut self, frame: &[u8], _: &FrameMeta) -> Delivered {
            self.0[..frame.len()].copy_from_slice(frame);
            Delivered::Taken
        }
    }
    let mut sink = Copied([0; 2048]);
    send(
        &mut *lane,
        &frame(MacAddress::BROADCAST, 2, &[0; 50]),
        FrameMeta::PLAIN,
    );
    let bytes = frame(MacAddress::local(2), 1, &[0; 50]);
    let rest = IoBufs::new();
    let start = Instant::now();
    let rounds = 20_000u32;
    for _ in 0..rounds {
        for _ in 0..256 {
            from.send(&TxFrame {
                head: &bytes,
                rest: &rest,
                meta: FrameMeta::PLAIN,
            });
        }
        from.flush();
        assert_eq!(lane.receive(&mut sink, 256), 256);
    }
    let each = start.elapsed().as_nanos() as f64 / f64::from(rounds * 256);
    println!("{each:.1} ns a frame");
}
