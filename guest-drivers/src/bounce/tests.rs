//! The space by hand, with a host that looks at every byte of the piece.

use super::*;
use crate::storage::Storage;
use alloc::vec;
use alloc::vec::Vec;

const PAGE: usize = PAGE_BYTES;
/// Where the device sees the piece.
const ADDR: u64 = 0xc000_0000;

/// What the host does.
struct Host {
    memory: NonNull<u8>,
}

impl Host {
    /// A piece in which an earlier use left its traces.
    fn new(pages: usize) -> (Self, BounceSpace) {
        let layout = Layout::from_size_align(pages * PAGE, 1 << 16).unwrap();
        // SAFETY: the size is not 0.
        let memory = NonNull::new(unsafe { alloc::alloc::alloc(layout) }).unwrap();
        // SAFETY: as long as the layout says.
        unsafe { memory.write_bytes(0x5e, layout.size()) };
        // SAFETY: leaked, and used by this test alone.
        let space = unsafe { BounceSpace::heap(memory, ADDR, pages * PAGE) }.unwrap();
        (Self { memory }, space)
    }

    fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let offset = (addr - ADDR) as usize;
        // SAFETY: tests stay inside the piece.
        let byte = |at| unsafe { self.memory.add(offset + at).read_volatile() };
        (0..len).map(byte).collect()
    }

    fn write(&self, addr: u64, data: &[u8]) {
        let offset = (addr - ADDR) as usize;
        for (at, byte) in data.iter().enumerate() {
            // SAFETY: tests stay inside the piece.
            unsafe { self.memory.add(offset + at).write_volatile(*byte) };
        }
    }
}

type Mapped = (NonNull<[u8]>, Direction, Vec<Segment<u64>>);

fn try_map(
    space: &BounceSpace,
    buffer: &mut [u8],
    direction: Direction,
    most: usize,
) -> Result<Mapped, DmaError> {
    let buffer = NonNull::from(buffer);
    let mut room = vec![Segment::default(); most];
    let mut segments = Segments::new(&mut room);
    // SAFETY: tests leave the buffer alone until it is unmapped.
    unsafe { space.map(buffer, direction, &mut segments)? };
    Ok((buffer, direction, segments.as_slice().to_vec()))
}

fn map(space: &BounceSpace, buffer: &mut [u8], direction: Direction) -> Mapped {
    try_map(space, buffer, direction, 16).unwrap()
}

fn unmap(space: &BounceSpace, mapped: &Mapped, written: usize) -> Result<(), StillShared> {
    let (buffer, direction, segments) = mapped;
    // SAFETY: what `map` returned; where it is not, it has to be refused.
    unsafe { space.unmap(*buffer, *direction, segments, written) }
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8 | 1).collect()
}

/// Pages of a buffer of so many bytes.
fn whole(len: usize) -> usize {
    len.next_multiple_of(PAGE)
}

const SIZES: [usize; 14] = [
    1, 2, 7, 8, 9, 20, 511, 512, 4095, 4096, 4097, 5003, 8192, 12301,
];

#[test]
fn what_the_device_reads_is_the_buffer_and_zeros() {
    let (host, space) = Host::new(8);
    // At any alignment for the driver.
    for (len, shift) in SIZES.into_iter().zip((0..9).cycle()) {
        let mut buffer = vec![0xee; shift];
        buffer.extend(bytes(len));
        let mapped = map(&space, &mut buffer[shift..], Direction::ToDevice);
        let [segment] = mapped.2[..] else {
            panic!("{len}: {:?}", mapped.2);
        };
        assert_eq!(segment.len as usize, len);
        assert_eq!(space.pool().in_use(), whole(len));
        let mut expected = bytes(len);
        expected.resize(whole(len), 0);
        assert_eq!(host.read(segment.addr, whole(len)), expected, "{len}");
        // What the device writes meanwhile goes nowhere.
        host.write(segment.addr, &vec![0xdd; whole(len)]);
        unmap(&space, &mapped, len).unwrap();
        assert_eq!(buffer[shift..], bytes(len)[..]);
        assert_eq!(space.pool().in_use(), 0);
    }
}

