//! What the guest's numbers cost the host in memory, and memory that goes away.

use super::{SECTORS, Scene, options};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::packed::PackedRing;
use pvkit_hostile::guest::{HIGH, HOLE, LOW, Machine, indirect, linked, readable, then, writable};
use pvkit_join::disk::RecordingDisk;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::RequestType;
use pvkit_protocol::virtio::mmio;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Notes how much each thread allocates.
struct Meter;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all work is the system allocator's; the counter allocates nothing.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // The counter is gone while a thread ends.
        let _ = ALLOCATED.try_with(|bytes| bytes.set(bytes.get() + layout.size()));
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) };
    }
}

#[global_allocator]
static METER: Meter = Meter;

/// The list that [`poll`](pvkit_join::stepped::Steps::poll) returns.
const POLL: usize = 128;
/// What a refused start may allocate: the list of queues and the error.
const REFUSAL: usize = 512;

/// Bytes that this thread allocates while `work` runs.
fn allocated(work: impl FnOnce()) -> usize {
    let before = ALLOCATED.get();
    work();
    ALLOCATED.get() - before
}

#[test]
fn requests_allocate_nothing_whatever_they_claim() {
    // Firecracker #5762, #5794: allocations sized by the guest's numbers.
    let mut scene = Scene::new();
    // The list of what happened is the test's own.
    scene.disk.ops.lock().unwrap().reserve(1000);
    let guest = &mut scene.guest;
    let steps = guest.steps();
    let table = guest.layout.table;
    let header = guest.set_header(0, RequestType::IN, 0);
    let data = guest.layout.data;
    // The longest chain once, so that the lists have their full length.
    let mut chain = vec![readable(header, 16)];
    chain.extend((0..127).map(|n| writable(data + n, 1)));
    guest.set_table(table, &linked(0, &chain));
    guest.post(&[indirect(table, 128 * 16)]);
    steps.poll(1);

    for len in [0, 1, 512, 1 << 20, LOW.end as u32, u32::MAX] {
        for kind in [0, 1, 4, 8, 99] {
            guest.set_header(0, RequestType(kind), u64::from(len));
            let big = (LOW.end - data).min(u64::from(len)) as u32;
            let chain = [
                readable(header, 16),
                writable(data, big.max(1)),
                writable(data, 1),
            ];
            guest.post(&chain);
            let bytes = allocated(|| drop(steps.poll(64)));
            assert!(bytes <= POLL, "{bytes} bytes for kind {kind}, length {len}");
        }
    }
    // Ranges: a list for as many as there can be, once, and that is all.
    let mut costs = Vec::new();
    for bytes in [16, 512, 1024, 0x1000, 0x7000] {
        for kind in [11, 13, 14] {
            guest.set_header(0, RequestType(kind), 0);
            guest.poke(data, &vec![0; bytes as usize]);
            let status = LOW.start + 0x7000;
            guest.post(&[
                readable(header, 16),
                readable(data, bytes),
                writable(status, 1),
            ]);
            costs.push(allocated(|| drop(steps.poll(64))));
        }
    }
    let first = costs.remove(0);
    assert!(first <= POLL + 32 * 64, "{first} bytes for the first range");
    assert!(costs.iter().all(|bytes| *bytes <= POLL), "{costs:?}");
    // Chains that break the queue.
    for bytes in [0x7fff_fff0, u32::MAX] {
        guest.post(&[indirect(table, bytes)]);
        let bytes = allocated(|| drop(steps.poll(64)));
        assert!(bytes <= POLL, "{bytes} bytes for a fault");
        assert!(guest.reset());
        guest.boot();
    }
}

#[test]
fn packed_rings_allocate_nothing_whatever_they_claim() {
    let mut scene = Scene::cold(BlockOptions {
        in_order: true,
        ..options()
    });
    scene.disk.ops.lock().unwrap().reserve(1000);
    let guest = &mut scene.guest;
    let steps = guest.steps();
    let table = guest.layout.table;
    for in_order in [false, true] {
        for bytes in [129 * 16, 0x7fff_fff0, u32::MAX - 15, u32::MAX] {
            let mut features = guest.offered_features();
            features.set(Features::IN_ORDER, in_order);
            let mut ring = PackedRing::boot_with(guest, 7, features);
            for sector in 0..3 {
                assert!(ring.works(guest, sector));
            }
            let header = guest.set_header(0, RequestType::IN, 0);
            let data = guest.layout.data;
            let chain = [readable(header, 16), writable(data, 513)];
            ring.post(guest, 1, &chain);
            ring.post(guest, 2, &chain);
            ring.post(guest, 3, &[indirect(table, bytes)]);
            let bytes = allocated(|| drop(steps.poll(64)));
            assert!(bytes <= POLL, "{bytes} bytes");
            assert_eq!(ring.used(guest).last().map(|used| used.id), Some(2));
            assert!(guest.reset());
        }
    }
}

