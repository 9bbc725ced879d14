//! Who drives workers: the contract, and threads that do it.
#![forbid(unsafe_code)]

mod crew;
mod spin;

pub use spin::AdaptiveSpin;

use crate::virtio::device::DeviceEvents;
use crate::worker::{Counter, Worker};
use crew::Crew;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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

/// How threads treat their workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadOptions {
    /// Most threads. Lanes are dealt out to them in turn; those of one thread
    /// share its time. 1 drives all lanes on one thread, `u16::MAX` each on its
    /// own.
    pub threads: u16,
    /// For how long workers that have nothing to do are polled before their
    /// thread waits, at the most: it is less, down to nothing, while it leads
    /// to nothing ([`AdaptiveSpin`]). Zero always waits at once, and so costs
    /// a doorbell and a wake-up for each burst of requests.
    pub spin: Duration,
    /// Requests per poll.
    pub budget: u32,
}

impl Default for ThreadOptions {
    fn default() -> Self {
        Self {
            threads: u16::MAX,
            spin: Duration::from_micros(50),
            budget: 64,
        }
    }
}

/// What a thread has done.
#[derive(Debug, Default)]
pub struct ThreadCounters {
    /// Rounds of polls, one of each lane, that did something.
    pub busy_polls: Counter,
    /// Rounds of polls that found nothing.
    pub idle_polls: Counter,
    /// Waits for a source.
    pub waits: Counter,
    /// Idle times that ended while the thread polled.
    pub spins: Counter,
    /// Idle times that went on when the thread stopped polling.
    pub spins_in_vain: Counter,
    /// For how long those were polled, in nanoseconds.
    pub nanos_in_vain: Counter,
}

/// A thread that drives lanes, as seen from outside.
#[derive(Debug, Clone)]
pub struct LaneThread {
    /// Kernel thread id, as in `/proc/self/task`.
    pub tid: i32,
    /// What it has done.
    pub counters: Arc<ThreadCounters>,
}

/// Threads for the lanes of a device: one for each, or fewer.
#[derive(Debug)]
pub struct Threads {
    name: String,
    options: ThreadOptions,
    crews: Vec<Option<Crew>>,
    /// By lane: started, and not handed back.
    started: Vec<bool>,
    running: Arc<Mutex<Vec<LaneThread>>>,
}

impl Threads {
    /// Threads whose names start with `name` (the kernel keeps 15 bytes).
    #[must_use]
    pub fn new(name: &str, options: ThreadOptions) -> Self {
        Self {
            name: name.to_owned(),
            options,
            crews: Vec::new(),
            started: Vec::new(),
            running: Arc::default(),
        }
    }

    /// The threads that run now; the list changes as lanes start and stop.
    #[must_use]
    pub fn running(&self) -> Arc<Mutex<Vec<LaneThread>>> {
        self.running.clone()
    }

    /// Which thread drives a lane.
    fn thread_of(&self, lane: u16) -> u16 {
        lane % self.options.threads.max(1)
    }

