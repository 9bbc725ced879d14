//! virtio over memory-mapped registers, version 2 (virtio 1.3 §4.2).
//!
//! Offsets are in bytes from the start of the window. All registers below
//! [`CONFIG`] are 32 bits wide and accept aligned 32-bit accesses only
//! (§4.2.2.2); the configuration space allows 8, 16 and 32 bits.

/// "virt" in little-endian order, the content of [`MAGIC_VALUE`].
pub const MAGIC: u32 = 0x7472_6976;
/// The content of [`VERSION`] for the layout described here; 1 is legacy.
pub const CURRENT_VERSION: u32 = 2;
/// Bytes of the register block before the configuration space.
pub const REGISTERS_BYTES: usize = 0x100;

/// R: [`MAGIC`].
pub const MAGIC_VALUE: usize = 0x000;
/// R: [`CURRENT_VERSION`].
pub const VERSION: usize = 0x004;
/// R: device type, see [`device_id`](super::device_id); 0 for an empty slot.
pub const DEVICE_ID: usize = 0x008;
/// R: vendor.
pub const VENDOR_ID: usize = 0x00c;
/// R: 32 feature bits of the device, chosen by [`DEVICE_FEATURES_SEL`].
pub const DEVICE_FEATURES: usize = 0x010;
/// W: which 32 bits [`DEVICE_FEATURES`] shows.
pub const DEVICE_FEATURES_SEL: usize = 0x014;
/// W: 32 feature bits that the driver accepts, chosen by [`DRIVER_FEATURES_SEL`].
pub const DRIVER_FEATURES: usize = 0x020;
/// W: which 32 bits [`DRIVER_FEATURES`] sets.
pub const DRIVER_FEATURES_SEL: usize = 0x024;
/// W: the queue that the `QUEUE_…` registers mean.
pub const QUEUE_SEL: usize = 0x030;
/// R: the largest size of the selected queue; 0 if there is no such queue.
pub const QUEUE_SIZE_MAX: usize = 0x034;
/// W: the size that the driver uses.
pub const QUEUE_SIZE: usize = 0x038;
/// RW: 1 once the driver has set up the selected queue.
pub const QUEUE_READY: usize = 0x044;
/// W: queue index, or [notification data](super::Features::NOTIFICATION_DATA).
pub const QUEUE_NOTIFY: usize = 0x050;
/// R: why the device interrupted, [`InterruptStatus`].
pub const INTERRUPT_STATUS: usize = 0x060;
/// W: bits of [`InterruptStatus`] that the driver has taken care of.
pub const INTERRUPT_ACK: usize = 0x064;
/// RW: [`DeviceStatus`](super::DeviceStatus); writing 0 resets the device.
pub const STATUS: usize = 0x070;
/// W: low 32 bits of the descriptor area's address.
pub const QUEUE_DESC_LOW: usize = 0x080;
/// W: high 32 bits of the descriptor area's address.
pub const QUEUE_DESC_HIGH: usize = 0x084;
/// W: low 32 bits of the driver area's (available ring's) address.
pub const QUEUE_DRIVER_LOW: usize = 0x090;
/// W: high 32 bits of the driver area's (available ring's) address.
pub const QUEUE_DRIVER_HIGH: usize = 0x094;
/// W: low 32 bits of the device area's (used ring's) address.
pub const QUEUE_DEVICE_LOW: usize = 0x0a0;
/// W: high 32 bits of the device area's (used ring's) address.
pub const QUEUE_DEVICE_HIGH: usize = 0x0a4;
/// W: the shared memory region that the `SHM_…` registers mean.
pub const SHM_SEL: usize = 0x0ac;
/// R: low 32 bits of the region's length; all ones if there is none.
pub const SHM_LEN_LOW: usize = 0x0b0;
/// R: high 32 bits of the region's length; all ones if there is none.
pub const SHM_LEN_HIGH: usize = 0x0b4;
/// R: low 32 bits of the region's address; all ones if there is none.
pub const SHM_BASE_LOW: usize = 0x0b8;
/// R: high 32 bits of the region's address; all ones if there is none.
pub const SHM_BASE_HIGH: usize = 0x0bc;
/// RW: writing 1 resets the selected queue (needs `RING_RESET`).
pub const QUEUE_RESET: usize = 0x0c0;
/// R: changes whenever the configuration space may have changed (§2.5).
pub const CONFIG_GENERATION: usize = 0x0fc;
/// RW: the device's configuration space starts here.
pub const CONFIG: usize = 0x100;

bitflags::bitflags! {
    /// Bits of [`INTERRUPT_STATUS`] and [`INTERRUPT_ACK`].
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct InterruptStatus: u32 {
        /// The device has used a buffer in at least one queue.
        const USED_BUFFER = 1;
        /// The configuration has changed, or the device needs a reset.
        const CONFIG_CHANGE = 2;
        const _ = !0;
    }
}
