//! Lies in registers and in the configuration space.

use super::{BUFFER_BYTES, BUFFERS, Scene, buffer, frame, options};
use pvkit_guest::net::{FrameMeta, MacAddress, NetRx, NetTx};
use pvkit_guest::storage::Storage;
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::net::{CONTROL_SIZE, Command, Net, NetOptions, PairStorage};
use pvkit_guest::virtio::queue::{QueueError, QueueStorage};
use pvkit_guest::virtio::transport::Events;
use pvkit_hostile::net_device::{NetDevice, net_device, transport};
use pvkit_join::arena::Arena;
use pvkit_protocol::virtio::net::{NetConfig, NetFeatures};
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{DeviceStatus, Features, mmio};

/// What opening such a device comes to; nothing is lost with it.
fn open(prepare: impl FnOnce(&mut NetDevice), options: NetOptions) -> InitError {
    let arena = Arena::new(4 << 20);
    let wire = net_device(&arena);
    prepare(&mut wire.device());
    let make = &mut || Some(vec![0u8; options.buffer_bytes]);
    let opened = Net::open_pairs(transport(&wire), arena.space(), options, make);
    let error = opened.expect_err("a device that cannot be used");
    let status = wire.device().status;
    let over = status.is_empty() || status.contains(DeviceStatus::FAILED);
    assert!(over, "{error}: left at {status:?}");
    assert_eq!((arena.in_use(), arena.leaked()), (0, 0), "{error}");
    error
}

#[test]
fn configurations_that_cannot_be() {
    let config = |change: fn(&mut NetConfig)| {
        let options = NetOptions {
            pairs: 2,
            ..options()
        };
        let prepare = |device: &mut NetDevice| {
            device.features |= NetFeatures::MQ.into();
            change(&mut device.config);
        };
        match open(prepare, options) {
            InitError::Config { field, value } => (field, value),
            other => panic!("{other}"),
        }
    };
    assert_eq!(config(|c| c.mtu = 0.into()), ("mtu", 0));
    assert_eq!(config(|c| c.mtu = 67.into()), ("mtu", 67));
    let pairs = "max_virtqueue_pairs";
    assert_eq!(config(|c| c.max_virtqueue_pairs = 0.into()), (pairs, 0));
    assert_eq!(
        config(|c| c.max_virtqueue_pairs = 65535.into()),
        (pairs, 65535)
    );
    assert_eq!(config(|c| c.mac = MacAddress::default()), ("mac", 0));
}

#[test]
fn frames_that_do_not_fit_the_buffers() {
    let prepare = |device: &mut NetDevice| {
        device.features -= NetFeatures::MRG_RXBUF.into();
        device.config.mtu = 9000.into();
    };
    let (have, need) = (BUFFER_BYTES, 12 + 9018);
    assert_eq!(
        open(prepare, options()),
        InitError::BufferBytes { have, need }
    );
    // Long frames are not agreed on, unless the buffers are as long.
    let without = |device: &mut NetDevice| device.features -= NetFeatures::MRG_RXBUF.into();
    let large = NetFeatures::GUEST_TSO4 | NetFeatures::GUEST_USO6 | NetFeatures::GUEST_ECN;
    let scene = Scene::with(without, options());
    assert!(!scene.negotiated().intersects(large));
    assert!(scene.negotiated().contains(NetFeatures::GUEST_CSUM));
    let long = NetOptions {
        buffer_bytes: 65_565,
        ..options()
    };
    let scene = Scene::with(without, long);
    assert!(scene.negotiated().contains(large));
    let none = NetOptions {
        receive_buffers: 0,
        ..options()
    };
    assert_eq!(open(|_| {}, none), InitError::NoBuffers);
}

