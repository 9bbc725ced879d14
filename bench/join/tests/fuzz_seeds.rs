//! The scripts of the fuzz target `block_join` on stable Rust: its seeds, and
//! pseudo-random ones.

use pvkit_join::fuzz::block_join;
use pvkit_join::hostile::Noise;
use std::path::Path;

#[test]
fn every_seed_of_block_join() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/block_join");
    let mut count = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        let path = seed.unwrap().path();
        println!("{}", path.display());
        block_join(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count >= 45, "{count} seeds");
}

#[test]
fn random_scripts_of_block_join() {
    for seed in 0..4_000 {
        let mut noise = Noise::new(seed);
        let len = 16 + noise.below(600);
        let mut script: Vec<u8> = (0..len).map(|_| noise.next_u64() as u8).collect();
        // Half of them as an honest pair has it: nothing that meddles.
        if seed % 2 == 0 {
            script = honest(&mut noise);
        }
        println!("seed {seed}");
        block_join(&script);
    }
}

/// A script without meddling.
fn honest(noise: &mut Noise) -> Vec<u8> {
    let mut script = vec![noise.next_u64() as u8, noise.next_u64() as u8];
    for _ in 0..150 {
        // Submit, publish, complete, arm, claim, refresh, recover, poll, run,
        // arm the device, allow.
        let opcode = [0, 0, 0, 3, 5, 5, 7, 8, 9, 10, 11, 11, 13, 13, 14, 15];
        let opcode = opcode[noise.below(opcode.len() as u64) as usize];
        let operands = match opcode {
            0 => 3,
            5 | 11 | 15 => 1,
            _ => 0,
        };
        script.push(opcode);
        script.extend((0..operands).map(|_| noise.next_u64() as u8));
    }
    script
}
