//! The guest changes its mind in the middle of a batch, at exactly the worst
//! moment: whenever the disk is asked to do something.

use super::{SECTORS, options};
use pvkit_host::disk::{Disk, DiskError, DiskLane, DiskRequest, DiskShape, MemoryDisk, Submit};
use pvkit_host::memory::Snapshot;
use pvkit_host::virtio::queue::Fault;
use pvkit_host::worker::{Interest, Progress};
use pvkit_hostile::guest::{Guest, HOLE, LOW, Layout, Machine, readable, writable};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::block::{RequestHeader, RequestType, status};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use zerocopy::IntoBytes;

/// What the guest does when its `n`-th request reaches the disk.
type Hook = Box<dyn FnMut(u64, &Snapshot) + Send>;

/// A disk in memory that tells the guest about every request before it does
/// it.
#[derive(Clone)]
struct Telling {
    disk: MemoryDisk,
    ram: Arc<Snapshot>,
    hook: Arc<Mutex<(u64, Hook)>>,
}

impl fmt::Debug for Telling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Telling")
    }
}

impl Disk for Telling {
    fn shape(&self) -> DiskShape {
        self.disk.shape()
    }
    fn lane(&self, depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        let lane = self.disk.lane(depth)?;
        Ok(Box::new(TellingLane(lane, self.clone())))
    }
}

#[derive(Debug)]
struct TellingLane(Box<dyn DiskLane>, Telling);

impl DiskLane for TellingLane {
    fn submit(&mut self, request: DiskRequest<'_>, tag: u16) -> Submit {
        let mut hook = self.1.hook.lock().unwrap();
        let (count, hook) = &mut *hook;
        hook(*count, &self.1.ram);
        *count += 1;
        self.0.submit(request, tag)
    }
    fn commit(&mut self) -> bool {
        true
    }
    fn reap(&mut self, each: &mut dyn FnMut(u16, Result<(), DiskError>)) -> usize {
        self.0.reap(each)
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn sources<'a>(&'a self, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}
}

/// A guest that meddles whenever one of its requests reaches the disk.
fn guest(hook: impl FnMut(u64, &Snapshot) + Send + 'static) -> Guest {
    let machine = Machine::new(super::KIND);
    let disk = Telling {
        disk: MemoryDisk::from_bytes(pattern(0, SECTORS as usize * 512)),
        ram: machine.memory().snapshot(),
        hook: Arc::new(Mutex::new((0, Box::new(hook)))),
    };
    let mut guest = machine.guest(Arc::new(disk), options(), LOW.start);
    guest.boot();
    guest
}

const LAYOUT: Layout = Layout::at(LOW.start);

fn set_index(ram: &Snapshot, index: u16) {
    ram.write(LAYOUT.avail + 2, &index.to_le_bytes()).unwrap();
}

/// `count` reads of sectors from 0 on, two descriptors each, not shown.
fn prepare(guest: &mut Guest, count: u16) {
    for index in 0..count {
        let sector = u64::from(index);
        let header = guest.set_header(sector, RequestType::IN, sector);
        let data = guest.layout.data + 0x400 * sector;
        guest.post_at(2 * index, &[readable(header, 16), writable(data, 513)]);
    }
}

#[test]
fn an_index_that_advances_with_every_request_is_served_by_the_budget() {
    // CVE-2016-5403 (QEMU): a guest that need not wait for completions. All
    // entries are head 0, which is free again each time.
    let mut guest = guest(|count, ram| set_index(ram, (count as u16).wrapping_add(2)));
    prepare(&mut guest, 1);
    for slot in 0..8 {
        guest.set_available(slot, 0);
    }
    let steps = guest.steps();
    for round in 1..=300 {
        // More than 65,536 requests in all.
        assert_eq!(steps.poll(250), [Progress::More]);
        assert_eq!(guest.counters.requests.get(), 250 * round);
    }
    assert!(guest.reset(), "it can be stopped");
    assert_eq!(guest.counters.requests.get(), 75_000);
}

#[test]
fn an_index_that_jumps_in_the_middle_of_a_batch() {
    for to in [0u16, 0x4000, 0xffff] {
        let mut guest = guest(move |count, ram| {
            if count == 1 {
                set_index(ram, to);
            }
        });
        prepare(&mut guest, 4);
        let fault = guest.serve().fault;
        let (from, size) = (4, 8);
        assert_eq!(fault, Some(Fault::IndexJump { from, to, size }));
        assert_eq!(guest.used().len(), 4, "what was seen before is served");
        for sector in 0..4 {
            let data = guest.layout.data + 0x400 * sector;
            assert_eq!(guest.peek(data, 512), pattern(sector, 512));
        }
    }
}

#[test]
fn a_request_that_is_rewritten_while_the_disk_works_on_it() {
    // Header, descriptors, available ring: all were copied before they were
    // checked, and nobody looks at them again.
    let mut guest = guest(|_, ram| {
        let header = RequestHeader::new(RequestType::OUT, u64::MAX);
        ram.write(LAYOUT.header, header.as_bytes()).unwrap();
        let elsewhere = [
            readable(HOLE, u32::MAX),
            writable(LAYOUT.data + 0x4000, 4096),
        ];
        ram.write(LAYOUT.descriptors, elsewhere.as_bytes()).unwrap();
        ram.write(LAYOUT.avail + 4, &[0xff; 16]).unwrap();
    });
    prepare(&mut guest, 1);
    let data = guest.layout.data;
    let before = guest.remember();
    assert_eq!(guest.serve().fault, None);
    assert_eq!(guest.used(), [(0, 513)]);
    let mut expected = pattern(0, 512);
    expected.push(status::OK);
    assert_eq!(guest.peek(data, 513), expected);
    let allowed = [
        guest.used_ring(),
        (data, 513),
        (LAYOUT.header, 16),
        (LAYOUT.descriptors, 32),
        (LAYOUT.avail, 22),
    ];
    assert_eq!(guest.changed(&before, &allowed), [0; 0]);
}

#[test]
fn the_next_request_is_rewritten_while_the_disk_works_on_the_last() {
    // It was seen as available, but not yet fetched: what is there when it is
    // fetched counts, and is checked like anything else.
    let mut guest = guest(|count, ram| {
        if count == 0 {
            let empty = readable(LAYOUT.header, 0);
            ram.write(LAYOUT.descriptors + 32, empty.as_bytes())
                .unwrap();
        }
    });
    prepare(&mut guest, 3);
    assert_eq!(guest.serve().fault, Some(Fault::Empty { head: 2 }));
    assert_eq!(guest.used(), [(0, 513)], "the first was answered");
}

#[test]
fn the_used_ring_is_rewritten_in_the_middle_of_a_batch() {
    let mut guest = guest(|count, ram| {
        ram.write(LAYOUT.used, &[count as u8; 70]).unwrap();
    });
    prepare(&mut guest, 4);
    assert_eq!(guest.serve().fault, None);
    assert_eq!(guest.peek_u16(LAYOUT.used + 2), 4, "the device's own count");
    for sector in 0..4 {
        let data = guest.layout.data + 0x400 * sector;
        assert_eq!(guest.peek(data, 512), pattern(sector, 512));
    }
}
