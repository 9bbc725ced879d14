//! What lies where in the guest's address space.
#![forbid(unsafe_code)]

use std::ops::Range;

/// Least RAM: the image, its page tables and a little heap.
pub(in crate::vmm) const MIN_RAM_BYTES: u64 = 16 << 20;
/// Most RAM: 1 TiB, as much as guests reach with 40 address bits.
pub(in crate::vmm) const MAX_RAM_BYTES: u64 = 1 << 40;
/// RAM ends here, and goes on at [`HOLE_END`].
pub(in crate::vmm) const HOLE_START: u64 = 3 << 30;
/// End of the hole for devices.
pub(in crate::vmm) const HOLE_END: u64 = 4 << 30;

/// Where [`StartInfo`](pvkit_protocol::pvh::StartInfo) lies.
pub(in crate::vmm) const START_INFO: u64 = 0x6000;
/// Where the list of modules lies.
pub(in crate::vmm) const MODULES: u64 = 0x6100;
/// Where the memory map lies.
pub(in crate::vmm) const MEMORY_MAP: u64 = 0x6200;
/// Where the command line lies.
pub(in crate::vmm) const COMMAND_LINE: u64 = 0x2_0000;
/// Most bytes of the command line, with its NUL.
pub(in crate::vmm) const COMMAND_LINE_BYTES: usize = 0x1_0000;
/// End of the memory that a guest may use below 1 MiB.
pub(in crate::vmm) const LOW_END: u64 = 0x9_fc00;
/// Images are loaded from here on.
pub(in crate::vmm) const HIGH_START: u64 = 0x10_0000;

/// First virtio-mmio window.
pub(in crate::vmm) const MMIO_BASE: u64 = 0xd000_0000;
/// Pins of the I/O APIC for virtio-mmio devices, in order: those without an
/// old device, and not used by PCI.
pub(in crate::vmm) const MMIO_GSIS: [u32; 10] = [16, 17, 18, 19, 20, 21, 22, 23, 6, 9];
/// Pins of the I/O APIC at which PCI's lines A to D end; a PIIX3 could route
/// them so.
pub(in crate::vmm) const PCI_GSIS: [u32; 4] = [5, 7, 10, 11];

/// Addresses for the registers of PCI functions, below those of interrupt
/// controllers.
pub(in crate::vmm) const PCI_MEMORY: Range<u64> = 0xe000_0000..0xfe00_0000;
/// Ports for them, where nothing of old has any.
pub(in crate::vmm) const PCI_PORTS: Range<u64> = 0xc000..0x1_0000;
/// First slot that no bridge stands in.
pub(in crate::vmm) const PCI_FIRST_SLOT: u8 = 2;

/// Three pages that KVM needs for itself on Intel, where nothing else is.
pub(in crate::vmm) const TSS_ADDRESS: u64 = 0xfffb_d000;

/// Most vCPUs: those that an 8-bit APIC id can name, less the broadcast.
pub(in crate::vmm) const MAX_VCPUS: u8 = 254;
