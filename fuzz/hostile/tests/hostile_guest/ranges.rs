//! Discards, zeroes and erasure from a guest that lies about ranges: each is
//! answered with the right error, nothing of it is done, and the queue goes on.

use super::{SECTORS, Scene, options};
use pvkit_host::disk::{Disk, DiskOp, MemoryDisk};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::{Guest, HOLE, LOW, Layout, Machine, readable, writable};
use pvkit_join::disk::{RecordingDisk, pattern};
use pvkit_protocol::virtio::block::{
    BlockConfig, RangeFlags, RangeSegment, RequestType, WRITEBACK, status,
};
use pvkit_protocol::virtio::{Features, mmio};
use std::mem::offset_of;
use std::sync::Arc;
use zerocopy::IntoBytes;

const KINDS: [RequestType; 3] = [
    RequestType::DISCARD,
    RequestType::WRITE_ZEROES,
    RequestType::SECURE_ERASE,
];

/// Sends `data` as a request of this kind; its status, or the fault.
fn send(guest: &mut Guest, kind: RequestType, data: &[u8]) -> Result<u8, Fault> {
    let header = guest.set_header(0, kind, 0x55);
    let Layout {
        status, data: at, ..
    } = guest.layout;
    guest.poke(status, &[0xee]).poke(at, data);
    let ends = [readable(header, 16), writable(status, 1)];
    if data.is_empty() {
        guest.post(&ends);
    } else {
        let data = readable(at, data.len() as u32);
        guest.post(&[ends[0], data, ends[1]]);
    }
    guest.kick();
    if let Some(fault) = guest.serve().fault {
        return Err(fault);
    }
    assert_eq!(guest.used(), [(0, 1)]);
    Ok(guest.peek(status, 1)[0])
}

fn range(sector: u64, count: u32, flags: u32) -> RangeSegment {
    RangeSegment::new(sector, count, RangeFlags::from_bits_retain(flags))
}

fn send_ranges(guest: &mut Guest, kind: RequestType, ranges: &[RangeSegment]) -> u8 {
    send(guest, kind, ranges.as_bytes()).unwrap()
}

#[test]
fn ranges_that_make_no_sense() {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    let good = range(1, 1, 0);
    for kind in KINDS {
        let mut bad: Vec<(Vec<RangeSegment>, u8)> = Vec::new();
        for (sector, count) in [
            (SECTORS, 1),
            (SECTORS - 1, 2),
            (0, SECTORS as u32 + 1),
            (u64::MAX, 1),
            (u64::MAX - 1, 2),
            (u64::MAX / 512, 1),
            (1 << 55, 1),
            (1 << 63, 8),
            (0, u32::MAX),
            (0, 131_073),
        ] {
            let lie = range(sector, count, 0);
            bad.push((vec![lie], status::IOERR));
            // All are checked before any is done.
            bad.push((vec![good, lie], status::IOERR));
        }
        for flags in [2, 4, 0x8000_0000, u32::MAX] {
            bad.push((vec![range(1, 1, flags)], status::UNSUPP));
            bad.push((vec![good, range(1, 1, flags)], status::UNSUPP));
        }
        if kind != RequestType::WRITE_ZEROES {
            bad.push((vec![range(1, 1, 1)], status::UNSUPP));
        }
        bad.push((vec![], status::IOERR));
        bad.push((vec![range(0, 0, 0); 33], status::IOERR));
        bad.push((vec![range(0, 0, 0); 1000], status::IOERR));
        for (ranges, expected) in bad {
            let status = send_ranges(guest, kind, &ranges);
            assert_eq!(status, expected, "{kind:?} {:?}", ranges.last());
        }
        for bytes in [1, 15, 17, 31, 511, 513, 4096 + 8] {
            let status = send(guest, kind, &vec![0; bytes]);
            assert_eq!(status, Ok(status::IOERR), "{kind:?} of {bytes} bytes");
        }
    }
    assert_eq!(scene.disk.ops.lock().unwrap().len(), 1, "only the scene's");
    for sector in 0..SECTORS {
        assert!(scene.guest.works(sector), "nothing was changed");
    }
}

