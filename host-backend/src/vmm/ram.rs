//! The guest's RAM.
#![forbid(unsafe_code)]

use super::VmError;
use super::x86_64::layout;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Allocates RAM, around the hole for devices below 4 GiB. The host hands out
/// pages as the guest touches them.
pub(super) fn allocate(bytes: u64) -> Result<GuestMemoryMmap<()>, VmError> {
    let (least, most) = (layout::MIN_RAM_BYTES, layout::MAX_RAM_BYTES);
    if !(least..=most).contains(&bytes) || !bytes.is_multiple_of(4096) {
        return Err(VmError::MemorySize { bytes, least, most });
    }
    let low = bytes.min(layout::HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((GuestAddress(layout::HOLE_END), (bytes - low) as usize));
    }
    GuestMemoryMmap::from_ranges(&ranges).map_err(|error| VmError::Memory {
        bytes,
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

    #[test]
    fn ram_goes_around_the_hole() {
        let map = allocate(4 << 30).unwrap();
        let regions: Vec<_> = map
            .iter()
            .map(|region| (region.start_addr().raw_value(), region.len()))
            .collect();
        assert_eq!(regions, [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        for bytes in [0, 4096, layout::MIN_RAM_BYTES + 1, u64::MAX, !4095] {
            assert!(
                matches!(allocate(bytes), Err(VmError::MemorySize { .. })),
                "{bytes}"
            );
        }
    }
}
