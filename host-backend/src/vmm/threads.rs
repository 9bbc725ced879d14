//! CPU time of threads.

use std::fs;
use std::time::Duration;

/// CPU time that a thread has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThreadTime {
    /// All of it, to the nanosecond. For a vCPU that includes the guest.
    pub total: Duration,
    /// The part spent in the kernel. The kernel finds it by sampling, so it
    /// is coarse for short times.
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

impl std::iter::Sum for ThreadTime {
    fn sum<I: Iterator<Item = Self>>(times: I) -> Self {
        times.fold(Self::default(), std::ops::Add::add)
    }
}

/// CPU time of a thread of this process; zero if there is no such thread.
#[must_use]
pub fn thread_time(tid: i32) -> ThreadTime {
    let Some(total) = cpu_clock(tid) else {
        return ThreadTime::default();
    };
    // Fields 14 and 15 of stat: user and system time in clock ticks, behind
    // the name in parentheses.
    let ticks = fs::read_to_string(format!("/proc/self/task/{tid}/stat"))
        .ok()
        .and_then(|text| {
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

/// CPU time of the threads that the kernel runs for this process's io_uring
/// requests.
#[must_use]
pub fn kernel_worker_time() -> Duration {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return Duration::ZERO;
    };
    tasks
        .filter_map(|task| {
            let task = task.ok()?;
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            let tid = task.file_name().to_str()?.parse().ok()?;
            if name.starts_with("iou-wrk") {
                cpu_clock(tid)
            } else {
                None
            }
        })
        .sum()
}

/// The CPU clock of one thread.
fn cpu_clock(tid: i32) -> Option<Duration> {
    if tid <= 0 {
        return None;
    }
    // linux/posix-timers.h: the inverted id, "one thread" and "scheduler
    // clock".
    let clock = (!tid << 3) | 4 | 2;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    Some(Duration::new(
        time.tv_sec.try_into().ok()?,
        time.tv_nsec.try_into().ok()?,
    ))
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
        assert_eq!(thread_time(0), ThreadTime::default());
        let _ = kernel_worker_time();
    }
}