#[test]
fn what_the_device_wrote_comes_back_as_far_as_it_counts() {
    let (host, space) = Host::new(8);
    for (len, shift) in SIZES.into_iter().zip((0..9).cycle()) {
        for written in [0, 1, len / 2, len - 1, len, len + 1, usize::MAX] {
            let mut buffer = vec![0xee; shift + len + 32];
            let own = &mut buffer[shift..shift + len];
            let mapped = map(&space, own, Direction::FromDevice);
            let addr = mapped.2[0].addr;
            let clean = vec![0; whole(len)];
            assert_eq!(host.read(addr, whole(len)), clean, "no trace of others");
            host.write(addr, &vec![0xdd; whole(len)]);
            unmap(&space, &mapped, written).unwrap();
            let count = written.min(len);
            let mut expected = vec![0xee; shift];
            expected.extend(vec![0xdd; count]);
            expected.resize(shift + len + 32, 0xee);
            assert_eq!(buffer, expected, "{written} of {len}");
        }
    }
    // A device that says that it wrote, and did not.
    let mut buffer = vec![0xee; 600];
    let mapped = map(&space, &mut buffer, Direction::FromDevice);
    unmap(&space, &mapped, 600).unwrap();
    assert_eq!(buffer, vec![0; 600]);
}

#[test]
fn regions_are_zeroed_aligned_and_apart() {
    let (host, space) = Host::new(64);
    let alloc = |size, align| space.alloc(Layout::from_size_align(size, align).unwrap());
    let mut regions = Vec::new();
    for (size, align) in [(1, 1), (100, 64), (5000, 16), (4096, 4096), (10, 0x4000)] {
        let region = alloc(size, align).unwrap();
        assert_eq!(host.read(region.addr(), size), vec![0; size]);
        assert!(region.addr().is_multiple_of(align as u64));
        region.write_u8(0, size as u8);
        regions.push(region);
    }
    for region in &regions {
        assert_eq!(host.read(region.addr(), 1), [region.bytes() as u8]);
        let (_, ptr, ..) = alloc(1, 1).unwrap().into_parts();
        assert!(ptr.addr().get().is_multiple_of(PAGE));
    }
    let before = space.pool().in_use();
    assert_eq!(before, (6 + regions.len()) * PAGE);
    for bytes in [0, 65 * PAGE, isize::MAX as usize - 64] {
        let error = DmaError::OutOfMemory { bytes, align: 64 };
        assert_eq!(alloc(bytes, 64).unwrap_err(), error);
    }
    assert!(alloc(1, 1 << 40).is_err(), "no page is aligned so far");
    assert_eq!(space.pool().in_use(), before);
    let leaked = regions.pop().unwrap();
    leaked.leak();
    assert_eq!(space.pool().leaked(), 10);
    drop(regions);
    assert_eq!(space.pool().in_use(), before - 6 * PAGE + PAGE);
}

#[test]
fn without_room_everything_is_as_it_was() {
    let (_host, space) = Host::new(4);
    let mut small: Vec<_> = (0..4).map(|_| bytes(100)).collect();
    let mut mapped: Vec<_> = small
        .iter_mut()
        .map(|buffer| map(&space, buffer, Direction::ToDevice))
        .collect();
    let mut other = bytes(1);
    let full = |len| {
        Err(DmaError::OutOfMemory {
            bytes: len,
            align: 1,
        })
    };
    let try_read = |buffer: &mut [u8], most| {
        try_map(&space, buffer, Direction::FromDevice, most).map(|mapped| mapped.2.len())
    };
    assert_eq!(try_read(&mut other, 16), full(1));
    unmap(&space, &mapped.remove(1), 0).unwrap();
    unmap(&space, &mapped.remove(2), 0).unwrap();
    // Two pages are free, apart from each other.
    let mut large = bytes(3 * PAGE);
    assert_eq!(try_read(&mut large, 16), full(3 * PAGE));
    assert_eq!(space.pool().in_use(), 2 * PAGE);
    // Room for the pages, none for the segments.
    let two = &mut large[..2 * PAGE];
    assert_eq!(try_read(two, 1), full(2 * PAGE));
    assert_eq!(space.pool().in_use(), 2 * PAGE);
    assert_eq!(try_read(two, 2), Ok(2));
    assert_eq!(space.pool().in_use(), 4 * PAGE);
    // Segments that never fit are another error.
    let (_host, space) = Host::new(4);
    let error = try_map(&space, &mut other, Direction::ToDevice, 0).unwrap_err();
    assert_eq!(error, DmaError::TooManySegments { max: 0 });
    assert_eq!((space.pool().in_use(), space.pool().refused()), (0, 0));
    assert_eq!(other, bytes(1));
    // Nothing to map takes nothing.
    let nothing = map(&space, &mut [], Direction::ToDevice);
    assert_eq!((nothing.2.len(), space.pool().in_use()), (0, 0));
    unmap(&space, &nothing, 0).unwrap();
}

