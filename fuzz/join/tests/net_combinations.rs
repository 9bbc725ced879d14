//! Driver and device together, for every combination of mergeable buffers,
//! checksums, segmentation of TCP over IPv4 and IPv6 and of UDP, and several
//! pairs of queues: whatever was agreed on, every byte arrives, in frames that
//! their receiver understands.

use pvkit_guest::net::{BadFrame, FrameMeta, HEADROOM, NetRx, NetTx, Offloads, Reason};
use pvkit_guest::virtio::net::{Command, Net, NetOptions, PairOf};
use pvkit_host::link::switch::{Endpoint, Switch, SwitchOptions};
use pvkit_host::virtio::net::NetOptions as DeviceOptions;
use pvkit_join::any::{AnySpace, AnyTransport};
use pvkit_join::net::{NetJoin, Received};
use pvkit_join::packets::{Packet, payload};
use pvkit_join::pci::AnyWire;
use pvkit_join::stepped::{Steps, stepped};
use pvkit_join::{IOVA, Kind, Machine};
use pvkit_protocol::frame::MacAddress;
use pvkit_protocol::virtio::net::NetFeatures;

type Transport = AnyTransport<AnyWire>;
type Pair = PairOf<Vec<u8>, AnySpace, Transport>;

const HOST: MacAddress = MacAddress::local(9);
const SEGMENT: u16 = 1400;

/// What the device can reach of the guest's memory.
#[derive(Debug, Clone, Copy)]
enum Platform {
    /// All of it, as it is.
    Direct,
    /// All of it, through an IOMMU, at other addresses.
    Iommu,
    /// Through an IOMMU, the piece that bounce buffers lie in.
    Bounce,
}

/// What is agreed on.
#[derive(Debug, Clone, Copy)]
struct Combination {
    platform: Platform,
    kind: Kind,
    packed: bool,
    mergeable: bool,
    offloads: Offloads,
    pairs: u16,
}

fn combinations() -> impl Iterator<Item = Combination> {
    (0..64u32).flat_map(|bits| {
        [Kind::Mmio, Kind::Pci].into_iter().flat_map(move |kind| {
            [false, true].map(move |packed| {
                let has = |bit: u32| bits & (1 << bit) != 0;
                let mut offloads = Offloads::empty();
                offloads.set(Offloads::CHECKSUM, has(1));
                offloads.set(Offloads::TSO4, has(2));
                offloads.set(Offloads::TSO6, has(3));
                offloads.set(Offloads::USO4 | Offloads::USO6, has(4));
                Combination {
                    platform: Platform::Direct,
                    kind,
                    packed,
                    mergeable: has(0),
                    offloads,
                    pairs: if has(5) { 3 } else { 1 },
                }
            })
        })
    })
}

struct Joined {
    join: NetJoin,
    steps: Steps,
    host: Endpoint,
    net: Net<Transport, AnySpace>,
    pairs: Vec<Pair>,
    mac: MacAddress,
}

/// What segmentation needs is not agreed on without it.
fn effective(offloads: Offloads) -> Offloads {
    if offloads.contains(Offloads::CHECKSUM) {
        offloads
    } else {
        Offloads::empty()
    }
}

fn join(of: Combination) -> Joined {
    let switch = Switch::new(SwitchOptions {
        lanes: 3,
        ..SwitchOptions::default()
    });
    let host = switch.endpoint().unwrap();
    let options = DeviceOptions {
        packed: of.packed,
        mergeable: of.mergeable,
        transmit: of.offloads,
        receive: of.offloads,
        pairs: of.pairs,
        ..DeviceOptions::default()
    };
    let mac = options.mac;
    let port = switch.port().unwrap();
    let (executor, steps) = stepped();
    let join = NetJoin::with(port, options, |device| {
        let executor = Box::new(executor);
        match of.platform {
            Platform::Direct => Machine::new(of.kind, device, executor, 16 << 20),
            _ => Machine::translated(of.kind, device, executor, 16 << 20),
        }
    });
    let space = match (of.platform, &join.iommu) {
        (Platform::Bounce, Some(iommu)) => {
            let (space, window) = join.arena.bounce(8 << 20, IOVA + (1 << 40));
            iommu.unmap(0, u64::MAX).unwrap();
            iommu.map(window).unwrap();
            AnySpace::Bounce(space)
        }
        _ => AnySpace::Arena(join.space()),
    };
    // Without merging, a buffer has to hold the longest frame there can be.
    let buffer_bytes = if of.mergeable { 2048 } else { 65_600 };
    let options = NetOptions {
        pairs: 4,
        buffer_bytes,
        receive_buffers: if of.mergeable { 128 } else { 16 },
        ..NetOptions::default()
    };
    let make = &mut || Some(vec![0; buffer_bytes]);
    let (net, pairs) = Net::open_pairs(join.transport(), space, options, make).unwrap();
    let mut joined = Joined {
        join,
        steps,
        host,
        net,
        pairs,
        mac,
    };
    joined.check_agreement(of);
    joined
}

