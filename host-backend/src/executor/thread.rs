//! A worker thread and the mailbox through which its owner commands it.
#![forbid(unsafe_code)]

use super::{AdaptiveSpin, LaneThread, Stopped, ThreadCounters, ThreadOptions};
use crate::event::EventFd;
use crate::sync::lock;
use crate::worker::{Failure, Interest, LaneEvents, Progress, Worker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smallvec::SmallVec;
use std::hint::spin_loop;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The thread that drove a lane ended before the lane had stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the thread that served the lane has ended")]
pub struct ThreadEnded;

/// A lane with its worker.
#[derive(Debug)]
pub(super) struct RunningLane {
    number: u16,
    worker: Box<dyn Worker>,
    events: Arc<dyn LaneEvents>,
    stopping: bool,
}

impl RunningLane {
    pub(super) fn new(number: u16, worker: Box<dyn Worker>, events: Arc<dyn LaneEvents>) -> Self {
        Self {
            number,
            worker,
            events,
            stopping: false,
        }
    }
}

/// Handle to a worker thread; the thread exits with its last lane.
#[derive(Debug)]
pub(super) struct WorkerThread {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    mailbox: Mutex<Mailbox>,
    /// Whether there are commands. The thread looks at it at every turn, so it
    /// is outside the lock.
    has_commands: AtomicBool,
    wake: EventFd,
}

#[derive(Debug)]
struct Mailbox {
    /// In the order given: a lane may stop and start again.
    commands: Vec<Command>,
    /// Lanes that have stopped and wait for their owner.
    stopped: Vec<RunningLane>,
    /// The thread is about to exit and takes no more commands.
    closed: bool,
}

#[derive(Debug)]
enum Command {
    Start(RunningLane),
    Stop(u16),
}

impl WorkerThread {
    /// Spawns a thread with its first lane, and with stopped lanes that its
    /// predecessor left.
    pub(super) fn spawn(
        name: String,
        first: RunningLane,
        stopped: Vec<RunningLane>,
        options: ThreadOptions,
        running: Arc<Mutex<Vec<LaneThread>>>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            mailbox: Mutex::new(Mailbox {
                commands: Vec::new(),
                stopped,
                closed: false,
            }),
            has_commands: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let theirs = shared.clone();
        let thread = thread::Builder::new().name(name).spawn(move || {
            let this = LaneThread {
                tid: rustix::thread::gettid().as_raw_nonzero().get(),
                counters: Arc::default(),
            };
            lock(&running).push(this.clone());
            let registration = Registration {
                running,
                tid: this.tid,
            };
            let mut event_loop = EventLoop {
                lanes: vec![first],
                options,
                shared: theirs,
                counters: this.counters,
                idle: Idle::new(options.spin),
                last: None,
            };
            event_loop.run(registration);
        })?;
        Ok(Self { shared, thread })
    }

    /// Gives the thread another lane. Returns it if the thread has exited or is
    /// about to.
    pub(super) fn start(&self, lane: RunningLane) -> Option<RunningLane> {
        if self.thread.is_finished() {
            return Some(lane);
        }
        let mut mailbox = lock(&self.shared.mailbox);
        if mailbox.closed {
            return Some(lane);
        }
        mailbox.commands.push(Command::Start(lane));
        drop(mailbox);
        self.wake();
        None
    }

    pub(super) fn begin_stop(&self, lane: u16) {
        lock(&self.shared.mailbox)
            .commands
            .push(Command::Stop(lane));
        self.wake();
    }

    fn wake(&self) {
        self.shared.has_commands.store(true, Ordering::Release);
        self.shared.wake.notify();
    }

    pub(super) fn poll_stopped(&self, lane: u16) -> Stopped {
        // Asked first: everything that a thread leaves behind is in the mailbox
        // once it has exited.
        let exited = self.thread.is_finished();
        let mut mailbox = lock(&self.shared.mailbox);
        let found = mailbox
            .stopped
            .iter()
            .position(|other| other.number == lane);
        match found.map(|index| mailbox.stopped.swap_remove(index)) {
            Some(lane) => Stopped::Worker(lane.worker),
            None if exited => {
                log::error!("the thread of lane {lane} died");
                Stopped::Lost
            }
            None => Stopped::Pending,
        }
    }

    /// Waits for the thread to exit, all of whose lanes are stopping; returns
    /// stopped lanes that their owner has not taken.
    pub(super) fn join(self) -> Vec<RunningLane> {
        let _ = self.thread.join();
        std::mem::take(&mut lock(&self.shared.mailbox).stopped)
    }
}

/// A thread's entry in the list of running threads; removed when it exits,
/// by a panic too.
struct Registration {
    running: Arc<Mutex<Vec<LaneThread>>>,
    tid: i32,
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.running).retain(|other| other.tid != self.tid);
    }
}

