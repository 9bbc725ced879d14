//! The control queue, and one that does not do what it should.

use super::{BUFFER_BYTES, Scene, options};
use pvkit_guest::fault::Fault;
use pvkit_guest::net::{MacAddress, Offloads};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::net::{Command, ControlError, MAC_TABLE, Net};
use pvkit_guest::virtio::queue::TRAILER_UNWRITTEN;
use pvkit_hostile::net_device::{Answer, net_device, transport};
use pvkit_join::arena::Arena;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{NetFeatures, NetStatus};

const CONTROL: usize = 2;

#[test]
fn commands_look_as_the_specification_says_and_are_given_again() {
    for features in [Features::empty(), Features::RING_PACKED, Features::IN_ORDER] {
        let mut scene = Scene::with(
            |device| {
                device.features |= features;
                device.features -= Features::INDIRECT_DESC;
            },
            options(),
        );
        let [one, two] = [1, 2].map(MacAddress::local);
        let group = MacAddress([1, 0, 0x5e, 0, 0, 1]);
        let mut table = vec![1, 0, 1, 0, 0, 0];
        table.extend_from_slice(&one.0);
        table.extend_from_slice(&[1, 0, 0, 0]);
        table.extend_from_slice(&group.0);
        let mut address = vec![1, 1];
        address.extend_from_slice(&two.0);
        let offloads = Offloads::CHECKSUM | Offloads::TSO4;
        let bits = (NetFeatures::GUEST_CSUM | NetFeatures::GUEST_TSO4).bits();
        let mut guest = vec![5, 0];
        guest.extend_from_slice(&bits.to_le_bytes());
        let commands: [(Command<'_>, Vec<u8>); 12] = [
            (Command::SetMac(two), address),
            (
                Command::MacTable {
                    unicast: &[one],
                    multicast: &[group],
                },
                table,
            ),
            (Command::Promiscuous(true), vec![0, 0, 1]),
            (Command::AllMulticast(false), vec![0, 1, 0]),
            (Command::AllUnicast(true), vec![0, 2, 1]),
            (Command::NoMulticast(true), vec![0, 3, 1]),
            (Command::NoUnicast(true), vec![0, 4, 1]),
            (Command::NoBroadcast(true), vec![0, 5, 1]),
            (Command::AddVlan(0x123), vec![2, 0, 0x23, 1]),
            (Command::ReceiveOffloads(offloads), guest),
            (Command::AddVlan(7), vec![2, 0, 7, 0]),
            (Command::DeleteVlan(7), vec![2, 1, 7, 0]),
        ];
        for (command, _) in &commands {
            scene.net.command(command).unwrap();
        }
        scene.net.command(&Command::Announced).unwrap();
        let wanted: Vec<_> = commands.iter().map(|(_, bytes)| bytes.clone()).collect();
        let mut device = scene.device();
        let mut seen = std::mem::take(&mut device.commands);
        assert_eq!(seen.pop(), Some(vec![3, 0]));
        assert_eq!(seen, wanted);
        drop(device);
        assert_eq!(scene.net.limits().mac, Some(two));
        // After a reset: all but what was taken back.
        scene
            .net
            .recover(&mut [(&mut scene.tx, &mut scene.rx)], &mut |_| {})
            .unwrap();
        assert_eq!(scene.device().commands, wanted[..10]);
        assert_eq!(scene.net.limits().mac, Some(two));
        scene.works("");
        scene.assert_closes("");
    }
}

#[test]
fn arguments_that_make_no_sense_never_reach_the_device() {
    let mut scene = Scene::new();
    let group = [MacAddress::BROADCAST; 1];
    let many = [MacAddress::local(1); MAC_TABLE + 1];
    let none: [MacAddress; 0] = [];
    for command in [
        Command::AddVlan(4096),
        Command::SetMac(MacAddress::BROADCAST),
        Command::MacTable {
            unicast: &group,
            multicast: &none,
        },
        Command::MacTable {
            unicast: &many,
            multicast: &none,
        },
    ] {
        assert_eq!(scene.net.command(&command), Err(ControlError::Argument));
    }
    let unknown = scene.net.command(&Command::Pairs(1));
    assert_eq!(unknown, Err(ControlError::Unsupported));
    assert_eq!(scene.device().commands.len(), 0);
    let most = &many[..MAC_TABLE];
    let command = Command::MacTable {
        unicast: most,
        multicast: &none,
    };
    assert_eq!(scene.net.command(&command), Ok(()));
    assert_eq!(scene.device().commands[0].len(), 2 + 8 + 6 * MAC_TABLE);
    scene.assert_closes("");

    let without = |device: &mut pvkit_hostile::net_device::NetDevice| {
        device.features -= NetFeatures::CTRL_VQ.into();
    };
    let mut scene = Scene::with(without, options());
    assert!(scene.net.control_counters().is_none());
    let refused = scene.net.command(&Command::Promiscuous(true));
    assert_eq!(refused, Err(ControlError::Unsupported));
    scene.works("");
}

#[test]
fn answers_that_are_no_answers() {
    let mut scene = Scene::new();
    for (answer, error) in [
        (Answer::Byte(1), ControlError::Refused),
        (Answer::Byte(2), ControlError::Answer(2)),
        (Answer::Byte(0xff), ControlError::Answer(0xff)),
        (Answer::Nothing, ControlError::Answer(TRAILER_UNWRITTEN)),
    ] {
        scene.device().answer = answer;
        let refused = scene.net.command(&Command::Promiscuous(true));
        assert_eq!(refused, Err(error));
    }
    scene.device().answer = Answer::Byte(0);
    assert_eq!(scene.net.command(&Command::AllMulticast(true)), Ok(()));
    let before = scene.device().commands.len();
    scene
        .net
        .recover(&mut [(&mut scene.tx, &mut scene.rx)], &mut |_| {})
        .unwrap();
    // What was refused is not asked for again.
    assert_eq!(scene.device().commands[before..], [vec![0, 1, 1]]);
    scene.works("");
    scene.assert_closes("");
}

#[test]
fn a_queue_that_never_answers() {
    let mut scene = Scene::new();
    scene.device().answer = Answer::Never;
    let timeout = scene.net.command(&Command::Promiscuous(true));
    assert_eq!(timeout, Err(ControlError::Timeout));
    let busy = scene.net.command(&Command::Promiscuous(true));
    assert_eq!(busy, Err(ControlError::Busy));
    let mut looks = 0;
    let busy = scene.net.command_with(&Command::AddVlan(1), &mut || {
        looks += 1;
        true
    });
    assert_eq!((busy, looks), (Err(ControlError::Busy), 0));
    scene.works("frames go on");
    // A late answer counts, and makes room.
    let head = {
        let mut device = scene.device();
        device.lanes[CONTROL].fetched -= 1;
        device.fetch(CONTROL).remove(0)
    };
    scene.device().fill(&head, &[0]);
    scene
        .device()
        .push(CONTROL, head.head.into(), 1, head.units)
        .publish(CONTROL);
    scene.device().answer = Answer::Byte(0);
    assert_eq!(scene.net.command(&Command::AddVlan(1)), Ok(()));
    let before = scene.device().commands.len();
    scene.device().answer = Answer::Never;
    let failed = scene
        .net
        .recover(&mut [(&mut scene.tx, &mut scene.rx)], &mut |_| {});
    assert_eq!(failed, Err(InitError::Control(ControlError::Timeout)));
    assert_eq!(scene.device().commands[before..], [vec![0, 0, 1]]);
    scene.works("frames go on, though not all is set");
    scene.device().answer = Answer::Byte(0);
    scene.assert_recovers("in the end", 0);
}

#[test]
fn a_control_queue_that_breaks_the_rules_retires_alone() {
    for (id, len, fault) in [
        (4, 1, Fault::UsedId { id: 4, size: 4 }),
        (
            0,
            2,
            Fault::UsedLen {
                id: 0,
                len: 2,
                posted: 1,
            },
        ),
        (3, 1, Fault::NotInFlight { id: 3 }),
    ] {
        let mut scene = Scene::new();
        scene.device().answer = Answer::Never;
        scene
            .net
            .submit_command(&Command::Promiscuous(true))
            .unwrap();
        assert_eq!(scene.net.poll_command(), None);
        scene.device().push(CONTROL, id, len, 1).publish(CONTROL);
        let error = Err(ControlError::Fault(fault));
        assert_eq!(scene.net.poll_command(), Some(error));
        assert_eq!(scene.net.poll_command(), None);
        let again = scene.net.command(&Command::Promiscuous(true));
        assert!(matches!(again, Err(ControlError::Fault(_))), "{again:?}");
        scene.works("frames go on");
        scene.device().answer = Answer::Byte(0);
        scene.assert_recovers("control", 0);
    }
}

#[test]
fn a_storm_of_announcements() {
    let mut scene = Scene::new();
    assert!(!scene.net.announce_pending());
    for round in 0..1000 {
        let status = NetStatus::ANNOUNCE.bits() | (round & 1);
        scene.device().config.status = status.into();
        let link = scene.net.refresh().unwrap();
        assert_eq!(link.up, round & 1 == 1);
        assert!(scene.net.announce_pending());
        scene.net.command(&Command::Announced).unwrap();
    }
    assert_eq!(scene.device().commands.len(), 1000);
    scene.device().config.status = 1.into();
    scene.net.refresh().unwrap();
    assert!(!scene.net.announce_pending());
    scene.assert_closes("");
}

#[test]
fn several_pairs_and_the_queue_behind_them() {
    let arena = Arena::new(8 << 20);
    let wire = net_device(&arena);
    {
        let mut device = wire.device();
        device.features |= NetFeatures::MQ.into();
        device.config.max_virtqueue_pairs = 4.into();
        device.control = 8;
    }
    let options = pvkit_guest::virtio::NetOptions {
        pairs: 3,
        ..options()
    };
    let make = &mut || Some(vec![0u8; BUFFER_BYTES]);
    let (mut net, mut pairs) =
        Net::open_pairs(transport(&wire), arena.space(), options, make).unwrap();
    assert_eq!((pairs.len(), net.limits().pairs), (3, 3));
    let numbers: Vec<_> = pairs
        .iter()
        .map(|(tx, rx)| (tx.index(), rx.index()))
        .collect();
    assert_eq!(numbers, [(1, 0), (3, 2), (5, 4)]);
    assert_eq!(net.command(&Command::Pairs(4)), Err(ControlError::Argument));
    assert_eq!(net.command(&Command::Pairs(0)), Err(ControlError::Argument));
    net.command(&Command::Pairs(3)).unwrap();
    assert_eq!(wire.device().commands, [vec![4, 0, 3, 0]]);
    let two: &mut [_] = &mut pairs[..2];
    let few = net.recover(two, &mut |_| {});
    assert_eq!(few, Err(InitError::Queues { given: 2, open: 3 }));
    net.recover(&mut pairs, &mut |_| {}).unwrap();
    assert_eq!(wire.device().commands[1..], [vec![4, 0, 3, 0]]);
    let mut back = 0;
    net.close(pairs, &mut |_: Vec<u8>| back += 1).unwrap();
    assert_eq!((back, arena.in_use(), arena.leaked()), (48, 0, 0));
}