impl Joined {
    fn check_agreement(&mut self, of: Combination) {
        let features = NetFeatures::from(self.net.features());
        assert_eq!(features.contains(NetFeatures::MRG_RXBUF), of.mergeable);
        let agreed = effective(of.offloads);
        let without_ecn = |offloads: Offloads| offloads - Offloads::TSO_ECN;
        assert_eq!(without_ecn(self.net.limits().transmit), agreed);
        assert_eq!(without_ecn(self.net.limits().receive), agreed);
        assert_eq!(self.pairs.len(), usize::from(of.pairs));
        assert_eq!(features.contains(NetFeatures::MQ), of.pairs > 1);
        assert_eq!(self.net.limits().mac, Some(self.mac));
        if of.pairs > 1 {
            let steps = &self.steps;
            let command = Command::Pairs(of.pairs);
            self.net
                .command_with(&command, &mut || {
                    steps.run();
                    true
                })
                .unwrap();
        }
    }

    /// Sends a frame by a pair.
    fn send(&mut self, pair: usize, frame: &[u8], meta: &FrameMeta) -> Result<(), Reason> {
        let mut buffer = vec![0; HEADROOM];
        buffer.extend(frame);
        let (tx, _) = &mut self.pairs[pair];
        tx.submit(buffer, frame.len(), meta)
            .map_err(|refused| refused.reason)?;
        tx.publish();
        self.steps.run();
        let back = tx.complete().unwrap().expect("its buffer");
        assert_eq!(&back[HEADROOM..], frame, "nobody writes what is sent");
        Ok(())
    }

    fn host_got(&mut self) -> Vec<(Vec<u8>, FrameMeta)> {
        let mut got = Received::default();
        self.host.receive(&mut got, u32::MAX);
        got.0
    }

    /// What has arrived, at all pairs; how many of them got something.
    fn guest_got(&mut self) -> (Vec<(Vec<u8>, FrameMeta)>, usize) {
        let mut got = Vec::new();
        let mut busy = 0;
        for (_, rx) in &mut self.pairs {
            let before = got.len();
            while let Some(frame) = rx.recv().unwrap() {
                let mut bytes = vec![0; frame.bytes()];
                assert_eq!(frame.copy_to(&mut bytes), bytes.len());
                let meta = *frame.meta();
                got.push((bytes, meta));
            }
            rx.publish();
            busy += usize::from(got.len() > before);
        }
        (got, busy)
    }
}

/// Puts together what came of a packet, and checks it on the way.
fn collect(packet: &Packet, frames: &[(Vec<u8>, FrameMeta)], takes: Offloads) {
    let mut all = Vec::<u8>::new();
    for (frame, meta) in frames {
        assert!(
            takes.contains(meta.needs()) || uso6(meta, takes),
            "{meta:?}"
        );
        let (from, data) = packet.check(frame, meta);
        if !packet.udp {
            assert_eq!(from, all.len());
        }
        all.extend(data);
    }
    assert_eq!(all, payload(packet.seed, packet.payload));
}

/// The metadata of a frame do not say by themselves which version of IP UDP
/// is over.
fn uso6(meta: &FrameMeta, takes: Offloads) -> bool {
    meta.needs().contains(Offloads::USO4) && takes.contains(Offloads::USO6)
}

fn packets() -> [(Packet, Offloads); 4] {
    let packet = |v6, udp, seed| Packet {
        v6,
        udp,
        payload: 20_001,
        seed,
        port: 1000 + u16::from(seed),
    };
    [
        (packet(false, false, 1), Offloads::TSO4),
        (packet(true, false, 2), Offloads::TSO6),
        (packet(false, true, 3), Offloads::USO4),
        (packet(true, true, 4), Offloads::USO6),
    ]
}

