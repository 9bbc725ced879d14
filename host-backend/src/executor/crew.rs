//! A thread, and the lanes that it drives.
#![forbid(unsafe_code)]

use super::{AdaptiveSpin, LaneThread, Stopped, ThreadCounters, ThreadOptions, lock};
use crate::event::EventFd;
use crate::virtio::device::DeviceEvents;
use crate::virtio::queue::Fault;
use crate::worker::{Interest, Progress, Worker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::hint::spin_loop;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A lane at work.
#[derive(Debug)]
pub(super) struct Lane {
    number: u16,
    worker: Box<dyn Worker>,
    events: Arc<dyn DeviceEvents>,
    stopping: bool,
}

impl Lane {
    pub(super) fn new(number: u16, worker: Box<dyn Worker>, events: Arc<dyn DeviceEvents>) -> Self {
        Self {
            number,
            worker,
            events,
            stopping: false,
        }
    }
}

/// The thread as its owner has it. It ends with its last lane.
#[derive(Debug)]
pub(super) struct Crew {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    desk: Mutex<Desk>,
    /// There are orders: looked at often, so not behind the lock.
    ordered: AtomicBool,
    wake: EventFd,
}

/// What owner and thread hand each other.
#[derive(Debug)]
struct Desk {
    /// In the order in which they were given: a lane may start again.
    orders: Vec<Order>,
    /// Lanes that have stopped.
    stopped: Vec<Lane>,
    /// The thread is about to end, and takes no more orders.
    closed: bool,
}

#[derive(Debug)]
enum Order {
    Start(Lane),
    Stop(u16),
}

impl Crew {
    /// A thread with its first lane, and lanes of its predecessor that have
    /// stopped.
    pub(super) fn spawn(
        name: String,
        first: Lane,
        stopped: Vec<Lane>,
        options: ThreadOptions,
        running: Arc<Mutex<Vec<LaneThread>>>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            desk: Mutex::new(Desk {
                orders: Vec::new(),
                stopped,
                closed: false,
            }),
            ordered: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let desk = shared.clone();
        let thread = thread::Builder::new().name(name).spawn(move || {
            let this = LaneThread {
                tid: rustix::thread::gettid().as_raw_nonzero().get(),
                counters: Arc::default(),
            };
            lock(&running).push(this.clone());
            let listed = Listed {
                running,
                tid: this.tid,
            };
            let mut driver = Driver {
                lanes: vec![first],
                options,
                shared: desk,
                counters: this.counters,
                idle: Idle::new(options.spin),
                last: Vec::new(),
            };
            driver.run(listed);
        })?;
        Ok(Self { shared, thread })
    }

    /// Gives the thread another lane; back, if the thread has ended or is
    /// about to.
    pub(super) fn start(&self, lane: Lane) -> Option<Lane> {
        if self.thread.is_finished() {
            return Some(lane);
        }
        let mut desk = lock(&self.shared.desk);
        if desk.closed {
            return Some(lane);
        }
        desk.orders.push(Order::Start(lane));
        drop(desk);
        self.wake();
        None
    }

    pub(super) fn begin_stop(&self, lane: u16) {
        lock(&self.shared.desk).orders.push(Order::Stop(lane));
        self.wake();
    }

    fn wake(&self) {
        self.shared.ordered.store(true, Ordering::Release);
        self.shared.wake.notify();
    }

    pub(super) fn stopped(&self, lane: u16) -> Stopped {
        // Asked first: what a thread leaves behind is there when it has ended.
        let ended = self.thread.is_finished();
        let mut desk = lock(&self.shared.desk);
        let place = desk.stopped.iter().position(|other| other.number == lane);
        match place.map(|place| desk.stopped.swap_remove(place)) {
            Some(lane) => Stopped::Worker(lane.worker),
            None if ended => {
                log::error!("the thread of lane {lane} died");
                Stopped::Gone
            }
            None => Stopped::NotYet,
        }
    }

    /// Waits for the thread to end, which is to have no lanes any more; hands
    /// back lanes that nobody has asked for.
    pub(super) fn join(self) -> Vec<Lane> {
        let _ = self.thread.join();
        std::mem::take(&mut lock(&self.shared.desk).stopped)
    }
}

/// Takes the thread off the list when it ends, however it does.
struct Listed {
    running: Arc<Mutex<Vec<LaneThread>>>,
    tid: i32,
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&self.running).retain(|other| other.tid != self.tid);
    }
}

/// The idle time that a thread is in, if it is in one.
struct Idle {
    spin: AdaptiveSpin,
    since: Option<Instant>,
    /// It was polled for as long as was allowed.
    spun: bool,
}

impl Idle {
    fn new(bound: Duration) -> Self {
        Self {
            spin: AdaptiveSpin::new(bound),
            since: None,
            spun: false,
        }
    }

