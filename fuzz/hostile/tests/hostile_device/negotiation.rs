//! Lies while the driver sets the device up.

use super::{SECTORS, Scene, open};
use pvkit_guest::block::{BlockOp, BlockQueue, Reason};
use pvkit_guest::dma::DmaError;
use pvkit_guest::virtio::block::{Block, BlockOptions, WriteCacheError};
use pvkit_guest::virtio::init::InitError;
use pvkit_guest::virtio::queue::QueueError;
use pvkit_guest::virtio::transport::{MmioError, MmioTransport, ResetTimeout, Transport};
use pvkit_hostile::Noise;
use pvkit_hostile::device::{Device, device, transport};
use pvkit_join::arena::Arena;
use pvkit_protocol::virtio::block::BlockFeatures;
use pvkit_protocol::virtio::{DeviceStatus, Features, mmio};

/// The device cannot be opened because of a lie; nothing is lost, it is left
/// reset or FAILED, and once it is honest it can be opened.
fn refused(name: &str, expected: InitError, lie: impl FnOnce(&mut Device)) {
    let arena = Arena::new(1 << 20);
    let wire = device(&arena, SECTORS);
    let honest = {
        let device = wire.device();
        (device.features, device.config, device.queue_max)
    };
    lie(&mut wire.device());
    let error = open(&arena, &wire).map(|_| ()).unwrap_err();
    assert_eq!(error, expected, "{name}");
    assert!(!error.to_string().is_empty());
    assert_eq!((arena.in_use(), arena.leaked()), (0, 0), "{name}");
    assert!(wire.device().cleared.is_empty(), "{name}: only resets do");
    let status = wire.device().status;
    assert!(
        status.is_empty() || status.contains(DeviceStatus::FAILED),
        "{name}: left at {status:?}"
    );
    assert!(wire.device().reads < 2_000, "{name}: bounded");

    let mut device = wire.device();
    (device.features, device.config, device.queue_max) = honest;
    device.tell_the_truth();
    drop(device);
    let mut scene = Scene::on(arena, wire);
    assert!(scene.works(3), "{name}");
    scene.assert_recovers(name, &[]);
}

#[test]
fn windows_without_a_device() {
    let arena = Arena::new(1 << 16);
    for (register, value, error) in [
        (mmio::MAGIC_VALUE, 0, MmioError::Magic(0)),
        (mmio::MAGIC_VALUE, u32::MAX, MmioError::Magic(u32::MAX)),
        (
            mmio::MAGIC_VALUE,
            0x7472_6977,
            MmioError::Magic(0x7472_6977),
        ),
        (mmio::VERSION, 0, MmioError::Version(0)),
        (mmio::VERSION, 1, MmioError::Version(1)),
        (mmio::VERSION, 3, MmioError::Version(3)),
        (mmio::DEVICE_ID, 0, MmioError::Empty),
    ] {
        let wire = device(&arena, SECTORS);
        wire.device().lie(register, move |_| value);
        assert_eq!(MmioTransport::new(wire.clone()).map(|_| ()), Err(error));
        assert!(wire.device().status.is_empty(), "nothing was written");
    }
}

#[test]
fn devices_of_another_type() {
    for found in [1, 3, 5, 0x1_0002, u32::MAX] {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        wire.device().lie(mmio::DEVICE_ID, move |_| found);
        let error = open(&arena, &wire).map(|_| ()).unwrap_err();
        assert_eq!(error, InitError::DeviceId { expected: 2, found });
        assert_eq!(arena.in_use(), 0);
        assert_eq!(wire.device().resets, 0, "not ours to touch");
    }
}

#[test]
fn features_that_are_missing_or_do_not_stick() {
    let missing = Features::VERSION_1;
    refused("no VERSION_1", InitError::Missing { missing }, |device| {
        device.features.remove(Features::VERSION_1);
    });
    refused("no features", InitError::Missing { missing }, |device| {
        device.features = Features::empty();
    });
    let block = BlockFeatures::SEG_MAX
        | BlockFeatures::SIZE_MAX
        | BlockFeatures::BLK_SIZE
        | BlockFeatures::FLUSH;
    let asked = Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX | block.into();
    refused(
        "FEATURES_OK falls",
        InitError::Refused { asked },
        |device| {
            device.lie(mmio::STATUS, |status| status & !8);
        },
    );
    // Features that the driver does not know are not accepted.
    let arena = Arena::new(1 << 20);
    let wire = device(&arena, SECTORS);
    wire.device().features = Features::all();
    let (block, _queue) = open(&arena, &wire).unwrap();
    let accepted = wire.device().accepted;
    assert_eq!(block.features(), accepted);
    assert!(accepted.contains(Features::ACCESS_PLATFORM));
    for bad in [
        Features::SR_IOV,
        Features::ADMIN_VQ,
        Features::from_bits_retain(1 << 63),
    ] {
        assert!(!accepted.intersects(bad), "{bad:?}");
    }
}

