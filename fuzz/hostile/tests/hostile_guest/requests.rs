//! Requests that are chains as they should be, and nonsense otherwise: each is
//! answered with an error, and the queue goes on.

use super::{SECTORS, Scene, options};
use pvkit_host::disk::{DiskOp, MemoryDisk};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::Noise;
use pvkit_hostile::guest::{Guest, LOW, Layout, Machine, indirect, linked, readable, writable};
use pvkit_join::disk::{RecordingDisk, pattern};
use pvkit_protocol::virtio::block::{ID_BYTES, RequestType, status};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Runs a request on `guest`; nothing but status, used ring and the first
/// `written` bytes of data may change.
fn expect(guest: &mut Guest, kind: RequestType, sector: u64, len: u32, status: u8, written: u64) {
    let name = format!("{kind:?} of {len} bytes at sector {sector:#x}");
    let Layout { data, header, .. } = guest.layout;
    guest.poke(data, &[0x77; 4096]);
    let before = guest.remember();
    assert_eq!(guest.request(kind, sector, len), Ok(status), "{name}");
    let allowed = [
        guest.used_ring(),
        (guest.layout.descriptors, 128),
        (guest.layout.avail, 22),
        (header, 16),
        (guest.layout.status, 1),
        (data, written),
    ];
    assert_eq!(guest.changed(&before, &allowed), [0; 0], "{name}");
}

#[test]
fn sectors_beyond_the_disk() {
    // Cloud Hypervisor 376434a69, OpenVMM #4046: every part in bounds, the sum
    // beyond the disk; and sums that wrap.
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    for kind in [RequestType::IN, RequestType::OUT] {
        for (sector, len) in [
            (SECTORS, 512),
            (SECTORS - 1, 1024),
            (0, 512 * 65),
            (u64::MAX, 512),
            (u64::MAX, 1024),
            (u64::MAX / 512, 512),
            (u64::MAX / 512 + 1, 512),
            (1 << 55, 512),
            (1 << 63, 512),
        ] {
            expect(guest, kind, sector, len, status::IOERR, 0);
        }
        // Lengths that are no sectors.
        for len in [1, 511, 513, 1023] {
            expect(guest, kind, 1, len, status::IOERR, 0);
        }
        expect(guest, kind, SECTORS, 0, status::OK, 0);
        expect(guest, kind, SECTORS + 1, 0, status::IOERR, 0);
        expect(guest, kind, u64::MAX, 0, status::IOERR, 0);
    }
    expect(guest, RequestType::IN, SECTORS - 1, 512, status::OK, 512);
    for sector in 0..SECTORS {
        assert!(guest.works(sector), "no write reached the disk");
    }
    let status = scene.guest.status();
    assert!(!status.contains(DeviceStatus::DEVICE_NEEDS_RESET));
}

#[test]
fn unknown_requests_are_answered_so() {
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    guest.boot_with(Features::VERSION_1);
    for kind in [
        2,
        3,
        5,
        6,
        7,
        9,
        12,
        15,
        24,
        0x100,
        0x8000_0000,
        0x8000_0001,
        u32::MAX,
        // Known and (but for one) offered, but not negotiated.
        RequestType::GET_LIFETIME.0,
        RequestType::DISCARD.0,
        RequestType::WRITE_ZEROES.0,
        RequestType::SECURE_ERASE.0,
    ] {
        let kind = RequestType(kind);
        expect(guest, kind, u64::MAX, 512, status::UNSUPP, 0);
        expect(guest, kind, 0, 0, status::UNSUPP, 0);
    }
    assert_eq!(*scene.disk.ops.lock().unwrap(), [], "not even looked at");
    assert!(scene.guest.works(9));
}

#[test]
fn the_id_fills_what_there_is_and_no_more() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let mut id = [0; ID_BYTES];
    id[..5].copy_from_slice(b"pvkit");
    for len in [0, 1, 4, 19, 20, 21, 512] {
        let written = len.min(ID_BYTES as u32);
        let data = guest.layout.data;
        let kind = RequestType::GET_ID;
        expect(guest, kind, u64::MAX, len, status::OK, u64::from(written));
        let written = written as usize;
        assert_eq!(guest.peek(data, written), id[..written]);
    }
}

