//! Memory barriers between driver and device, in one place (virtio 1.3 §2.7.13
//! and §6, `VIRTIO_F_ORDER_PLATFORM`).
//!
//! A device that is another CPU needs the barriers of threads; one that stands
//! behind a real bus needs those of the platform. On x86-64 both are the same.
#![allow(unsafe_code)]

use core::sync::atomic::{Ordering, fence};
use pvkit_protocol::virtio::Features;

/// How strong the barriers have to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// The device is a CPU of this machine.
    Threads,
    /// `ORDER_PLATFORM`: the device may be real hardware.
    Platform,
}

impl Order {
    /// What the negotiated features ask for.
    pub(crate) fn of(features: Features) -> Self {
        if features.contains(Features::ORDER_PLATFORM) {
            Self::Platform
        } else {
            Self::Threads
        }
    }
}

/// What was written before is visible before what is written after.
#[inline]
pub(crate) fn write(order: Order) {
    match order {
        Order::Threads => fence(Ordering::Release),
        Order::Platform => platform(),
    }
}

/// What is read after is at least as new as what was read before.
#[inline]
pub(crate) fn read(order: Order) {
    match order {
        Order::Threads => fence(Ordering::Acquire),
        Order::Platform => platform(),
    }
}

/// What was written before is visible before anything after is read: without
/// it, "publish the index, then look whether a notification is wanted" can
/// miss the device that goes to sleep at the same moment.
#[inline]
pub(crate) fn full(order: Order) {
    match order {
        Order::Threads => fence(Ordering::SeqCst),
        Order::Platform => platform(),
    }
}

#[inline]
fn platform() {
    fence(Ordering::SeqCst);
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a barrier instruction; it changes no register and no memory.
    unsafe {
        core::arch::asm!("dmb osh", options(nostack, preserves_flags));
    }
}
