//! Feature bits that belong to rings and negotiation (virtio 1.3 §6).
//!
//! Bits 0 to 23 and 50 upwards belong to the device type; they are defined
//! beside each device, for instance [`BlockFeatures`](super::block::BlockFeatures).

bitflags::bitflags! {
    /// A set of virtio feature bits, whatever their owner.
    ///
    /// Unknown bits are kept, so that a set read from a device can be
    /// intersected and printed without loss.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Features: u64 {
        /// Descriptors may point to a table of descriptors (§2.7.5.3, §2.8.7).
        const INDIRECT_DESC = 1 << 28;
        /// `used_event` and `avail_event` say when to notify (§2.7.7, §2.7.10).
        const EVENT_IDX = 1 << 29;
        /// The device follows virtio 1.0 or later, not the legacy drafts.
        const VERSION_1 = 1 << 32;
        /// The device reaches memory through an IOMMU or bounce buffers:
        /// addresses must come from the platform's DMA interface.
        const ACCESS_PLATFORM = 1 << 33;
        /// Packed virtqueues (§2.8).
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order in which they were made available.
        const IN_ORDER = 1 << 35;
        /// Ordering needs barriers as for real hardware, not only between CPUs.
        const ORDER_PLATFORM = 1 << 36;
        /// Single root I/O virtualization.
        const SR_IOV = 1 << 37;
        /// Notifications carry the ring position (§2.9).
        const NOTIFICATION_DATA = 1 << 38;
        /// The notification value comes from the device.
        const NOTIF_CONFIG_DATA = 1 << 39;
        /// Each queue can be reset by itself (§2.6.1).
        const RING_RESET = 1 << 40;
        /// Administration virtqueues (§2.13).
        const ADMIN_VQ = 1 << 41;
        const _ = !0;
    }
}

impl Features {
    /// The low or high 32 bits, as the 32-bit windows of the transports show
    /// them. Windows above 1 are empty: no bit above 63 is defined.
    #[must_use]
    pub const fn window(self, select: u32) -> u32 {
        match select {
            0 => self.bits() as u32,
            1 => (self.bits() >> 32) as u32,
            _ => 0,
        }
    }

    /// This set with the low (`select` 0) or high (`select` 1) 32 bits
    /// replaced. Any other window changes nothing.
    #[must_use]
    pub const fn with_window(self, select: u32, value: u32) -> Self {
        let bits = self.bits();
        Self::from_bits_retain(match select {
            0 => (bits & !0xffff_ffff) | value as u64,
            1 => (bits & 0xffff_ffff) | ((value as u64) << 32),
            _ => bits,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Features;

    #[test]
    fn windows_round_trip() {
        let set = Features::VERSION_1 | Features::EVENT_IDX | Features::from_bits_retain(1 << 5);
        let copy = Features::empty()
            .with_window(0, set.window(0))
            .with_window(1, set.window(1))
            .with_window(2, 0xffff_ffff);
        assert_eq!(copy, set);
        assert_eq!(set.window(2), 0);
    }
}
