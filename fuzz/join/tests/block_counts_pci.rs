//! Exact counts in the stepped join, over virtio-pci.

#[path = "block_counts.rs"]
mod over_pci;