#[test]
fn writes_to_a_disk_that_is_read_only() {
    let machine = Machine::new(super::KIND);
    let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512));
    let read_only = Arc::new(disk.clone().read_only());
    let mut guest = machine.guest(read_only, options(), LOW.start);
    guest.boot();
    expect(&mut guest, RequestType::OUT, 1, 512, status::IOERR, 0);
    assert!(guest.works(1));
    assert_eq!(disk.contents()[..], pattern(0, 64 * 512));
}

#[test]
fn more_data_than_a_used_length_can_count() {
    // 126 buffers of 64 MiB each: 7.9 GiB, of which the used ring can report
    // less than four. RAM is only reserved, not touched.
    const BYTES: u32 = 64 << 20;
    let map = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(
        vm_memory::GuestAddress(LOW.start),
        BYTES as usize,
    )])
    .unwrap();
    let machine = Machine::new(super::KIND);
    machine.memory().replace(Arc::new(map)).unwrap();
    let disk = RecordingDisk::new(SECTORS);
    let mut guest = machine.guest(Arc::new(disk), options(), LOW.start);
    guest.boot();
    let Layout {
        header,
        table,
        status: at,
        ..
    } = guest.layout;
    // With the status, one more than counts: not even looked at.
    for len in [u32::MAX, u32::MAX - 1] {
        guest.set_header(0, RequestType::IN, 0);
        guest.poke(at, &[0xee]).post(&[
            readable(header, 16),
            writable(LOW.start, len),
            writable(at, 1),
        ]);
        let fault = guest.serve().fault;
        if len == u32::MAX {
            assert_eq!(fault, None);
            assert_eq!(guest.used(), [(0, 1)]);
            assert_eq!(guest.peek(at, 1), [status::IOERR]);
        } else {
            assert!(matches!(fault, Some(Fault::Address { .. })));
            assert!(guest.reset());
            guest.boot();
        }
    }
    for kind in [RequestType::IN, RequestType::OUT] {
        guest.set_header(0, kind, 0);
        let mut chain = vec![readable(header, 16)];
        for _ in 0..126 {
            chain.push(match kind {
                RequestType::IN => writable(LOW.start, BYTES),
                _ => readable(LOW.start, BYTES),
            });
        }
        chain.push(writable(at, 1));
        guest
            .poke(at, &[0xee])
            .set_table(table, &linked(0, &chain))
            .post(&[indirect(table, 128 * 16)]);
        assert_eq!(guest.serve().fault, None);
        assert_eq!(guest.used(), [(0, 1)]);
        assert_eq!(guest.peek(at, 1), [status::IOERR]);
    }
}

#[test]
fn without_the_flush_feature_every_write_is_durable() {
    // A guest that does not accept FLUSH and sends it all the same gets it,
    // and its writes are forced through (§5.2.6.2).
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    guest.boot_with(Features::VERSION_1);
    expect(guest, RequestType::OUT, 1, 512, status::OK, 0);
    expect(guest, RequestType::FLUSH, 0, 0, status::OK, 0);
    assert_eq!(
        *scene.disk.ops.lock().unwrap(),
        [DiskOp::Write { fua: true }, DiskOp::Flush]
    );
}

