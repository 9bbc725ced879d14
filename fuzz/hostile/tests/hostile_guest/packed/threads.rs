//! Real threads: a packed ring is rewritten while the device serves it.

use super::super::threads::{ENOUGH, threads};
use super::super::{SECTORS, options};
use pvkit_host::disk::{Disk, MemoryDisk};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_hostile::Noise;
use pvkit_hostile::guest::packed::{PackedRing, packed};
use pvkit_hostile::guest::{HIGH, LOW, Machine, indirect, readable, writable};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::RequestType;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn rewrite_for(disk: Arc<dyn Disk>, rounds: u32, seed: u64) {
    let machine = Machine::new(super::super::KIND);
    let options = BlockOptions {
        in_order: true,
        ..options()
    };
    let mut guest = machine.guest_on(disk.clone(), options, LOW.start, threads());
    let mut other = machine.guest(disk, BlockOptions::default(), HIGH.start);
    other.boot();
    let mut noise = Noise::new(seed);
    let mut ring = PackedRing::boot(&mut guest, 5);
    let mut resets = 0;
    let start = Instant::now();
    for round in 0..rounds {
        if start.elapsed() > ENOUGH {
            break;
        }
        let layout = guest.layout;
        for _ in 0..20 {
            match noise.below(8) {
                0..5 => {
                    // Room or not, and without a look at what comes back.
                    let index = noise.below(4);
                    let kind = RequestType([0, 1, 4, 8][noise.below(4) as usize]);
                    let header = guest.set_header(index, kind, noise.below(SECTORS + 2));
                    let data = layout.data + 0x400 * index;
                    let parts = [readable(header, 16), writable(data, 513)];
                    let id = noise.next_u64() as u16;
                    if noise.below(2) == 0 {
                        let table = layout.table + 0x100 * index;
                        PackedRing::set_table(&mut guest, table, &parts);
                        ring.post(&mut guest, id, &[indirect(table, 32)]);
                    } else {
                        ring.post(&mut guest, id, &parts);
                    }
                    guest.kick();
                }
                5 => {
                    // A descriptor, of which any bit may be wrong.
                    let at = layout.descriptors + 16 * noise.below(5);
                    let flags = noise.next_u64() as u16;
                    let descriptor = packed(layout.header, 16, flags, flags);
                    guest.poke(at, &descriptor);
                    guest.kick();
                }
                6 => PackedRing::ask(&mut guest, noise.next_u64() as u32),
                _ => {
                    let at = layout.descriptors + noise.below(5 * 16);
                    let byte = guest.peek(at, 1)[0] ^ (1 << noise.below(8));
                    guest.poke(at, &[byte]);
                }
            }
        }
        if noise.below(4) == 0 {
            assert!(guest.reset(), "round {round}");
            resets += 1;
            let mut features = guest.offered_features();
            features.set(Features::IN_ORDER, noise.below(2) == 0);
            let size = 1 + noise.below(8) as u16;
            ring = PackedRing::boot_with(&mut guest, size, features);
        }
    }
    assert!(other.works(3), "the other device");
    assert!(guest.reset());
    let before = guest.remember();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(guest.changed(&before, &[]), [0; 0], "it has stopped");
    println!("{resets} resets");

    let mut ring = PackedRing::boot(&mut guest, 7);
    let header = guest.set_header(0, RequestType::IN, 1);
    let data = guest.layout.data;
    guest.poke(data, &[0xee; 513]);
    ring.post(&mut guest, 1, &[readable(header, 16), writable(data, 513)]);
    guest.kick();
    let start = Instant::now();
    while ring.used(&guest).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20), "no answer");
        std::thread::yield_now();
    }
    assert_eq!(guest.peek(data + 512, 1), [0], "the status");
    assert!(guest.reset());
}

#[test]
fn a_packed_ring_that_is_rewritten_while_threads_serve_it() {
    let disk = MemoryDisk::from_bytes(pattern(0, SECTORS as usize * 512));
    rewrite_for(Arc::new(disk.clone()), 1_500, 61);
    rewrite_for(Arc::new(disk), 1_500, 62);
}
