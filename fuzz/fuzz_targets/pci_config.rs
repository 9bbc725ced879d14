//! How driver and device find each other on PCI: a guest that writes what it
//! likes to configuration space and registers, and a function that lies.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pvkit_scripts::pci_config(data));