#[test]
fn a_header_that_changes_after_the_check() {
    // Cloud Hypervisor 778c9f53d: a double fetch. Another thread rewrites the
    // header, the descriptors and the indirect table while the device works.
    // Whatever it sees, it sees once: reads fill no more than the buffer that
    // was checked, and nothing else changes.
    let machine = Machine::new(super::KIND);
    let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512)).read_only();
    let options = BlockOptions {
        queue_size: 8,
        ..BlockOptions::default()
    };
    let mut guest = machine.guest(Arc::new(disk), options, LOW.start);
    guest.boot();
    let Layout {
        header,
        table,
        data,
        status: at,
        ..
    } = guest.layout;
    guest.set_header(0, RequestType::IN, 1);
    let chain = [readable(header, 16), writable(data, 1024), writable(at, 1)];
    guest.set_table(table, &linked(0, &chain));
    guest.poke(data, &[0; 4096]);
    let before = guest.remember();

    let stop = Arc::new(AtomicBool::new(false));
    let (seen, ram) = (stop.clone(), guest.ram.clone());
    let mutator = std::thread::spawn(move || {
        let mut noise = Noise::new(3);
        let mut rounds = 0u64;
        while !seen.load(Ordering::Relaxed) {
            let word = [0u32, 1, 8, 63, 64, 4096, u32::MAX][noise.below(7) as usize];
            // Kind, sector, length of the data: 0, 512 or 1,024 bytes.
            let (addr, bytes) = match noise.below(4) {
                0 => (header, &word.to_le_bytes()[..]),
                1 => (header + 8, &word.to_le_bytes()[..]),
                2 => (table + 16 + 8, &[0, 2 * (word as u8 & 1), 0, 0][..]),
                _ => (table + 16 + 9, &[4u8 >> (word & 1)][..]),
            };
            ram.write(addr, bytes).unwrap();
            rounds += 1;
        }
        rounds
    });
    let (mut answered, mut faults) = (0u32, 0u32);
    for _ in 0..30_000 {
        guest.post(&[indirect(table, 48)]);
        match guest.serve().fault {
            None => {
                answered += 1;
                assert!(guest.peek(at, 1)[0] <= status::UNSUPP);
            }
            Some(_) => {
                faults += 1;
                assert!(guest.reset());
                guest.boot();
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    let rounds = mutator.join().unwrap();
    println!("{answered} answered, {faults} faults, {rounds} changes");
    let allowed = [
        guest.used_ring(),
        (guest.layout.descriptors, 128),
        (guest.layout.avail, 22),
        (header, 16),
        (table, 48),
        (at, 1),
        (data, 1024),
    ];
    assert_eq!(guest.changed(&before, &allowed), [0; 0]);
    guest.set_header(0, RequestType::IN, 1);
    assert!(guest.reset());
    guest.boot();
    assert!(guest.works(1));
}

#[test]
fn a_flush_of_any_sector_is_a_flush() {
    // §5.2.6: the sector of a flush means nothing.
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    for sector in [0, 1, SECTORS, u64::MAX / 512, 1 << 55, u64::MAX] {
        expect(guest, RequestType::FLUSH, sector, 0, status::OK, 0);
        expect(guest, RequestType::FLUSH, sector, 512, status::OK, 0);
    }
    let ops = scene.disk.ops.lock().unwrap();
    let flushes = ops.iter().filter(|op| **op == DiskOp::Flush).count();
    assert_eq!(flushes, 12);
}

#[test]
fn a_disk_with_less_room_than_the_queue_is_waited_for_not_spun_on() {
    // A worker with a request that does not fit must sleep until the disk has
    // room, although the ring has more (OpenVMM #4036: a worker that spins).
    let machine = Machine::new(super::KIND);
    let mut disk = RecordingDisk::new(SECTORS);
    disk.depth = 2;
    disk.allow(0);
    let mut guest = machine.guest(Arc::new(disk.clone()), options(), LOW.start);
    guest.boot();
    for index in 0..4u16 {
        let sector = u64::from(index);
        let header = guest.set_header(sector, RequestType::IN, sector);
        let data = guest.layout.data + 0x400 * sector;
        guest.post_at(2 * index, &[readable(header, 16), writable(data, 513)]);
    }
    guest.kick();
    guest.steps().run();
    assert_eq!(guest.used(), []);
    for done in 1..=4 {
        disk.allow(1);
        guest.serve();
        guest.steps().run();
        assert_eq!(guest.used().len(), 1, "request {done}");
    }
    for sector in 0..4 {
        let data = guest.layout.data + 0x400 * sector;
        assert_eq!(guest.peek(data, 512), pattern(sector, 512));
    }
}
