//! Lanes that start and stop, with whatever is under way.

use super::link::TestLink;
use super::{HEADER, OWN, PEER, Port, RINGS, SIZE, Scene, frame};
use pvkit_host::event::EventFd;
use pvkit_host::link::Link;
use pvkit_host::virtio::device::{ConfigEvents, Device, LaneResources, LaneState};
use pvkit_host::virtio::net::{MAX_PAIRS, Net, NetOptions, NetOptionsError};
use pvkit_host::virtio::queue::{QueueAddresses, QueueResources};
use pvkit_host::worker::{Progress, SignalCounter, Worker};
use pvkit_hostile::guest::{readable, writable};
use pvkit_protocol::frame::{FrameMeta, MacAddress, Offloads};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{NetFeatures, NetHeader};
use std::sync::Arc;
use zerocopy::IntoBytes;

#[test]
fn a_link_that_is_full_for_ever_holds_no_reset_up() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        scene.link.set_room(0, Some(0));
        for seed in 0..4 {
            scene.transmit(&NetHeader::default(), &frame(PEER, seed, 1000));
        }
        // A frame that waits for buffers, too.
        scene.rx.lend(100);
        scene.link.offer(0, &frame(OWN, 1, 1000), FrameMeta::PLAIN);
        scene.tx.kick();
        scene.steps.run();
        assert_eq!(scene.tx.used(), [0; 0]);
        assert_eq!(scene.counters.tx_full.get(), 1);
        scene.restart();
        scene.link.set_room(0, None);
        scene.rx.lend(1100);
        assert_eq!(scene.serve(), []);
        assert_eq!(scene.link.sent(0), [], "frames of another life");
        assert_eq!(scene.rx.used(), [HEADER + 1000], "the link kept it");
        assert!(scene.works());
    }
}

#[test]
fn a_link_that_is_down_hinders_nobody() {
    let mut scene = Scene::new(Features::empty(), NetFeatures::empty());
    scene.link.set_up(false);
    assert!(scene.works(), "what is lost is the link's business");
    scene.restart();
    assert!(scene.works());
}

#[derive(Debug)]
struct Nobody;

impl ConfigEvents for Nobody {
    fn config_changed(&self) {}
}

/// Starts a pair by hand, over the rings of a scene whose own device does not
/// work.
fn start(scene: &Scene, device: &mut Net, at: Option<LaneState>) -> Box<dyn Worker> {
    let queue = |port: &Port| QueueResources {
        at: QueueAddresses {
            size: SIZE,
            descriptors: port.guest.layout.descriptors,
            driver: port.guest.layout.avail,
            device: port.guest.layout.used,
        },
        signal: Arc::new(SignalCounter::default()),
        kick: Arc::new(EventFd::new().unwrap()),
    };
    let resources = LaneResources {
        memory: scene.machine.memory().clone(),
        queues: vec![Some(queue(&scene.rx)), Some(queue(&scene.tx))],
    };
    let started = device.start(0, resources, scene.features, at.as_ref());
    started.unwrap()
}

fn serve(worker: &mut dyn Worker) {
    for _ in 0..100 {
        match worker.poll(64) {
            Progress::More => {}
            Progress::Drained => return,
            other => panic!("{other:?}"),
        }
    }
    panic!("it never rests");
}