#[test]
fn each_offload_can_be_switched_off() {
    let all = NetFeatures::from(Features::all());
    for feature in [
        NetFeatures::CSUM,
        NetFeatures::GUEST_CSUM,
        NetFeatures::HOST_TSO4,
        NetFeatures::HOST_TSO6,
        NetFeatures::HOST_ECN,
        NetFeatures::HOST_USO,
        NetFeatures::GUEST_TSO4,
        NetFeatures::GUEST_USO6,
        NetFeatures::MRG_RXBUF,
        NetFeatures::CTRL_VQ,
        NetFeatures::MTU,
    ] {
        let options = NetOptions {
            allow: Features::all() - feature.into(),
            ..options()
        };
        let mut scene = Scene::with(|_| {}, options);
        let negotiated = scene.negotiated();
        assert!(!negotiated.contains(feature));
        assert_eq!(negotiated, negotiated.without_dangling());
        assert!(all.contains(negotiated));
        scene.works(&format!("{feature:?}"));
        scene.assert_closes(&format!("{feature:?}"));
    }
}

#[test]
fn a_device_that_does_not_become_ready() {
    let sticks = open(
        |device| {
            device.lie(mmio::STATUS, |status| {
                status & !u32::from(DeviceStatus::FEATURES_OK.bits())
            });
        },
        options(),
    );
    assert!(matches!(sticks, InitError::Refused { .. }), "{sticks}");
    let broken = open(
        |device| {
            device.lie(mmio::STATUS, |status| {
                let ready = u32::from(DeviceStatus::DRIVER_OK.bits());
                let broken = u32::from(DeviceStatus::DEVICE_NEEDS_RESET.bits());
                if status & ready == 0 {
                    status
                } else {
                    status | broken
                }
            });
        },
        options(),
    );
    assert!(matches!(broken, InitError::NotReady(_)), "{broken}");
    let unstable = open(
        |device| {
            let mut count = 0;
            device.lie(mmio::CONFIG_GENERATION, move |_| {
                count += 1;
                count
            });
        },
        options(),
    );
    assert!(matches!(unstable, InitError::ConfigUnstable(_)));
    let small = open(|device| device.queue_max = 2, options());
    assert!(matches!(small, InitError::Queue(_)), "{small}");
    let missing = NetOptions {
        require: Features::ACCESS_PLATFORM,
        ..options()
    };
    let missing = open(|_| {}, missing);
    assert!(matches!(missing, InitError::Missing { .. }), "{missing}");
}

#[test]
fn a_device_that_asks_to_be_reset() {
    let scene = Scene::new();
    scene.device().need_reset();
    assert!(scene.net.claim_events().contains(Events::NEEDS_RESET));
    scene.assert_recovers("reset", 0);
}

#[test]
fn a_device_that_comes_back_as_another() {
    for (field, change) in [
        ("mtu", (|c| c.mtu = 1000.into()) as fn(&mut NetConfig)),
        ("mac", |c| c.mac = MacAddress::BROADCAST),
    ] {
        let mut scene = Scene::new();
        let before = scene.device().config;
        change(&mut scene.device().config);
        let error = scene
            .net
            .recover(&mut [(&mut scene.tx, &mut scene.rx)], &mut |_| {})
            .unwrap_err();
        assert!(
            matches!(error, InitError::Config { field: found, .. } if found == field),
            "{error}"
        );
        assert!(scene.rx.recv().unwrap().is_none());
        assert!(scene.tx.complete().unwrap().is_none());
        scene.device().config = before;
        scene.assert_recovers(field, 0);
    }
    let mut scene = Scene::new();
    let before = scene.device().features;
    scene.device().features -= NetFeatures::CSUM.into();
    let error = scene
        .net
        .recover(&mut [(&mut scene.tx, &mut scene.rx)], &mut |_| {})
        .unwrap_err();
    assert!(matches!(error, InitError::Changed { .. }), "{error}");
    scene.device().features = before;
    scene.assert_recovers("features", 0);
}

