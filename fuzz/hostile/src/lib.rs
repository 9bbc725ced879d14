//! # pvkit-hostile
//!
//! Peers that break the rules, for the shipped drivers and devices.
//!
//! - [`guest`] is a guest without a driver: it writes rings, tables and
//!   registers of the shipped device by hand, rightly or not.
//! - [`function`] is a PCI function that lies about itself.
//! - [`device`] is a device that lies: the shipped driver believes that it
//!   drives a disk.
//! - [`net_device`] is one of which the driver believes that it is a network
//!   card. What both share is [`liar`].
//!
//! All behave well until a script tells them otherwise, so that each test
//! reads like the one thing it does wrong.
#![deny(unsafe_code)]

pub mod device;
#[allow(unsafe_code)]
pub mod function;
pub mod guest;
pub mod liar;
pub mod net_device;

/// Numbers that look random and are the same in every run (xorshift64).
#[derive(Debug, Clone)]
pub struct Noise(u64);

impl Noise {
    /// The sequence that belongs to `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        // 0 would stay 0 for ever.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    #[must_use = "the sequence moves on"]
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// The next number below `end`, which is not 0.
    #[must_use = "the sequence moves on"]
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }
}
