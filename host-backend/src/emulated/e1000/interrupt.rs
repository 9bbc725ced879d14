//! Causes, masks, delays and moderation, and the pin that they drive.
#![forbid(unsafe_code)]

use super::E1000Counters;
use crate::pci::Intx;
use crate::sync::lock;
use pvkit_protocol::emulated::e1000::{Cause, delay_nanos, interval_nanos};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What time it is.
pub(super) trait Clock: Send + Sync + fmt::Debug {
    fn now(&self) -> Instant;
}

/// The host's clock.
#[derive(Debug)]
pub(super) struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// No time has come.
const NEVER: u64 = u64::MAX;

/// An interrupt that is delayed after its cause: by one timer that each cause
/// starts anew, and one that the first starts.
#[derive(Debug, Clone, Copy)]
struct Delay {
    /// Registers.
    packet: u32,
    absolute: u32,
    /// When the timers expire.
    packet_at: u64,
    absolute_at: u64,
}

impl Delay {
    const NONE: Self = Self {
        packet: 0,
        absolute: 0,
        packet_at: NEVER,
        absolute_at: NEVER,
    };

    fn start(&mut self, now: u64) {
        self.packet_at = now + delay_nanos(self.packet);
        if self.absolute_at == NEVER && delay_nanos(self.absolute) != 0 {
            self.absolute_at = now + delay_nanos(self.absolute);
        }
    }

    fn at(&self) -> u64 {
        self.packet_at.min(self.absolute_at)
    }

    fn stop(&mut self) {
        self.packet_at = NEVER;
        self.absolute_at = NEVER;
    }

    /// Stops it if it runs and has expired.
    fn expire(&mut self, now: u64) -> bool {
        let expired = self.at() <= now;
        if expired {
            self.stop();
        }
        expired
    }
}

/// Which of two delays is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Timer {
    /// RDTR and RADV, before RXT0.
    Receive,
    /// TIDV and TADV, before TXDW.
    Transmit,
}

/// When the cause of a delay is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// At once; a delay that runs is over.
    Now,
    /// Once the delay is over.
    Later,
}

#[derive(Debug)]
struct State {
    causes: Cause,
    mask: Cause,
    /// ITR.
    interval: u32,
    asserted: bool,
    /// When it was last asserted.
    last: Option<u64>,
    /// When it is to be asserted, and not before.
    held: u64,
    receive: Delay,
    transmit: Delay,
}

impl State {
    const fn reset() -> Self {
        Self {
            causes: Cause::empty(),
            mask: Cause::empty(),
            interval: 0,
            asserted: false,
            last: None,
            held: NEVER,
            receive: Delay::NONE,
            transmit: Delay::NONE,
        }
    }

    fn delay(&mut self, timer: Timer) -> &mut Delay {
        match timer {
            Timer::Receive => &mut self.receive,
            Timer::Transmit => &mut self.transmit,
        }
    }
}

/// Interrupts of the device, shared by registers and worker. Its lock is held
/// for a few instructions, and for driving the pin.
#[derive(Debug)]
pub(super) struct Interrupts {
    state: Mutex<State>,
    /// When [`expire`](Self::expire) has something to do; readable without the
    /// lock.
    deadline: AtomicU64,
    pin: Intx,
    clock: Arc<dyn Clock>,
    start: Instant,
    counters: Arc<E1000Counters>,
}

impl Interrupts {
    pub(super) fn new(pin: Intx, clock: Arc<dyn Clock>, counters: Arc<E1000Counters>) -> Self {
        Self {
            state: Mutex::new(State::reset()),
            deadline: AtomicU64::new(NEVER),
            pin,
            start: clock.now(),
            clock,
            counters,
        }
    }

    fn now(&self) -> u64 {
        let since = self.clock.now().saturating_duration_since(self.start);
        u64::try_from(since.as_nanos()).unwrap_or(NEVER - 1)
    }