#[test]
fn resets_that_never_finish() {
    for stuck in [1u32, 0x40, 0x80, 0xff, 0x100, u32::MAX] {
        let timeout = ResetTimeout {
            status: stuck as u8,
            reads: 64,
        };
        refused(
            &format!("status stuck at {stuck:#x}"),
            InitError::Reset(timeout),
            |device| {
                device.lie(mmio::STATUS, move |status| status | stuck);
            },
        );
    }
    // A slow one is waited for.
    let arena = Arena::new(1 << 20);
    let wire = device(&arena, SECTORS);
    let mut left = 60;
    wire.device().lie(mmio::STATUS, move |status| {
        left -= i32::from(left > 0);
        if left > 0 { 0x40 } else { status }
    });
    let mut scene = Scene::on(arena, wire);
    assert!(scene.works(1));
}

#[test]
fn devices_that_break_at_driver_ok() {
    let running = DeviceStatus::ACKNOWLEDGE
        | DeviceStatus::DRIVER
        | DeviceStatus::FEATURES_OK
        | DeviceStatus::DRIVER_OK;
    let needs_reset = running | DeviceStatus::DEVICE_NEEDS_RESET;
    let ok = u32::from(DeviceStatus::DRIVER_OK.bits());
    refused("NEEDS_RESET", InitError::NotReady(needs_reset), |device| {
        device.lie(mmio::STATUS, move |status| {
            if status & ok != 0 {
                status | 0x40
            } else {
                status
            }
        });
    });
    // One that reset itself, or never took it.
    for bits in [0, 0x0b] {
        let status = DeviceStatus::from_bits_retain(bits);
        refused("DRIVER_OK falls", InitError::NotReady(status), |device| {
            device.lie(mmio::STATUS, move |status| {
                if status & ok != 0 {
                    u32::from(bits)
                } else {
                    status
                }
            });
        });
    }
    refused(
        "FAILED",
        InitError::NotReady(running | DeviceStatus::FAILED),
        |device| {
            device.lie(mmio::STATUS, move |status| {
                if status & ok != 0 {
                    status | 0x80
                } else {
                    status
                }
            });
        },
    );
}

#[test]
fn queues_of_absurd_sizes() {
    let absent = InitError::Queue(QueueError::Absent { index: 0 });
    refused("no queue", absent, |device| device.queue_max = 0);
    for (max, size) in [(1, 1), (2, 2), (3, 2)] {
        let error = QueueError::TooSmall {
            size,
            descriptors: 3,
            enough: 4,
        };
        refused(
            &format!("queue of {max}"),
            InitError::Queue(error),
            |device| {
                device.queue_max = max;
            },
        );
    }
    for (max, size) in [
        (4, 4),
        (5, 4),
        (7, 4),
        (100, 64),
        (255, 128),
        (257, 256),
        (0x1_0000, 256),
        (0x8000_0001, 256),
        (u32::MAX, 256),
    ] {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        wire.device().queue_max = max;
        let mut scene = Scene::on(arena, wire);
        assert_eq!(scene.device().place.size, size, "of {max}");
        assert!(scene.works(1));
    }
}

