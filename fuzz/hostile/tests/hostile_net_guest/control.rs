//! Commands, and what else the driver is told.

use super::{OWN, PEER, Port, RINGS, Scene, frame, options};
use pvkit_host::virtio::net::NetOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::{HIGH, TOP, readable, writable};
use pvkit_protocol::frame::{FrameMeta, MacAddress, Offloads};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::mmio;
use pvkit_protocol::virtio::net::{NetConfig, NetFeatures, NetHeader, NetStatus, ack};
use zerocopy::{FromBytes, IntoBytes};

const OK: u8 = ack::OK;
const ERR: u8 = ack::ERR;

fn config(scene: &Scene) -> NetConfig {
    let guest = &scene.control.guest;
    let bytes: Vec<u8> = (0..17)
        .flat_map(|at| guest.read_wide((mmio::CONFIG + at) as u64, 1))
        .collect();
    NetConfig::read_from_bytes(&bytes).unwrap()
}

fn status(scene: &Scene) -> NetStatus {
    NetStatus::from_bits_retain(config(scene).status.get())
}

fn table(unicast: u32, multicast: u32) -> Vec<u8> {
    let mut bytes = vec![1, 0];
    for count in [unicast, multicast] {
        bytes.extend(count.to_le_bytes());
        for low in 0..count {
            bytes.extend(MacAddress::local(low + 100).0);
        }
    }
    bytes
}

#[test]
fn commands_are_done_or_refused() {
    let mut cases = vec![
        (vec![], ERR),
        (vec![0], ERR),
        (vec![0, 0], ERR),
        (vec![0, 0, 2], ERR),
        (vec![0, 0, 1, 0], ERR),
        (vec![0, 6, 1], ERR),
        (vec![1, 0], ERR),
        (vec![1, 1, 2, 0, 0, 0, 0], ERR),
        (vec![1, 1, 3, 0, 0, 0, 0, 1], ERR),
        (vec![1, 1, 0, 0, 0, 0, 0, 0], ERR),
        (vec![1, 1, 2, 0, 0, 0, 0, 1, 0], ERR),
        (vec![1, 1, 2, 0, 0, 0, 0, 1], OK),
        (vec![1, 2, 0, 0, 0, 0, 0, 1], ERR),
        (vec![2, 0, 0xff, 0x0f], OK),
        (vec![2, 1, 0xff, 0x0f], OK),
        (vec![2, 0, 0, 0x10], ERR),
        (vec![2, 1, 0xff, 0xff], ERR),
        (vec![2, 0, 1], ERR),
        (vec![2, 0, 1, 0, 0], ERR),
        (vec![2, 2, 1, 0], ERR),
        (vec![3, 0], OK),
        (vec![3, 0, 0], ERR),
        (vec![3, 1], ERR),
        // One pair: not offered, not agreed on.
        (vec![4, 0, 1, 0], ERR),
        (vec![5, 0, 0, 0, 0, 0, 0, 0, 0], ERR),
        (vec![5, 0, 1, 0, 0, 0, 0, 0, 0, 0], ERR),
        (vec![5, 1, 0, 0, 0, 0, 0, 0, 0, 0], ERR),
        (vec![5, 0, 0, 0, 0, 0, 0, 0, 0, 0], OK),
        (vec![6, 0], ERR),
        (vec![255, 255, 255], ERR),
        (table(0, 0), OK),
        (table(64, 64), OK),
        (table(65, 0), OK),
        (table(500, 300), OK),
    ];
    for mode in 0..6 {
        cases.push((vec![0, mode, 1], OK));
        cases.push((vec![0, mode, 0], OK));
    }
    for cut in [3, 5, 6, 11, 12, 15] {
        cases.push((table(1, 1)[..cut].to_vec(), ERR));
    }
    let mut longer = table(1, 1);
    longer.push(0);
    cases.push((longer, ERR));
    for count in [2, 0x2aaa_aaab, u32::MAX] {
        let mut lies = table(1, 1);
        lies[2..6].copy_from_slice(&u32::to_le_bytes(count));
        cases.push((lies, ERR));
    }
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        let mut refused = 0;
        for (command, answer) in &cases {
            let name = &command[..command.len().min(16)];
            assert_eq!(scene.command(command), *answer, "{name:x?}");
            refused += u64::from(*answer == ERR);
        }
        assert_eq!(scene.commands.commands.get(), cases.len() as u64);
        assert_eq!(scene.commands.refused.get(), refused);
        assert_eq!(scene.command(&[0, 0, 1]), OK);
        assert!(scene.works());
    }
}

