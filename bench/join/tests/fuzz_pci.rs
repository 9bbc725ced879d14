//! The scripts of the fuzz target `pci_config` on stable Rust: its seeds, and
//! pseudo-random ones.

use pvkit_join::fuzz::pci_config;
use pvkit_join::hostile::Noise;
use std::path::Path;

#[test]
fn every_seed_of_pci_config() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/pci_config");
    let mut count = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        let path = seed.unwrap().path();
        println!("{}", path.display());
        pci_config(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count >= 12, "{count} seeds");
}

#[test]
fn random_scripts_of_pci_config() {
    for seed in 0..3_000 {
        let mut noise = Noise::new(seed);
        let len = 2 + noise.below(800);
        let script: Vec<u8> = (0..len).map(|_| noise.next_u64() as u8).collect();
        println!("seed {seed}");
        pci_config(&script);
    }
}
