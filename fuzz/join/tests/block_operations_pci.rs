//! What a user of the block driver does, over virtio-pci.

#[path = "block_operations.rs"]
mod over_pci;