#[test]
fn a_fragmented_piece_gives_several_segments() {
    let (host, space) = Host::new(200);
    let mut small: Vec<_> = (0..200).map(|_| [0]).collect();
    let mut mapped: Vec<_> = small
        .iter_mut()
        .map(|buffer| map(&space, buffer, Direction::ToDevice))
        .collect();
    // Runs of 3, 1 and 2 pages, one of them over the border of two words.
    for page in [70, 62, 63, 64, 130, 131] {
        let at = mapped
            .iter()
            .position(|mapped| mapped.2[0].addr == ADDR + (page * PAGE) as u64);
        unmap(&space, &mapped.swap_remove(at.unwrap()), 0).unwrap();
    }
    let len = 5 * PAGE + 77;
    let mut buffer = bytes(len);
    let written = map(&space, &mut buffer, Direction::ToDevice);
    let places: Vec<_> = written.2.iter().map(|s| (s.addr - ADDR, s.len)).collect();
    let at = |page: u64, len: usize| (page * PAGE as u64, len as u32);
    let p = PAGE;
    let expected = [at(62, 3 * p), at(70, p), at(130, p), at(131, 77)];
    assert_eq!(places, expected);
    let seen: Vec<u8> = written
        .2
        .iter()
        .flat_map(|segment| host.read(segment.addr, segment.len as usize))
        .collect();
    assert_eq!(seen, bytes(len));
    unmap(&space, &written, 0).unwrap();
    // And back, cut in the second segment.
    buffer.fill(0xee);
    let read = map(&space, &mut buffer, Direction::FromDevice);
    let mut data = &bytes(len)[..];
    for segment in &read.2 {
        let (now, later) = data.split_at(segment.len as usize);
        host.write(segment.addr, now);
        data = later;
    }
    unmap(&space, &read, 3 * PAGE + 5).unwrap();
    let (front, rest) = buffer.split_at(3 * PAGE + 5);
    assert_eq!(front, &bytes(len)[..front.len()]);
    assert!(rest.iter().all(|byte| *byte == 0xee));
    assert_eq!(space.pool().in_use(), 194 * PAGE);
}

#[test]
fn what_was_not_mapped_so_is_refused() {
    let (host, space) = Host::new(16);
    let mut buffer = vec![0xee; 2 * PAGE];
    let mut other = vec![0xee; 2 * PAGE];
    let own = map(&space, &mut buffer, Direction::FromDevice);
    let others = map(&space, &mut other, Direction::FromDevice);
    let region = space
        .alloc(Layout::from_size_align(PAGE, 8).unwrap())
        .unwrap();
    let in_use = space.pool().in_use();
    host.write(ADDR, &[0xdd; 16 * PAGE]);
    let segment = own.2[0];
    let at = |addr, len| Segment { addr, len };
    let mut bad = vec![
        (own.0, Direction::ToDevice, own.2.clone()),
        (own.0, own.1, others.2.clone()),
        (others.0, own.1, own.2.clone()),
        (own.0, own.1, vec![]),
        (own.0, own.1, vec![segment, segment]),
        (own.0, own.1, vec![region_segment(&region); 2]),
    ];
    for segment in [
        at(segment.addr + 1, segment.len),
        at(segment.addr + PAGE as u64, segment.len),
        at(segment.addr, segment.len - 1),
        at(segment.addr, segment.len + 1),
        at(segment.addr, u32::MAX),
        at(ADDR - PAGE as u64, segment.len),
        at(ADDR + (16 * PAGE) as u64, segment.len),
        at(0, segment.len),
        at(u64::MAX, segment.len),
        at(u64::MAX - PAGE as u64 + 1, segment.len),
    ] {
        bad.push((own.0, own.1, vec![segment]));
    }
    for (count, bad) in (1..).zip(&bad) {
        assert_eq!(unmap(&space, bad, usize::MAX), Err(StillShared), "{bad:?}");
        assert_eq!(space.pool().in_use(), in_use);
        assert_eq!(space.pool().refused(), count);
        assert_eq!(space.pool().leaked(), 2 * PAGE * count);
    }
    // Half of it, as a buffer of its own.
    let half = NonNull::slice_from_raw_parts(own.0.cast(), PAGE);
    assert!(unmap(&space, &(half, own.1, own.2.clone()), 0).is_err());
    unmap(&space, &own, 1).unwrap();
    assert!(unmap(&space, &own, usize::MAX).is_err(), "twice");
    assert_eq!((buffer[0], buffer[1]), (0xdd, 0xee));
    assert!(other.iter().all(|byte| *byte == 0xee));
    // A region that is not one.
    let refused = space.pool().refused();
    let layout = Layout::from_size_align(2 * PAGE, 8).unwrap();
    // SAFETY: none; it has to be refused.
    unsafe { space.dealloc(others.0.cast(), others.2[0].addr, layout) };
    assert_eq!(space.pool().refused(), refused + 1);
    unmap(&space, &others, 0).unwrap();
    drop(region);
    assert_eq!(space.pool().in_use(), 0);
}