#[test]
fn as_many_ranges_as_there_may_be() {
    // A list of many is done one after the other, at once or as the disk has
    // time, also with others of the same kind in flight.
    for held in [false, true] {
        let mut scene = Scene::new();
        scene.disk.ops.lock().unwrap().clear();
        let guest = &mut scene.guest;
        let ranges: Vec<_> = (0..32).map(|n| range(2 * n, 1, n as u32 & 1)).collect();
        if held {
            scene.disk.allow(0);
        }
        let header = guest.set_header(0, RequestType::WRITE_ZEROES, 0);
        let Layout { status, data, .. } = guest.layout;
        guest.poke(status, &[0xee]).poke(data, ranges.as_bytes());
        guest.post(&[
            readable(header, 16),
            // In two pieces, cut within a range.
            readable(data, 21),
            readable(data + 21, 512 - 21),
            writable(status, 1),
        ]);
        guest.kick();
        guest.serve();
        if held {
            for _ in 0..32 {
                assert_eq!(guest.used(), [], "the list is not done yet");
                // What the guest writes now comes too late.
                guest.poke(data, &[0xff; 512]);
                scene.disk.allow(1);
                guest.serve();
            }
        }
        assert_eq!(guest.used(), [(0, 1)]);
        assert_eq!(guest.peek(status, 1), [status::OK]);
        let ops = scene.disk.ops.lock().unwrap().clone();
        let expected: Vec<_> = (0..32)
            .map(|n| DiskOp::WriteZeroes {
                sectors: 1,
                unmap: n & 1 != 0,
                fua: false,
            })
            .collect();
        assert_eq!(ops, expected);
        let mut content = pattern(0, SECTORS as usize * 512);
        for sector in (0..SECTORS as usize).step_by(2) {
            content[sector * 512..][..512].fill(0);
        }
        assert!(*scene.disk.disk.contents() == content);
        assert_eq!(scene.guest.counters.bytes_zeroed.get(), 32 * 512);
    }
}

#[test]
fn a_reset_while_a_list_is_half_done() {
    let mut scene = Scene::new();
    scene.disk.allow(0);
    let guest = &mut scene.guest;
    let ranges: Vec<_> = (0..4).map(|n| range(n, 1, 0)).collect();
    let header = guest.set_header(0, RequestType::DISCARD, 0);
    let Layout { status, data, .. } = guest.layout;
    guest.poke(data, ranges.as_bytes()).post(&[
        readable(header, 16),
        readable(data, 64),
        writable(status, 1),
    ]);
    guest.kick();
    guest.serve();
    scene.disk.allow(1);
    guest.serve();
    guest.set_status(pvkit_protocol::virtio::DeviceStatus::empty());
    assert!(!guest.status().is_empty(), "the disk has the second");
    // What was begun is done to its end: the lane knows of no way back.
    scene.disk.allow(100);
    assert!(guest.reset_finishes());
    let ops = scene.disk.ops.lock().unwrap().len();
    assert_eq!(ops, 1 + 4);
    guest.boot();
    assert!(guest.works(9));
}

#[test]
fn ranges_outside_memory() {
    for kind in KINDS {
        let mut scene = Scene::new();
        let guest = &mut scene.guest;
        let header = guest.set_header(0, kind, 0);
        let status = guest.layout.status;
        guest.post(&[
            readable(header, 16),
            readable(HOLE, 16),
            writable(status, 1),
        ]);
        guest.kick();
        let fault = guest.serve().fault;
        assert!(matches!(fault, Some(Fault::Address { .. })), "{fault:?}");
        scene.assert_broken_until_reset("a range that is not in RAM");
    }
}

