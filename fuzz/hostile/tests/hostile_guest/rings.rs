//! The available ring, the events, and where the rings lie.

use super::{Ready, SECTORS, Scene, attack, options};
use pvkit_host::disk::MemoryDisk;
use pvkit_host::event::EventFd;
use pvkit_host::virtio::block::{Block, BlockOptions};
use pvkit_host::virtio::device::{Device, LaneResources, LaneState, StartError};
use pvkit_host::virtio::queue::{Fault, QueueAddresses, QueueError, QueueResources, QueueState};
use pvkit_host::worker::{Failure, Progress, SignalCounter};
use pvkit_hostile::Noise;
use pvkit_hostile::guest::{Guest, HIGH, HOLE, LOW, Layout, Machine, TOP, readable, writable};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::block::{RequestHeader, RequestType, status};
use pvkit_protocol::virtio::mmio::InterruptStatus;
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::sync::Arc;
use zerocopy::IntoBytes;

#[test]
fn an_index_that_jumps_or_runs_backwards() {
    // rust-vmm's queue: more than the queue holds. The scene has served one
    // request, so the device stands at 1.
    for to in [0, 10, 11, 0x7fff, 0x8000, 0x8001, 0xffff] {
        let fault = Fault::IndexJump {
            from: 1,
            to,
            size: 8,
        };
        attack(&format!("index {to}"), fault, |guest| {
            guest.set_index(to);
        });
    }
}

#[test]
fn heads_beyond_the_table() {
    for head in [8, 9, 0x7fff, 0x8000, 0xffff] {
        let fault = Fault::Head { head, size: 8 };
        attack(&format!("head {head}"), fault, |guest| {
            guest.offer(head);
        });
    }
}

/// Requests for sectors 0 to 3, each of two descriptors with the status behind
/// the data, and no doorbell.
fn four_requests(guest: &mut Guest) {
    for index in 0..4u16 {
        let sector = u64::from(index);
        let header = guest.set_header(sector, RequestType::IN, sector);
        let data = guest.layout.data + 0x400 * sector;
        guest.poke(data, &[0xee; 0x400]);
        guest.post_at(2 * index, &[readable(header, 16), writable(data, 513)]);
    }
}

#[test]
fn the_same_head_twice() {
    // CVE-2026-45782 (Cloud Hypervisor): a use after free.
    let fault = Fault::HeadInFlight { head: 2 };

    // While the disk has it.
    let mut scene = Scene::new();
    scene.disk.allow(0);
    let guest = &mut scene.guest;
    four_requests(guest);
    assert_eq!(guest.serve().fault, None);
    guest.offer(2);
    assert_eq!(guest.serve().fault, Some(fault), "the disk has it");
    scene.disk.allow(100);
    scene.guest.serve();
    scene.assert_broken_until_reset("the disk has it");

    // After it was answered, it is free again: also in the same batch, where
    // the disk answers at once.
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    four_requests(guest);
    guest.offer(2).offer(2).offer(2);
    assert_eq!(guest.serve().fault, None);
    assert_eq!(guest.used().len(), 7);
}

#[test]
fn more_in_flight_than_the_queue_is_long() {
    // OpenVMM #4002, CVE-2016-5403 (QEMU).
    let mut scene = Scene::new();
    scene.disk.allow(0);
    let guest = &mut scene.guest;
    // All eight heads name one good chain: 0 → 1, 2 → 1 and so on.
    let header = guest.set_header(0, RequestType::IN, 7);
    let data = guest.layout.data;
    let end = writable(data, 513);
    for head in 0..8 {
        let head_descriptor = pvkit_hostile::guest::then(readable(header, 16), 1);
        guest.set_descriptors(head, &[head_descriptor]);
    }
    guest.set_descriptors(1, &[end]);
    for head in [0, 2, 3, 4, 5, 6, 7] {
        guest.offer(head);
    }
    assert_eq!(guest.serve().fault, None, "seven chains share a descriptor");
    // An index within the queue's size, but with eight more than it can have.
    for head in [0, 2, 3, 4, 5, 6, 7, 0] {
        guest.offer(head);
    }
    assert_eq!(
        guest.serve().fault,
        Some(Fault::HeadInFlight { head: 0 }),
        "the queue is full"
    );
    scene.disk.allow(100);
    scene.guest.serve();
    scene.assert_broken_until_reset("more than the queue holds");
}

#[test]
fn what_came_before_the_fault_is_answered() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    four_requests(guest);
    guest.offer(0xffff);
    let before = guest.interrupts.count();
    assert_eq!(
        guest.serve().fault,
        Some(Fault::Head {
            head: 0xffff,
            size: 8
        })
    );
    assert_eq!(guest.used(), [(0, 513), (2, 513), (4, 513), (6, 513)]);
    for sector in 0..4 {
        let mut expected = pattern(sector, 512);
        expected.push(status::OK);
        let data = guest.layout.data + 0x400 * sector;
        assert_eq!(guest.peek(data, 513), expected);
    }
    assert!(guest.interrupts.count() > before);
    scene.assert_broken_until_reset("after four requests");
}