    /// Nothing was found: whether to look again before sleeping.
    fn look_again(&mut self, counters: &ThreadCounters) -> bool {
        if self.spin.is_off() {
            return false;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let allowance = self.spin.allowance();
        if self.spun || allowance.is_zero() {
            return false;
        }
        let spent = since.elapsed();
        if spent < allowance {
            spin_loop();
            return true;
        }
        self.spun = true;
        self.spin.in_vain();
        counters.spins_in_vain.add(1);
        let nanos = u64::try_from(spent.as_nanos()).unwrap_or(u64::MAX);
        counters.nanos_in_vain.add(nanos);
        false
    }

    /// Something was found.
    fn over(&mut self, counters: &ThreadCounters) {
        let Some(since) = self.since.take() else {
            return;
        };
        if !self.spun && !self.spin.allowance().is_zero() {
            counters.spins.add(1);
        }
        self.spun = false;
        self.spin.work_after(since.elapsed());
    }
}

/// The thread as it sees itself.
struct Driver {
    lanes: Vec<Lane>,
    options: ThreadOptions,
    shared: Arc<Shared>,
    counters: Arc<ThreadCounters>,
    idle: Idle,
    /// The last lane, once it has stopped.
    last: Vec<Lane>,
}

impl Drop for Driver {
    /// A thread that ends before its lanes have stopped, by a panic or because
    /// it cannot wait, leaves nobody waiting for ever: the drivers are told.
    fn drop(&mut self) {
        let orders = {
            let mut desk = lock(&self.shared.desk);
            desk.closed = true;
            std::mem::take(&mut desk.orders)
        };
        let starting = orders.into_iter().filter_map(|order| match order {
            Order::Start(lane) => Some(lane),
            Order::Stop(_) => None,
        });
        for lane in self.lanes.drain(..).chain(starting) {
            lane.events.needs_reset(lane.number, Fault::Abandoned);
        }
    }
}

impl Driver {
    /// Drives lanes until the last has stopped.
    fn run(&mut self, listed: Listed) {
        loop {
            if self.shared.ordered.load(Ordering::Acquire) {
                self.take_orders();
            }
            let mut worked = false;
            let mut index = 0;
            while let Some(lane) = self.lanes.get_mut(index) {
                match lane.worker.poll(self.options.budget) {
                    Progress::More => worked = true,
                    Progress::Drained => {}
                    Progress::Broken(fault) => {
                        worked = true;
                        log::warn!("lane {} is broken: {fault}", lane.number);
                        lane.events.needs_reset(lane.number, fault);
                    }
                    Progress::Stopped => {
                        let lane = self.lanes.swap_remove(index);
                        if self.hand_back(lane) {
                            // Whoever gets the lane finds the list without us.
                            drop(listed);
                            lock(&self.shared.desk).stopped.append(&mut self.last);
                            return;
                        }
                        continue;
                    }
                }
                index += 1;
            }
            if worked {
                self.counters.busy_polls.add(1);
                self.idle.over(&self.counters);
                continue;
            }
            self.counters.idle_polls.add(1);
            // What is left of a lane that stops is for its disk to say.
            let stopping = self.lanes.iter().any(|lane| lane.stopping);
            if !stopping && self.idle.look_again(&self.counters) {
                continue;
            }
            if self.lanes.iter_mut().any(|lane| lane.worker.arm()) {
                continue;
            }
            self.counters.waits.add(1);
            if let Err(error) = self.wait() {
                log::error!(
                    "a thread of {} lanes cannot wait: {error}",
                    self.lanes.len()
                );
                return;
            }
        }
    }

    fn take_orders(&mut self) {
        // A store alone could come to lie behind one of the owner whose order
        // is not taken here, and hide it.
        self.shared.ordered.swap(false, Ordering::AcqRel);
        let orders = std::mem::take(&mut lock(&self.shared.desk).orders);
        for order in orders {
            match order {
                Order::Start(lane) => self.lanes.push(lane),
                Order::Stop(number) => {
                    let mut lanes = self.lanes.iter_mut();
                    // One that has stopped already may be asked again.
                    if let Some(lane) = lanes.find(|lane| lane.number == number)
                        && !lane.stopping
                    {
                        lane.stopping = true;
                        lane.worker.begin_stop();
                    }
                }
            }
        }
    }

    /// Puts a lane that has stopped on the desk. `true` if it was the last, and
    /// no other is to start: then it is kept for the very end.
    fn hand_back(&mut self, lane: Lane) -> bool {
        let mut desk = lock(&self.shared.desk);
        let starts = |order: &Order| matches!(order, Order::Start(_));
        if self.lanes.is_empty() && !desk.orders.iter().any(starts) {
            desk.closed = true;
            self.last.push(lane);
            return true;
        }
        desk.stopped.push(lane);
        false
    }

    /// Waits until a source is ready, a deadline has come, or there are orders.
    fn wait(&self) -> io::Result<()> {
        let workers = || self.lanes.iter().map(|lane| &lane.worker);
        let deadline = workers().filter_map(|worker| worker.deadline()).min();
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        for worker in workers() {
            worker.sources(&mut |fd, interest| {
                let flags = match interest {
                    Interest::Readable => PollFlags::IN,
                    Interest::Writable => PollFlags::OUT,
                };
                fds.push(PollFd::from_borrowed_fd(fd, flags));
            });
        }
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {
                    // Whoever wakes has ordered before. Taken here and not
                    // where that is seen, which may be earlier: a wake-up that
                    // is left would end every later wait at once.
                    self.shared.wake.take();
                    return Ok(());
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
