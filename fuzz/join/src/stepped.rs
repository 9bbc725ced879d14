//! An executor that is driven by hand: deterministic, on one thread.
#![forbid(unsafe_code)]

use pvkit_host::event::is_readable;
use pvkit_host::executor::{Executor, Stopped};
use pvkit_host::worker::{LaneEvents, Progress, Worker};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct Lane {
    worker: Box<dyn Worker>,
    events: Arc<dyn LaneEvents>,
    /// Armed and waiting for a source.
    asleep: bool,
    broken: bool,
    done: bool,
}

/// How often a lane may be woken in vain, by a guest that rewrites its ring
/// meanwhile, say.
const PATIENCE: u32 = 10_000;

type Lanes = Arc<Mutex<Vec<Option<Lane>>>>;

/// The executor's end: goes into the device's transport.
#[derive(Debug)]
pub struct Stepped(Lanes);

/// The hand's end: steps the lanes.
#[derive(Debug, Clone)]
pub struct Steps(Lanes);

/// An executor and the hand that drives it.
#[must_use]
pub fn stepped() -> (Stepped, Steps) {
    let lanes = Lanes::default();
    (Stepped(lanes.clone()), Steps(lanes))
}

fn lock(lanes: &Lanes) -> MutexGuard<'_, Vec<Option<Lane>>> {
    lanes.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    fn poll(&mut self, lane: usize, budget: u32) -> Progress {
        let progress = self.worker.poll(budget);
        match &progress {
            Progress::Broken(why) => {
                assert!(!self.broken, "a failure is reported once, and not {why}");
                self.broken = true;
                self.events.failed(lane as u16, why);
            }
            Progress::Stopped => self.done = true,
            Progress::More | Progress::Drained => {}
        }
        progress
    }

    /// Whether a source that the worker waits for is ready.
    fn is_woken(&self) -> bool {
        let mut woken = false;
        self.worker
            .sources(&mut |fd: BorrowedFd<'_>, _| woken |= is_readable(fd));
        woken
    }
}

impl Steps {
    /// Polls every lane once, whether it sleeps or not; it is awake then.
    ///
    /// # Panics
    /// If a lane reports a second fault.
    pub fn poll(&self, budget: u32) -> Vec<Progress> {
        let mut lanes = lock(&self.0);
        let lanes = lanes.iter_mut().enumerate();
        lanes
            .filter_map(|(index, lane)| {
                let lane = lane.as_mut()?;
                lane.asleep = false;
                Some(lane.poll(index, budget))
            })
            .collect()
    }

    /// Arms every lane, as before sleeping, and leaves it awake. Whether any
    /// says that there is work.
    pub fn arm(&self) -> bool {
        let mut lanes = lock(&self.0);
        let lanes = lanes.iter_mut().flatten();
        lanes.fold(false, |work, lane| {
            lane.asleep = false;
            lane.worker.arm() | work
        })
    }

    /// Lets every lane do what a thread would do that spins for no time: if it
    /// sleeps and nothing wakes it, nothing; otherwise work until there is
    /// nothing left, arm, and sleep. Returns how many polls found work.
    ///
    /// # Panics
    /// If a lane spins: it says that there is work, and finds none.
    pub fn run(&self) -> usize {
        let mut busy = 0;
        for (index, lane) in lock(&self.0).iter_mut().enumerate() {
            let Some(lane) = lane else { continue };
            if lane.asleep && !lane.is_woken() {
                continue;
            }
            lane.asleep = false;
            let mut in_vain = 0;
            loop {
                match lane.poll(index, u32::MAX) {
                    Progress::More => {
                        busy += 1;
                        in_vain = 0;
                    }
                    Progress::Stopped => break,
                    Progress::Broken(_) => {}
                    Progress::Drained => {
                        if !lane.worker.arm() {
                            lane.asleep = true;
                            break;
                        }
                        in_vain += 1;
                        assert!(in_vain < PATIENCE, "lane {index} spins");
                    }
                }
            }
        }
        busy
    }
}

impl Executor for Stepped {
    fn start(
        &mut self,
        lane: u16,
        worker: Box<dyn Worker>,
        events: Arc<dyn LaneEvents>,
    ) -> io::Result<()> {
        let mut lanes = lock(&self.0);
        let index = usize::from(lane);
        if lanes.len() <= index {
            lanes.resize_with(index + 1, || None);
        }
        lanes[index] = Some(Lane {
            worker,
            events,
            asleep: false,
            broken: false,
            done: false,
        });
        Ok(())
    }

    fn begin_stop(&mut self, lane: u16) {
        if let Some(Some(lane)) = lock(&self.0).get_mut(usize::from(lane)) {
            lane.worker.begin_stop();
        }
    }

    fn poll_stopped(&mut self, lane: u16) -> Stopped {
        let mut lanes = lock(&self.0);
        let Some(place) = lanes.get_mut(usize::from(lane)) else {
            return Stopped::Lost;
        };
        let Some(running) = place else {
            return Stopped::Lost;
        };
        if !running.done {
            // The driver waits for the reset and nobody else steps meanwhile.
            running.poll(usize::from(lane), u32::MAX);
        }
        if !running.done {
            return Stopped::Pending;
        }
        place
            .take()
            .map_or(Stopped::Lost, |lane| Stopped::Worker(lane.worker))
    }
}
