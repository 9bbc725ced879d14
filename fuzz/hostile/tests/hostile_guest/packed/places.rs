//! Where packed rings may lie, how long they may be, and from where they may go
//! on.

use super::super::{Ready, SECTORS, Scene, options};
use pvkit_host::disk::MemoryDisk;
use pvkit_host::event::EventFd;
use pvkit_host::virtio::block::{Block, BlockOptions};
use pvkit_host::virtio::device::{Device, LaneResources, LaneState, StartError};
use pvkit_host::virtio::queue::{Fault, QueueAddresses, QueueError, QueueResources, QueueState};
use pvkit_host::worker::{Progress, SignalCounter, Worker};
use pvkit_hostile::Noise;
use pvkit_hostile::guest::packed::{NEXT, PackedRing};
use pvkit_hostile::guest::{HIGH, HOLE, LOW, Layout, Machine, TOP, readable, writable};
use pvkit_join::Kind;
use pvkit_join::disk::RecordingDisk;
use pvkit_protocol::virtio::block::{RequestType, status};
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

#[test]
fn parts_where_they_cannot_be() {
    let right = Layout::at(LOW.start);
    let mut rows = Vec::new();
    for addr in [
        // Not aligned (16 and 4 bytes).
        LOW.start + 1,
        LOW.start + 2,
        // No RAM at all, or not to the end: sizes are 112 and twice 4 bytes.
        0,
        HOLE,
        HOLE - 0x1_0000 - 2,
        TOP.end,
        LOW.start - 4,
        u64::MAX - 3,
        u64::MAX,
    ] {
        rows.push(Layout {
            descriptors: addr,
            ..right
        });
        rows.push(Layout {
            avail: addr,
            ..right
        });
        rows.push(Layout {
            used: addr,
            ..right
        });
    }
    for descriptors in [
        LOW.start + 4,
        LOW.start + 8,
        TOP.end - 96,
        HIGH.end - 16,
        // Across two regions, which lie apart in the host.
        LOW.end - 16,
    ] {
        rows.push(Layout {
            descriptors,
            ..right
        });
    }
    for layout in rows {
        let name = format!("{layout:x?}");
        let mut scene = Scene::cold(options());
        let guest = &mut scene.guest;
        guest.layout = layout;
        PackedRing::boot(guest, 7);
        assert!(
            guest
                .status()
                .contains(DeviceStatus::DEVICE_NEEDS_RESET | DeviceStatus::DRIVER_OK),
            "{name}"
        );
        assert!(
            guest
                .interrupt_status()
                .contains(InterruptStatus::CONFIG_CHANGE),
            "{name}"
        );
        assert_eq!(guest.interrupts.count(), 1, "{name}");
        guest.place(right).go();
        guest.set_status(DeviceStatus::all_of_a_driver());
        assert_eq!(guest.serve().polls, 1, "{name}: there is no worker");
        scene.assert_broken_until_reset(&name);
    }
}

#[test]
fn parts_at_the_very_end_of_ram_work() {
    for end in [HIGH.end, TOP.end, LOW.end] {
        let right = Layout::at(LOW.start);
        for layout in [
            Layout {
                descriptors: end - 112,
                ..right
            },
            Layout {
                avail: end - 4,
                ..right
            },
            Layout {
                used: end - 4,
                ..right
            },
        ] {
            let mut scene = Scene::cold(options());
            scene.guest.layout = layout;
            let mut ring = PackedRing::boot(&mut scene.guest, 7);
            for round in 0..20 {
                assert!(ring.works(&mut scene.guest, round), "{layout:x?}");
            }
        }
    }
}

