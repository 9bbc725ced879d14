//! Resetting one queue, and doorbells with data, over virtio-pci.

#[path = "block_queue_reset.rs"]
mod over_pci;
