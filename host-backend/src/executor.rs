//! Who drives workers: the contract, and threads that do it.
#![forbid(unsafe_code)]

use crate::event::EventFd;
use crate::virtio::device::DeviceEvents;
use crate::worker::{Counter, Interest, Progress, Worker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fmt;
use std::hint::spin_loop;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Drives the workers of one device's lanes. Called by one owner at a time.
pub trait Executor: Send + fmt::Debug {
    /// Takes a worker and drives it from now on. If it breaks, `events` is
    /// told, once.
    ///
    /// # Errors
    /// What the host says if it cannot; the worker is gone then.
    fn start(
        &mut self,
        lane: u16,
        worker: Box<dyn Worker>,
        events: Arc<dyn DeviceEvents>,
    ) -> io::Result<()>;

    /// Asks a lane to stop. Does not wait.
    fn begin_stop(&mut self, lane: u16);

    /// Hands the worker back once it has stopped.
    fn stopped(&mut self, lane: u16) -> Stopped;
}

/// What became of a lane that was asked to stop.
#[derive(Debug)]
pub enum Stopped {
    /// It still has something in flight; ask again.
    NotYet,
    /// Here it is.
    Worker(Box<dyn Worker>),
    /// There is no worker: the lane was never started, or its thread died.
    Gone,
}

/// How a thread treats its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadOptions {
    /// How long a worker that has nothing to do is polled before it waits.
    /// Zero waits at once, and so costs a doorbell and a wake-up for each
    /// burst of requests.
    pub spin: Duration,
    /// Requests per poll.
    pub budget: u32,
}

impl Default for ThreadOptions {
    fn default() -> Self {
        Self {
            spin: Duration::from_micros(50),
            budget: 64,
        }
    }
}

/// What the thread of a lane has done.
#[derive(Debug, Default)]
pub struct ThreadCounters {
    /// Polls that did something.
    pub busy_polls: Counter,
    /// Polls that found nothing.
    pub idle_polls: Counter,
    /// Waits for a source.
    pub waits: Counter,
}

/// A thread that drives a lane, as seen from outside.
#[derive(Debug, Clone)]
pub struct LaneThread {
    /// Kernel thread id, as in `/proc/self/task`.
    pub tid: i32,
    /// What it has done.
    pub counters: Arc<ThreadCounters>,
}

/// One thread for each lane.
#[derive(Debug)]
pub struct Threads {
    name: String,
    options: ThreadOptions,
    lanes: Vec<Option<Lane>>,
    running: Arc<Mutex<Vec<LaneThread>>>,
}

#[derive(Debug)]
struct Lane {
    stop: Arc<Stop>,
    thread: JoinHandle<Option<Box<dyn Worker>>>,
}

#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    wake: EventFd,
}

impl Threads {
    /// Threads whose names start with `name` (the kernel keeps 15 bytes).
    #[must_use]
    pub fn new(name: &str, options: ThreadOptions) -> Self {
        Self {
            name: name.to_owned(),
            options,
            lanes: Vec::new(),
            running: Arc::default(),
        }
    }

    /// The threads that run now; the list changes as lanes start and stop.
    #[must_use]
    pub fn running(&self) -> Arc<Mutex<Vec<LaneThread>>> {
        self.running.clone()
    }

