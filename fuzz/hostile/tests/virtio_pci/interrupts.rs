//! Vectors, the pin, and what an interrupt costs.

use super::{DeviceOptions, Queue, Scene};
use pvkit_guest::block::BlockQueue;
use pvkit_guest::pci::{Msix, MsixError};
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::transport::{Events, Transport as _, VectorError};
use pvkit_host::virtio::transport::PciOptions;
use pvkit_join::pci::{AnyWire, PLACE};
use pvkit_join::unchecked::message;
use pvkit_protocol::pci::{Command, Status, header};
use pvkit_protocol::virtio::Features;

fn options(config: Option<u16>, queue: Option<u16>) -> BlockOptions {
    BlockOptions {
        config_vector: config,
        queue_vector: queue,
        // What breaks the queue below writes a split ring.
        allow: Features::all() - Features::RING_PACKED,
        ..BlockOptions::default()
    }
}

#[test]
fn by_message_an_interrupt_touches_no_register_and_a_doorbell_is_one_access() {
    let scene = Scene::new(PciOptions::default());
    let mut free = scene.pci.free();
    let transport = scene.pci.transport(&mut free);
    let msix = scene.pci.msix(&mut free);
    assert_eq!(msix.vectors(), 2, "one for the queue, and one for the rest");
    let (block, mut queue) = scene.open(transport.with_msix(&msix), options(Some(0), Some(1)));
    scene.steps.run();
    let wire = &scene.pci.wire;
    let (accesses, kicks) = (wire.accesses(), wire.kicks());
    let ports = scene.pci.ports.accesses();
    for round in 0..100 {
        assert!(!queue.arm());
        scene.read(&mut queue, round % 64);
        assert_eq!(block.claim_events(), Events::QUEUE);
        assert_eq!(scene.pci.interrupts.vector(1), round + 1);
    }
    assert_eq!(wire.accesses(), accesses, "registers per interrupt");
    assert_eq!(wire.kicks(), kicks + 100, "accesses per doorbell");
    assert_eq!(scene.pci.ports.accesses(), ports);
    assert_eq!(scene.pci.interrupts.vector(0), 0);
    assert_eq!(scene.pci.interrupts.all.count(), 100);
    assert_eq!(scene.pci.interrupts.lines(), [false; 4]);
}

#[test]
fn without_msix_the_isr_status_is_read_once_an_interrupt_and_releases_the_pin() {
    for vectors in [None, Some(0)] {
        let options_of_device = vectors.map_or(PciOptions::default(), |count| {
            PciOptions::default().with_vectors(count)
        });
        let scene = Scene::new(options_of_device);
        let transport = scene.pci.transport(&mut scene.pci.free());
        let (block, mut queue) = scene.open(transport, options(None, None));
        scene.steps.run();
        // Slot 4, INTA#.
        let asserted = [true, false, false, false];
        let status = || scene.pci.config().read_u16(PLACE, header::STATUS);
        let wants = || Status::from_bits_retain(status()).contains(Status::INTERRUPT);
        let before = scene.pci.wire.accesses();
        for round in 0..50 {
            assert!(!queue.arm());
            scene.submit(&mut queue, round);
            scene.steps.run();
            assert_eq!(scene.pci.interrupts.lines(), asserted);
            assert!(wants());
            assert_eq!(block.claim_events(), Events::QUEUE);
            assert_eq!(scene.pci.interrupts.lines(), [false; 4]);
            assert!(!wants());
            scene.complete(&mut queue, round);
        }
        assert_eq!(scene.pci.wire.accesses(), before + 50);
        assert_eq!(block.claim_events(), Events::empty());

        // The command register holds the pin back, and lets it go again.
        let config = scene.pci.config();
        config.enable(PLACE, Command::INTX_DISABLE);
        assert!(!queue.arm());
        scene.read(&mut queue, 3);
        assert_eq!(scene.pci.interrupts.lines(), [false; 4]);
        assert!(wants(), "whether or not it may");
        config.disable(PLACE, Command::INTX_DISABLE);
        assert_eq!(scene.pci.interrupts.lines(), asserted);
        // A reset forgets it.
        drop(block);
        assert_eq!(scene.pci.interrupts.lines(), [false; 4]);
    }
}

