//! A lying device against the shipped network driver: whatever it writes to
//! registers, rings or headers, the driver reports at most one fault a queue,
//! drops and counts frames that are none, hands out no byte that the device did
//! not vouch for, gives every buffer back exactly once or leaks and counts it,
//! and works again with a device that has turned honest.

mod control;
mod frames;
mod negotiation;
mod rings;
mod transmit;

use pvkit_guest::fault::Fault;
use pvkit_guest::net::{FrameMeta, HEADROOM, NetRx, NetTx, Reason};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::net::{Net, NetOptions, RxOf, TxOf};
use pvkit_hostile::net_device::{Chain, NetDevice, Transport, net_device, transport};
use pvkit_join::arena::{Arena, ArenaSpace};
use pvkit_join::wire::Wire;
use pvkit_protocol::virtio::net::{HEADER_BYTES, NetFeatures, NetHeader};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::sync::MutexGuard;

type Tx = TxOf<Vec<u8>, ArenaSpace, Transport>;
type Rx = RxOf<Vec<u8>, ArenaSpace, Transport>;

/// The receive queue, and the one that transmits.
const RX: usize = 0;
const TX: usize = 1;
/// Receive buffers: fewer than the queue has descriptors, and enough for the
/// longest frame.
const BUFFERS: u16 = 16;
const BUFFER_BYTES: usize = 4224;

/// The driver, and a device that is honest for now.
struct Scene {
    arena: Arena,
    wire: Wire<NetDevice>,
    net: Net<Transport, ArenaSpace>,
    tx: Tx,
    rx: Rx,
}

fn options() -> NetOptions {
    NetOptions {
        queue_size: 32,
        receive_buffers: BUFFERS,
        buffer_bytes: BUFFER_BYTES,
        control_polls: 100,
        ..NetOptions::default()
    }
}

/// A frame that can be told from others.
fn frame(seed: u8, bytes: usize) -> Vec<u8> {
    let bytes = (0..bytes).map(|index| (index as u8).wrapping_mul(7) ^ seed);
    let mut frame: Vec<u8> = bytes.collect();
    // Of a kind that nobody parses.
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// A buffer with a frame behind its headroom.
fn buffer(frame: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0xdd; HEADROOM];
    buffer.extend_from_slice(frame);
    // What lies behind the frame is nobody's business.
    buffer.extend_from_slice(&[0xdd; 100]);
    buffer
}

impl Scene {
    fn new() -> Self {
        Self::with(|_| {}, options())
    }

    fn with(prepare: impl FnOnce(&mut NetDevice), options: NetOptions) -> Self {
        let arena = Arena::new(4 << 20);
        let wire = net_device(&arena);
        prepare(&mut wire.device());
        Self::on(arena, wire, options).expect("an honest device")
    }

    fn on(arena: Arena, wire: Wire<NetDevice>, options: NetOptions) -> Result<Self, InitError> {
        let make = &mut || Some(vec![0xa5; options.buffer_bytes]);
        let (net, (tx, rx)) = Net::open(transport(&wire), arena.space(), options, make)?;
        Ok(Self {
            arena,
            wire,
            net,
            tx,
            rx,
        })
    }

