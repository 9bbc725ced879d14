//! Executors drive workers: the contract, and one that does it on threads.
#![forbid(unsafe_code)]

mod spin;
mod thread;

pub use spin::AdaptiveSpin;
pub use thread::ThreadEnded;

use crate::worker::{Counter, LaneEvents, Worker};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use thread::{RunningLane, WorkerThread};

/// Drives the workers of one device's lanes. Called by one owner at a time.
pub trait Executor: Send + fmt::Debug {
    /// Takes a worker and drives it from now on. If it breaks, it calls
    /// `events`, once.
    ///
    /// # Errors
    /// The host's error if it cannot; the worker is dropped then.
    fn start(
        &mut self,
        lane: u16,
        worker: Box<dyn Worker>,
        events: Arc<dyn LaneEvents>,
    ) -> io::Result<()>;

    /// Asks a lane to stop. Does not wait.
    fn begin_stop(&mut self, lane: u16);

    /// Returns the worker once it has stopped. Does not wait.
    fn poll_stopped(&mut self, lane: u16) -> Stopped;
}

/// The state of a lane that was asked to stop.
#[derive(Debug)]
pub enum Stopped {
    /// It still has something in flight; ask again.
    Pending,
    /// It has stopped.
    Worker(Box<dyn Worker>),
    /// There is no worker: the lane was never started, or its thread died.
    Lost,
}

/// Options of worker threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadOptions {
    /// Maximum number of threads. Lanes are assigned to them in turn; those of
    /// one thread share its time. 1 drives all lanes on one thread, `u16::MAX` each on its
    /// own.
    pub threads: u16,
    /// Upper bound of the time for which idle workers are polled before their
    /// thread waits; [`AdaptiveSpin`] lowers it, down to nothing, while spinning
    /// finds no work. Zero always waits at once, which costs a notification and
    /// a wake-up for each burst of requests.
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

/// Statistics of a worker thread.
#[derive(Debug, Default)]
pub struct ThreadCounters {
    /// Turns (one poll of each lane) that found work.
    pub busy_polls: Counter,
    /// Turns that found nothing.
    pub idle_polls: Counter,
    /// Waits for a source.
    pub waits: Counter,
    /// Idle periods that ended while the thread spun.
    pub spins: Counter,
    /// Idle periods that outlasted the spinning.
    pub spins_in_vain: Counter,
    /// Time spun in those, in nanoseconds.
    pub nanos_in_vain: Counter,
}

/// A running worker thread.
#[derive(Debug, Clone)]
pub struct LaneThread {
    /// Kernel thread id, as in `/proc/self/task`.
    pub tid: i32,
    /// Its statistics.
    pub counters: Arc<ThreadCounters>,
}

/// Threads for the lanes of a device: one for each, or fewer.
#[derive(Debug)]
pub struct Threads {
    name: String,
    options: ThreadOptions,
    threads: Vec<Option<WorkerThread>>,
    /// By lane: started, and not returned.
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
            threads: Vec::new(),
            started: Vec::new(),
            running: Arc::default(),
        }
    }

    /// The threads that run now; the list changes as lanes start and stop.
    #[must_use]
    pub fn running(&self) -> Arc<Mutex<Vec<LaneThread>>> {
        self.running.clone()
    }

    /// The index of the thread that drives a lane.
    fn thread_index(&self, lane: u16) -> u16 {
        lane % self.options.threads.max(1)
    }

    fn thread(&self, lane: u16) -> Option<&WorkerThread> {
        let index = usize::from(self.thread_index(lane));
        self.threads.get(index)?.as_ref()
    }

    fn is_started(&self, lane: u16) -> bool {
        self.started.get(usize::from(lane)) == Some(&true)
    }
}

/// The element at `index` of a list that grows as needed.
fn grow<T: Default>(list: &mut Vec<T>, index: u16) -> Option<&mut T> {
    let index = usize::from(index);
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
        events: Arc<dyn LaneEvents>,
    ) -> io::Result<()> {
        let running = RunningLane::new(lane, worker, events);
        let refused = match self.thread(lane) {
            Some(thread) => thread.start(running),
            None => Some(running),
        };
        if let Some(running) = refused {
            let index = self.thread_index(lane);
            let name = format!("{}-{index}", self.name);
            if let Some(slot) = grow(&mut self.threads, index) {
                // The old thread has exited, or is about to.
                let stopped = slot.take().map(WorkerThread::join).unwrap_or_default();
                let list = self.running.clone();
                let thread = WorkerThread::spawn(name, running, stopped, self.options, list)?;
                *slot = Some(thread);
            }
        }
        if let Some(started) = grow(&mut self.started, lane) {
            *started = true;
        }
        Ok(())
    }

    fn begin_stop(&mut self, lane: u16) {
        if self.is_started(lane)
            && let Some(thread) = self.thread(lane)
        {
            thread.begin_stop(lane);
        }
    }

    fn poll_stopped(&mut self, lane: u16) -> Stopped {
        if !self.is_started(lane) {
            return Stopped::Lost;
        }
        let stopped = match self.thread(lane) {
            Some(thread) => thread.poll_stopped(lane),
            None => Stopped::Lost,
        };
        if !matches!(stopped, Stopped::Pending)
            && let Some(started) = self.started.get_mut(usize::from(lane))
        {
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
        for thread in self.threads.drain(..).flatten() {
            thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
