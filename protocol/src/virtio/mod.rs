//! virtio 1.3: what all its devices share, its rings, its transports and its
//! devices.

pub mod block;
pub mod feature;
pub mod mmio;
pub mod net;
pub mod packed;
pub mod pci;
pub mod split;
pub mod status;

pub use feature::Features;
pub use status::DeviceStatus;

/// Device types (virtio 1.3 §5), as a transport reports them.
pub mod device_id {
    /// No device stands behind this transport (§4.2.3.1.1).
    pub const NONE: u32 = 0;
    /// Network card.
    pub const NETWORK: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Traditional memory balloon.
    pub const BALLOON: u32 = 5;
}