#[test]
fn a_lane_goes_on_where_it_stopped() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        let link = TestLink::new(1);
        let mut device = Net::new(Arc::new(link.clone()), super::options()).unwrap();
        device.connect(Arc::new(Nobody));
        let mut state = None;
        // Enough rounds to go round the rings, at all their places.
        for round in 0..100u8 {
            let mut worker = start(&scene, &mut device, state.take());
            // Two frames of three find room; of two frames that come in, the
            // second needs more buffers than there are.
            link.set_room(0, Some(2));
            for seed in 0..3 {
                let at = scene.tx.place(412);
                scene.tx.guest.poke(at, NetHeader::default().as_bytes());
                scene
                    .tx
                    .guest
                    .poke(at + 12, &frame(PEER, seed ^ round, 400));
                // A header of its own, for some.
                if seed == 0 {
                    scene.tx.post(&[readable(at, 412)]);
                } else {
                    scene.tx.post(&[readable(at, 12), readable(at + 12, 400)]);
                }
            }
            for pieces in 1..=3 {
                let at = scene.rx.place(112);
                let parts = [
                    writable(at, 40),
                    writable(at + 40, 40),
                    writable(at + 80, 32),
                ];
                match pieces {
                    1 => scene.rx.post(&[writable(at, 112)]),
                    2 => scene.rx.post(&[writable(at, 80), parts[2]]),
                    _ => scene.rx.post(&parts),
                }
            }
            link.offer(0, &frame(OWN, round, 100), FrameMeta::PLAIN);
            let long = frame(OWN, round ^ 0xff, 300);
            link.offer(0, &long, FrameMeta::PLAIN);
            serve(&mut *worker);
            assert!(!worker.arm());
            assert_eq!(scene.tx.used(), [0, 0]);
            assert_eq!(scene.rx.used(), [112]);
            worker.begin_stop();
            assert_eq!(worker.poll(64), Progress::Stopped);
            let stopped = device.stopped(0, worker);

            // Another goes on, by what this one left.
            let mut worker = start(&scene, &mut device, Some(stopped));
            link.set_room(0, None);
            let at = scene.rx.lend(112);
            serve(&mut *worker);
            let sent: Vec<_> = link.sent(0).into_iter().map(|(frame, _)| frame).collect();
            let expected: Vec<_> = (0..3).map(|seed| frame(PEER, seed ^ round, 400)).collect();
            assert_eq!(sent, expected, "round {round} of {rings:?}");
            assert_eq!(scene.tx.used(), [0]);
            assert_eq!(
                scene.rx.used(),
                [112, 112, 88],
                "round {round} of {rings:?}"
            );
            assert_eq!(scene.rx.guest.peek(at, 88), long[212..]);
            worker.begin_stop();
            assert_eq!(worker.poll(64), Progress::Stopped);
            state = Some(device.stopped(0, worker));
        }
    }
}

#[test]
fn chains_that_are_held_are_fetched_again_from_new_memory() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        scene.link.set_room(0, Some(0));
        scene.transmit(&NetHeader::default(), &frame(PEER, 1, 400));
        let last = scene.tx.guest.layout.data + 411;
        let first = scene.rx.lend(112);
        scene.link.offer(0, &frame(OWN, 1, 200), FrameMeta::PLAIN);
        scene.serve();
        // The same contents elsewhere in the host.
        let regions = scene.rx.guest.remember();
        let ranges: Vec<_> = regions
            .iter()
            .map(|(start, bytes)| (vm_memory::GuestAddress(*start), bytes.len()))
            .collect();
        let map = vm_memory::GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        scene.machine.memory().replace(Arc::new(map)).unwrap();
        let ram = scene.machine.memory().snapshot();
        for (start, bytes) in &regions {
            ram.write(*start, bytes).unwrap();
        }
        for port in [&mut scene.rx, &mut scene.tx, &mut scene.control] {
            port.guest.ram = ram.clone();
        }
        scene.link.set_room(0, None);
        let at = scene.rx.lend(112);
        scene.tx.guest.poke(last, &[0x5a]);
        assert_eq!(scene.serve(), []);
        assert_eq!(scene.rx.used(), [112, 100]);
        let guest = &scene.rx.guest;
        assert_eq!(guest.peek(first + 12, 100), frame(OWN, 1, 200)[..100]);
        assert_eq!(guest.peek(at, 100), frame(OWN, 1, 200)[100..]);
        let sent = scene.link.sent(0);
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].0[..399], frame(PEER, 1, 400)[..399]);
        assert_eq!(sent[0].0[399], 0x5a, "as it is in the new memory");
        assert_eq!(scene.tx.used(), [0]);
        assert!(scene.works());
    }
}

#[test]
fn nothing_is_missed_between_the_last_look_and_the_wait() {
    // What comes in after the last poll and before the lane is armed is found
    // by arming.
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        assert!(!scene.steps.arm());
        scene.transmit(&NetHeader::default(), &frame(PEER, 1, 60));
        assert!(scene.steps.arm(), "a frame of the driver's");
        scene.serve();
        assert!(!scene.steps.arm());
        scene.link.offer(0, &frame(OWN, 1, 60), FrameMeta::PLAIN);
        assert!(scene.steps.arm(), "a frame of the link's");
        scene.serve();
        assert!(!scene.steps.arm(), "which waits for buffers now");
        scene.rx.lend(50);
        assert!(scene.steps.arm(), "a buffer");
        scene.serve();
        assert!(!scene.steps.arm(), "of which one more is needed");
        scene.rx.lend(50);
        assert!(scene.steps.arm());
        scene.serve();
        assert_eq!(scene.rx.used(), [50, 22]);
        scene.rx.lend(50);
        assert!(!scene.steps.arm(), "buffers that nobody waits for");
        scene.link.set_room(0, Some(0));
        scene.transmit(&NetHeader::default(), &frame(PEER, 1, 60));
        scene.serve();
        assert!(!scene.steps.arm());
        scene.link.set_room(0, Some(1));
        assert!(scene.steps.arm(), "room");
        scene.serve();
        assert!(!scene.steps.arm());
    }
}

