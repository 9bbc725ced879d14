//! What registers and worker share, and how they keep out of each other's way.
#![forbid(unsafe_code)]

use super::E1000Counters;
use super::interrupt::Interrupts;
use super::receive::Receive;
use super::settings::Settings;
use super::statistics::Statistics;
use super::transmit::Transmit;
use crate::event::EventFd;
use crate::link::{Link, LinkCounters, LinkEvents};
use crate::memory::GuestMemory;
use crate::sync::lock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, Weak};

/// What an armed worker is to be woken for.
pub(super) mod wake {
    /// Anything that is rare: settings, deadlines, the link.
    pub(in super::super) const ANY: u32 = 1;
    /// The tail of the transmit ring.
    pub(in super::super) const TRANSMIT: u32 = 2;
    /// The tail of the receive ring.
    pub(in super::super) const RECEIVE: u32 = 4;
}

/// The rings, which the worker has while it polls.
#[derive(Debug)]
pub(super) struct Plane {
    pub(super) transmit: Transmit,
    pub(super) receive: Receive,
}

/// What registers and worker share.
///
/// - Heads, tails and `armed` are atomic: moving a tail never waits.
/// - `settings` is locked for a copy, by the worker only when its
///   `generation` has changed.
/// - `interrupts` is locked for a few instructions.
/// - `plane` is locked by the worker as long as it polls, and by a register
///   access only if it takes a ring away ([`Shared::quiesce`]).
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) memory: GuestMemory,
    pub(super) link: Arc<dyn Link>,
    pub(super) interrupts: Interrupts,
    pub(super) counters: Arc<E1000Counters>,
    pub(super) link_counters: Arc<LinkCounters>,
    pub(super) statistics: Mutex<Statistics>,
    pub(super) tx_head: AtomicU32,
    pub(super) tx_tail: AtomicU32,
    pub(super) rx_head: AtomicU32,
    pub(super) rx_tail: AtomicU32,
    settings: Mutex<Settings>,
    generation: AtomicU32,
    plane: Mutex<Plane>,
    /// Register accesses that wait for the plane.
    pub(super) claims: AtomicU32,
    /// What the worker waits for, while it does.
    armed: AtomicU32,
    pub(super) kick: EventFd,
    /// It was notified since it was last taken.
    rung: AtomicBool,
    /// The link has something to tell.
    pub(super) link_changed: AtomicBool,
    pub(super) link_up: AtomicBool,
    /// The link was lost since the PHY was asked.
    pub(super) link_lost: AtomicBool,
}

impl Shared {
    pub(super) fn new(
        memory: GuestMemory,
        link: Arc<dyn Link>,
        link_counters: Arc<LinkCounters>,
        interrupts: Interrupts,
        counters: Arc<E1000Counters>,
        settings: Settings,
        kick: EventFd,
    ) -> Arc<Self> {
        let up = link.is_up();
        Arc::new(Self {
            memory,
            link,
            interrupts,
            counters,
            link_counters,
            statistics: Mutex::default(),
            tx_head: AtomicU32::new(0),
            tx_tail: AtomicU32::new(0),
            rx_head: AtomicU32::new(0),
            rx_tail: AtomicU32::new(0),
            settings: Mutex::new(settings),
            generation: AtomicU32::new(0),
            plane: Mutex::new(Plane {
                transmit: Transmit::new(),
                receive: Receive::new(),
            }),
            claims: AtomicU32::new(0),
            armed: AtomicU32::new(0),
            kick,
            rung: AtomicBool::new(false),
            link_changed: AtomicBool::new(false),
            link_up: AtomicBool::new(up),
            link_lost: AtomicBool::new(false),
        })
    }

    /// Reads settings.
    pub(super) fn settings<T>(&self, read: impl FnOnce(&Settings) -> T) -> T {
        read(&lock(&self.settings))
    }

    /// Changes settings.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Settings) -> T) -> T {
        let result = change(&mut lock(&self.settings));
        self.generation.fetch_add(1, Ordering::Release);
        result
    }

    /// Number of the settings.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Copies the settings; their number is that of these or of older ones.
    pub(super) fn copy_settings(&self, to: &mut Settings) -> u32 {
        let generation = self.generation();
        to.clone_from(&lock(&self.settings));
        generation
    }

    /// The rings, for the worker.
    pub(super) fn plane(&self) -> std::sync::MutexGuard<'_, Plane> {
        lock(&self.plane)
    }

    /// Takes the rings away from the worker: when this returns, it does not
    /// touch what it had of them. It waits for the frame that the worker has at
    /// hand and for the link to take the batch that ends with it, and for no
    /// more.
    pub(super) fn quiesce<T>(&self, change: impl FnOnce(&mut Plane) -> T) -> T {
        self.claims.fetch_add(1, Ordering::AcqRel);
        let result = change(&mut self.plane());
        self.claims.fetch_sub(1, Ordering::AcqRel);
        self.wake(wake::ANY);
        result
    }

    /// Wakes the worker, if it waits for one of `reasons`.
    pub(super) fn wake(&self, reasons: u32) {
        // What happened must be visible before the worker is found asleep.
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) & reasons != 0
            && self.armed.swap(0, Ordering::AcqRel) != 0
        {
            self.ring();
        }
    }

    fn ring(&self) {
        self.counters.kicks.add(1);
        self.kick.notify();
        // In this order: who sees it finds the counter readable.
        self.rung.store(true, Ordering::Release);
    }

    /// As [`wake`](Self::wake), if something happens after the worker was found
    /// asleep and before it is woken.
    #[cfg(test)]
    pub(super) fn wake_late(&self, meanwhile: impl FnOnce()) {
        assert_ne!(self.armed.swap(0, Ordering::AcqRel), 0);
        meanwhile();
        self.ring();
    }

    /// The worker is about to wait for `reasons`; it looks once more after
    /// this.
    pub(super) fn arm(&self, reasons: u32) {
        self.armed.store(reasons, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The worker does not wait for `reasons` after all.
    pub(super) fn arm_without(&self, reasons: u32) {
        self.armed.fetch_and(!reasons, Ordering::AcqRel);
    }

    /// The worker is awake.
    pub(super) fn disarm(&self) {
        self.armed.store(0, Ordering::Release);
        // Who found it asleep may ring only later, even when it is armed again:
        // then it wakes once more for nothing, and takes that.
        if self.rung.swap(false, Ordering::AcqRel) {
            self.kick.take();
        }
    }

    /// Whether there is a link, as far as the driver was told.
    pub(super) fn is_up(&self) -> bool {
        self.link_up.load(Ordering::Acquire)
    }
}

/// What a link tells the device.
#[derive(Debug)]
pub(super) struct Events(pub(super) Weak<Shared>);

impl LinkEvents for Events {
    fn link_changed(&self) {
        // Perhaps from within the worker: it is left to the worker to ask.
        if let Some(shared) = self.0.upgrade() {
            shared.link_changed.store(true, Ordering::Release);
            shared.wake(wake::ANY);
        }
    }
}
