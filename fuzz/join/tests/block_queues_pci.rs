//! The same over virtio-pci.

#[path = "block_queues.rs"]
mod over_pci;