#[test]
fn ranges_on_a_disk_that_is_read_only_or_has_larger_blocks() {
    let machine = Machine::new(super::KIND);
    let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512));
    let good = range(8, 8, 0);
    let read_only: Arc<dyn Disk> = Arc::new(disk.clone().read_only());
    let mut guest = machine.guest(read_only, options(), LOW.start);
    guest.boot();
    for kind in KINDS {
        assert_eq!(send_ranges(&mut guest, kind, &[good]), status::IOERR);
    }
    let large: Arc<dyn Disk> = Arc::new(disk.clone().with_block_bytes(4096));
    let mut guest = machine.guest(large, options(), LOW.start);
    guest.boot();
    for kind in KINDS {
        for (sector, count) in [(1, 8), (8, 7), (0, 1), (63, 1)] {
            let bad = [range(sector, count, 0)];
            assert_eq!(send_ranges(&mut guest, kind, &bad), status::IOERR);
        }
        assert_eq!(
            send_ranges(&mut guest, kind, &[range(64, 0, 0)]),
            status::OK
        );
    }
    assert_eq!(disk.contents()[..], pattern(0, 64 * 512));
    assert_eq!(send_ranges(&mut guest, KINDS[0], &[good]), status::OK);
    assert_eq!(disk.contents()[8 * 512..16 * 512], [0; 8 * 512]);
}

#[test]
fn lifetime_fills_what_there_is_and_no_more() {
    let machine = Machine::new(super::KIND);
    let wear = pvkit_host::disk::Lifetime {
        pre_eol: 1,
        type_a: 2,
        type_b: 3,
    };
    let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512)).with_lifetime(wear);
    let mut guest = machine.guest(Arc::new(disk), options(), LOW.start);
    guest.boot();
    let data = guest.layout.data;
    for len in [0u32, 1, 5, 6, 7, 512] {
        guest.poke(data, &[0x77; 512]);
        let result = guest.request(RequestType::GET_LIFETIME, u64::MAX, len);
        assert_eq!(result, Ok(status::OK));
        let written = len.min(6) as usize;
        assert_eq!(guest.peek(data, written), [1, 0, 2, 0, 3, 0][..written]);
        assert_eq!(guest.peek(data + written as u64, 8), [0x77; 8]);
    }
}

#[test]
fn only_the_write_cache_is_writable_and_only_if_negotiated() {
    let machine = Machine::new(super::KIND);
    let disk = RecordingDisk::new(SECTORS);
    let options = BlockOptions {
        queues: 2,
        ..options()
    };
    let mut guest = machine.guest(Arc::new(disk), options, LOW.start);
    let at = (mmio::CONFIG + offset_of!(BlockConfig, writeback)) as u64;
    let all = guest.read_wide(mmio::CONFIG as u64, size_of::<BlockConfig>());
    assert_eq!(guest.read_wide(at, 1), [WRITEBACK]);
    // Not before it is negotiated, and not without.
    guest.write_wide(at, &[0]);
    assert_eq!(guest.read_wide(at, 1), [1]);
    guest.boot_with(Features::VERSION_1);
    guest.write_wide(at, &[0]);
    assert_eq!(guest.read_wide(at, 1), [1]);
    assert!(guest.reset());
    guest.boot();
    for (value, reads) in [(0, 0), (1, 1), (0, 0), (0xff, 1)] {
        guest.write_wide(at, &[value]);
        assert_eq!(guest.read_wide(at, 1), [reads]);
    }
    // Anything else, of any width, changes nothing.
    for offset in 0..0x80 {
        for width in [1, 2, 4, 8] {
            if (offset, width) != (offset_of!(BlockConfig, writeback) as u64, 1) {
                guest.write_wide(mmio::CONFIG as u64 + offset, &vec![0; width]);
            }
        }
    }
    let now = guest.read_wide(mmio::CONFIG as u64, size_of::<BlockConfig>());
    assert_eq!(now, all);
    guest.write_wide(at, &[0]);
    assert!(guest.reset());
    assert_eq!(guest.read_wide(at, 1), [1], "as at power-on");
}