#[test]
fn one_vector_for_everything_is_told_apart_by_the_isr_status() {
    let scene = Scene::new(PciOptions::default().with_vectors(1));
    let mut free = scene.pci.free();
    let transport = scene.pci.transport(&mut free);
    let msix = scene.pci.msix(&mut free);
    assert_eq!(msix.vectors(), 1);
    let (mut block, mut queue) = scene.open(transport.with_msix(&msix), options(Some(0), Some(0)));
    let before = scene.pci.wire.accesses();
    assert!(!queue.arm());
    scene.read(&mut queue, 1);
    assert_eq!(scene.pci.interrupts.vector(0), 1);
    assert_eq!(block.claim_events(), Events::QUEUE);
    assert_eq!(scene.pci.wire.accesses(), before + 1);

    // A guest that breaks its ring: the configuration's news.
    break_queue(&scene);
    assert_eq!(scene.pci.interrupts.vector(0), 2);
    assert_eq!(
        block.claim_events(),
        Events::QUEUE | Events::CONFIG | Events::NEEDS_RESET
    );
    assert_eq!(block.claim_events(), Events::QUEUE, "said once");
    block.recover(&mut queue, &mut |_| {}).unwrap();
    assert!(!queue.arm());
    scene.read(&mut queue, 2);
    assert_eq!(scene.pci.interrupts.vector(0), 3, "after a reset, too");
}

/// Makes the device break: an available index that jumps.
fn break_queue(scene: &Scene) {
    use pvkit_protocol::virtio::pci::common;
    let mut half = [0; 4];
    let mut read = |at: usize| {
        let mut device = scene.pci.device();
        pvkit_host::pci::PciFunction::read_bar(&mut *device, 0, at as u64, &mut half);
        u64::from(u32::from_le_bytes(half))
    };
    let avail = read(common::QUEUE_DRIVER) | read(common::QUEUE_DRIVER + 4) << 32;
    let ram = scene.arena.snapshot();
    ram.write(avail + 2, &0x7fffu16.to_le_bytes()).unwrap();
    scene.steps.poll(64);
}

#[test]
fn the_configuration_s_own_vector_says_that_the_device_needs_a_reset() {
    let scene = Scene::new(PciOptions::default());
    let mut free = scene.pci.free();
    let transport = scene.pci.transport(&mut free);
    let msix = scene.pci.msix(&mut free);
    let (mut block, mut queue) = scene.open(transport.with_msix(&msix), options(Some(0), Some(1)));
    break_queue(&scene);
    assert_eq!(scene.pci.interrupts.vector(0), 1);
    assert_eq!(scene.pci.interrupts.vector(1), 0);
    let events = block.claim_config_events();
    assert_eq!(events, Events::CONFIG | Events::NEEDS_RESET);
    block.recover(&mut queue, &mut |_| {}).unwrap();
    assert!(!queue.arm());
    scene.read(&mut queue, 5);
    assert_eq!(scene.pci.interrupts.vector(1), 1);
}

#[test]
fn a_queue_without_a_vector_is_polled() {
    let scene = Scene::new(PciOptions::default());
    let mut free = scene.pci.free();
    let transport = scene.pci.transport(&mut free);
    let msix = scene.pci.msix(&mut free);
    let (_block, mut queue) = scene.open(transport.with_msix(&msix), options(None, None));
    for sector in 0..8 {
        assert!(!queue.arm());
        scene.read(&mut queue, sector);
    }
    break_queue(&scene);
    assert_eq!(scene.pci.interrupts.all.count(), 0);
}

#[test]
fn vectors_that_cannot_be_are_reported() {
    for (vectors, asked, refused) in [
        (1, options(Some(0), Some(1)), 1),
        (1, options(Some(1), Some(0)), 1),
        (2, options(Some(0), Some(2)), 2),
        (2, options(Some(0x7ff), Some(0)), 0x7ff),
        (2, options(Some(0), Some(0xffff)), 0xffff),
    ] {
        let scene = Scene::new(PciOptions::default().with_vectors(vectors));
        let mut free = scene.pci.free();
        let transport = scene.pci.transport(&mut free);
        let mut msix = scene.pci.msix(&mut free);
        let space = scene.arena.space();
        let transport = transport.with_msix(&msix);
        let error = Block::open::<Vec<u8>, _>(transport, space, asked).unwrap_err();
        let vector = refused;
        let read = 0xffff;
        let expected = InitError::Vector(VectorError::Refused { vector, read });
        assert_eq!(error, expected);
        assert_eq!(
            msix.set(vectors, message(0, 0)),
            Err(MsixError::Vector {
                vector: vectors,
                vectors
            })
        );
        assert!(scene.arena.in_use() == 0);
    }
    // MSI-X is off, or not there at all.
    let scene = Scene::new(PciOptions::default());
    let transport = scene.pci.transport(&mut scene.pci.free());
    let space = scene.arena.space();
    let error = Block::open::<Vec<u8>, _>(transport, space, options(None, Some(0))).unwrap_err();
    assert_eq!(error, InitError::Vector(VectorError::OneLine));
    let scene = Scene::new(PciOptions::default().with_vectors(0));
    let config = scene.pci.config();
    let map = |bar| Some(scene.pci.map(bar));
    let error = Msix::enable(&config, PLACE, &mut scene.pci.free(), map).unwrap_err();
    assert_eq!(error, MsixError::Absent);
}

