//! virtio over PCI (virtio 1.3 §4.1), without the legacy interface.
//!
//! A device is a function with [`VENDOR`] and [`device`]. Vendor capabilities
//! ([`Capability`]) say where in its memory base address registers each
//! structure lies. Drivers access every field with its own width, and 64-bit
//! fields as two halves (§4.1.3.1).

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Red Hat, who lend their number to virtio (§4.1.2).
pub const VENDOR: u16 = 0x1af4;
/// Device of type 0; the type is added (§4.1.2).
pub const DEVICE_BASE: u16 = 0x1040;
/// Last device that a type can have.
pub const DEVICE_LAST: u16 = 0x107f;
/// Least revision of a device without the legacy interface (§4.1.2.1).
pub const REVISION: u8 = 1;
/// Least subsystem device of a device without the legacy interface (§4.1.2.1).
pub const SUBSYSTEM: u16 = 0x40;

/// The PCI device of a device type; `None` if the type has none.
#[must_use]
pub const fn device(device_id: u32) -> Option<u16> {
    if device_id <= (DEVICE_LAST - DEVICE_BASE) as u32 {
        Some(DEVICE_BASE + device_id as u16)
    } else {
        None
    }
}

/// The device type of a PCI device; `None` for transitional devices (0x1000 to
/// 0x103f) and for what is not virtio at all.
#[must_use]
pub const fn device_id(device: u16) -> Option<u32> {
    if device >= DEVICE_BASE && device <= DEVICE_LAST {
        Some((device - DEVICE_BASE) as u32)
    } else {
        None
    }
}

/// What a [`Capability`] locates (§4.1.4).
pub mod cfg_type {
    /// The [`common`](super::common) configuration.
    pub const COMMON: u8 = 1;
    /// Notifications, see [`NotifyCapability`](super::NotifyCapability).
    pub const NOTIFY: u8 = 2;
    /// One byte, [`IsrStatus`](super::IsrStatus).
    pub const ISR: u8 = 3;
    /// Configuration space of the device type.
    pub const DEVICE: u8 = 4;
    /// A window onto the others, see [`WindowCapability`](super::WindowCapability).
    pub const PCI: u8 = 5;
    /// Shared memory.
    pub const SHARED_MEMORY: u8 = 8;
    /// Vendor data.
    pub const VENDOR: u8 = 9;
}

/// The last base address register that a [`Capability`] may name; those with a
/// larger one are reserved, and drivers ignore them (§4.1.4).
pub const BAR_LAST: u8 = 5;

/// A vendor capability of a virtio device: where a structure lies (§4.1.4).
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Capability {
    /// [`capability::VENDOR`](crate::pci::capability::VENDOR).
    pub id: u8,
    /// Offset of the next capability; 0 for none.
    pub next: u8,
    /// Bytes of this capability, with the three fields so far.
    pub len: u8,
    /// One of [`cfg_type`].
    pub cfg_type: u8,
    /// Base address register, 0 to [`BAR_LAST`].
    pub bar: u8,
    /// Tells several capabilities of a type apart.
    pub number: u8,
    /// Not used.
    pub padding: [u8; 2],
    /// Where in the register's window the structure starts, in bytes.
    pub offset: U32,
    /// Its length in bytes.
    pub length: U32,
}

/// The capability of notifications (§4.1.4.4). The doorbell of a queue is at
/// `offset + queue_notify_off × notify_off_multiplier`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct NotifyCapability {
    /// With [`cfg_type::NOTIFY`].
    pub capability: Capability,
    /// Bytes between doorbells: 0, or a power of two that is at least 2.
    pub multiplier: U32,
}

/// The capability through which configuration accesses reach what the others
/// locate (§4.1.4.9): the guest writes `bar`, `offset` and `length` (1, 2 or
/// 4), and an access to `data` is one to that place.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct WindowCapability {
    /// With [`cfg_type::PCI`].
    pub capability: Capability,
    /// What is read and written there.
    pub data: [u8; 4],
}