#[test]
fn sizes_that_the_queue_cannot_have() {
    let mut scene = Scene::cold(BlockOptions {
        queue_size: 16,
        ..options()
    });
    let guest = &mut scene.guest;
    let features = guest.offered_features();
    let split = features - Features::RING_PACKED;
    for (features, size, possible) in [
        (features, 0, false),
        (features, 1, true),
        (features, 15, true),
        (features, 16, true),
        (features, 17, false),
        (features, 0x8000, false),
        (features, 0x8001, false),
        (features, 0xffff, false),
        (features, 0x1_0000, false),
        (features, 0x1_0007, false),
        (features, u32::MAX, false),
        (split, 0, false),
        (split, 1, true),
        (split, 15, false),
        (split, 16, true),
        (split, 3, false),
        (split, 0x1_0008, false),
    ] {
        if size == 0 && super::super::KIND != Kind::Mmio {
            // On virtio-pci, a size that nobody chose: the largest.
            continue;
        }
        assert!(guest.negotiate(features));
        let layout = guest.layout;
        guest
            .set_register(mmio::QUEUE_SEL, 0)
            .set_register(mmio::QUEUE_SIZE, size)
            .place(layout)
            .set_register(mmio::QUEUE_READY, 1);
        let ready = guest.register(mmio::QUEUE_READY);
        assert_eq!(ready, u32::from(possible), "{size} with {features:?}");
        guest.go();
        guest.kick();
        guest.serve();
        assert!(guest.reset());
    }

    // The size is one of a packed ring, and the ring is none: features may
    // change until FEATURES_OK.
    guest.set_status(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER);
    for select in 0..2 {
        guest
            .set_register(mmio::DRIVER_FEATURES_SEL, select)
            .set_register(mmio::DRIVER_FEATURES, features.window(select));
    }
    guest.size = 7;
    let layout = guest.layout;
    guest.set_up_queue_at(layout);
    assert_eq!(guest.register(mmio::QUEUE_READY), 1);
    assert!(guest.negotiate(split));
    guest.go();
    scene.assert_broken_until_reset("7 descriptors, split");
}

#[test]
fn memory_that_goes_away() {
    // The ring, or only one of the two event structures.
    let low = Layout::at(LOW.start);
    let high = Layout::at(HIGH.start);
    for layout in [
        low,
        Layout {
            avail: low.avail,
            ..high
        },
        Layout {
            used: low.used,
            ..high
        },
        Layout {
            descriptors: low.descriptors,
            ..high
        },
    ] {
        for in_order in [false, true] {
            let machine = Machine::new(super::super::KIND);
            let disk = RecordingDisk::new(SECTORS);
            let options = BlockOptions {
                in_order,
                ..options()
            };
            let mut guest = machine.guest(Arc::new(disk.clone()), options, HIGH.start);
            guest.layout = layout;
            let mut ring = PackedRing::boot(&mut guest, 7);
            assert!(ring.works(&mut guest, 1));
            disk.allow(0);
            let header = guest.set_header(0, RequestType::IN, 3);
            let chain = [readable(header, 16), writable(guest.layout.data, 513)];
            ring.post(&mut guest, 1, &chain);
            ring.post(&mut guest, 2, &chain);
            assert_eq!(guest.serve().fault, None);

            let map = GuestMemoryMmap::<()>::from_ranges(&[
                (GuestAddress(HIGH.start), 0x2_0000),
                (GuestAddress(HOLE), 0x1000),
            ]);
            machine.memory().replace(Arc::new(map.unwrap())).unwrap();
            disk.allow(1);
            assert_eq!(guest.serve().fault, Some(Fault::RingGone), "{layout:x?}");
            disk.allow(100);
            guest.serve();
            assert!(guest.status().contains(DeviceStatus::DEVICE_NEEDS_RESET));
            assert!(guest.reset());
            guest.ram = machine.memory().snapshot();
            guest.layout = high;
            let mut ring = PackedRing::boot(&mut guest, 5);
            for sector in 0..10 {
                assert!(ring.works(&mut guest, sector));
            }
        }
    }
}