    /// What follows from a change: the pin, and when to look again.
    fn settle(&self, state: &mut State) {
        let wanted = !(state.causes & state.mask).is_empty();
        if !wanted {
            state.held = NEVER;
            if state.asserted {
                state.asserted = false;
                self.pin.set(false);
            }
        } else if !state.asserted {
            let interval = interval_nanos(state.interval);
            // Without moderation, nobody needs to know what time it is.
            let now = if interval == 0 { 0 } else { self.now() };
            let earliest = match state.last {
                Some(last) if interval != 0 => last.saturating_add(interval),
                _ => 0,
            };
            if now >= earliest {
                state.held = NEVER;
                state.last = (interval != 0).then_some(now);
                state.asserted = true;
                self.counters.interrupts.add(1);
                self.pin.set(true);
            } else {
                if state.held == NEVER {
                    self.counters.moderated.add(1);
                }
                state.held = earliest;
            }
        }
        let deadline = state.held.min(state.receive.at()).min(state.transmit.at());
        self.deadline.store(deadline, Ordering::Release);
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = lock(&self.state);
        let result = change(&mut state);
        self.settle(&mut state);
        result
    }

    /// As after a reset.
    pub(super) fn reset(&self) {
        self.change(|state| {
            let asserted = state.asserted;
            *state = State::reset();
            state.asserted = asserted;
        });
    }

    /// Sets causes.
    pub(super) fn raise(&self, causes: Cause) {
        if !causes.is_empty() {
            self.change(|state| state.causes |= causes);
        }
    }

    /// Sets `causes`, and the cause of a delay: now, or once the delay is over,
    /// which is now if there is none.
    pub(super) fn report(&self, timer: Timer, causes: Cause, moment: Option<Moment>) {
        if causes.is_empty() && moment.is_none() {
            return;
        }
        self.change(|state| {
            state.causes |= causes;
            match moment {
                None => {}
                Some(Moment::Later) if delay_nanos(state.delay(timer).packet) != 0 => {
                    let now = self.now();
                    state.delay(timer).start(now);
                }
                Some(_) => Self::raise_now(state, timer),
            }
        });
    }

    fn raise_now(state: &mut State, timer: Timer) {
        state.delay(timer).stop();
        state.causes |= match timer {
            Timer::Receive => Cause::RXT0,
            Timer::Transmit => Cause::TXDW,
        };
    }

    /// Ends a delay that runs.
    pub(super) fn flush(&self, timer: Timer) {
        self.change(|state| {
            if state.delay(timer).at() != NEVER {
                Self::raise_now(state, timer);
            }
        });
    }

    /// Reads ICR: clears it.
    pub(super) fn take(&self) -> Cause {
        self.change(|state| std::mem::take(&mut state.causes))
    }

    /// Writes ICR: clears causes.
    pub(super) fn clear(&self, causes: Cause) {
        self.change(|state| state.causes -= causes);
    }

    pub(super) fn mask(&self) -> Cause {
        lock(&self.state).mask
    }

    /// Writes IMS.
    pub(super) fn enable(&self, causes: Cause) {
        self.change(|state| state.mask |= causes);
    }

    /// Writes IMC.
    pub(super) fn disable(&self, causes: Cause) {
        self.change(|state| state.mask -= causes);
    }

    pub(super) fn interval(&self) -> u32 {
        lock(&self.state).interval
    }

    /// Writes ITR.
    pub(super) fn set_interval(&self, value: u32) {
        self.change(|state| state.interval = value & 0xffff);
    }

    /// The registers of a delay: RDTR and RADV, or TIDV and TADV.
    pub(super) fn delays(&self, timer: Timer) -> (u32, u32) {
        let mut state = lock(&self.state);
        let delay = state.delay(timer);
        (delay.packet, delay.absolute)
    }

    /// Writes RDTR or TIDV.
    pub(super) fn set_delay(&self, timer: Timer, value: u32) {
        self.change(|state| state.delay(timer).packet = value & 0xffff);
    }

    /// Writes RADV or TADV.
    pub(super) fn set_absolute(&self, timer: Timer, value: u32) {
        self.change(|state| state.delay(timer).absolute = value & 0xffff);
    }

    /// Whether there is a time to wait for.
    pub(super) fn is_waiting(&self) -> bool {
        self.deadline.load(Ordering::Acquire) != NEVER
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.deadline.load(Ordering::Acquire) {
            NEVER => None,
            nanos => self.start.checked_add(Duration::from_nanos(nanos)),
        }
    }

    /// Does what the time has come for; whether there was anything.
    pub(super) fn expire(&self) -> bool {
        if !self.is_waiting() {
            return false;
        }
        let now = self.now();
        if self.deadline.load(Ordering::Acquire) > now {
            return false;
        }
        self.change(|state| {
            for timer in [Timer::Receive, Timer::Transmit] {
                if state.delay(timer).expire(now) {
                    Self::raise_now(state, timer);
                }
            }
        });
        true
    }
}