#[test]
fn whatever_was_agreed_on_every_byte_arrives() {
    let mut count = 0;
    let all = Offloads::all() - Offloads::TSO_ECN;
    let translated = combinations().filter(|of| of.offloads == all);
    let translated = translated.flat_map(|of| {
        [Platform::Iommu, Platform::Bounce].map(|platform| Combination { platform, ..of })
    });
    for of in combinations().chain(translated) {
        let mut joined = join(of);
        let agreed = effective(of.offloads);
        let mac = joined.mac;
        for pair in 0..joined.pairs.len() {
            // Short ones, and one of each length around what is copied at once.
            for bytes in [14, 60, 64, 191, 192, 193, 512, 1500, 1514, 1518] {
                let mut frame = payload(bytes as u8, bytes);
                frame[..6].copy_from_slice(&HOST.0);
                frame[6..12].copy_from_slice(&mac.0);
                joined.send(pair, &frame, &FrameMeta::PLAIN).unwrap();
                assert_eq!(joined.host_got(), [(frame, FrameMeta::PLAIN)], "{of:?}");
            }
            for (packet, offload) in packets() {
                let small = Packet {
                    payload: 1234,
                    ..packet
                };
                let (frame, meta) = small.frame(HOST, mac, 0);
                let sent = joined.send(pair, &frame, &meta);
                if agreed.contains(Offloads::CHECKSUM) {
                    sent.unwrap();
                    collect(&small, &joined.host_got(), Offloads::empty());
                } else {
                    let missing = BadFrame::NotAgreed(Offloads::CHECKSUM);
                    assert_eq!(sent, Err(Reason::Frame(missing)), "{of:?}");
                }
                let (frame, meta) = packet.frame(HOST, mac, SEGMENT);
                let sent = joined.send(pair, &frame, &meta);
                if agreed.contains(offload) {
                    sent.unwrap();
                    let got = joined.host_got();
                    assert_eq!(got.len(), 20_001usize.div_ceil(SEGMENT.into()));
                    collect(&packet, &got, Offloads::empty());
                } else {
                    assert!(matches!(sent, Err(Reason::Frame(_))), "{of:?}: {sent:?}");
                }
            }
        }
        receive(of, &mut joined, agreed);
        let lies = joined.join.counters.iter().map(|c| {
            c.tx_bad_header.get() + c.tx_short.get() + c.rx_unfit.get() + c.rx_no_room.get()
        });
        assert_eq!(lies.sum::<u64>(), 0);
        count += 1;
    }
    println!("{count} combinations");
    assert_eq!(count, 256 + 2 * 16);
}

fn receive(of: Combination, joined: &mut Joined, agreed: Offloads) {
    let mac = joined.mac;
    let mut flows = 0;
    for round in 0..8 {
        for (packet, offload) in packets() {
            let packet = Packet {
                port: packet.port + 16 * round,
                ..packet
            };
            let (frame, meta) = packet.frame(mac, HOST, SEGMENT);
            joined.host.send(&frame, &meta).unwrap();
            joined.host.flush();
            // More than there are buffers for: some wait for the driver.
            let mut got = Vec::new();
            for _ in 0..40 {
                joined.steps.run();
                let (some, busy) = joined.guest_got();
                assert!(busy <= 1, "one flow comes in at one pair");
                got.extend(some);
            }
            if agreed.contains(offload) {
                assert_eq!(got.len(), 1, "{of:?}");
                let segments = got[0].1.segments.expect("a frame to be cut");
                assert_eq!(segments.size, SEGMENT);
                assert_eq!(usize::from(segments.header_bytes), packet.header_bytes());
            } else {
                assert_eq!(got.len(), 20_001usize.div_ceil(SEGMENT.into()), "{of:?}");
            }
            collect(&packet, &got, agreed);
        }
        flows += 1;
    }
    assert_eq!(flows, 8);
    let busy = joined
        .pairs
        .iter()
        .filter(|(_, rx)| rx.counters().frames > 0);
    if of.pairs > 1 {
        assert!(busy.count() > 1, "flows are spread over pairs");
    } else {
        assert_eq!(busy.count(), 1);
    }
}