#[test]
fn requests_in_flight_when_the_queue_breaks_finish_unseen() {
    let mut scene = Scene::new();
    scene.disk.allow(0);
    let guest = &mut scene.guest;
    four_requests(guest);
    assert_eq!(guest.serve().fault, None);
    guest.set_index(0x4000);
    assert!(matches!(guest.serve().fault, Some(Fault::IndexJump { .. })));
    let before = guest.remember();
    scene.disk.allow(100);
    let guest = &mut scene.guest;
    assert_eq!(guest.serve().fault, None);
    let data: Vec<_> = (0..4)
        .map(|n| (guest.layout.data + 0x400 * n, 512))
        .collect();
    assert_eq!(
        guest.changed(&before, &data),
        [0; 0],
        "data arrives, but nothing is answered"
    );
    scene.assert_broken_until_reset("in flight");
}

#[test]
fn an_index_that_moves_back_once_it_was_seen() {
    // The entries that were seen are served; then the index runs backwards.
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    four_requests(guest);
    let steps = guest.steps();
    assert_eq!(steps.poll(1), [Progress::More]);
    guest.set_index(2);
    let served = guest.serve();
    assert_eq!(guest.used().len(), 4);
    let (from, to, size) = (5, 2, 8);
    assert_eq!(served.fault, Some(Fault::IndexJump { from, to, size }));
    scene.assert_broken_until_reset("back to 2");
}

#[test]
fn entries_and_descriptors_that_change_once_the_index_was_seen() {
    // The device has seen four entries and served one. What it finds when it
    // comes to the others is what counts, whatever was there before.
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    four_requests(guest);
    let steps = guest.steps();
    assert_eq!(steps.poll(1), [Progress::More]);
    for slot in 0..8 {
        guest.set_available(slot, 6);
    }
    assert_eq!(guest.serve().fault, None);
    assert_eq!(guest.used(), [(0, 513), (6, 513), (6, 513), (6, 513)]);
    assert!(guest.works(3));
}

#[test]
fn a_state_to_continue_from_that_is_nonsense() {
    // Firecracker 7b01bdc1e: corrupt state. Any pair of indices is a state
    // that a queue can be in; one that does not fit the ring is a fault.
    let machine = Machine::new(super::KIND);
    let memory = machine.memory();
    let layout = Layout::at(LOW.start);
    let size = QueueSize::new(8).unwrap();
    let mut noise = Noise::new(3);
    for round in 0..2_000 {
        let index = noise.next_u64() as u16;
        let bytes = index.to_le_bytes();
        memory.snapshot().write(layout.avail + 2, &bytes).unwrap();
        let next_avail = match round % 4 {
            0 => index,
            1 => index.wrapping_sub(noise.below(9) as u16),
            _ => noise.next_u64() as u16,
        };
        let next_used = match round % 8 {
            0 => noise.next_u64() as u16,
            _ => next_avail,
        };
        let queue = QueueState {
            next_avail,
            next_used,
        };
        // Of too many queues, the first counts; of none, a fresh one.
        let queues = vec![Some(queue); noise.below(3) as usize];
        let fresh = queues.is_empty();
        let resources = LaneResources {
            memory: memory.clone(),
            queues: vec![Some(QueueResources {
                at: QueueAddresses {
                    size: size.get(),
                    descriptors: layout.descriptors,
                    driver: layout.avail,
                    device: layout.used,
                },
                signal: Arc::new(SignalCounter::default()),
                kick: Arc::new(EventFd::new().unwrap()),
            })],
        };
        let mut device = Block::new(Arc::new(MemoryDisk::new(8)), options()).unwrap();
        let at = LaneState { queues };
        let started = device.start(0, resources, Features::VERSION_1, Some(&at));
        if !fresh && next_avail != next_used {
            let expected = QueueError::NotDrained {
                avail: next_avail,
                used: next_used,
            };
            let error = started.unwrap_err();
            assert!(matches!(error, StartError::Queue(error) if error == expected));
            continue;
        }
        let mut worker = started.unwrap();
        let from = if fresh { 0 } else { next_avail };
        let progress = worker.poll(64);
        if index.wrapping_sub(from) > 8 {
            let (to, size) = (index, 8);
            let fault = Fault::IndexJump { from, to, size };
            assert_eq!(progress, Progress::Broken(Failure::new(fault)));
        } else if index == from {
            assert_eq!(progress, Progress::Drained);
        } else {
            // There are no descriptors: the first chain is empty.
            assert_eq!(
                progress,
                Progress::Broken(Failure::new(Fault::Empty { head: 0 }))
            );
        }
        worker.begin_stop();
        assert_eq!(worker.poll(64), Progress::Stopped);
    }
}