#[test]
fn a_link_that_goes_away_and_comes_back() {
    let mut scene = Scene::new();
    assert!(scene.net.link().up);
    assert_eq!(scene.net.link().speed_mbps, Some(10_000));
    scene.device().config.status = 0.into();
    scene.device().config.speed = u32::MAX.into();
    scene.device().config.duplex = 0xff;
    let link = scene.net.refresh().unwrap();
    assert_eq!(
        (link.up, link.speed_mbps, link.full_duplex),
        (false, None, None)
    );
    scene.device().config.mtu = 3.into();
    assert!(scene.net.refresh().is_err());
    assert_eq!(scene.net.link(), link, "nothing changes");
    scene.device().config.mtu = 1500.into();
    scene.device().config.status = 1.into();
    assert!(scene.net.refresh().unwrap().up);
    scene.works("");
    scene.assert_closes("");
}

#[test]
fn one_queue_is_reset_by_itself() {
    let mut scene = Scene::new();
    let missing = scene.net.reset_receive(&mut scene.rx);
    assert!(matches!(missing, Err(InitError::Missing { .. })));
    scene.works("");
    let reset = |device: &mut NetDevice| device.features |= Features::RING_RESET;
    let mut scene = Scene::with(reset, options());
    let mut other = Scene::with(reset, options());
    for round in 0..3 {
        let out = buffer(&frame(1, 60));
        scene.tx.submit(out, 60, &FrameMeta::PLAIN).unwrap();
        scene.tx.publish();
        let mut back = 0;
        let foreign = other.net.reset_transmit(&mut scene.tx, &mut |_| back += 1);
        assert_eq!((foreign, back), (Err(InitError::ForeignQueue), 0));
        let reset = scene.net.reset_transmit(&mut scene.tx, &mut |_| back += 1);
        assert_eq!((reset, back), (Ok(()), 1), "round {round}");
        scene.net.reset_receive(&mut scene.rx).unwrap();
        scene.works("after resets of queues");
    }
    assert_eq!(scene.device().resets, 1, "of the device");
    scene.assert_closes("");
}

#[test]
fn memory_that_is_handed_in() {
    let size = |count| QueueSize::new(count).unwrap();
    let arena = Arena::new(4 << 20);
    let storage = |transmit, segments| PairStorage {
        transmit: QueueStorage::heap(size(transmit), segments),
        receive: QueueStorage::heap(size(32), 4),
        buffers: Storage::heap(BUFFERS.into(), || Some(vec![0u8; BUFFER_BYTES])),
    };
    let control = || Some(QueueStorage::heap(size(CONTROL_SIZE.into()), 1));
    for (storage, control, what) in [
        (storage(16, 4), control(), "slots"),
        (storage(32, 3), control(), "segments"),
        (
            storage(32, 4),
            Some(QueueStorage::heap(size(2), 1)),
            "slots",
        ),
    ] {
        let wire = net_device(&arena);
        let opened = Net::open_in(transport(&wire), arena.space(), options(), storage, control);
        let error = opened.expect_err("too little memory");
        assert!(
            matches!(error, InitError::Queue(QueueError::Storage { what: found, .. }) if found == what),
            "{error}"
        );
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0), "{error}");
        assert_eq!(wire.device().status, DeviceStatus::empty(), "{error}");
    }
    // Without memory for it, there is no control queue.
    for control in [control(), None] {
        let wire = net_device(&arena);
        let has = control.is_some();
        let (mut net, (tx, rx)) = Net::open_in(
            transport(&wire),
            arena.space(),
            options(),
            storage(32, 4),
            control,
        )
        .unwrap();
        let features = NetFeatures::from(net.features());
        assert_eq!(features.contains(NetFeatures::CTRL_VQ), has);
        assert_eq!(net.command(&Command::Promiscuous(true)).is_ok(), has);
        let mut scene = Scene {
            arena: arena.clone(),
            wire,
            net,
            tx,
            rx,
        };
        scene.works("handed in");
        scene.assert_closes("handed in");
    }
}