#[test]
fn configurations_that_make_no_sense() {
    let config = |field, value| InitError::Config { field, value };
    for size in [0u32, 1, 256, 511, 513, 768, 0xffff_fe00, u32::MAX] {
        let error = config("blk_size", u64::from(size));
        refused(&format!("blk_size {size}"), error, |device| {
            device.config.blk_size.set(size);
        });
    }
    for capacity in [u64::MAX, u64::MAX / 512 + 1] {
        refused("capacity", config("capacity", capacity), |device| {
            device.config.capacity.set(capacity);
        });
    }
    refused("seg_max", config("seg_max", 0), |device| {
        device.config.seg_max.set(0);
    });
    refused("size_max", config("size_max", 0), |device| {
        device.config.size_max.set(0);
    });
    for exponent in [23, 31, 32, 63, 64, 255] {
        let error = config("physical_block_exp", u64::from(exponent));
        refused("topology", error, |device| {
            device.features |= BlockFeatures::TOPOLOGY.into();
            device.config.topology.physical_block_exp = exponent;
        });
    }
    // Config space that is not there at all reads as ones.
    refused("no config", config("capacity", u64::MAX), |device| {
        for offset in 0..0x100 {
            device.lie(mmio::CONFIG + offset, |_| u32::MAX);
        }
    });
}

#[test]
fn configurations_that_are_odd_but_possible() {
    let open = |change: &dyn Fn(&mut Device)| {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        change(&mut wire.device());
        Scene::on(arena, wire)
    };
    // Nothing fits a disk without sectors.
    let mut scene = open(&|device| device.config.capacity.set(0));
    let read = |sector| BlockOp::Read { sector };
    for sector in [0, 1, u64::MAX] {
        let refused = scene.queue.submit(read(sector), Some(vec![0; 512]), 1);
        let refused = refused.unwrap_err();
        assert!(matches!(refused.reason, Reason::OutOfRange { .. }));
        assert_eq!(refused.buffer.map(|buffer| buffer.len()), Some(512));
    }
    // The largest disk that can be counted in bytes.
    let capacity = u64::MAX / 512;
    let mut scene = open(&|device| device.config.capacity.set(capacity));
    for sector in [capacity, capacity + 1, u64::MAX, u64::MAX - 1] {
        let refused = scene.queue.submit(read(sector), Some(vec![0; 512]), 1);
        assert!(matches!(
            refused.unwrap_err().reason,
            Reason::OutOfRange { .. }
        ));
    }
    scene
        .queue
        .submit(read(capacity - 1), Some(vec![0; 512]), 1)
        .unwrap();
    // Blocks that no buffer fills.
    let mut scene = open(&|device| device.config.blk_size.set(1 << 31));
    let refused = scene.queue.submit(read(0), Some(vec![0; 512]), 1);
    assert!(matches!(
        refused.unwrap_err().reason,
        Reason::Unaligned { .. }
    ));
    // More segments than the driver has room for.
    let scene = open(&|device| device.config.seg_max.set(u32::MAX));
    assert_eq!(scene.block.limits().max_segments, 16);
    // Segments of a byte: the buffer comes back, and nothing stays mapped.
    let mut scene = open(&|device| device.config.size_max.set(1));
    let held = scene.arena.in_use();
    let refused = scene.queue.submit(read(0), Some(vec![7; 512]), 1);
    let refused = refused.unwrap_err();
    let too_long = DmaError::SegmentTooLong { bytes: 512, max: 1 };
    assert_eq!(refused.reason, Reason::Dma(too_long));
    assert_eq!(refused.buffer, Some(vec![7; 512]));
    assert_eq!(scene.arena.in_use(), held);
    // Ranges of nothing, or of less than a block: not offered, then.
    for (sectors, count, block, possible) in [
        (8, 1, 4096, Some(8)),
        (u32::MAX, u32::MAX, 4096, Some(u32::MAX - 7)),
        (7, 1, 4096, None),
        (0, 1, 512, None),
        (8, 0, 512, None),
    ] {
        let mut scene = open(&|device| {
            device.features |= (BlockFeatures::DISCARD | BlockFeatures::WRITE_ZEROES).into();
            device.config.blk_size.set(block);
            device.config.max_discard_sectors.set(sectors);
            device.config.max_discard_seg.set(count);
            device.config.max_write_zeroes_sectors.set(sectors);
            device.config.max_write_zeroes_seg.set(count);
        });
        let limits = *scene.block.limits();
        let discard = limits.discard.map(|limits| limits.max_sectors);
        assert_eq!(discard, possible);
        let zeroes = limits.write_zeroes.map(|limits| limits.max_sectors);
        assert_eq!(zeroes, possible);
        let (sector, count) = (0, 8);
        let result = scene
            .queue
            .submit(BlockOp::Discard { sector, count }, None, 1);
        match (possible, result) {
            (Some(_), result) => result.unwrap(),
            (None, result) => assert_eq!(result.unwrap_err().reason, Reason::Unsupported),
        }
    }
    // Fields of features that were not negotiated do not count.
    let mut scene = open(&|device| {
        device.features = Features::VERSION_1;
        device.config.num_queues.set(u16::MAX);
        device.config.blk_size.set(7);
        device.config.seg_max.set(0);
        device.config.size_max.set(0);
    });
    assert!(scene.works(5));
}