#[test]
fn events_and_flags_of_any_value_neither_spin_nor_flood() {
    // Every batch ends with at most one interrupt, whatever the guest wrote.
    let mut noise = Noise::new(1);
    for event_idx in [true, false] {
        let mut scene = Scene::cold(options());
        let guest = &mut scene.guest;
        let mut features = guest.split_ring_features();
        features.set(Features::EVENT_IDX, event_idx);
        guest.boot_with(features);
        for round in 0..3_000u64 {
            let event = match round % 4 {
                0 => guest.offered,
                1 => guest.offered.wrapping_add(1),
                2 => guest.offered.wrapping_sub(1),
                _ => noise.next_u64() as u16,
            };
            guest.set_used_event(event);
            guest.set_avail_flags(noise.next_u64() as u16);
            // Also the fields that are the device's to write.
            let (used, bytes) = guest.used_ring();
            guest.poke(used, &(noise.next_u64() as u16).to_le_bytes());
            let avail_event = used + bytes - 2;
            guest.poke(avail_event, &(noise.next_u64() as u16).to_le_bytes());

            let before = guest.interrupts.count();
            let header = guest.set_header(0, RequestType::IN, round % SECTORS);
            let data = guest.layout.data;
            guest.post(&[readable(header, 16), writable(data, 513)]);
            let served = guest.serve();
            assert_eq!(served.fault, None);
            assert!(served.polls <= 2, "{} polls", served.polls);
            assert!(guest.interrupts.count() - before <= 1);
            assert_eq!(guest.used().len(), 1);
        }
    }
}

#[test]
fn a_used_index_that_the_guest_rewrites_is_not_read_back() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    for garbage in [0u16, 7, 0x8000, 0xffff] {
        let (used, bytes) = guest.used_ring();
        guest.poke(used, &vec![0xff; bytes as usize]);
        guest.poke(used + 2, &garbage.to_le_bytes());
        four_requests(guest);
        let expected = guest.offered;
        assert_eq!(guest.serve().fault, None);
        assert_eq!(guest.peek_u16(used + 2), expected, "the device's own count");
    }
}

/// DRIVER_OK with rings at `layout`, and what comes of it.
fn start_at(layout: Layout, size: u16) -> Scene {
    let mut scene = Scene::cold(BlockOptions {
        queue_size: 256,
        ..options()
    });
    let guest = &mut scene.guest;
    guest.layout = layout;
    guest.size = size;
    guest.boot();
    scene
}

#[test]
fn rings_where_they_cannot_be() {
    let right = Layout::at(LOW.start);
    let mut rows = Vec::new();
    for addr in [
        // Not aligned (16, 2 and 4 bytes).
        LOW.start + 1,
        // No RAM at all, or not to the end: sizes are 128, 22 and 70 bytes.
        0,
        HOLE,
        TOP.end,
        TOP.end - 16,
        HIGH.end - 16,
        LOW.start - 16,
        // Across two regions, which lie apart in the host.
        LOW.end - 16,
        // Wraps.
        u64::MAX - 15,
        u64::MAX - 1,
    ] {
        let descriptors = Layout {
            descriptors: addr,
            ..right
        };
        let avail = Layout {
            avail: addr,
            ..right
        };
        let used = Layout {
            used: addr,
            ..right
        };
        rows.extend([descriptors, avail, used]);
    }
    rows.extend([
        Layout {
            descriptors: LOW.start + 8,
            ..right
        },
        Layout {
            used: LOW.start + 0x2002,
            ..right
        },
    ]);
    for layout in rows {
        let name = format!("{layout:x?}");
        let mut scene = start_at(layout, 8);
        let guest = &mut scene.guest;
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
        // There is no second start in the same life, wherever the rings go.
        guest.place(right).go();
        guest.set_status(DeviceStatus::all_of_a_driver());
        assert_eq!(guest.serve().polls, 1, "{name}: there is no worker");
        assert_eq!(guest.interrupts.count(), 1, "{name}");
        scene.assert_broken_until_reset(&name);
    }
}

#[test]
fn rings_at_the_very_end_of_ram_work() {
    for end in [HIGH.end, TOP.end, LOW.end] {
        let right = Layout::at(LOW.start);
        for layout in [
            Layout {
                descriptors: end - 128,
                ..right
            },
            Layout {
                avail: end - 22,
                ..right
            },
            Layout {
                used: end - 72,
                ..right
            },
        ] {
            let mut scene = start_at(layout, 8);
            for sector in 0..20 {
                assert!(scene.guest.works(sector), "{layout:x?}");
            }
            assert!(scene.other.works(1));
        }
    }
}

