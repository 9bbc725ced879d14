//! Where a driver's code begins and ends.
//!
//! A tool that counts instructions is told to switch with these two functions,
//! by their names: they are never inlined, and what they call usually is.

/// Runs a piece of a driver.
#[inline(never)]
pub fn driver_side<R>(run: impl FnOnce() -> R) -> R {
    run()
}

/// Runs what a driver calls and is none of it: the register access that
/// reaches the device, and the translation of addresses.
#[inline(never)]
pub fn platform_side<R>(run: impl FnOnce() -> R) -> R {
    run()
}
