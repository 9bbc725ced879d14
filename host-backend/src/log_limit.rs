//! A limit for log lines that a guest, or the peer of a link, can trigger.
#![forbid(unsafe_code)]

use crate::sync::lock;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines at once.
const BURST: u32 = 8;
/// One more line is allowed after each interval.
const INTERVAL: Duration = Duration::from_secs(5);

/// A token bucket for one device. What it holds back is counted, and reported
/// with the next line.
#[derive(Debug)]
pub(crate) struct LogLimit(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    tokens: u32,
    refilled: Option<Instant>,
    held_back: u64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self(Mutex::new(Bucket {
            tokens: BURST,
            refilled: None,
            held_back: 0,
        }))
    }
}

/// Formats the number of lines that were held back, behind the next one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct HeldBack(u64);

impl std::fmt::Display for HeldBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " ({count} similar messages were held back)"),
        }
    }
}

impl LogLimit {
    /// Whether a line may be written now, and how many were held back before
    /// it.
    pub(crate) fn allow(&self) -> Option<HeldBack> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<HeldBack> {
        let mut bucket = lock(&self.0);
        let refilled = *bucket.refilled.get_or_insert(now);
        let elapsed = now.saturating_duration_since(refilled);
        let intervals = elapsed.as_nanos() / INTERVAL.as_nanos();
        if intervals > 0 {
            let intervals = u32::try_from(intervals).unwrap_or(u32::MAX);
            bucket.tokens = bucket.tokens.saturating_add(intervals).min(BURST);
            bucket.refilled = Some(now);
        }
        match bucket.tokens.checked_sub(1) {
            Some(left) => {
                bucket.tokens = left;
                Some(HeldBack(std::mem::take(&mut bucket.held_back)))
            }
            None => {
                bucket.held_back += 1;
                None
            }
        }
    }
}

/// Logs a warning unless the device has logged too much.
macro_rules! warn_limited {
    ($limit:expr, $format:literal $(, $argument:expr)* $(,)?) => {
        if let Some(held_back) = $limit.allow() {
            log::warn!(concat!($format, "{}") $(, $argument)*, held_back);
        }
    };
}
pub(crate) use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_passes_then_one_per_interval() {
        let limit = LogLimit::default();
        let start = Instant::now();
        let count = |at: Duration, tries: u32| {
            let allowed = (0..tries).filter_map(|_| limit.allow_at(start + at));
            allowed.map(|HeldBack(count)| count).collect::<Vec<_>>()
        };
        assert_eq!(count(Duration::ZERO, 1000), [0; BURST as usize]);
        assert_eq!(count(INTERVAL / 2, 1000), [0; 0]);
        assert_eq!(count(INTERVAL, 1000), [1992]);
        assert_eq!(count(3 * INTERVAL, 5), [999, 0]);
        let later = count(1000 * INTERVAL, 1000);
        assert_eq!(later.len(), BURST as usize);
    }

    #[test]
    fn held_back_lines_are_reported() {
        assert_eq!(HeldBack(0).to_string(), "");
        let text = HeldBack(7).to_string();
        assert_eq!(text, " (7 similar messages were held back)");
    }
}
