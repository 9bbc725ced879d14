//! What only the kernel may do in a machine, for tests: addresses, messages,
//! and configuration writes that nobody checks.
//!
//! In a join, devices reach the memory of a test's arena and nothing else, so
//! none of this can harm the program.

use pvkit_guest::pci::{ConfigAccess, MemoryPool, MsiMessage, PciConfig, PortPool};
use pvkit_protocol::pci::Bdf;

/// Addresses for windows, from `first` to `last`.
#[must_use]
pub const fn memory_pool(first: u64, last: u64) -> MemoryPool {
    // SAFETY: there is nothing at any address of a machine of this crate but
    // the arena, which devices reach by themselves.
    unsafe { MemoryPool::new(first, last) }
}

/// Ports, from `first` to `last`.
#[must_use]
pub const fn port_pool(first: u16, last: u16) -> PortPool {
    // SAFETY: devices of this crate reach the arena only.
    unsafe { PortPool::new(first, last) }
}

/// A message of any kind.
#[must_use]
pub const fn message(address: u64, data: u32) -> MsiMessage {
    // SAFETY: messages of this crate end in a counter.
    unsafe { MsiMessage::new(address, data) }
}

/// Writes to configuration space as a guest of ill will makes them.
pub trait Poke {
    /// Writes 8 bits.
    fn poke_u8(&self, place: Bdf, offset: u8, value: u8);
    /// Writes 16 bits.
    fn poke_u16(&self, place: Bdf, offset: u8, value: u16);
    /// Writes 32 bits.
    fn poke_u32(&self, place: Bdf, offset: u8, value: u32);
}

impl<A: ConfigAccess> Poke for PciConfig<A> {
    fn poke_u8(&self, place: Bdf, offset: u8, value: u8) {
        // SAFETY: devices of this crate reach the arena only.
        unsafe { self.write_u8(place, offset, value) };
    }
    fn poke_u16(&self, place: Bdf, offset: u8, value: u16) {
        // SAFETY: devices of this crate reach the arena only.
        unsafe { self.write_u16(place, offset, value) };
    }
    fn poke_u32(&self, place: Bdf, offset: u8, value: u32) {
        // SAFETY: devices of this crate reach the arena only.
        unsafe { self.write_u32(place, offset, value) };
    }
}