    fn device(&self) -> MutexGuard<'_, NetDevice> {
        self.wire.device()
    }

    /// The receive buffers that the device has.
    fn buffers(&self) -> Vec<Chain> {
        self.device().fetch(RX)
    }

    fn negotiated(&self) -> NetFeatures {
        NetFeatures::from(self.net.features())
    }

    /// Sends one frame, and receives one that fills one buffer and, if they are
    /// merged, one that fills three.
    fn works(&mut self, name: &str) {
        let out = frame(1, 100);
        let refused = self.tx.submit(buffer(&out), out.len(), &FrameMeta::PLAIN);
        refused.unwrap_or_else(|refused| panic!("{name}: {}", refused.reason));
        self.tx.publish();
        let sent = self.device().transmit(TX);
        assert_eq!(sent.len(), 1, "{name}");
        assert_eq!(sent[0][..HEADER_BYTES], [0; HEADER_BYTES], "{name}");
        assert_eq!(sent[0][HEADER_BYTES..], out, "{name}");
        let back = self.tx.complete().unwrap().expect("a buffer");
        assert_eq!(back[HEADROOM..HEADROOM + out.len()], out, "{name}");
        assert!(self.tx.complete().unwrap().is_none());

        self.rx.publish();
        let chains = self.buffers();
        assert!(chains.len() >= 4, "{name}: {} buffers", chains.len());
        let one = frame(2, 60);
        let mut taken = self
            .device()
            .deliver(RX, &chains, NetHeader::default(), &one);
        assert_eq!(taken, 1);
        self.expect_frame(name, &one);
        if self.negotiated().contains(NetFeatures::MRG_RXBUF) && self.max_frame() > 4096 {
            let long = frame(3, 5000);
            taken += self
                .device()
                .deliver(RX, &chains[1..], NetHeader::default(), &long);
            self.expect_frame(name, &long);
        }
        // What was fetched and not used goes back to the device's hands.
        self.device().lanes[RX].fetched -= (chains.len() - taken) as u32;
        assert!(self.rx.recv().unwrap().is_none());
    }

    fn max_frame(&self) -> usize {
        usize::from(self.net.limits().mtu) + 18
    }

    fn expect_frame(&mut self, name: &str, bytes: &[u8]) {
        let got = self.rx.recv().unwrap().expect("a frame");
        assert_eq!(got.bytes(), bytes.len(), "{name}");
        assert_eq!(*got.meta(), FrameMeta::PLAIN, "{name}");
        let all: Vec<u8> = got.pieces().flatten().copied().collect();
        assert_eq!(all, bytes, "{name}");
        let mut copy = vec![0; bytes.len()];
        assert_eq!(got.copy_to(&mut copy), bytes.len());
        assert_eq!(copy, bytes);
    }

    fn assert_rx_faults_once(&mut self, name: &str, fault: Fault) {
        assert_eq!(self.rx.recv().unwrap_err(), fault, "{name}");
        for _ in 0..3 {
            assert!(self.rx.recv().unwrap().is_none(), "{name}: retired");
            self.rx.publish();
            assert!(!self.rx.arm(), "{name}: nothing to wake up for");
        }
        assert_eq!(self.rx.counters().queue.faults, 1, "{name}");
    }

    fn assert_tx_faults_once(&mut self, name: &str, fault: Fault) {
        assert_eq!(self.tx.complete().unwrap_err(), fault, "{name}");
        for _ in 0..3 {
            assert!(self.tx.complete().unwrap().is_none(), "{name}: retired");
            self.tx.publish();
            assert!(!self.tx.arm(), "{name}: nothing to wake up for");
        }
        assert_eq!(self.tx.room(), 0, "{name}");
        let refused = self.tx.submit(buffer(&frame(9, 60)), 60, &FrameMeta::PLAIN);
        let refused = refused.unwrap_err();
        assert_eq!(refused.reason, Reason::Retired, "{name}");
        assert!(refused.buffer.is_some(), "{name}");
        assert_eq!(self.tx.counters().queue.faults, 1, "{name}");
    }

    /// With an honest device: so many transmit buffers come back; then
    /// everything works, and nothing is lost.
    fn assert_recovers(mut self, name: &str, outstanding: usize) {
        self.device().tell_the_truth();
        let mut back = 0;
        self.net
            .recover(&mut [(&mut self.tx, &mut self.rx)], &mut |_| back += 1)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(back, outstanding, "{name}");
        for _ in 0..40 {
            self.works(name);
        }
        self.assert_closes(name);
    }

    /// All receive buffers come back, and nothing is lost.
    fn assert_closes(self, name: &str) {
        let Self {
            net,
            tx,
            rx,
            arena,
            wire,
        } = self;
        let mut back = 0;
        net.close([(tx, rx)], &mut |_| back += 1).unwrap();
        assert_eq!(back, usize::from(BUFFERS), "{name}");
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0), "{name}");
        assert_eq!(wire.device().status, DeviceStatus::empty(), "{name}");
    }
}

/// Ring formats to attack.
const RINGS: [Features; 2] = [Features::empty(), Features::RING_PACKED];

/// A scene on each ring, merging buffers or not.
fn scenes() -> impl Iterator<Item = (String, Scene)> {
    RINGS.into_iter().flat_map(|ring| {
        [true, false].map(|merge| {
            let scene = Scene::with(
                |device| {
                    device.features |= ring;
                    device.features.set(NetFeatures::MRG_RXBUF.into(), merge);
                },
                options(),
            );
            assert!(scene.net.features().contains(ring));
            (format!("{ring:?}, merging {merge}"), scene)
        })
    })
}

#[test]
fn an_honest_device_serves_the_driver() {
    for (name, mut scene) in scenes() {
        for _ in 0..500 {
            scene.works(&name);
        }
        let counters = scene.rx.counters();
        assert_eq!(counters.dropped(), 0, "{name}");
        assert_eq!(counters.frames, 500, "{name}");
        scene.assert_recovers(&name, 0);
    }
    // Frames over many buffers, all the way around the ring.
    for ring in RINGS {
        let mut scene = Scene::with(
            |device| {
                device.features |= ring;
                device.config.mtu = 9000.into();
            },
            NetOptions {
                buffer_bytes: 2048,
                ..options()
            },
        );
        for _ in 0..100 {
            scene.works("merged");
        }
        assert_eq!(scene.rx.counters().buffers, 100 * 4);
        scene.assert_closes("merged");
    }
}

#[test]
fn buffers_go_back_in_batches() {
    let mut scene = Scene::new();
    let chains = scene.buffers();
    assert_eq!(chains.len(), usize::from(BUFFERS));
    let kicks = scene.device().lanes[RX].kicks;
    assert_eq!(kicks, 1, "one doorbell for all of them");
    for chain in &chains[..3] {
        let one = frame(1, 60);
        let chain = std::slice::from_ref(chain);
        scene
            .device()
            .deliver(RX, chain, NetHeader::default(), &one);
        scene.expect_frame("", &one);
    }
    assert_eq!(scene.buffers(), [], "not before there is a batch");
    let one = frame(1, 60);
    scene
        .device()
        .deliver(RX, &chains[3..4], NetHeader::default(), &one);
    scene.expect_frame("", &one);
    assert_eq!(scene.buffers().len(), 4);
    // A frame that is forgotten, not dropped, goes back too.
    scene
        .device()
        .deliver(RX, &chains[4..5], NetHeader::default(), &one);
    std::mem::forget(scene.rx.recv().unwrap().expect("a frame"));
    assert!(scene.rx.recv().unwrap().is_none());
    scene.rx.publish();
    assert_eq!(scene.buffers().len(), 1);
    scene.assert_closes("");
}

#[test]
fn queues_that_are_dropped_without_proof_leak_and_count() {
    let Scene {
        arena, net, tx, rx, ..
    } = Scene::new();
    drop((tx, rx));
    assert!(arena.leaked() > 0);
    drop(net);
    assert!(arena.leaked() > 0);
}
