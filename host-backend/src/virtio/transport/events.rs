//! What the device and its lanes report, from threads of their own.
#![forbid(unsafe_code)]

use super::TransportSignals;
use crate::log_limit::{LogLimit, warn_limited};
use crate::virtio::device::ConfigEvents;
use crate::worker::{Failure, LaneEvents};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

#[derive(Debug)]
pub(super) struct Events<S> {
    pub(super) signals: Arc<S>,
    needs_reset: AtomicBool,
    config_generation: AtomicU32,
    /// DRIVER_OK is set. Before that the driver must not be interrupted
    /// (§3.1.1).
    driver_ok: AtomicBool,
    /// The configuration changed before that: what the driver has read of it
    /// may no longer be true.
    change_pending: AtomicBool,
    /// For what the driver can make the device log.
    log_limit: LogLimit,
}

/// The part of the events that is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EventState {
    pub(super) needs_reset: bool,
    pub(super) config_generation: u32,
    pub(super) change_pending: bool,
}

impl<S: TransportSignals> Events<S> {
    pub(super) fn new(signals: Arc<S>) -> Self {
        Self {
            signals,
            needs_reset: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
            driver_ok: AtomicBool::new(false),
            change_pending: AtomicBool::new(false),
            log_limit: LogLimit::default(),
        }
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// Raises DEVICE_NEEDS_RESET because a lane cannot work.
    pub(super) fn break_lane(&self, lane: u16, why: &dyn std::fmt::Display) {
        warn_limited!(
            self.log_limit,
            "virtio: lane {} failed, the device needs a reset: {}",
            lane,
            why
        );
        self.needs_reset.store(true, Ordering::Release);
        self.signals.config();
    }

    /// The driver set DRIVER_OK.
    pub(super) fn driver_ok(&self) {
        self.driver_ok.store(true, Ordering::SeqCst);
        self.report_change();
    }

    /// The driver asked for a reset.
    pub(super) fn resetting(&self) {
        self.driver_ok.store(false, Ordering::SeqCst);
    }

    /// The device is back at its state at power-on.
    pub(super) fn reset(&self) {
        self.change_pending.store(false, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::Release);
        self.signals.reset();
    }

    /// Tells a driver that is ready of a change that is pending.
    fn report_change(&self) {
        // Each side stores its flag, then loads the other's (SeqCst): at least
        // one thread sees both.
        if self.driver_ok.load(Ordering::SeqCst)
            && self.change_pending.swap(false, Ordering::SeqCst)
        {
            self.signals.config();
        }
    }

    pub(super) fn save(&self) -> EventState {
        let Self {
            signals: _,
            needs_reset,
            config_generation,
            // As DRIVER_OK in the status.
            driver_ok: _,
            change_pending,
            log_limit: _,
        } = self;
        EventState {
            needs_reset: needs_reset.load(Ordering::Acquire),
            config_generation: config_generation.load(Ordering::Acquire),
            change_pending: change_pending.load(Ordering::SeqCst),
        }
    }

    pub(super) fn restore(&self, state: EventState, driver_ok: bool) {
        let EventState {
            needs_reset,
            config_generation,
            change_pending,
        } = state;
        self.needs_reset.store(needs_reset, Ordering::Release);
        self.config_generation
            .store(config_generation, Ordering::Release);
        self.change_pending.store(change_pending, Ordering::SeqCst);
        self.driver_ok.store(driver_ok, Ordering::SeqCst);
    }
}

impl<S: TransportSignals> ConfigEvents for Events<S> {
    fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.change_pending.store(true, Ordering::SeqCst);
        self.report_change();
    }
}

impl<S: TransportSignals> LaneEvents for Events<S> {
    fn failed(&self, lane: u16, why: &Failure) {
        self.break_lane(lane, why);
    }
}