#[test]
fn rings_that_overlap_each_other_or_the_data() {
    // Used elements and data become descriptors and indices. What they name
    // is the guest's own fault, but it is all bounded and inside RAM.
    let mut noise = Noise::new(2);
    for round in 0..400 {
        let base = LOW.start + 0x1000;
        let mut near = |align: u64| base + noise.below(0x200 / align) * align;
        let layout = Layout {
            descriptors: near(16),
            avail: near(2),
            used: near(4),
            table: near(16),
            header: near(1),
            status: near(1),
            data: near(1),
        };
        let mut scene = start_at(layout, 8);
        let guest = &mut scene.guest;
        for _ in 0..16 {
            let header = guest.set_header(0, RequestType::IN, noise.below(SECTORS));
            let Layout { data, status, .. } = guest.layout;
            guest.post(&[
                readable(header, 16),
                writable(data, 0x200),
                writable(status, 1),
            ]);
            guest.offer(noise.below(10) as u16);
            let steps = guest.steps();
            for _ in 0..10 {
                steps.poll(8);
            }
        }
        assert!(scene.other.works(1));
        assert!(scene.guest.reset(), "round {round}");
        scene.guest.layout = Layout::at(LOW.start);
        scene.guest.boot();
        assert!(scene.guest.works(2), "round {round}");
    }
}

#[test]
fn all_rings_at_the_same_address() {
    for data_there_too in [false, true] {
        let mut layout = Layout {
            avail: LOW.start,
            used: LOW.start,
            ..Layout::at(LOW.start)
        };
        if data_there_too {
            layout.data = LOW.start;
            layout.status = LOW.start + 2;
            layout.header = LOW.start;
        }
        let mut scene = start_at(layout, 8);
        for index in 0..200u16 {
            let guest = &mut scene.guest;
            guest.set_header(0, RequestType::IN, 1);
            guest.set_index(index);
            let steps = guest.steps();
            for _ in 0..4 {
                steps.poll(64);
            }
        }
        assert!(scene.other.works(1));
        assert!(scene.guest.reset());
        scene.guest.layout = Layout::at(LOW.start);
        scene.guest.boot();
        assert!(scene.guest.works(2));
    }
}

#[test]
fn a_ring_that_feeds_itself_is_served_a_budget_at_a_time() {
    // Each sector, once it is read, lies over the available ring and the
    // request's header: it makes the next request, for the next sector. The
    // device works for as long as the disk has sectors, with no guest at all.
    const LINKS: u64 = 1000;
    let area = LOW.start + 0x1000;
    let header_offset = 0x100;
    let mut content = vec![0; (LINKS * 512) as usize];
    for (sector, bytes) in (0..).zip(content.chunks_mut(512)) {
        // After the request that reads sector n, the index is n + 2.
        bytes[2..4].copy_from_slice(&(sector as u16 + 2).to_le_bytes());
        let header = RequestHeader::new(RequestType::IN, sector + 1);
        bytes[header_offset..header_offset + 16].copy_from_slice(header.as_bytes());
    }
    let machine = Machine::new(super::KIND);
    let disk = MemoryDisk::from_bytes(content);
    let mut guest = machine.guest(Arc::new(disk), options(), LOW.start);
    guest.layout.avail = area;
    guest.layout.header = area + header_offset as u64;
    guest.boot();
    let header = guest.set_header(0, RequestType::IN, 0);
    let status = guest.layout.status;
    guest.post(&[
        readable(header, 16),
        writable(area, 512),
        writable(status, 1),
    ]);
    let steps = guest.steps();
    for round in 1..=20 {
        assert_eq!(steps.poll(10), [Progress::More]);
        assert_eq!(guest.counters.requests.get(), 10 * round, "the budget");
    }
    // It can be stopped in the middle of it.
    assert!(guest.reset());
    let done = guest.counters.requests.get();
    assert!(done <= LINKS + 1);
    steps.poll(10);
    assert_eq!(guest.counters.requests.get(), done);
    guest.layout = Layout::at(LOW.start);
    guest.boot();
    assert_eq!(guest.request(RequestType::IN, 0, 512), Ok(status::OK));
}

#[test]
fn a_full_ring_is_served_within_the_budget() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let steps = guest.steps();
    four_requests(guest);
    let before = guest.counters.requests.get();
    for done in 1..=4 {
        assert_eq!(steps.poll(1), [Progress::More]);
        assert_eq!(guest.counters.requests.get(), before + done);
    }
    assert_eq!(steps.poll(1), [Progress::Drained]);
}