/// Offsets in the common configuration (§4.1.4.3).
pub mod common {
    /// RW, 32 bits: which 32 bits [`DEVICE_FEATURE`] shows.
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    /// R, 32 bits.
    pub const DEVICE_FEATURE: usize = 4;
    /// RW, 32 bits: which 32 bits [`DRIVER_FEATURE`] means.
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    /// RW, 32 bits.
    pub const DRIVER_FEATURE: usize = 12;
    /// RW, 16 bits: the vector of configuration changes.
    pub const CONFIG_MSIX_VECTOR: usize = 16;
    /// R, 16 bits: number of queues.
    pub const NUM_QUEUES: usize = 18;
    /// RW, 8 bits: [`DeviceStatus`](super::super::DeviceStatus); writing 0
    /// resets the device.
    pub const DEVICE_STATUS: usize = 20;
    /// R, 8 bits: changes whenever the configuration space may have changed.
    pub const CONFIG_GENERATION: usize = 21;
    /// RW, 16 bits: the queue that the `QUEUE_…` fields mean.
    pub const QUEUE_SELECT: usize = 22;
    /// RW, 16 bits: after a reset the largest size of the queue; 0 if there is
    /// no such queue.
    pub const QUEUE_SIZE: usize = 24;
    /// RW, 16 bits: the vector of the queue.
    pub const QUEUE_MSIX_VECTOR: usize = 26;
    /// RW, 16 bits: 1 once the driver has set up the queue.
    pub const QUEUE_ENABLE: usize = 28;
    /// R, 16 bits: where the queue's doorbell is, in units of the
    /// [multiplier](super::NotifyCapability::multiplier).
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    /// RW, 64 bits: address of the descriptor area.
    pub const QUEUE_DESC: usize = 32;
    /// RW, 64 bits: address of the driver area (available ring).
    pub const QUEUE_DRIVER: usize = 40;
    /// RW, 64 bits: address of the device area (used ring).
    pub const QUEUE_DEVICE: usize = 48;
    /// R, 16 bits, with
    /// [`NOTIF_CONFIG_DATA`](super::super::Features::NOTIF_CONFIG_DATA): what
    /// the driver writes to the doorbell in place of the queue's index.
    pub const QUEUE_NOTIF_CONFIG_DATA: usize = 56;
    /// RW, 16 bits, with [`RING_RESET`](super::super::Features::RING_RESET):
    /// writing 1 resets the queue.
    pub const QUEUE_RESET: usize = 58;
    /// R, 16 bits, with [`ADMIN_VQ`](super::super::Features::ADMIN_VQ): first
    /// administration queue.
    pub const ADMIN_QUEUE_INDEX: usize = 60;
    /// R, 16 bits, with [`ADMIN_VQ`](super::super::Features::ADMIN_VQ): number
    /// of administration queues.
    pub const ADMIN_QUEUE_NUM: usize = 62;

    /// Bytes of the fields that every device has.
    pub const LEAST_BYTES: usize = QUEUE_NOTIF_CONFIG_DATA;
    /// Bytes of all fields up to the queue's reset.
    pub const BYTES: usize = ADMIN_QUEUE_INDEX;
}

/// A vector that is none: what events have after a reset, and what a vector
/// field reads as after the device has refused a vector (§4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

bitflags::bitflags! {
    /// The ISR status, which reading clears (§4.1.4.5).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct IsrStatus: u8 {
        /// The device has used a buffer in at least one queue; without MSI-X
        /// only.
        const QUEUE = 1;
        /// The configuration has changed, or the device needs a reset.
        const CONFIG_CHANGE = 2;
        const _ = !0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::device_id as types;

    #[test]
    fn devices_and_types_are_each_other_s_inverse() {
        assert_eq!(device(types::BLOCK), Some(0x1042));
        assert_eq!(device(63), Some(0x107f));
        for none in [64, 0xefc0, 0xffc0, u32::MAX] {
            assert_eq!(device(none), None);
        }
        for type_ in 0..64 {
            assert_eq!(device(type_).and_then(device_id), Some(type_));
        }
        for other in [0, 0x1000, 0x1001, 0x103f, 0x1080, 0xffff] {
            assert_eq!(device_id(other), None, "{other:#x}");
        }
    }
}
