//! Threads that start, stop, share and lose lanes.

use super::*;
use crate::event::EventFd;
use crate::sync::lock;
use crate::worker::{Failure, Interest, Progress};
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Instant;

/// A worker with a request in flight until `done` is notified.
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
}

#[derive(Debug)]
struct NoFailure;

impl LaneEvents for NoFailure {
    fn failed(&self, lane: u16, why: &Failure) {
        panic!("lane {lane}: {why}");
    }
}

#[test]
fn stopping_lane_sleeps_until_disk_completes() {
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
        .start(0, Box::new(worker), Arc::new(NoFailure))
        .unwrap();
    // Asking again stands for the race in which the wake-up arrives after
    // the command was taken.
    for _ in 0..3 {
        threads.begin_stop(0);
        thread::sleep(Duration::from_millis(10));
    }
    let counters = lock(&threads.running)[0].counters.clone();
    thread::sleep(Duration::from_millis(20));
    let waits = counters.waits.get();
    assert!(matches!(threads.poll_stopped(0), Stopped::Pending));
    done.notify();
    assert!(waits < 20, "{waits} waits");
    let start = Instant::now();
    loop {
        match threads.poll_stopped(0) {
            Stopped::Pending => assert!(start.elapsed() < Duration::from_secs(20)),
            Stopped::Worker(_) => break,
            Stopped::Lost => panic!("the thread died"),
        }
    }
}

/// Stops a lane and waits; whether its worker was returned.
fn stop(threads: &mut Threads, lane: u16) -> bool {
    threads.begin_stop(lane);
    let start = Instant::now();
    loop {
        match threads.poll_stopped(lane) {
            Stopped::Pending => assert!(start.elapsed() < Duration::from_secs(20)),
            Stopped::Worker(_) => return true,
            Stopped::Lost => return false,
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
fn lanes_share_limited_threads() {
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
                threads
                    .start(lane, idle(done), Arc::new(NoFailure))
                    .unwrap();
            }
            let start = Instant::now();
            while lock(&threads.running).len() < expected {
                assert!(start.elapsed() < Duration::from_secs(20));
                thread::yield_now();
            }
            assert_eq!(lock(&threads.running).len(), expected);
            // In any order: a busy lane holds up no other.
            for (lane, done) in (0..).zip(&done).skip(1) {
                done.notify();
                assert!(stop(&mut threads, lane));
                assert!(matches!(threads.poll_stopped(lane), Stopped::Lost));
            }
            threads.begin_stop(0);
            assert!(matches!(threads.poll_stopped(0), Stopped::Pending));
            done[0].notify();
            assert!(stop(&mut threads, 0));
            assert_eq!(lock(&threads.running).len(), 0);
        }
    }
}

#[test]
fn stopped_lane_survives_restart_of_another() {
    let options = ThreadOptions {
        threads: 1,
        ..ThreadOptions::default()
    };
    let mut threads = Threads::new("kept", options);
    let done = [(); 2].map(|()| Arc::new(EventFd::new().unwrap()));
    for _ in 0..100 {
        for (lane, done) in (0..).zip(&done) {
            threads
                .start(lane, idle(done), Arc::new(NoFailure))
                .unwrap();
            done.notify();
        }
        threads.begin_stop(1);
        assert!(stop(&mut threads, 0));
        done[0].notify();
        threads
            .start(0, idle(&done[0]), Arc::new(NoFailure))
            .unwrap();
        assert!(stop(&mut threads, 1));
        assert!(stop(&mut threads, 0));
    }
}

#[test]
fn lane_restarts_beside_running_lane() {
    let options = ThreadOptions {
        threads: 1,
        ..ThreadOptions::default()
    };
    let mut threads = Threads::new("again", options);
    let done = [(); 2].map(|()| Arc::new(EventFd::new().unwrap()));
    for (lane, done) in (0..).zip(&done) {
        threads
            .start(lane, idle(done), Arc::new(NoFailure))
            .unwrap();
    }
    for _ in 0..100 {
        done[1].notify();
        assert!(stop(&mut threads, 1));
        threads
            .start(1, idle(&done[1]), Arc::new(NoFailure))
            .unwrap();
    }
    assert_eq!(lock(&threads.running).len(), 1);
    // Dropping waits for both.
    done.iter().for_each(|done| done.notify());
    drop(threads);
}

/// A worker that panics when it is asked to stop.
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
}

/// Records failures.
#[derive(Debug, Default)]
struct Failures(Mutex<Vec<(u16, ThreadEnded)>>);

impl LaneEvents for Failures {
    fn failed(&self, lane: u16, why: &Failure) {
        lock(&self.0).push((lane, *why.downcast_ref().unwrap()));
    }
}

#[test]
fn lanes_of_dead_thread_can_restart() {
    let options = ThreadOptions {
        threads: 1,
        ..ThreadOptions::default()
    };
    let mut threads = Threads::new("died", options);
    let done = Arc::new(EventFd::new().unwrap());
    let failures = Arc::new(Failures::default());
    threads
        .start(0, Box::new(Broken), failures.clone())
        .unwrap();
    threads.start(1, idle(&done), failures.clone()).unwrap();
    assert!(!stop(&mut threads, 0));
    assert!(!stop(&mut threads, 1), "it shared the thread");
    let mut seen = std::mem::take(&mut *lock(&failures.0));
    seen.sort_by_key(|(lane, _)| *lane);
    assert_eq!(seen, [(0, ThreadEnded), (1, ThreadEnded)]);
    threads.start(1, idle(&done), Arc::new(NoFailure)).unwrap();
    done.notify();
    assert!(stop(&mut threads, 1));
}

/// A worker that has work once per notification.
#[derive(Debug)]
struct Fed {
    work: Arc<EventFd>,
    stopping: bool,
}

impl Worker for Fed {
    fn poll(&mut self, _budget: u32) -> Progress {
        if self.stopping {
            Progress::Stopped
        } else if self.work.take() > 0 {
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
        each(self.work.as_fd(), Interest::Readable);
    }
}

#[test]
fn spinning_without_work_gives_up() {
    let options = ThreadOptions {
        spin: Duration::from_micros(100),
        ..ThreadOptions::default()
    };
    for spin in [options.spin, Duration::ZERO] {
        let mut threads = Threads::new("vain", ThreadOptions { spin, ..options });
        let work = Arc::new(EventFd::new().unwrap());
        let worker = Fed {
            work: work.clone(),
            stopping: false,
        };
        threads
            .start(0, Box::new(worker), Arc::new(NoFailure))
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
            work.notify();
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