    fn spawn(
        &self,
        lane: u16,
        worker: Box<dyn Worker>,
        events: Arc<dyn DeviceEvents>,
    ) -> io::Result<Lane> {
        let stop = Arc::new(Stop {
            asked: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let shared = stop.clone();
        let options = self.options;
        let running = self.running.clone();
        let thread = thread::Builder::new()
            .name(format!("{}-{lane}", self.name))
            .spawn(move || {
                let this = LaneThread {
                    tid: rustix::thread::gettid().as_raw_nonzero().get(),
                    counters: Arc::default(),
                };
                lock(&running).push(this.clone());
                let mut driver = Driver {
                    worker,
                    options,
                    stop: shared,
                    counters: this.counters,
                };
                let alive = driver.run(lane, &*events);
                lock(&running).retain(|other| other.tid != this.tid);
                alive.then_some(driver.worker)
            })?;
        Ok(Lane { stop, thread })
    }
}

fn lock(list: &Mutex<Vec<LaneThread>>) -> std::sync::MutexGuard<'_, Vec<LaneThread>> {
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Executor for Threads {
    fn start(
        &mut self,
        lane: u16,
        worker: Box<dyn Worker>,
        events: Arc<dyn DeviceEvents>,
    ) -> io::Result<()> {
        let index = usize::from(lane);
        if self.lanes.len() <= index {
            self.lanes.resize_with(index + 1, || None);
        }
        let started = self.spawn(lane, worker, events)?;
        if let Some(place) = self.lanes.get_mut(index) {
            *place = Some(started);
        }
        Ok(())
    }

    fn begin_stop(&mut self, lane: u16) {
        if let Some(Some(lane)) = self.lanes.get(usize::from(lane)) {
            lane.stop.asked.store(true, Ordering::Release);
            lane.stop.wake.notify();
        }
    }

    fn stopped(&mut self, lane: u16) -> Stopped {
        let Some(place) = self.lanes.get_mut(usize::from(lane)) else {
            return Stopped::Gone;
        };
        match place {
            Some(running) if !running.thread.is_finished() => Stopped::NotYet,
            _ => match place.take().map(|lane| lane.thread.join()) {
                Some(Ok(Some(worker))) => Stopped::Worker(worker),
                Some(_) => {
                    log::error!("the thread of lane {lane} died");
                    Stopped::Gone
                }
                None => Stopped::Gone,
            },
        }
    }
}

impl Drop for Threads {
    /// Stops every lane and waits until nothing is in flight.
    fn drop(&mut self) {
        for lane in 0..self.lanes.len() {
            self.begin_stop(lane as u16);
        }
        for lane in self.lanes.drain(..).flatten() {
            let _ = lane.thread.join();
        }
    }
}

struct Driver {
    worker: Box<dyn Worker>,
    options: ThreadOptions,
    stop: Arc<Stop>,
    counters: Arc<ThreadCounters>,
}

impl Driver {
    /// Drives the worker until it has stopped. `false` if that cannot be.
    fn run(&mut self, lane: u16, events: &dyn DeviceEvents) -> bool {
        let mut idle_since = None;
        let mut stopping = false;
        loop {
            if !stopping && self.stop.asked.load(Ordering::Acquire) {
                stopping = true;
                self.worker.begin_stop();
            }
            match self.worker.poll(self.options.budget) {
                Progress::More => {
                    self.counters.busy_polls.add(1);
                    idle_since = None;
                    continue;
                }
                Progress::Stopped => return true,
                Progress::Broken(fault) => {
                    log::warn!("lane {lane} is broken: {fault}");
                    events.needs_reset(lane, fault);
                    continue;
                }
                Progress::Drained => self.counters.idle_polls.add(1),
            }
            if !self.options.spin.is_zero() && !stopping {
                let since = *idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() < self.options.spin {
                    spin_loop();
                    continue;
                }
            }
            idle_since = None;
            if !self.worker.arm() {
                self.counters.waits.add(1);
                if let Err(error) = self.wait() {
                    log::error!("lane {lane} cannot wait: {error}");
                    return false;
                }
            }
        }
    }

    /// Waits until a source is ready, the deadline has come, or the lane is
    /// asked to stop.
    fn wait(&self) -> io::Result<()> {
        let timeout = self.worker.deadline().map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        let mut fds = vec![PollFd::new(&self.stop.wake, PollFlags::IN)];
        self.worker.sources(&mut |fd, interest| {
            let flags = match interest {
                Interest::Readable => PollFlags::IN,
                Interest::Writable => PollFlags::OUT,
            };
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        });
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {
                    // Whoever wakes has asked before. Taken here and not where
                    // that is seen, which may be earlier: a wake-up that is
                    // left would end every later wait at once.
                    self.stop.wake.take();
                    return Ok(());
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::queue::Fault;
    use crate::worker::LaneState;
    use std::os::fd::{AsFd, BorrowedFd};

    /// A worker that has something in flight until `done` says otherwise.
    #[derive(Debug)]
    struct Busy {
        done: Arc<EventFd>,
        stopping: bool,
    }

    impl Worker for Busy {
        fn poll(&mut self, _budget: u32) -> Progress {
            if self.stopping && self.done.take() > 0 {
                Progress::Stopped
            } else {
                Progress::Drained
            }
        }
        fn arm(&mut self) -> bool {
            false
        }
        fn begin_stop(&mut self) {
            self.stopping = true;
        }
        fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
            each(self.done.as_fd(), Interest::Readable);
        }
        fn state(&self) -> LaneState {
            LaneState::default()
        }
    }

    #[derive(Debug)]
    struct Nobody;

    impl DeviceEvents for Nobody {
        fn config_changed(&self) {}
        fn needs_reset(&self, lane: u16, fault: Fault) {
            panic!("lane {lane}: {fault}");
        }
    }

    #[test]
    fn a_lane_that_is_asked_to_stop_sleeps_until_the_disk_is_done() {
        let options = ThreadOptions {
            spin: Duration::ZERO,
            budget: 1,
        };
        let mut threads = Threads::new("test", options);
        let done = Arc::new(EventFd::new().unwrap());
        let worker = Busy {
            done: done.clone(),
            stopping: false,
        };
        threads
            .start(0, Box::new(worker), Arc::new(Nobody))
            .unwrap();
        // Asking again is what the race between asking and waking looks like:
        // a wake-up that comes after the request was seen.
        for _ in 0..3 {
            threads.begin_stop(0);
            thread::sleep(Duration::from_millis(10));
        }
        let counters = lock(&threads.running)[0].counters.clone();
        thread::sleep(Duration::from_millis(20));
        let waits = counters.waits.get();
        assert!(matches!(threads.stopped(0), Stopped::NotYet));
        done.notify();
        assert!(waits < 20, "{waits} waits");
        let start = Instant::now();
        loop {
            match threads.stopped(0) {
                Stopped::NotYet => assert!(start.elapsed() < Duration::from_secs(20)),
                Stopped::Worker(_) => break,
                Stopped::Gone => panic!("the thread died"),
            }
        }
    }
}
