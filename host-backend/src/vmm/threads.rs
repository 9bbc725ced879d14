//! CPU time of threads.
#![forbid(unsafe_code)]

use std::time::Duration;

/// CPU time that a thread has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThreadTime {
    /// All of it.
    pub total: Duration,
    /// The part spent in the kernel. The kernel splits the total by samples,
    /// so this is coarse for short times.
    pub kernel: Duration,
}

impl ThreadTime {
    /// What was added since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            total: self.total.saturating_sub(earlier.total),
            kernel: self.kernel.saturating_sub(earlier.kernel),
        }
    }
}

impl std::ops::Add for ThreadTime {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
            kernel: self.kernel + other.kernel,
        }
    }
}

/// CPU time of a thread of this process; zero if there is no such thread.
#[must_use]
pub fn thread_time(tid: i32) -> ThreadTime {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/self/task/{tid}/{file}"));
    // The first field of schedstat: nanoseconds on a CPU.
    let total = read("schedstat")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .map_or(Duration::ZERO, Duration::from_nanos);
    // Fields 14 and 15 of stat: user and system time in clock ticks, behind
    // the name in parentheses.
    let ticks = read("stat").ok().and_then(|text| {
        let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
        let user: u64 = fields.next()?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        Some((user, system))
    });
    let kernel = match ticks {
        Some((user, system)) if user + system > 0 => {
            total.mul_f64(system as f64 / (user + system) as f64)
        }
        _ => Duration::ZERO,
    };
    ThreadTime { total, kernel }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_thread_uses_time_and_an_absent_one_none() {
        let me = rustix::thread::gettid().as_raw_nonzero().get();
        let before = thread_time(me);
        let mut sum = 0u64;
        while thread_time(me).since(before).total < Duration::from_millis(2) {
            sum = std::hint::black_box(sum + 1);
        }
        assert_eq!(thread_time(-1), ThreadTime::default());
    }
}
