//! The data plane: polls link and rings, and waits for them.
#![forbid(unsafe_code)]

use super::receive::RxContext;
use super::settings::Settings;
use super::shared::{Shared, wake};
use super::transmit::TxContext;
use crate::link::{LinkLane, Waits};
use crate::memory::Snapshot;
use crate::worker::{Interest, Progress, Worker};
use pvkit_protocol::emulated::e1000::Cause;
use pvkit_protocol::frame::max_frame_bytes;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

/// Sends and receives. There is one for each device.
#[derive(Debug)]
pub struct E1000Worker {
    shared: Arc<Shared>,
    lane: Box<dyn LinkLane>,
    settings: Settings,
    generation: u32,
    memory: Arc<Snapshot>,
    /// Longest frame that the link takes.
    max: usize,
    waits: Waits,
    /// It was armed, and may have been waited for.
    armed: bool,
    stopping: bool,
}

impl E1000Worker {
    pub(super) fn new(shared: Arc<Shared>, lane: Box<dyn LinkLane>) -> Self {
        let mut settings = shared.settings(Settings::clone);
        let generation = shared.copy_settings(&mut settings);
        Self {
            memory: shared.memory.snapshot(),
            max: max_frame_bytes(shared.link.shape().mtu),
            shared,
            lane,
            settings,
            generation,
            waits: Waits {
                receive: false,
                send: false,
            },
            armed: false,
            stopping: false,
        }
    }

    /// Follows what has changed.
    fn look(&mut self) {
        if self.shared.generation() != self.generation {
            self.generation = self.shared.copy_settings(&mut self.settings);
        }
        if self.shared.memory.epoch() != self.memory.epoch() {
            self.memory = self.shared.memory.snapshot();
        }
    }

    /// Asks the link whether it is up, after it said that something is new.
    fn follow_link(&self) -> bool {
        let shared = &*self.shared;
        if !shared.link_changed.load(Ordering::Relaxed)
            || !shared.link_changed.swap(false, Ordering::AcqRel)
        {
            return false;
        }
        let up = shared.link.is_up();
        if shared.link_up.swap(up, Ordering::AcqRel) != up {
            if !up {
                shared.link_lost.store(true, Ordering::Release);
            }
            shared.interrupts.raise(Cause::LSC);
        }
        true
    }

    /// Both directions, once.
    fn run(&mut self, budget: u32) -> bool {
        let shared = self.shared.clone();
        let mut plane = shared.plane();
        // Behind the lock: settings that take a ring away are in force when
        // their access gets the plane.
        self.look();
        let context = TxContext {
            settings: &self.settings,
            memory: &self.memory,
            head: &shared.tx_head,
            tail: &shared.tx_tail,
            interrupts: &shared.interrupts,
            statistics: &shared.statistics,
            counters: &shared.counters,
            max: self.max,
            claims: &shared.claims,
        };
        let sent = plane.transmit.poll(&context, &mut *self.lane, budget);
        let context = RxContext {
            settings: &self.settings,
            memory: &self.memory,
            head: &shared.rx_head,
            tail: &shared.rx_tail,
            interrupts: &shared.interrupts,
            statistics: &shared.statistics,
            counters: &shared.counters,
            claims: &shared.claims,
        };
        let received = plane.receive.poll(&context, &mut *self.lane, budget);
        sent | received
    }
}

impl Worker for E1000Worker {
    fn poll(&mut self, budget: u32) -> Progress {
        if std::mem::take(&mut self.armed) {
            self.shared.disarm();
        }
        if self.stopping {
            // Nothing is in flight between polls.
            return Progress::Stopped;
        }
        if self.shared.claims.load(Ordering::Acquire) != 0 {
            // Whoever waits for the rings goes first.
            thread::yield_now();
            return Progress::More;
        }
        let changed = self.follow_link();
        let worked = self.run(budget.max(1));
        let expired = self.shared.interrupts.expire();
        if changed | worked | expired {
            Progress::More
        } else {
            Progress::Drained
        }
    }

    fn arm(&mut self) -> bool {
        let shared = self.shared.clone();
        self.armed = true;
        // All of it, until it is known what there is to wait for.
        shared.arm(wake::ANY | wake::TRANSMIT | wake::RECEIVE);
        let (tail, space) = (
            shared.tx_tail.load(Ordering::Acquire),
            shared.rx_tail.load(Ordering::Acquire),
        );
        let starved = {
            let plane = shared.plane();
            self.look();
            if plane.transmit.has_work(&self.settings, tail) {
                return true;
            }
            self.waits = Waits {
                receive: plane.receive.has_room(&self.settings, space),
                send: plane.transmit.is_blocked(),
            };
            plane.receive.is_starved(&self.settings, space)
        };
        if self.lane.arm(self.waits)
            || shared.link_changed.load(Ordering::Acquire)
            || shared.claims.load(Ordering::Acquire) != 0
        {
            return true;
        }
        if !starved {
            // Drivers move this tail all the time.
            shared.arm_without(wake::RECEIVE);
        }
        false
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        each(self.shared.kick.as_fd(), Interest::Readable);
        self.lane.sources(self.waits, each);
    }

    fn deadline(&self) -> Option<Instant> {
        [self.lane.deadline(), self.shared.interrupts.deadline()]
            .into_iter()
            .flatten()
            .min()
    }
}