#[test]
fn options_that_make_no_sense() {
    let link = || Arc::new(TestLink::new(2)) as Arc<dyn Link>;
    let error = |options: NetOptions| Net::new(link(), options).map(|_| ()).unwrap_err();
    let good = NetOptions::default();
    let pairs = |pairs| NetOptions {
        pairs,
        ..NetOptions::default()
    };
    assert!(Net::new(link(), pairs(2)).is_ok());
    assert_eq!(error(pairs(0)), NetOptionsError::Pairs(0));
    assert_eq!(
        error(pairs(MAX_PAIRS + 1)),
        NetOptionsError::Pairs(MAX_PAIRS + 1)
    );
    assert_eq!(
        error(pairs(3)),
        NetOptionsError::Lanes { pairs: 3, lanes: 2 }
    );
    let alone = NetOptions {
        control: false,
        ..pairs(2)
    };
    assert_eq!(error(alone), NetOptionsError::NoControl(2));
    for mac in [MacAddress::BROADCAST, MacAddress::default()] {
        let options = NetOptions {
            mac,
            ..good.clone()
        };
        assert_eq!(error(options), NetOptionsError::Mac(mac));
    }
    for mtu in [0, 67, 1501, u16::MAX] {
        let options = NetOptions {
            mtu: Some(mtu),
            ..good.clone()
        };
        assert_eq!(error(options), NetOptionsError::Mtu { mtu, max: 1500 });
    }
    let odd = NetOptions {
        queue_size: 3,
        ..good
    };
    assert!(matches!(error(odd), NetOptionsError::QueueSize(_)));
}

#[test]
fn every_feature_can_be_switched() {
    let offered = |options: NetOptions| {
        let device = Net::new(Arc::new(TestLink::new(2)), options).unwrap();
        NetFeatures::from(device.identity().features)
    };
    let all = NetOptions {
        pairs: 2,
        ..NetOptions::default()
    };
    let not_here = NetFeatures::GUEST_UFO | NetFeatures::HOST_UFO | NetFeatures::GUEST_HDRLEN;
    let everything = NetFeatures::all() - not_here;
    assert_eq!(offered(all.clone()), everything);
    let one = NetOptions {
        pairs: 1,
        ..all.clone()
    };
    assert_eq!(offered(one.clone()), everything - NetFeatures::MQ);
    let uncontrolled = offered(NetOptions {
        control: false,
        ..one
    });
    let commands = NetFeatures::CTRL_VQ
        | NetFeatures::CTRL_RX
        | NetFeatures::CTRL_RX_EXTRA
        | NetFeatures::CTRL_VLAN
        | NetFeatures::CTRL_MAC_ADDR
        | NetFeatures::CTRL_GUEST_OFFLOADS
        | NetFeatures::GUEST_ANNOUNCE
        | NetFeatures::MQ;
    assert_eq!(uncontrolled, everything - commands);
    let unmerged = NetOptions {
        mergeable: false,
        ..all.clone()
    };
    assert_eq!(offered(unmerged), everything - NetFeatures::MRG_RXBUF);
    for offload in Offloads::all().iter() {
        let transmit = NetOptions {
            transmit: Offloads::all() - offload,
            ..all.clone()
        };
        let has = offered(transmit).transmit_offloads();
        // UDP of both versions is one feature; and without checksums there is
        // nothing.
        match offload {
            Offloads::CHECKSUM => assert_eq!(has, Offloads::empty()),
            Offloads::USO4 | Offloads::USO6 => assert_eq!(has, Offloads::all()),
            _ => assert_eq!(has, Offloads::all() - offload),
        }
        let receive = NetOptions {
            receive: Offloads::all() - offload,
            ..all.clone()
        };
        let has = offered(receive).receive_offloads();
        match offload {
            Offloads::CHECKSUM => assert_eq!(has, Offloads::empty()),
            _ => assert_eq!(has, Offloads::all() - offload),
        }
    }
}
