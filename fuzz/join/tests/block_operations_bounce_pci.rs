//! What a user of the block driver does, over virtio-pci, behind an IOMMU;
//! where a pair is used, with bounce buffers and nothing else in its reach.

#[path = "block_operations.rs"]
mod with_bounce_buffers;
