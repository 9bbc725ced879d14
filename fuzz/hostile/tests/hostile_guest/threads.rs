//! Real threads: the device works while the guest changes its mind.

use super::{SECTORS, options};
use pvkit_guest::block::{BlockOp, BlockQueue};
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::block::{Block, BlockOptions as DriverOptions};
use pvkit_host::disk::{Disk, FileDisk, FileOptions, MemoryDisk, OpenError};
use pvkit_host::executor::{ThreadOptions, Threads};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_hostile::Noise;
use pvkit_hostile::guest::{LOW, Machine, readable, writable};
use pvkit_join::Join;
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::block::RequestType;
use pvkit_protocol::virtio::mmio;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// On a busy machine, fewer rounds will do.
pub(super) const ENOUGH: Duration = Duration::from_secs(2);

pub(super) fn threads() -> Box<Threads> {
    let options = ThreadOptions {
        spin: Duration::from_micros(20),
        budget: 16,
        ..ThreadOptions::default()
    };
    Box::new(Threads::new("hostile", options))
}

/// A disk in a file, so that the kernel writes to guest memory as well. `None`
/// if the file system does not do that.
fn file_disk(options: FileOptions) -> Option<(tempfile::NamedTempFile, FileDisk)> {
    // Beside the test program: the system's folder may lie in memory, and then
    // knows no direct I/O.
    let here = std::env::current_exe().unwrap();
    let file = tempfile::NamedTempFile::new_in(here.parent().unwrap()).unwrap();
    std::fs::write(file.path(), pattern(0, SECTORS as usize * 512)).unwrap();
    match FileDisk::open(file.path(), options) {
        Ok(disk) => Some((file, disk)),
        Err(OpenError::NoDirect { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// A guest that rewrites its rings, headers and tables while the device looks.
fn rewrite_for(disk: Arc<dyn Disk>, rounds: u32, seed: u64) {
    let machine = Machine::new(super::KIND);
    let mut guest = machine.guest_on(disk, options(), LOW.start, threads());
    let mut other = machine.guest(
        Arc::new(MemoryDisk::from_bytes(pattern(0, 64 * 512))),
        BlockOptions::default(),
        pvkit_hostile::guest::HIGH.start,
    );
    other.boot();
    let mut noise = Noise::new(seed);
    guest.boot();
    let mut resets = 0;
    let start = Instant::now();
    for round in 0..rounds {
        if start.elapsed() > ENOUGH {
            break;
        }
        let layout = guest.layout;
        for _ in 0..20 {
            match noise.below(8) {
                0..4 => {
                    let index = noise.below(4) as u16;
                    let sector = noise.below(SECTORS + 2);
                    let kind = RequestType([0, 1, 4, 8, 10, 11, 13, 14][noise.below(8) as usize]);
                    let header = guest.set_header(u64::from(index), kind, sector);
                    let data = layout.data + 0x400 * u64::from(index);
                    let parts = [readable(header, 16), writable(data, 513)];
                    guest.post_at(2 * index, &parts);
                    guest.kick();
                }
                4 => {
                    // A word anywhere in rings, table, headers.
                    let at = LOW.start + noise.below(0x7000 / 4) * 4;
                    let word = noise.next_u64() as u32;
                    guest.poke(at, &word.to_le_bytes());
                }
                5 => {
                    // A bit of a descriptor.
                    let at = layout.descriptors + noise.below(128);
                    let byte = guest.peek(at, 1)[0] ^ (1 << noise.below(8));
                    guest.poke(at, &[byte]);
                }
                6 => {
                    let step = [0, 1, 1, 1, 2, 0xffff][noise.below(6) as usize];
                    guest.set_index(guest.offered.wrapping_add(step));
                    guest.kick();
                }
                _ => {
                    let register = noise.below(0x40) as usize * 4;
                    if register != mmio::STATUS {
                        guest.set_register(register, noise.next_u64() as u32);
                    }
                }
            }
        }
        if noise.below(4) == 0 {
            assert!(guest.reset(), "round {round}");
            resets += 1;
            guest.boot();
        }
    }
    assert!(other.works(3), "the other device");
    assert!(guest.reset());
    // No byte of memory changes once the status reads 0.
    let before = guest.remember();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(guest.changed(&before, &[]), [0; 0]);
    println!("{resets} resets");

    // And it works again.
    guest.boot();
    let header = guest.set_header(0, RequestType::IN, 1);
    let data = guest.layout.data;
    guest.poke(data, &[0xee; 513]);
    guest.post(&[readable(header, 16), writable(data, 513)]);
    guest.kick();
    let start = Instant::now();
    while guest.peek(data + 512, 1) == [0xee] {
        assert!(start.elapsed() < Duration::from_secs(20), "no answer");
        std::thread::yield_now();
    }
    assert_eq!(guest.peek(data + 512, 1), [0], "the status");
    assert!(guest.reset());
}

#[test]
fn a_guest_that_rewrites_everything_while_threads_serve_it() {
    let disk = MemoryDisk::from_bytes(pattern(0, SECTORS as usize * 512));
    rewrite_for(Arc::new(disk), 1_500, 5);
    for (no_io_uring, direct) in [(false, false), (false, true), (true, false)] {
        let options = FileOptions {
            no_io_uring,
            direct,
            ..FileOptions::default()
        };
        if let Some((_file, disk)) = file_disk(options) {
            rewrite_for(Arc::new(disk), 500, 6);
        }
    }
}

/// Driver and device on threads, with a third that flips bits of the memory
/// between them.
fn flip_between(disk: Arc<dyn Disk>, ring: (bool, bool), rounds: u32, seed: u64) {
    let (packed, in_order) = ring;
    let options = BlockOptions {
        queue_size: 16,
        packed,
        in_order,
        ..BlockOptions::default()
    };
    let join = Join::new(super::KIND, disk, options, threads(), 1 << 20);
    let (mut block, mut queue) =
        Block::open::<Vec<u8>, _>(join.transport(), join.space(), DriverOptions::default())
            .unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let pause = Arc::new(AtomicBool::new(false));
    let (stopped, paused) = (stop.clone(), pause.clone());
    // Rings, slots and bounce buffers are what was handed out first.
    let (ram, hot) = (join.arena.snapshot(), join.arena.in_use() as u64);
    let flipper = std::thread::spawn(move || {
        let mut noise = Noise::new(seed);
        let mut flips = 0u64;
        while !stopped.load(Ordering::Relaxed) {
            if paused.load(Ordering::Relaxed) {
                std::thread::yield_now();
                continue;
            }
            let at = pvkit_join::arena::BASE + noise.below(hot + 0x1000);
            let mut byte = [0];
            ram.read(at, &mut byte).unwrap();
            byte[0] ^= 1 << noise.below(8);
            ram.write(at, &byte).unwrap();
            flips += 1;
            for _ in 0..noise.below(200) {
                std::hint::spin_loop();
            }
        }
        flips
    });

    let mut noise = Noise::new(seed + 1);
    let mut outstanding = BTreeSet::new();
    let (mut next_tag, mut faults, mut done_right) = (0u64, 0, 0);
    let start = Instant::now();
    for round in 0..rounds {
        if start.elapsed() > ENOUGH {
            break;
        }
        for _ in 0..noise.below(12) {
            let sector = noise.below(SECTORS);
            let op = match noise.below(4) {
                0 => BlockOp::Write { sector },
                1 => BlockOp::Flush,
                _ => BlockOp::Read { sector },
            };
            let buffer = (op != BlockOp::Flush).then(|| vec![0x33; 512]);
            if queue.submit(op, buffer, next_tag).is_ok() {
                outstanding.insert(next_tag);
                next_tag += 1;
            }
        }
        queue.publish();
        for _ in 0..50 {
            match queue.complete() {
                Ok(Some(done)) => {
                    assert!(outstanding.remove(&done.tag), "back twice: {}", done.tag);
                    let buffer = done.buffer.map(|buffer| buffer.len());
                    assert_eq!(buffer, (done.op != BlockOp::Flush).then_some(512));
                    done_right += usize::from(done.result.is_ok());
                }
                Ok(None) => std::thread::yield_now(),
                Err(fault) => {
                    faults += 1;
                    assert_ne!(fault, Fault::Timeout);
                    assert!(queue.complete().unwrap().is_none(), "reported once");
                    break;
                }
            }
        }
        queue.arm();
        // A flipped doorbell index or length can stop everything: the caller's
        // clock runs out.
        if round % 16 == 15 {
            let back = |done: pvkit_guest::block::Done<Vec<u8>>| {
                assert!(outstanding.remove(&done.tag), "back twice: {}", done.tag);
                assert_eq!(done.buffer.is_some(), done.op != BlockOp::Flush);
            };
            recover(&mut block, &mut queue, &pause, back);
            assert!(outstanding.is_empty(), "all came back: {outstanding:?}");
        }
    }
    stop.store(true, Ordering::Relaxed);
    let flips = flipper.join().unwrap();
    println!("{next_tag} requests, {done_right} done, {faults} faults, {flips} flips");

    let mut back = outstanding.len();
    block
        .recover(&mut queue, &mut |_| back -= 1)
        .expect("an honest device");
    assert_eq!(back, 0);
    queue
        .submit(BlockOp::Read { sector: 9 }, Some(vec![0; 512]), 1)
        .unwrap();
    queue.publish();
    let start = Instant::now();
    let done = loop {
        if let Some(done) = queue.complete().unwrap() {
            break done;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no answer");
        std::thread::yield_now();
    };
    done.result.unwrap();
    block.close(queue, &mut |_| {}).unwrap();
    assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
}

/// Recovers; the rings may be flipped again before the device has started.
fn recover<
    S: pvkit_guest::dma::DmaSpace<Addr = u64>,
    T: pvkit_guest::virtio::transport::Transport,
>(
    block: &mut Block<T>,
    queue: &mut pvkit_guest::virtio::block::QueueOf<Vec<u8>, S, T>,
    pause: &AtomicBool,
    mut back: impl FnMut(pvkit_guest::block::Done<Vec<u8>>),
) {
    if block.recover(queue, &mut back).is_err() {
        pause.store(true, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
        block
            .recover(queue, &mut back)
            .expect("an honest device and memory that holds still");
        pause.store(false, Ordering::Relaxed);
    }
}

#[test]
fn driver_and_device_on_threads_with_bits_flipped_between_them() {
    let disk = MemoryDisk::from_bytes(pattern(0, SECTORS as usize * 512));
    let (_file, file) = file_disk(FileOptions::default()).unwrap();
    for (seed, ring) in (0..).zip([(false, false), (true, false), (false, true), (true, true)]) {
        flip_between(Arc::new(disk.clone()), ring, 500, 2 * seed + 7);
        flip_between(Arc::new(file.clone()), ring, 250, 2 * seed + 8);
    }
}