#[test]
fn memory_that_moves_in_the_host() {
    // The same addresses, other pages: all three parts are found again.
    for in_order in [false, true] {
        let machine = Machine::new(super::super::KIND);
        let disk = RecordingDisk::new(SECTORS);
        let options = BlockOptions {
            in_order,
            ..options()
        };
        let mut guest = machine.guest(Arc::new(disk), options, LOW.start);
        let mut ring = PackedRing::boot(&mut guest, 7);
        for round in 0..20 {
            assert!(ring.works(&mut guest, round));
            let before = guest.remember();
            let regions = before
                .iter()
                .map(|(start, bytes)| (GuestAddress(*start), bytes.len()));
            let regions: Vec<_> = regions.collect();
            let map = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
            machine.memory().replace(Arc::new(map)).unwrap();
            guest.ram = machine.memory().snapshot();
            for (start, bytes) in &before {
                guest.poke(*start, bytes);
            }
            let interrupts = guest.interrupts.count();
            PackedRing::ask(&mut guest, 1 << 16);
            assert!(ring.works(&mut guest, round));
            assert_eq!(guest.interrupts.count(), interrupts, "none was wanted");
            PackedRing::ask(&mut guest, 0);
            assert!(!guest.steps().arm());
            let asked = 2 << 16 | ring.off_wrap(ring.posted);
            assert_eq!(PackedRing::asked(&guest), asked, "round {round}");
        }
    }
}

/// A worker that goes on at `state`.
fn start_at(
    machine: &Machine,
    size: u16,
    features: Features,
    state: QueueState,
) -> Result<(Block, Box<dyn Worker>), StartError> {
    let layout = Layout::at(LOW.start);
    let resources = LaneResources {
        memory: machine.memory().clone(),
        queues: vec![Some(QueueResources {
            at: QueueAddresses {
                size,
                descriptors: layout.descriptors,
                driver: layout.avail,
                device: layout.used,
            },
            signal: Arc::new(SignalCounter::default()),
            kick: Arc::new(EventFd::new().unwrap()),
        })],
    };
    let queues = vec![Some(state)];
    let mut device = Block::new(Arc::new(MemoryDisk::new(8)), options()).unwrap();
    let worker = device.start(0, resources, features, Some(&LaneState { queues }))?;
    Ok((device, worker))
}

