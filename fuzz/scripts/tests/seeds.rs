//! The scripts of all fuzz targets on stable Rust: their seeds, and
//! pseudo-random ones.

use pvkit_hostile::Noise;
use pvkit_scripts::{block_join, e1000, frame_offload, net_join, pci_config};
use std::path::Path;

/// Plays all seeds of a target, of which there are at least so many.
fn play_seeds(target: &str, play: fn(&[u8]), least: usize) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds");
    let mut count = 0;
    for seed in std::fs::read_dir(seeds.join(target)).unwrap() {
        let path = seed.unwrap().path();
        println!("{}", path.display());
        play(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count >= least, "{count} seeds");
}

/// Plays so many scripts that `make` makes.
fn play_noise(play: fn(&[u8]), count: u64, make: impl Fn(u64, &mut Noise) -> Vec<u8>) {
    for seed in 0..count {
        let script = make(seed, &mut Noise::new(seed));
        println!("seed {seed}");
        play(&script);
    }
}

fn noise(noise: &mut Noise, least: u64, more: u64) -> Vec<u8> {
    let len = least + noise.below(more);
    (0..len).map(|_| noise.next_u64() as u8).collect()
}

/// Actions without meddling: some of `opcodes`, which `operands` says how many
/// bytes follow of, behind a set-up of `setup` bytes.
fn honest(
    noise: &mut Noise,
    setup: usize,
    opcodes: &[u8],
    operands: impl Fn(u8, &mut Noise) -> Vec<u8>,
) -> Vec<u8> {
    let mut script: Vec<u8> = (0..setup).map(|_| noise.next_u64() as u8).collect();
    for _ in 0..150 {
        let opcode = opcodes[noise.below(opcodes.len() as u64) as usize];
        script.push(opcode);
        script.extend(operands(opcode, noise));
    }
    script
}

fn some(noise: &mut Noise, count: usize) -> Vec<u8> {
    (0..count).map(|_| noise.next_u64() as u8).collect()
}

/// A frame about which nobody lies.
fn frame(noise: &mut Noise) -> Vec<u8> {
    let mut bytes = some(noise, 3);
    bytes[0] &= !32;
    if bytes[0] & 9 == 8 {
        // The length of its segments.
        bytes.extend(some(noise, 2));
    }
    bytes
}

#[test]
fn every_seed_of_block_join() {
    play_seeds("block_join", block_join, 45);
}

#[test]
fn every_seed_of_net_join() {
    play_seeds("net_join", net_join, 20);
}

#[test]
fn every_seed_of_e1000() {
    play_seeds("e1000", e1000, 12);
}

#[test]
fn every_seed_of_pci_config() {
    play_seeds("pci_config", pci_config, 12);
}

#[test]
fn every_seed_of_frame_offload() {
    play_seeds("frame_offload", frame_offload, 12);
}

#[test]
fn random_scripts_of_block_join() {
    // Submit, publish, complete, arm, claim, refresh, recover, poll, run, arm
    // the device, allow.
    let opcodes = [0, 0, 0, 3, 5, 5, 7, 8, 9, 10, 11, 11, 13, 13, 14, 15];
    play_noise(block_join, 4_000, |seed, source| {
        // Half of them as an honest pair has it.
        if seed % 2 != 0 {
            return noise(source, 16, 600);
        }
        honest(source, 2, &opcodes, |opcode, source| match opcode {
            0 => some(source, 3),
            5 | 11 | 15 => some(source, 1),
            _ => Vec::new(),
        })
    });
}

#[test]
fn random_scripts_of_net_join() {
    // Everything but meddling; what ends all doubts less often.
    let opcodes = [
        0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 5, 6, 7, 7, 9, 11, 12, 13, 14, 15, 16, 21, 22, 22, 22, 24, 25,
    ];
    let rare = [17, 18, 19, 20];
    play_noise(net_join, 3_000, |seed, source| {
        if seed % 2 != 0 {
            return noise(source, 16, 900);
        }
        let opcodes: Vec<u8> = match seed % 4 {
            0 => opcodes.to_vec(),
            _ => [&opcodes[..], &rare].concat(),
        };
        honest(source, 3, &opcodes, |opcode, source| match opcode {
            0 => [some(source, 1), frame(source)].concat(),
            2 => frame(source),
            6 | 7 | 15 => some(source, 2),
            4 | 5 | 9 | 11 | 12 | 18 | 21 => some(source, 1),
            25 => some(source, 3),
            _ => Vec::new(),
        })
    });
}

#[test]
fn random_scripts_of_e1000() {
    // Everything that a driver and the other end do.
    let opcodes = [
        0, 0, 0, 2, 2, 4, 4, 6, 7, 8, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 17, 19,
    ];
    play_noise(e1000, 3_000, |seed, source| {
        if seed % 2 != 0 {
            return noise(source, 16, 900);
        }
        let mut script = honest(source, 2, &opcodes, |opcode, source| match opcode {
            0 | 2 => frame(source),
            7 | 8 | 9 | 10 | 16 => some(source, 1),
            _ => Vec::new(),
        });
        script[0] &= !1;
        script
    });
}

#[test]
fn random_scripts_of_pci_config() {
    play_noise(pci_config, 3_000, |_, source| noise(source, 2, 800));
}

#[test]
fn random_scripts_of_frame_offload() {
    play_noise(frame_offload, 20_000, |_, source| noise(source, 3, 400));
}