#[test]
fn a_masked_vector_is_sent_when_it_is_unmasked() {
    let scene = Scene::new(PciOptions::default());
    let mut free = scene.pci.free();
    let transport = scene.pci.transport(&mut free);
    let msix = scene.pci.msix(&mut free);
    let (_block, mut queue) = scene.open(transport.with_msix(&msix), options(Some(0), Some(1)));
    msix.mask(1).unwrap();
    for sector in 0..4 {
        assert!(!queue.arm());
        scene.read(&mut queue, sector);
    }
    assert_eq!(scene.pci.interrupts.vector(1), 0);
    msix.unmask(1).unwrap();
    assert_eq!(scene.pci.interrupts.vector(1), 1, "once");
    // Switched off, the pin is what is left, and for what comes after.
    assert!(!queue.arm());
    scene.read(&mut queue, 4);
    assert_eq!(scene.pci.interrupts.vector(1), 2);
    Msix::<AnyWire>::disable(&scene.pci.config(), PLACE);
    assert_eq!(scene.pci.interrupts.lines(), [false; 4]);
    assert!(!queue.arm());
    scene.read(&mut queue, 5);
    assert_eq!(scene.pci.interrupts.lines(), [true, false, false, false]);
}

#[test]
fn virtio_mmio_has_one_line_and_says_so() {
    use pvkit_host::disk::MemoryDisk;
    use pvkit_host::virtio::block::BlockOptions as DeviceOptions;
    use pvkit_join::{Join, Kind};
    use std::sync::Arc;
    let disk = Arc::new(MemoryDisk::new(8));
    let (join, _steps) = Join::stepped(Kind::Mmio, disk, DeviceOptions::default(), 1 << 20);
    let mut transport = join.transport();
    assert_eq!(transport.set_config_vector(None), Ok(()));
    assert_eq!(transport.set_queue_vector(0, None), Ok(()));
    let error = Err(VectorError::OneLine);
    assert_eq!(transport.set_config_vector(Some(0)), error);
    assert_eq!(transport.set_queue_vector(0, Some(0)), error);
}

#[test]
fn queues_share_vectors_where_there_are_fewer() {
    let device = DeviceOptions {
        queues: 5,
        ..DeviceOptions::default()
    };
    // One for configuration changes, and so many for the queues.
    for vectors in [1, 2, 3, 5] {
        let scene = Scene::of(
            device.clone(),
            PciOptions::default().with_vectors(1 + vectors),
        );
        let mut free = scene.pci.free();
        let transport = scene.pci.transport(&mut free);
        let msix = scene.pci.msix(&mut free);
        let options = BlockOptions {
            queues: 5,
            queue_vectors: vectors,
            ..options(Some(0), Some(1))
        };
        let transport = transport.with_msix(&msix);
        let (mut block, mut queues) =
            Block::open_queues(transport, scene.arena.space(), options).unwrap();
        assert_eq!(queues.len(), 5);
        let check = |queues: &mut Vec<Queue>| {
            for queue in queues {
                let vector = usize::from(1 + queue.index() % vectors);
                let before: Vec<_> = (0..6).map(|v| scene.pci.interrupts.vector(v)).collect();
                assert!(!queue.arm());
                scene.read(queue, 3);
                for (v, before) in before.into_iter().enumerate() {
                    let count = scene.pci.interrupts.vector(v as u16) - before;
                    assert_eq!(count, u64::from(v == vector), "{vectors} vectors, {v}");
                }
            }
        };
        check(&mut queues);
        block.recover_queues(&mut queues, &mut |_| {}).unwrap();
        check(&mut queues);
        for queue in &mut queues {
            block.reset_queue(queue, &mut |_| {}).unwrap();
        }
        check(&mut queues);
    }
}

#[test]
fn a_vector_that_is_not_there_is_refused() {
    let scene = Scene::new(PciOptions::default().with_vectors(2));
    let mut free = scene.pci.free();
    let transport = scene.pci.transport(&mut free);
    let msix = scene.pci.msix(&mut free);
    let options = options(Some(0), Some(2));
    let opened =
        Block::open::<Vec<u8>, _>(transport.with_msix(&msix), scene.arena.space(), options);
    assert!(opened.is_err(), "{opened:?}");
}
