//! How long to poll before sleeping.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Idle times that are slept through at once before one is polled through
/// again. A sleeper cannot tell a short idle time from a slow wake-up.
const PROBE_AFTER: u32 = 32;

/// Adapts how long an idle worker is polled to what came of it: longer while
/// work arrives meanwhile, not at all while it does not.
///
/// It knows no clock: whoever asks says how long it took.
///
/// ```
/// use pvkit_host::executor::AdaptiveSpin;
/// use std::time::Duration;
///
/// let mut spin = AdaptiveSpin::new(Duration::from_micros(50));
/// while !spin.allowance().is_zero() {
///     spin.in_vain();
/// }
/// spin.work_after(Duration::from_micros(20));
/// assert!(!spin.allowance().is_zero());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdaptiveSpin {
    bound: Duration,
    now: Duration,
    /// Idle times since the last that was polled.
    slept: u32,
    probing: bool,
}

impl AdaptiveSpin {
    /// Never polls for longer than `bound`; starts with that. Zero is off.
    #[must_use]
    pub const fn new(bound: Duration) -> Self {
        Self {
            bound,
            now: bound,
            slept: 0,
            probing: false,
        }
    }

    /// Whether it ever polls.
    #[must_use]
    pub const fn is_off(&self) -> bool {
        self.bound.is_zero()
    }

    /// For how long to poll now.
    #[must_use]
    pub const fn allowance(&self) -> Duration {
        self.now
    }

    /// What polling starts with, and the least there is.
    fn least(&self) -> Duration {
        self.bound / 8
    }

    /// Nothing came in while the [`allowance`](Self::allowance) was used up:
    /// the next is half as long, or none.
    pub fn in_vain(&mut self) {
        self.now /= 2;
        if self.probing || self.now < self.least() {
            self.now = Duration::ZERO;
        }
        self.probing = false;
    }

    /// Work came in after the worker was idle for so long, whether it was
    /// polled or slept. If polling could have found it, the next is twice as
    /// long.
    pub fn work_after(&mut self, idle: Duration) {
        self.probing = false;
        if idle <= self.bound {
            self.now = (self.now * 2).max(self.least()).min(self.bound);
        }
        if self.now.is_zero() && !self.is_off() {
            self.slept += 1;
            if self.slept >= PROBE_AFTER {
                self.slept = 0;
                self.now = self.bound;
                self.probing = true;
            }
        } else {
            self.slept = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_micros(48);

    fn micros(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    /// Plays idle times of these lengths, as a thread would that wakes up at
    /// once: how many were polled through, and for how long it was polled in
    /// vain.
    fn play(spin: &mut AdaptiveSpin, idle: impl IntoIterator<Item = u64>) -> (usize, Duration) {
        let (mut caught, mut in_vain) = (0, Duration::ZERO);
        for idle in idle.into_iter().map(micros) {
            let allowance = spin.allowance();
            assert!(allowance <= BOUND);
            if allowance.is_zero() || idle > allowance {
                in_vain += allowance;
                if !allowance.is_zero() {
                    spin.in_vain();
                }
            } else {
                caught += 1;
            }
            spin.work_after(idle);
        }
        (caught, in_vain)
    }

    #[test]
    fn off_stays_off() {
        let mut spin = AdaptiveSpin::new(Duration::ZERO);
        for _ in 0..1000 {
            assert!(spin.is_off());
            assert_eq!(spin.allowance(), Duration::ZERO);
            spin.in_vain();
            spin.work_after(Duration::ZERO);
        }
    }

    #[test]
    fn work_that_comes_soon_is_always_caught() {
        for idle in [0, 1, 20, 48] {
            let mut spin = AdaptiveSpin::new(BOUND);
            assert_eq!(play(&mut spin, [idle; 1000]), (1000, Duration::ZERO));
            assert_eq!(spin.allowance(), BOUND);
        }
    }

    #[test]
    fn polling_in_vain_ends_soon() {
        let mut spin = AdaptiveSpin::new(BOUND);
        let mut allowances = Vec::new();
        for _ in 0..6 {
            allowances.push(spin.allowance());
            play(&mut spin, [1_000_000]);
        }
        assert_eq!(allowances, [48, 24, 12, 6, 0, 0].map(micros));
        // From then on, one idle time in so many is polled, once.
        let (caught, in_vain) = play(&mut spin, [1_000_000; 1000]);
        assert_eq!(caught, 0);
        assert!(in_vain <= BOUND * 1000 / PROBE_AFTER, "{in_vain:?}");
        assert!(in_vain >= BOUND * 900 / PROBE_AFTER, "{in_vain:?}");
    }

    #[test]
    fn it_grows_again_when_work_comes_soon() {
        let mut spin = AdaptiveSpin::new(BOUND);
        play(&mut spin, [1000; 5]);
        assert_eq!(spin.allowance(), Duration::ZERO);
        let mut allowances = Vec::new();
        for _ in 0..5 {
            play(&mut spin, [5]);
            allowances.push(spin.allowance());
        }
        assert_eq!(allowances, [6, 12, 24, 48, 48].map(micros));
    }

    #[test]
    fn slow_wake_ups_do_not_keep_it_asleep() {
        // Idle times of 20 µs look like 120 µs to a sleeper.
        let mut spin = AdaptiveSpin::new(BOUND);
        play(&mut spin, [1000; 5]);
        let mut slept = 0;
        while spin.allowance().is_zero() {
            spin.work_after(micros(120));
            slept += 1;
        }
        assert!(slept <= PROBE_AFTER, "{slept}");
        assert_eq!(play(&mut spin, [20; 100]), (100, Duration::ZERO));
    }

    #[test]
    fn no_sequence_exceeds_the_bound() {
        let mut state = 7u64;
        let mut spin = AdaptiveSpin::new(BOUND);
        let idle = (0..10_000).map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % 200
        });
        play(&mut spin, idle);
    }
}
