//! The device status field (virtio 1.3 §2.1).

bitflags::bitflags! {
    /// How far the driver has come, and whether the device still works.
    ///
    /// Writing 0 resets the device.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct DeviceStatus: u8 {
        /// The driver has noticed the device.
        const ACKNOWLEDGE = 1;
        /// The driver knows how to drive the device.
        const DRIVER = 2;
        /// The driver is set up and ready; queues are live.
        const DRIVER_OK = 4;
        /// The driver has chosen its features, and the device accepts them.
        const FEATURES_OK = 8;
        /// The device has met an error that it cannot leave without a reset.
        const DEVICE_NEEDS_RESET = 64;
        /// The driver has given up on the device.
        const FAILED = 128;
        const _ = !0;
    }
}