fn region_segment(region: &DmaRegion<BounceSpace>) -> Segment<u64> {
    Segment {
        addr: region.addr(),
        len: region.bytes() as u32,
    }
}

#[test]
fn a_pool_needs_pages_and_storage() {
    let memory = NonNull::new(core::ptr::without_provenance_mut(0x10000)).unwrap();
    let new = |offset: usize, addr, bytes, map: usize, pages: usize| {
        let storage = BounceStorage {
            map: Storage::heap(map, || AtomicUsize::new(usize::MAX / 3)),
            pages: Storage::heap(pages, BouncePage::new),
        };
        let memory = memory.map_addr(|addr| addr.checked_add(offset).unwrap());
        // SAFETY: nothing is allocated from it.
        unsafe { BouncePool::new(memory, addr, bytes, storage) }
    };
    let error = |result: Result<BouncePool, BounceError>| result.map(|_| ()).unwrap_err();
    let misaligned = |addr| BounceError::Misaligned { addr };
    assert_eq!(error(new(8, 0, PAGE, 1, 1)), misaligned(0x10008));
    assert_eq!(error(new(0, 512, PAGE, 1, 1)), misaligned(512));
    let last = u64::MAX - PAGE as u64 + 1;
    for (addr, bytes) in [(0, 0), (0, PAGE - 1), (last, 2 * PAGE), (0, usize::MAX)] {
        let length = BounceError::Length { bytes };
        assert_eq!(error(new(0, addr, bytes, 100, 100)), length);
    }
    let lacks = |what, have, need| BounceError::Storage { what, have, need };
    assert_eq!(error(new(0, 0, 65 * PAGE, 1, 65)), lacks("words", 1, 2));
    assert_eq!(error(new(0, 0, 65 * PAGE, 2, 64)), lacks("pages", 64, 65));
    for pages in [1, 63, 64, 65, 128, 129] {
        let pool = new(0, last - (pages * PAGE) as u64, pages * PAGE + 5, 9, 200).unwrap();
        assert_eq!((pool.in_use(), pool.bytes()), (0, pages * PAGE));
        assert_eq!(pool.claim(pages + 1, 1), None);
        assert_eq!(pool.claim(pages, 1), Some(0));
        assert_eq!(pool.claim(1, 1), None, "storage has room for more");
    }
}

#[test]
fn two_threads_never_share_a_page() {
    extern crate std;
    let rounds = if cfg!(miri) { 20 } else { 500 };
    let (host, space) = Host::new(70);
    let memory = host.memory.expose_provenance();
    std::thread::scope(|scope| {
        for seed in [1u8, 2] {
            let space = space.clone();
            scope.spawn(move || {
                let memory = NonNull::with_exposed_provenance(memory);
                let host = Host { memory };
                let mut out_of_room = 0;
                for round in 0..rounds {
                    // Up to 30 pages each: sometimes there is no room.
                    let sizes = [round * 37 % 9000 + 1, round * 101 % 50_000 + 1];
                    let mut buffers = sizes.map(|len| vec![seed; len]);
                    let mut held = Vec::new();
                    for buffer in &mut buffers {
                        match try_map(&space, buffer, Direction::FromDevice, 64) {
                            Ok(mapped) => held.push(mapped),
                            Err(_) => out_of_room += 1,
                        }
                    }
                    for mapped in &held {
                        for segment in &mapped.2 {
                            host.write(segment.addr, &vec![seed + 8; segment.len as usize]);
                        }
                    }
                    for mapped in &held {
                        unmap(&space, mapped, usize::MAX).unwrap();
                        // SAFETY: the buffer is back.
                        let data = unsafe { mapped.0.as_ref() };
                        assert!(data.iter().all(|byte| *byte == seed + 8));
                    }
                }
                assert!(out_of_room < rounds, "most of it works");
            });
        }
    });
    assert_eq!((space.pool().in_use(), space.pool().refused()), (0, 0));
}