#[test]
fn commands_in_pieces() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        let bytes = table(2, 1);
        let at = scene.control.place(100);
        scene
            .control
            .guest
            .poke(at, &bytes)
            .poke(at + 90, &[0xee; 4]);
        // One byte, then three, then the rest; and more room than an answer
        // needs.
        let rest = bytes.len() as u32 - 4;
        scene.control.post(&[
            readable(at, 1),
            readable(at + 1, 3),
            readable(at + 4, rest),
            writable(at + 90, 3),
        ]);
        scene.control.kick();
        scene.steps.run();
        assert_eq!(scene.control.used(), [1]);
        assert_eq!(scene.control.guest.peek(at + 90, 4), [OK, 0xee, 0xee, 0xee]);
        assert_eq!(scene.commands.queue.signals.get(), 1);
    }
}

#[test]
fn what_was_not_agreed_is_refused() {
    for (without, command) in [
        (
            NetFeatures::CTRL_RX | NetFeatures::CTRL_RX_EXTRA,
            vec![0, 0, 1],
        ),
        (NetFeatures::CTRL_RX_EXTRA, vec![0, 2, 1]),
        (
            NetFeatures::CTRL_RX | NetFeatures::CTRL_RX_EXTRA,
            table(1, 1),
        ),
        (NetFeatures::CTRL_MAC_ADDR, vec![1, 1, 2, 0, 0, 0, 0, 1]),
        (NetFeatures::CTRL_VLAN, vec![2, 0, 1, 0]),
        (NetFeatures::GUEST_ANNOUNCE, vec![3, 0]),
        (
            NetFeatures::CTRL_GUEST_OFFLOADS,
            vec![5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
    ] {
        let mut scene = Scene::new(Features::empty(), without);
        assert_eq!(scene.command(&command), ERR, "{without:?}");
        let mut scene = Scene::new(Features::empty(), NetFeatures::empty());
        assert_eq!(scene.command(&command), OK, "{without:?}");
    }
}

#[test]
fn a_command_without_room_for_an_answer_breaks_the_control_queue_alone() {
    for rings in RINGS {
        let mut scene = Scene::new(rings, NetFeatures::empty());
        scene.control.send(&[0, 0, 0]);
        let faults = scene.serve();
        assert!(matches!(faults[..], [Fault::Frame { .. }]), "{faults:?}");
        assert!(scene.works(), "the pair goes on");
        scene.link.offer(0, &frame(PEER, 1, 60), FrameMeta::PLAIN);
        scene.rx.lend(100);
        scene.serve();
        assert_eq!(scene.rx.used(), [72], "it was not done");
        scene.restart();
        assert_eq!(scene.command(&[0, 0, 0]), OK);
    }
}

#[test]
fn offloads_can_be_changed_to_less_than_was_agreed() {
    let mut scene = Scene::new(Features::empty(), NetFeatures::GUEST_USO6);
    let without = Offloads::all() - Offloads::USO6;
    assert_eq!(scene.link.receive_offloads(), [without]);
    let set = |scene: &mut Scene, features: NetFeatures| {
        let mut command = vec![5, 0];
        command.extend(features.bits().to_le_bytes());
        scene.command(&command)
    };
    let csum = NetFeatures::GUEST_CSUM;
    assert_eq!(set(&mut scene, csum), OK);
    assert_eq!(scene.link.receive_offloads(), [Offloads::CHECKSUM]);
    for more in [
        csum | NetFeatures::GUEST_USO6,
        csum | NetFeatures::GUEST_UFO,
        csum | NetFeatures::MRG_RXBUF,
        csum | NetFeatures::HOST_TSO4,
    ] {
        assert_eq!(set(&mut scene, more), ERR, "{more:?}");
    }
    // Segmentation without checksums is nothing.
    assert_eq!(set(&mut scene, NetFeatures::GUEST_TSO4), OK);
    assert_eq!(scene.link.receive_offloads(), [Offloads::empty()]);
    let meta = FrameMeta {
        checksum: pvkit_protocol::frame::Checksum::Partial {
            start: 34,
            offset: 16,
        },
        segments: None,
    };
    scene.rx.lend(200);
    scene.link.offer(0, &frame(OWN, 1, 60), meta);
    scene.serve();
    assert_eq!(scene.rx.used(), [0; 0]);
    // A link that refuses leaves things as they are.
    scene.link.refuse(true);
    assert_eq!(set(&mut scene, csum), ERR);
    scene.link.offer(0, &frame(OWN, 1, 60), meta);
    scene.serve();
    assert_eq!(scene.rx.used(), [0; 0]);
    assert_eq!(scene.counters.rx_unfit.get(), 2);
    scene.link.refuse(false);
    assert_eq!(set(&mut scene, csum), OK);
    scene.link.offer(0, &frame(OWN, 1, 60), meta);
    scene.serve();
    assert_eq!(scene.rx.used(), [72]);
    scene.restart();
    let told = scene.link.receive_offloads();
    assert_eq!(told, [Offloads::CHECKSUM, Offloads::empty(), without]);
}

#[test]
fn the_configuration_says_what_there_is() {
    let scene = Scene::new(Features::empty(), NetFeatures::empty());
    let config = config(&scene);
    assert_eq!(config.mac, OWN);
    assert_eq!(status(&scene), NetStatus::LINK_UP);
    assert_eq!(config.max_virtqueue_pairs.get(), 0);
    assert_eq!(config.mtu.get(), 1500);
    assert_eq!((config.speed.get(), config.duplex), (10_000, 1));
    // Beyond it there is nothing; and it is not writable.
    let mut guest = scene.control.guest;
    let end = (mmio::CONFIG + 17) as u64;
    assert_eq!(guest.read_wide(end, 1), [0]);
    guest.write_wide(mmio::CONFIG as u64, &[9]);
    assert_eq!(guest.read_wide(mmio::CONFIG as u64, 1), [OWN.0[0]]);
}

#[test]
fn a_link_that_goes_and_comes_back_is_news() {
    for announce in [true, false] {
        let without = if announce {
            NetFeatures::empty()
        } else {
            NetFeatures::GUEST_ANNOUNCE
        };
        let mut scene = Scene::new(Features::empty(), without);
        let generation = |scene: &Scene| scene.control.guest.register(mmio::CONFIG_GENERATION);
        let interrupts = scene.control.guest.interrupts.clone();
        let (before, count) = (generation(&scene), interrupts.count());
        scene.link.set_up(false);
        assert_eq!(status(&scene), NetStatus::empty());
        assert_eq!(
            (generation(&scene), interrupts.count()),
            (before + 1, count + 1)
        );
        // Twice the same is no news.
        scene.link.set_up(false);
        assert_eq!(
            (generation(&scene), interrupts.count()),
            (before + 1, count + 1)
        );
        scene.link.set_up(true);
        assert_eq!(
            (generation(&scene), interrupts.count()),
            (before + 2, count + 2)
        );
        if announce {
            assert_eq!(status(&scene), NetStatus::LINK_UP | NetStatus::ANNOUNCE);
            assert_eq!(scene.command(&[3, 0]), OK);
        }
        assert_eq!(status(&scene), NetStatus::LINK_UP);
        assert!(scene.works());
        scene.link.set_up(false);
        scene.restart();
        assert_eq!(status(&scene), NetStatus::empty());
    }
}

#[test]
fn a_driver_that_is_not_ready_is_not_interrupted() {
    let mut scene = Scene::new(Features::empty(), NetFeatures::empty());
    assert!(scene.rx.guest.reset());
    let interrupts = scene.rx.guest.interrupts.clone();
    let count = interrupts.count();
    scene.link.set_up(false);
    assert_eq!(interrupts.count(), count);
    assert_eq!(status(&scene), NetStatus::empty());
    // It may have read the old state: it hears of it when it is ready.
    assert!(scene.rx.guest.negotiate(scene.features));
    assert_eq!(interrupts.count(), count);
    scene.rx.guest.go();
    assert_eq!(interrupts.count(), count + 1);
}

fn three_pairs() -> NetOptions {
    NetOptions {
        pairs: 3,
        ..options()
    }
}

#[test]
fn the_control_queue_is_where_the_driver_expects_it() {
    for (without, at) in [(NetFeatures::empty(), 6), (NetFeatures::MQ, 2)] {
        for rings in RINGS {
            let mut scene = Scene::with(three_pairs(), rings, without);
            assert_eq!(scene.control.guest.queue, at);
            assert_eq!(config(&scene).max_virtqueue_pairs.get(), 3);
            for _ in 0..2 {
                assert!(scene.works());
                assert_eq!(scene.command(&[0, 0, 1]), OK);
                scene.restart();
            }
        }
    }
}

#[test]
fn lanes_are_those_of_the_driver_of_the_moment() {
    // One driver knows of several pairs, the next does not, and back.
    let mut scene = Scene::with(three_pairs(), Features::empty(), NetFeatures::empty());
    let many = scene.features;
    for round in 0..4 {
        let (features, control) = match round % 2 {
            0 => (many - Features::from(NetFeatures::MQ), 2),
            _ => (many, 6),
        };
        scene.features = features;
        scene.control.guest.queue = control;
        scene.restart();
        assert!(scene.works(), "round {round}");
        assert_eq!(scene.command(&[0, 0, 1]), OK, "round {round}");
    }
}

#[test]
fn how_many_pairs_are_used() {
    let mut scene = Scene::with(three_pairs(), Features::empty(), NetFeatures::empty());
    assert_eq!(scene.link.used_lanes(), [1]);
    let set = |scene: &mut Scene, pairs: u16| {
        let [low, high] = pairs.to_le_bytes();
        scene.command(&[4, 0, low, high])
    };
    for bad in [0, 4, 0x8000, 0x8001, 65_535] {
        assert_eq!(set(&mut scene, bad), ERR, "{bad}");
    }
    assert_eq!(scene.link.used_lanes(), [0; 0]);
    for good in [1, 2, 3, 2] {
        assert_eq!(set(&mut scene, good), OK, "{good}");
    }
    assert_eq!(scene.link.used_lanes(), [1, 2, 3, 2]);
    scene.link.refuse(true);
    assert_eq!(set(&mut scene, 3), ERR);
    assert_eq!(scene.command(&[4, 1, 1, 0]), ERR);
    assert_eq!(scene.command(&[4, 0, 1]), ERR);
    assert_eq!(scene.command(&[4, 0, 1, 0, 0]), ERR);
}

#[test]
fn every_pair_has_its_own_lane_of_the_link() {
    for rings in RINGS {
        let mut scene = Scene::with(three_pairs(), rings, NetFeatures::empty());
        assert!(scene.rx.guest.reset());
        assert!(scene.rx.guest.negotiate(scene.features));
        // Only the third pair is set up.
        let [mut rx, mut tx] = [(4, TOP.start), (5, HIGH.start)].map(|(queue, base)| {
            let mut guest = scene.rx.guest.at_queue(queue, base);
            guest.layout.data = base + 0x6000;
            Port::new(guest, scene.features)
        });
        rx.guest.go();
        let at = rx.lend(200);
        let mut bytes = NetHeader::default().as_bytes().to_vec();
        bytes.extend(frame(PEER, 1, 80));
        tx.send(&bytes);
        scene.link.offer(2, &frame(OWN, 2, 70), FrameMeta::PLAIN);
        scene.link.offer(0, &frame(OWN, 3, 70), FrameMeta::PLAIN);
        assert_eq!(scene.serve(), []);
        assert_eq!(tx.used(), [0]);
        assert_eq!(rx.used(), [82]);
        assert_eq!(rx.guest.peek(at + 12, 70), frame(OWN, 2, 70));
        assert_eq!(scene.link.sent(2), [(frame(PEER, 1, 80), FrameMeta::PLAIN)]);
        assert_eq!(scene.link.waiting(0), 1, "that pair does not work");
    }
}
