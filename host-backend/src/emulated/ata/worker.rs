//! The half of the controller that waits for the disks.
#![forbid(unsafe_code)]

use super::controller::Ide;
use crate::event::EventFd;
use crate::sync::lock;
use crate::worker::{Interest, Progress, Worker};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How soon a request is tried again for which a disk had no room, if the disk
/// says nothing.
const RETRY: Duration = Duration::from_millis(1);

/// Finishes what the disks could not serve at once. It has nothing to do for
/// disks that always can, and then costs nothing.
#[derive(Debug)]
pub struct IdeWorker {
    ide: Arc<Mutex<Ide>>,
    kick: Arc<EventFd>,
    /// Copies of the disks' descriptors: the originals cannot be borrowed out
    /// of the controller's lock.
    sources: Vec<(OwnedFd, Interest)>,
    deadline: Option<Instant>,
    stopping: bool,
}

impl IdeWorker {
    /// The worker of `ide`. There should be one.
    ///
    /// # Errors
    /// What the host says if there are no more file descriptors.
    pub fn new(ide: Arc<Mutex<Ide>>) -> io::Result<Self> {
        let mut sources = Vec::new();
        let mut failed = None;
        let kick = {
            let locked = lock(&ide);
            locked.sources(&mut |fd, interest| match fd.try_clone_to_owned() {
                Ok(fd) => sources.push((fd, interest)),
                Err(error) => failed = Some(error),
            });
            locked.kick()
        };
        match failed {
            Some(error) => Err(error),
            None => Ok(Self {
                ide,
                kick,
                sources,
                deadline: None,
                stopping: false,
            }),
        }
    }
}

impl Worker for IdeWorker {
    fn poll(&mut self, _budget: u32) -> Progress {
        // Each channel has one request at the most.
        let mut ide = lock(&self.ide);
        let worked = ide.reap();
        self.deadline = ide.is_stalled().then(|| Instant::now() + RETRY);
        if self.stopping && !ide.waits_for_disk() {
            return Progress::Stopped;
        }
        if worked {
            Progress::More
        } else {
            Progress::Drained
        }
    }

    fn arm(&mut self) -> bool {
        // Since the last look, a request may have found no room.
        self.kick.take() > 0
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
    }

    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        each(self.kick.as_fd(), Interest::Readable);
        for (fd, interest) in &self.sources {
            each(fd.as_fd(), *interest);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}
