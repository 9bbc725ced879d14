//! What the tests of the benchmark share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Says why something cannot be tested here.
pub fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr().lock(), "skipped: {why}");
}

/// One test with machines at a time: where several share few processors and
/// write their files at once, a disk takes longer, and a guest that polls it
/// looks more often.
pub fn alone() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}