#[test]
fn a_state_to_continue_from_that_is_nonsense() {
    // Firecracker 7b01bdc1e: corrupt state. A position beyond the ring, and a
    // queue with something in flight, are refused.
    let machine = Machine::new(super::super::KIND);
    let layout = Layout::at(LOW.start);
    let mut noise = Noise::new(31);
    let (mut refused, mut broken, mut drained) = (0, 0, 0);
    for round in 0..3_000 {
        let size = 1 + noise.below(9) as u16;
        let mut features = Features::VERSION_1 | Features::RING_PACKED;
        features.set(Features::IN_ORDER, round % 2 == 0);
        features.set(Features::EVENT_IDX, round % 3 == 0);
        let mut place = || {
            let wrap = noise.next_u64() as u16 & 0x8000;
            match noise.below(8) {
                0 => noise.next_u64() as u16,
                1 => wrap | size,
                _ => wrap | (noise.next_u64() as u16 % size),
            }
        };
        let next_avail = place();
        let next_used = match round % 8 {
            0 => place(),
            _ => next_avail,
        };
        let state = QueueState {
            next_avail,
            next_used,
        };
        // One descriptor that is available, in some round, with no end.
        let at = u64::from(noise.next_u64() as u16 % size);
        let flags = NEXT | [0x80, 0x8000][noise.below(2) as usize];
        let ram = machine.memory().snapshot();
        ram.write(layout.descriptors, &[0; 160]).unwrap();
        let descriptor = layout.descriptors + 16 * at;
        ram.write(descriptor, &LOW.start.to_le_bytes()).unwrap();
        ram.write(descriptor + 8, &16u32.to_le_bytes()).unwrap();
        ram.write(descriptor + 14, &flags.to_le_bytes()).unwrap();

        let started = start_at(&machine, size, features, state);
        let beyond = [state.next_avail, state.next_used]
            .map(|place| place & 0x7fff)
            .into_iter()
            .find(|index| *index >= size);
        let expected = match beyond {
            Some(index) => Some(QueueError::State { index, size }),
            None if next_avail != next_used => Some(QueueError::NotDrained {
                avail: next_avail,
                used: next_used,
            }),
            None => None,
        };
        let (mut device, mut worker) = match (started, expected) {
            (Ok(started), None) => started,
            (Err(error), Some(expected)) => {
                assert!(
                    matches!(error, StartError::Queue(error) if error == expected),
                    "{error}"
                );
                refused += 1;
                continue;
            }
            (started, expected) => panic!("{state:?}, {expected:?}: {:?}", started.err()),
        };
        let wrap = state.next_avail & 0x8000 != 0;
        let available = state.next_avail & 0x7fff == at as u16
            && flags == NEXT | if wrap { 0x80 } else { 0x8000 };
        match worker.poll(64) {
            Progress::Broken(fault) => {
                assert!(available, "{fault}");
                broken += 1;
                worker.begin_stop();
                assert_eq!(worker.poll(64), Progress::Stopped);
                assert_eq!(device.stopped(0, worker).queues, [None]);
            }
            progress => {
                assert_eq!(progress, Progress::Drained);
                assert!(!available);
                assert!(!worker.arm());
                drained += 1;
                worker.begin_stop();
                assert_eq!(worker.poll(64), Progress::Stopped);
                assert_eq!(device.stopped(0, worker).queues, [Some(state)]);
            }
        }
    }
    assert!(refused > 300 && broken > 50 && drained > 1_000);

    // The size comes with the state, too.
    for size in [0, 0x8001, 0xffff] {
        let features = Features::VERSION_1 | Features::RING_PACKED;
        let state = QueueState::start(features);
        let error = start_at(&machine, size, features, state).unwrap_err();
        assert!(
            matches!(error, StartError::Queue(QueueError::PackedSize(_))),
            "{error}"
        );
        let error = start_at(&machine, size, Features::VERSION_1, state).unwrap_err();
        assert!(
            matches!(error, StartError::Queue(QueueError::Size(_))),
            "{error}"
        );
    }
}

#[test]
fn a_queue_that_was_stopped_goes_on_where_it_stood() {
    // At every place of the ring, and in both rounds.
    for in_order in [false, true] {
        for size in [3u16, 4, 7] {
            let machine = Machine::new(super::super::KIND);
            let mut features =
                Features::VERSION_1 | Features::RING_PACKED | Features::INDIRECT_DESC;
            features.set(Features::IN_ORDER, in_order);
            let mut guest = machine.guest(
                Arc::new(MemoryDisk::new(8)),
                BlockOptions {
                    in_order,
                    ..options()
                },
                LOW.start,
            );
            let mut ring = PackedRing::boot_with(&mut guest, size, features);
            assert!(guest.reset());
            let zeros = vec![0; 16 * usize::from(size)];
            guest.poke(guest.layout.descriptors, &zeros);
            let mut state = QueueState::start(features);
            assert_eq!((state.next_avail, state.next_used), (0x8000, 0x8000));
            for round in 0..4 * u32::from(size) {
                let started = start_at(&machine, size, features, state);
                let (mut device, mut worker) = started.unwrap();
                let header = guest.set_header(0, RequestType::IN, 1);
                let chain = [readable(header, 16), writable(guest.layout.data, 513)];
                let id = round as u16;
                ring.post(&mut guest, id, &chain);
                assert_eq!(worker.poll(8), Progress::More, "{round}");
                let used = ring.used(&guest);
                assert_eq!((used.len(), used[0].id), (1, id));
                assert_eq!(guest.peek(guest.layout.data + 512, 1), [status::OK]);
                worker.begin_stop();
                assert_eq!(worker.poll(8), Progress::Stopped);
                state = device.stopped(0, worker).queues[0].unwrap();
                let place = ring.off_wrap(ring.posted) as u16;
                assert_eq!((state.next_avail, state.next_used), (place, place));
            }
        }
    }
}