#[test]
fn a_start_allocates_by_the_queue_s_size_and_that_is_limited() {
    let mut scene = Scene::cold(BlockOptions {
        queue_size: 1024,
        ..options()
    });
    let guest = &mut scene.guest;
    let mut costs = Vec::new();
    for size in [4u16, 1024] {
        guest.size = size;
        let features = guest.split_ring_features();
        assert!(guest.negotiate(features));
        // 1,024 descriptors fill more than a page: clear of the other rings.
        guest.layout.descriptors = LOW.start + 0x20000;
        guest.layout.used = LOW.start + 0x28000;
        guest.set_up_queue();
        costs.push(allocated(|| _ = guest.go()));
        assert!(guest.works(1));
        assert!(guest.reset());
    }
    assert!(costs[0] < 16 << 10, "{costs:?}");
    assert!(costs[1] < 128 << 10, "{costs:?}");
    // Sizes that the device does not have cost what a refusal costs: the list
    // of queues and the error, whatever the size.
    for size in [2048u32, 0x8000, u32::MAX] {
        let features = guest.split_ring_features();
        assert!(guest.negotiate(features));
        guest.set_register(mmio::QUEUE_SIZE, size);
        guest.set_register(mmio::QUEUE_READY, 1);
        let bytes = allocated(|| _ = guest.go());
        assert!(bytes <= REFUSAL, "{bytes} bytes for size {size}");
        assert!(guest.reset());
    }
}

#[test]
fn a_cycle_costs_no_memory_and_little_time() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let steps = guest.steps();
    guest
        .set_descriptors(0, &[then(readable(LOW.start, 1), 0)])
        .offer(0);
    let bytes = allocated(|| drop(steps.poll(64)));
    assert!(bytes <= POLL, "{bytes} bytes");
}

#[test]
fn rings_in_memory_that_is_taken_away() {
    let mut scene = Scene::new();
    let old = scene.guest.ram.clone();
    // All RAM but the first region, where the queue is.
    let regions = [
        (GuestAddress(HIGH.start), 0x2_0000),
        (GuestAddress(HOLE), 0x1000),
    ];
    let map = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
    scene.machine.memory().replace(Arc::new(map)).unwrap();
    assert_eq!(scene.guest.serve().fault, Some(Fault::RingGone));
    assert!(
        scene
            .guest
            .status()
            .contains(pvkit_protocol::virtio::DeviceStatus::DEVICE_NEEDS_RESET)
    );
    // The old map is alive as long as somebody holds it.
    old.write(LOW.start, b"alive").unwrap();
    // A guest that places its queue in what is left goes on.
    let guest = &mut scene.guest;
    assert!(guest.reset());
    guest.ram = scene.machine.memory().snapshot();
    guest.layout = pvkit_hostile::guest::Layout::at(HIGH.start);
    guest.boot();
    assert!(guest.works(1));
}

#[test]
fn memory_taken_away_while_the_disk_has_requests() {
    let machine = Machine::new(super::KIND);
    let disk = RecordingDisk::new(SECTORS);
    disk.allow(0);
    let mut guest = machine.guest(Arc::new(disk.clone()), options(), LOW.start);
    guest.boot();
    let header = guest.set_header(0, RequestType::IN, 5);
    let data = guest.layout.data;
    guest.post(&[readable(header, 16), writable(data, 513)]);
    assert_eq!(guest.serve().fault, None);

    let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(HIGH.start), 0x2_0000)]);
    machine.memory().replace(Arc::new(map.unwrap())).unwrap();
    // The disk writes to the old map, which it keeps alive; the queue is gone.
    disk.allow(1);
    assert_eq!(guest.serve().fault, Some(Fault::RingGone));
    let expected = pvkit_join::disk::pattern(5, 512);
    assert_eq!(guest.peek(data, 512), expected);
    assert!(guest.reset());
}
