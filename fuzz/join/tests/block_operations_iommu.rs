//! What a user of the block driver does, behind an IOMMU.

#[path = "block_operations.rs"]
mod behind_an_iommu;
