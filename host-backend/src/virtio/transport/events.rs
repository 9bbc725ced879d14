//! What devices and lanes tell their transport, from threads of their own.
#![forbid(unsafe_code)]

use super::TransportSignals;
use crate::virtio::device::DeviceEvents;
use crate::virtio::queue::Fault;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

#[derive(Debug)]
pub(super) struct Events<S> {
    pub(super) signals: Arc<S>,
    needs_reset: AtomicBool,
    config_generation: AtomicU32,
    /// DRIVER_OK is set. Before that the driver must not be interrupted
    /// (§3.1.1).
    live: AtomicBool,
    /// The configuration changed before that: the driver may have read what is
    /// no longer true.
    news: AtomicBool,
}

impl<S: TransportSignals> Events<S> {
    pub(super) fn new(signals: Arc<S>) -> Self {
        Self {
            signals,
            needs_reset: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
            live: AtomicBool::new(false),
            news: AtomicBool::new(false),
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// The device needs a reset.
    pub(super) fn broke(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.signals.config();
    }

    /// The driver set DRIVER_OK.
    pub(super) fn started(&self) {
        self.live.store(true, Ordering::SeqCst);
        self.tell();
    }

    /// The driver asked for a reset.
    pub(super) fn stopping(&self) {
        self.live.store(false, Ordering::SeqCst);
    }

    /// The device is back at its state at power-on.
    pub(super) fn reset(&self) {
        self.news.store(false, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::Release);
        self.signals.reset();
    }

    /// Tells a driver that is ready what it may have missed.
    fn tell(&self) {
        // News come before this look at life, and life before that at news: of
        // two at the same time, one sees both.
        if self.live.load(Ordering::SeqCst) && self.news.swap(false, Ordering::SeqCst) {
            self.signals.config();
        }
    }
}

impl<S: TransportSignals> DeviceEvents for Events<S> {
    fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.news.store(true, Ordering::SeqCst);
        self.tell();
    }

    fn needs_reset(&self, lane: u16, fault: Fault) {
        log::warn!("virtio: lane {lane} needs a reset: {fault}");
        self.broke();
    }
}