#[test]
fn queues_that_are_not_there() {
    let several = BlockOptions {
        queues: 3,
        ..BlockOptions::default()
    };
    let scene = |queues: u16| {
        let arena = Arena::new(1 << 22);
        let wire = device(&arena, SECTORS);
        wire.device().features |= BlockFeatures::MQ.into();
        wire.device().config.num_queues.set(queues);
        (arena, wire)
    };
    let field = "num_queues";
    let (arena, wire) = scene(0);
    let error = Block::open_queues::<Vec<u8>, _>(transport(&wire), arena.space(), several);
    assert_eq!(error.unwrap_err(), InitError::Config { field, value: 0 });
    assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
    // Counted, and then absent: when sizes are chosen, or later.
    for honest in 1..6 {
        let (arena, wire) = scene(u16::MAX);
        let mut reads = 0;
        wire.device().lie(mmio::QUEUE_SIZE_MAX, move |size| {
            reads += 1;
            if reads > honest { 0 } else { size }
        });
        let error = Block::open_queues::<Vec<u8>, _>(transport(&wire), arena.space(), several);
        let index = honest % 3;
        let absent = InitError::Queue(QueueError::Absent { index });
        assert_eq!(error.unwrap_err(), absent);
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
    }
    // Fewer after a reset.
    let (arena, wire) = scene(3);
    let (mut block, mut queues) =
        Block::open_queues::<Vec<u8>, _>(transport(&wire), arena.space(), several).unwrap();
    wire.device().config.num_queues.set(2);
    let error = block.recover_queues(&mut queues, &mut |_| {});
    assert_eq!(error.unwrap_err(), InitError::Config { field, value: 2 });
    wire.device().config.num_queues.set(9);
    block.recover_queues(&mut queues, &mut |_| {}).unwrap();
    block.close_queues(queues, &mut |_| {}).unwrap();
    assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
}

#[test]
fn a_write_cache_that_does_not_switch() {
    let arena = Arena::new(1 << 20);
    let wire = device(&arena, SECTORS);
    wire.device().features |= BlockFeatures::CONFIG_WCE.into();
    wire.device().config.writeback = 1;
    let mut scene = Scene::on(arena, wire);
    // This device ignores what is written to its configuration.
    let ignored = WriteCacheError::Ignored;
    assert_eq!(scene.block.set_write_cache(false), Err(ignored));
    assert!(scene.block.write_cache());
    scene.device().config.writeback = 0;
    assert_eq!(scene.block.set_write_cache(false), Ok(()));
    // Nor may it forget.
    scene.device().config.writeback = 1;
    let Scene { block, queue, .. } = &mut scene;
    let error = block.recover(queue, &mut |_| {}).unwrap_err();
    let (field, value) = ("writeback", 1);
    assert_eq!(error, InitError::Config { field, value });
    scene.device().config.writeback = 0;
    scene.assert_recovers("a write cache", &[]);
}

#[test]
fn no_field_is_read_without_its_feature() {
    for (features, fields) in [
        (BlockFeatures::empty(), vec![0, 4]),
        (BlockFeatures::SIZE_MAX, vec![0, 4, 8]),
        (BlockFeatures::SEG_MAX, vec![0, 4, 12]),
        (BlockFeatures::BLK_SIZE, vec![0, 4, 20]),
        (BlockFeatures::DISCARD, vec![0, 4, 36, 40, 44]),
        (BlockFeatures::WRITE_ZEROES, vec![0, 4, 48, 52, 56]),
        (BlockFeatures::SECURE_ERASE, vec![0, 4, 60, 64, 68]),
        (BlockFeatures::TOPOLOGY, vec![0, 4, 24, 25, 26, 28]),
        (BlockFeatures::LIFETIME, vec![0, 4]),
        (BlockFeatures::CONFIG_WCE, vec![0, 4]),
        // One queue only is opened.
        (BlockFeatures::MQ, vec![0, 4]),
        (BlockFeatures::ZONED, vec![0, 4]),
    ] {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        wire.device().features = Features::VERSION_1 | features.into();
        let (reads, seen) = std::sync::mpsc::channel();
        for offset in 0..0x100 {
            let reads = reads.clone();
            wire.device().lie(mmio::CONFIG + offset, move |value| {
                reads.send(offset).unwrap();
                value
            });
        }
        let mut scene = Scene::on(arena, wire);
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), fields, "{features:?}");
        assert!(scene.works(1));
    }
}

