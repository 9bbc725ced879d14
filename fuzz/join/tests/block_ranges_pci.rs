//! The same over virtio-pci.

#[path = "block_ranges.rs"]
mod over_pci;