    fn crew(&mut self, lane: u16) -> Option<&mut Crew> {
        let thread = usize::from(self.thread_of(lane));
        self.crews.get_mut(thread)?.as_mut()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The place of an index in a list that grows as needed.
fn place<T: Default>(list: &mut Vec<T>, index: usize) -> Option<&mut T> {
    if list.len() <= index {
        list.resize_with(index + 1, T::default);
    }
    list.get_mut(index)
}

impl Executor for Threads {
    fn start(
        &mut self,
        lane: u16,
        worker: Box<dyn Worker>,
        events: Arc<dyn DeviceEvents>,
    ) -> io::Result<()> {
        let order = crew::Lane::new(lane, worker, events);
        let left = match self.crew(lane) {
            Some(crew) => crew.start(order),
            None => Some(order),
        };
        if let Some(order) = left {
            let thread = self.thread_of(lane);
            let name = format!("{}-{thread}", self.name);
            let Some(place) = place(&mut self.crews, usize::from(thread)) else {
                return Ok(());
            };
            // The thread has ended, or is about to.
            let stopped = place.take().map(Crew::join).unwrap_or_default();
            let running = self.running.clone();
            *place = Some(Crew::spawn(name, order, stopped, self.options, running)?);
        }
        if let Some(started) = place(&mut self.started, usize::from(lane)) {
            *started = true;
        }
        Ok(())
    }

    fn begin_stop(&mut self, lane: u16) {
        if self.started.get(usize::from(lane)) == Some(&true)
            && let Some(crew) = self.crew(lane)
        {
            crew.begin_stop(lane);
        }
    }

    fn stopped(&mut self, lane: u16) -> Stopped {
        if self.started.get(usize::from(lane)) != Some(&true) {
            return Stopped::Gone;
        }
        let stopped = match self.crew(lane) {
            Some(crew) => crew.stopped(lane),
            None => Stopped::Gone,
        };
        if let (Some(started), false) = (
            self.started.get_mut(usize::from(lane)),
            matches!(stopped, Stopped::NotYet),
        ) {
            *started = false;
        }
        stopped
    }
}

impl Drop for Threads {
    /// Stops every lane and waits until nothing is in flight.
    fn drop(&mut self) {
        for lane in 0..self.started.len() {
            self.begin_stop(lane as u16);
        }
        for crew in self.crews.drain(..).flatten() {
            crew.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EventFd;
    use crate::virtio::queue::Fault;
    use crate::worker::{Interest, LaneState, Progress};
    use std::os::fd::{AsFd, BorrowedFd};
    use std::thread;
    use std::time::Instant;

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
            ..ThreadOptions::default()
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

    /// Waits until a lane has stopped; whether its worker came back.
    fn stop(threads: &mut Threads, lane: u16) -> bool {
        threads.begin_stop(lane);
        let start = Instant::now();
        loop {
            match threads.stopped(lane) {
                Stopped::NotYet => assert!(start.elapsed() < Duration::from_secs(20)),
                Stopped::Worker(_) => return true,
                Stopped::Gone => return false,
            }
            thread::yield_now();
        }
    }

    fn idle(done: &Arc<EventFd>) -> Box<Busy> {
        Box::new(Busy {
            done: done.clone(),
            stopping: false,
        })
    }

    #[test]
    fn lanes_share_as_many_threads_as_there_may_be() {
        for (threads, lanes, expected) in [(1, 4, 1), (2, 4, 2), (3, 2, 2), (0, 3, 1), (9, 1, 1)] {
            let options = ThreadOptions {
                threads,
                ..ThreadOptions::default()
            };
            let mut threads = Threads::new("share", options);
            let done: Vec<_> = (0..lanes)
                .map(|_| Arc::new(EventFd::new().unwrap()))
                .collect();
            for _ in 0..3 {
                for (lane, done) in (0..).zip(&done) {
                    threads.start(lane, idle(done), Arc::new(Nobody)).unwrap();
                }
                let start = Instant::now();
                while lock(&threads.running).len() < expected {
                    assert!(start.elapsed() < Duration::from_secs(20));
                    thread::yield_now();
                }
                assert_eq!(lock(&threads.running).len(), expected);
                // In any order; one that still has work holds up no other.
                for (lane, done) in (0..).zip(&done).skip(1) {
                    done.notify();
                    assert!(stop(&mut threads, lane));
                    assert!(matches!(threads.stopped(lane), Stopped::Gone));
                }
                threads.begin_stop(0);
                assert!(matches!(threads.stopped(0), Stopped::NotYet));
                done[0].notify();
                assert!(stop(&mut threads, 0));
                assert_eq!(lock(&threads.running).len(), 0);
            }
        }
    }

    #[test]
    fn a_lane_that_stopped_is_kept_while_another_starts_again() {
        let options = ThreadOptions {
            threads: 1,
            ..ThreadOptions::default()
        };
        let mut threads = Threads::new("kept", options);
        let done = [(); 2].map(|()| Arc::new(EventFd::new().unwrap()));
        for _ in 0..100 {
            for (lane, done) in (0..).zip(&done) {
                threads.start(lane, idle(done), Arc::new(Nobody)).unwrap();
                done.notify();
            }
            threads.begin_stop(1);
            assert!(stop(&mut threads, 0));
            done[0].notify();
            threads.start(0, idle(&done[0]), Arc::new(Nobody)).unwrap();
            assert!(stop(&mut threads, 1));
            assert!(stop(&mut threads, 0));
        }
    }

    #[test]
    fn a_lane_can_start_again_beside_one_that_runs() {
        let options = ThreadOptions {
            threads: 1,
            ..ThreadOptions::default()
        };
        let mut threads = Threads::new("again", options);
        let done = [(); 2].map(|()| Arc::new(EventFd::new().unwrap()));
        for (lane, done) in (0..).zip(&done) {
            threads.start(lane, idle(done), Arc::new(Nobody)).unwrap();
        }
        for _ in 0..100 {
            done[1].notify();
            assert!(stop(&mut threads, 1));
            threads.start(1, idle(&done[1]), Arc::new(Nobody)).unwrap();
        }
        assert_eq!(lock(&threads.running).len(), 1);
        // Dropping waits for both.
        done.iter().for_each(|done| done.notify());
        drop(threads);
    }

    /// A worker that panics when it is to stop.
    #[derive(Debug)]
    struct Broken;

    impl Worker for Broken {
        fn poll(&mut self, _budget: u32) -> Progress {
            Progress::Drained
        }
        fn arm(&mut self) -> bool {
            false
        }
        fn begin_stop(&mut self) {
            panic!("on purpose");
        }
        fn sources<'a>(&'a self, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}
        fn state(&self) -> LaneState {
            LaneState::default()
        }
    }

    /// Notes which lanes were said to be broken, and how.
    #[derive(Debug, Default)]
    struct Told(Mutex<Vec<(u16, Fault)>>);

    impl DeviceEvents for Told {
        fn config_changed(&self) {}
        fn needs_reset(&self, lane: u16, fault: Fault) {
            lock(&self.0).push((lane, fault));
        }
    }

    #[test]
    fn lanes_of_a_thread_that_died_are_gone_and_can_start_again() {
        let options = ThreadOptions {
            threads: 1,
            ..ThreadOptions::default()
        };
        let mut threads = Threads::new("died", options);
        let done = Arc::new(EventFd::new().unwrap());
        let told = Arc::new(Told::default());
        threads.start(0, Box::new(Broken), told.clone()).unwrap();
        threads.start(1, idle(&done), told.clone()).unwrap();
        assert!(!stop(&mut threads, 0));
        assert!(!stop(&mut threads, 1), "it shared the thread");
        let mut said = std::mem::take(&mut *lock(&told.0));
        said.sort_by_key(|(lane, _)| *lane);
        assert_eq!(said, [(0, Fault::Abandoned), (1, Fault::Abandoned)]);
        threads.start(1, idle(&done), Arc::new(Nobody)).unwrap();
        done.notify();
        assert!(stop(&mut threads, 1));
    }

    /// A worker that has work as often as it is told to.
    #[derive(Debug)]
    struct Fed {
        food: Arc<EventFd>,
        stopping: bool,
    }

    impl Worker for Fed {
        fn poll(&mut self, _budget: u32) -> Progress {
            if self.stopping {
                Progress::Stopped
            } else if self.food.take() > 0 {
                Progress::More
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
            each(self.food.as_fd(), Interest::Readable);
        }
        fn state(&self) -> LaneState {
            LaneState::default()
        }
    }

    #[test]
    fn a_thread_that_polls_in_vain_counts_it_and_gives_up() {
        let options = ThreadOptions {
            spin: Duration::from_micros(100),
            ..ThreadOptions::default()
        };
        for spin in [options.spin, Duration::ZERO] {
            let mut threads = Threads::new("vain", ThreadOptions { spin, ..options });
            let food = Arc::new(EventFd::new().unwrap());
            let worker = Fed {
                food: food.clone(),
                stopping: false,
            };
            threads
                .start(0, Box::new(worker), Arc::new(Nobody))
                .unwrap();
            let start = Instant::now();
            let mut running = Vec::new();
            while running.is_empty() {
                assert!(start.elapsed() < Duration::from_secs(20));
                running = lock(&threads.running).clone();
            }
            let counters = running[0].counters.clone();
            for round in 1..=20 {
                // Far more than the bound, so that no idle time is short.
                while counters.waits.get() < round {
                    assert!(start.elapsed() < Duration::from_secs(20));
                    thread::yield_now();
                }
                thread::sleep(Duration::from_millis(1));
                food.notify();
            }
            while counters.waits.get() < 21 {
                assert!(start.elapsed() < Duration::from_secs(20));
                thread::yield_now();
            }
            assert!(stop(&mut threads, 0));
            let in_vain = counters.spins_in_vain.get();
            if spin.is_zero() {
                assert_eq!((in_vain, counters.nanos_in_vain.get()), (0, 0));
            } else {
                assert_eq!(in_vain, 4, "100, 50, 25 and 12.5 µs");
                assert!(counters.nanos_in_vain.get() >= 187_500);
            }
            assert_eq!(counters.spins.get(), 0);
        }
    }
}