#[test]
fn configuration_space_ends_somewhere() {
    let arena = Arena::new(1 << 16);
    let wire = device(&arena, SECTORS);
    let mut transport = transport(&wire);
    for offset in [0x100, usize::MAX - mmio::CONFIG - 2, usize::MAX] {
        let mut bytes = [0; 7];
        transport.read_config(offset, &mut bytes);
        assert_eq!(bytes, [0xff; 7], "{offset:#x}");
        transport.write_config(offset, &bytes);
    }
}

#[test]
fn configurations_that_never_hold_still() {
    let unstable = InitError::ConfigUnstable(64);
    let mut generation = 0;
    refused("generation", unstable, |device| {
        device.lie(mmio::CONFIG_GENERATION, move |_| {
            generation += 1;
            generation
        });
    });
    // One that settles is read until it has, and then in one piece.
    let arena = Arena::new(1 << 20);
    let wire = device(&arena, SECTORS);
    let mut reads = 0;
    wire.device().lie(mmio::CONFIG_GENERATION, move |_| {
        reads += 1;
        reads.min(100)
    });
    let mut early = 0;
    wire.device().lie(mmio::CONFIG, move |capacity| {
        early += 1;
        if early < 40 { u32::MAX } else { capacity }
    });
    let scene = Scene::on(arena, wire);
    assert_eq!(scene.block.limits().capacity, SECTORS);
    // Values that change without a word: whatever is read is checked.
    let mut noise = Noise::new(21);
    for round in 0..300 {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        for offset in (0..0x48).step_by(4) {
            let mut noise = Noise::new(noise.next_u64());
            wire.device()
                .lie(mmio::CONFIG + offset, move |honest| match noise.below(3) {
                    0 => honest,
                    1 => 1 << noise.below(32),
                    _ => noise.next_u64() as u32,
                });
        }
        match open(&arena, &wire) {
            Ok((block, queue)) => {
                let limits = *block.limits();
                assert!(limits.block_bytes.is_power_of_two(), "round {round}");
                assert!(limits.max_segments > 0 && limits.max_segment_bytes > 0);
                assert!(limits.capacity <= u64::MAX / 512);
                block.close(queue, &mut |_| {}).unwrap();
            }
            Err(InitError::Config { .. }) => {}
            Err(error) => panic!("round {round}: {error}"),
        }
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0), "round {round}");
    }
}

#[test]
fn registers_that_read_at_random_from_some_moment_on() {
    // The device turns at the n-th read of any register. Only a status of 0
    // is not made up: it proves that the memory is the driver's again.
    let mut noise = Noise::new(22);
    let mut refusals = 0;
    for round in 0..400u64 {
        let arena = Arena::new(1 << 20);
        let wire = device(&arena, SECTORS);
        let turn = round % 40;
        let seed = noise.next_u64();
        let count = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        for register in (0..0x148).step_by(4) {
            let count = count.clone();
            let mut noise = Noise::new(seed ^ register as u64);
            wire.device().lie(register, move |honest| {
                let now = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if now < turn {
                    return honest;
                }
                let value = noise.next_u64() as u32;
                match register {
                    mmio::STATUS => honest | (value & 0xff),
                    _ => value,
                }
            });
        }
        let Ok(transport) = MmioTransport::new(wire.clone()) else {
            continue;
        };
        let result = Block::<MmioTransport<_>>::open::<Vec<u8>, _>(
            transport.with_reset_reads(64),
            arena.space(),
            BlockOptions::default(),
        );
        match result {
            Ok(pair) => {
                wire.device().tell_the_truth();
                let (block, queue) = pair;
                block.close(queue, &mut |_| {}).unwrap();
                assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
            }
            Err(_) => {
                refusals += 1;
                assert_eq!(arena.in_use(), arena.leaked(), "freed, or counted");
            }
        }
        assert!(wire.device().reads < 5_000, "bounded");
    }
    assert!(refusals > 100, "{refusals}");
}
