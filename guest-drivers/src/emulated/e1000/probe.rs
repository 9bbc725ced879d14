//! Finding the chip, and its registers.
#![forbid(unsafe_code)]

use super::E1000Error;
use crate::pci::{ConfigAccess, Function, MemoryBar, MemoryPool, PciConfig};
use pvkit_protocol::emulated::e1000::pci;
use pvkit_protocol::pci::Command;

/// The first 82540EM on bus 0.
#[must_use]
pub fn find<A: ConfigAccess>(config: &PciConfig<A>) -> Option<Function> {
    config.find(pci::VENDOR, pci::DEVICE)
}

/// The registers of the chip behind a function: [`E1000::open`] takes them.
/// A window without an address gets one out of `free`; `map` makes it
/// reachable. Memory decoding and bus mastering are switched on. The chip
/// itself is not touched.
///
/// [`E1000::open`]: super::E1000::open
///
/// # Errors
/// [`E1000Error::Function`], [`E1000Error::Pci`], [`E1000Error::Window`] or
/// [`E1000Error::Map`].
pub fn attach<A: ConfigAccess, R>(
    config: &PciConfig<A>,
    function: &Function,
    free: &mut MemoryPool,
    map: impl FnOnce(MemoryBar) -> Option<R>,
) -> Result<R, E1000Error> {
    let Function {
        place,
        vendor,
        device,
        ..
    } = *function;
    if (vendor, device) != (pci::VENDOR, pci::DEVICE) {
        return Err(E1000Error::Function { vendor, device });
    }
    let bar = config.assign_memory(place, pci::MEMORY_BAR, free)?;
    if bar.size < u64::from(pci::MEMORY_BYTES) {
        return Err(E1000Error::Window { size: bar.size });
    }
    config.enable(place, Command::MEMORY | Command::BUS_MASTER);
    map(bar).ok_or(E1000Error::Map { base: bar.base })
}