/// The current idle period, if there is one.
struct Idle {
    spin: AdaptiveSpin,
    since: Option<Instant>,
    /// The spin allowance of this period is used up.
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

    /// A turn found nothing: whether to spin rather than to sleep.
    fn keep_spinning(&mut self, counters: &ThreadCounters) -> bool {
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

    /// A turn found work.
    fn end(&mut self, counters: &ThreadCounters) {
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

/// The thread's own side.
struct EventLoop {
    lanes: Vec<RunningLane>,
    options: ThreadOptions,
    shared: Arc<Shared>,
    counters: Arc<ThreadCounters>,
    idle: Idle,
    /// The last lane, once it has stopped.
    last: Option<RunningLane>,
}

impl Drop for EventLoop {
    /// Fails the lanes of a thread that exits before they have stopped, by a
    /// panic or because it cannot wait, so that no driver waits for ever.
    fn drop(&mut self) {
        let commands = {
            let mut mailbox = lock(&self.shared.mailbox);
            mailbox.closed = true;
            std::mem::take(&mut mailbox.commands)
        };
        let starting = commands.into_iter().filter_map(|command| match command {
            Command::Start(lane) => Some(lane),
            Command::Stop(_) => None,
        });
        let failure = Failure::new(ThreadEnded);
        for lane in self.lanes.drain(..).chain(starting) {
            lane.events.failed(lane.number, &failure);
        }
    }
}

impl EventLoop {
    /// Drives lanes until the last has stopped.
    fn run(&mut self, registration: Registration) {
        loop {
            if self.shared.has_commands.load(Ordering::Acquire) {
                self.take_commands();
            }
            let mut worked = false;
            let mut index = 0;
            while let Some(lane) = self.lanes.get_mut(index) {
                match lane.worker.poll(self.options.budget) {
                    Progress::More => worked = true,
                    Progress::Drained => {}
                    Progress::Broken(failure) => {
                        worked = true;
                        lane.events.failed(lane.number, &failure);
                    }
                    Progress::Stopped => {
                        let lane = self.lanes.swap_remove(index);
                        if self.return_stopped(lane) {
                            // Whoever takes the lane must no longer find this
                            // thread in the list.
                            drop(registration);
                            lock(&self.shared.mailbox).stopped.extend(self.last.take());
                            return;
                        }
                        continue;
                    }
                }
                index += 1;
            }
            if worked {
                self.counters.busy_polls.add(1);
                self.idle.end(&self.counters);
                continue;
            }
            self.counters.idle_polls.add(1);
            // Do not spin while draining: only the disk's completions make
            // progress.
            let draining = self.lanes.iter().any(|lane| lane.stopping);
            if !draining && self.idle.keep_spinning(&self.counters) {
                continue;
            }
            if self.lanes.iter_mut().any(|lane| lane.worker.arm()) {
                continue;
            }
            self.counters.waits.add(1);
            if let Err(error) = self.wait() {
                let lanes = self.lanes.len();
                log::error!("a thread with {lanes} lanes cannot wait: {error}");
                return;
            }
        }
    }

    fn take_commands(&mut self) {
        // A swap, not a store: the store could be ordered after one of the
        // owner, whose command is not taken here, and hide it.
        self.shared.has_commands.swap(false, Ordering::AcqRel);
        let commands = std::mem::take(&mut lock(&self.shared.mailbox).commands);
        for command in commands {
            match command {
                Command::Start(lane) => self.lanes.push(lane),
                Command::Stop(number) => {
                    let mut lanes = self.lanes.iter_mut();
                    // A lane that has stopped already may be asked again.
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

    /// Puts a stopped lane into the mailbox. `true` if it was the last and no
    /// other is about to start: then it stays here until the thread exits.
    fn return_stopped(&mut self, lane: RunningLane) -> bool {
        let mut mailbox = lock(&self.shared.mailbox);
        let starts = |command: &Command| matches!(command, Command::Start(_));
        if self.lanes.is_empty() && !mailbox.commands.iter().any(starts) {
            mailbox.closed = true;
            self.last = Some(lane);
            return true;
        }
        mailbox.stopped.push(lane);
        false
    }

    /// Waits for a source, a deadline or a command.
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
        // On the stack for as many lanes as usually share a thread.
        let mut fds = SmallVec::<[PollFd<'_>; 8]>::new();
        fds.push(PollFd::new(&self.shared.wake, PollFlags::IN));
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
                    // The owner stores its command before it wakes. Taken here
                    // and not with the commands, which may be earlier: a wake-up
                    // left behind would end every later wait at once.
                    self.shared.wake.take();
                    return Ok(());
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
