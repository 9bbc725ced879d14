//! The lane of a stream.
#![forbid(unsafe_code)]

use super::buffer::{Input, LENGTH_BYTES, Next, Output};
use super::{FLAGS, Origin, Shared, dial};
use crate::link::offload::{cut_size, finish, is_taken};
use crate::link::state::Gathered;
use crate::link::{Delivered, FrameSink, LinkCounters, LinkLane, Sent, TxFrame, Waits};
use crate::sync::lock;
use crate::worker::Interest;
use pvkit_protocol::frame::{FrameMeta, Offloads, max_frame_bytes};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long to wait before the next attempt to connect.
const RETRY: Duration = Duration::from_secs(1);
/// Most reads in one call: a peer that dribbles must not hold up everything
/// else.
const MAX_READS: u32 = 16;

/// A connection.
#[derive(Debug)]
struct Connection {
    fd: OwnedFd,
    /// The peer does not read any more. What it sent before is still taken.
    closing: bool,
}

/// A connection and what is on its way.
pub(super) struct Work {
    connection: Option<Connection>,
    output: Output,
    input: Input,
    gathered: Gathered,
    /// When to look for a connection next; `None` for as soon as there may be
    /// one.
    next_try: Option<Instant>,
    /// Room that the frame needs for which there was none.
    wanted: usize,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work")
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

impl Work {
    pub(super) fn new(connection: Option<OwnedFd>, send_bytes: usize) -> Self {
        Self {
            connection: connection.map(|fd| Connection { fd, closing: false }),
            output: Output::new(send_bytes),
            input: Input::new(),
            gathered: Gathered::default(),
            next_try: None,
            wanted: 0,
        }
    }

    /// The connection, if frames can be sent.
    fn sending(&self) -> Option<&Connection> {
        self.connection.as_ref().filter(|one| !one.closing)
    }
}

#[derive(Debug)]
pub(super) struct StreamLane {
    shared: Arc<Shared>,
    /// Given back at the end.
    work: Box<Work>,
}

impl StreamLane {
    pub(super) fn new(shared: Arc<Shared>, work: Box<Work>) -> Self {
        Self { shared, work }
    }

    /// Looks for a connection if there is none.
    fn find_connection(&mut self) {
        let work = &mut *self.work;
        if work.connection.is_some() {
            return;
        }
        let now = Instant::now();
        if work.next_try.is_some_and(|next| now < next) {
            return;
        }
        let found = match &self.shared.origin {
            Origin::Given => return,
            Origin::Connect(path) => dial(path).map_err(|error| error.to_string()),
            Origin::Listen(listener) => match rustix::net::accept_with(&listener.fd, FLAGS) {
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {
                    work.next_try = None;
                    return;
                }
                // Such as too many open files: it would be said again at once.
                result => result.map_err(|error| error.to_string()),
            },
        };
        match found {
            Ok(fd) => {
                work.next_try = None;
                work.input.clear();
                work.connection = Some(Connection { fd, closing: false });
                self.shared.state.set(true);
            }
            Err(error) => {
                log::debug!("no connection yet: {error}");
                work.next_try = Some(now + RETRY);
            }
        }
    }

    /// Nothing can be sent any more. What the peer sent before it closed may
    /// still be there to be read.
    fn stop_sending(&mut self) {
        let lost = self.work.output.discard();
        self.shared.counters.send_drops.add(lost as u64);
        if let Some(connection) = &mut self.work.connection {
            connection.closing = true;
        }
        self.shared.state.set(false);
    }

    /// The connection has ended.
    fn lost(&mut self) {
        self.stop_sending();
        self.work.connection = None;
        self.work.input.clear();
        if matches!(self.shared.origin, Origin::Connect(_)) {
            self.work.next_try = Some(Instant::now() + RETRY);
        }
    }

    /// Writes as much as the socket takes.
    fn write(&mut self) {
        let work = &mut *self.work;
        while !work.output.unwritten().is_empty() {
            let Some(connection) = work.connection.as_ref().filter(|one| !one.closing) else {
                return;
            };
            let bytes = work.output.unwritten();
            match rustix::net::send(&connection.fd, bytes, SendFlags::NOSIGNAL) {
                Ok(written) => {
                    let counters = &self.shared.counters;
                    work.output.wrote(written, |bytes| {
                        counters.count_sent(1, u64::from(bytes));
                    });
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(error) => {
                    log::debug!("the connection cannot be written: {error}");
                    self.stop_sending();
                    return;
                }
            }
        }
    }

    /// Reads once; `false` if nothing came.
    fn read(&mut self) -> bool {
        let work = &mut *self.work;
        let Some(connection) = &work.connection else {
            return false;
        };
        let fd = connection.fd.as_fd();
        match rustix::net::recv(fd, work.input.room(), RecvFlags::DONTWAIT) {
            Ok((bytes, _)) if bytes > 0 => {
                work.input.came(bytes);
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            end => {
                if work.input.is_partial() {
                    self.shared.counters.receive_errors.add(1);
                }
                if let Err(error) = end {
                    log::debug!("the connection cannot be read: {error}");
                }
                self.lost();
                false
            }
        }
    }
}

impl LinkLane for StreamLane {
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let counters = &self.shared.counters;
        let none = Offloads::empty();
        let taken = is_taken(frame.head, &frame.meta, none);
        let needed = match &frame.meta.segments {
            Some(segments) => {
                let (frames, bytes) = cut_size(frame.bytes(), segments);
                bytes + frames * LENGTH_BYTES
            }
            None => frame.bytes() + LENGTH_BYTES,
        };
        if self.work.sending().is_none() || needed > self.work.output.limit() {
            counters.send_drops.add(1);
            return Sent::Done;
        }
        if !self.work.output.has_room(needed) {
            self.write();
            if self.work.sending().is_none() {
                self.shared.counters.send_drops.add(1);
                return Sent::Done;
            }
            if !self.work.output.has_room(needed) {
                self.work.wanted = needed;
                return Sent::Full;
            }
        }
        let Work {
            output, gathered, ..
        } = &mut *self.work;
        let counters = &self.shared.counters;
        if taken {
            output.put(frame);
            return Sent::Done;
        }
        let finished = gathered.copy(frame).is_some_and(|copy| {
            finish(copy, &frame.meta, none, |head, rest, _| {
                output.put_part(head, rest);
            })
            .is_ok()
        });
        if finished {
            output.end(frame.bytes());
            counters.finished.add(1);
        } else {
            counters.send_drops.add(1);
        }
        Sent::Done
    }

    fn flush(&mut self) {
        self.write();
    }

    fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32 {
        self.find_connection();
        self.write();
        let counters = self.shared.counters.clone();
        let max = max_frame_bytes(self.shared.options.mtu);
        let (mut looked_at, mut taken, mut reads) = (0, 0, 0);
        while looked_at < budget {
            let range = match self.work.input.next() {
                Next::Frame(range) => range,
                Next::More if reads < MAX_READS => {
                    reads += 1;
                    if self.read() {
                        continue;
                    }
                    break;
                }
                Next::More => break,
                Next::OutOfStep(length) => {
                    log::warn!("the peer says that a frame has {length} bytes: closing");
                    counters.receive_errors.add(1);
                    self.lost();
                    break;
                }
            };
            let end = range.end;
            let frame = self.work.input.frame(range);
            match FrameMeta::PLAIN.check(frame, frame.len(), max, Offloads::empty()) {
                Ok(meta) => {
                    if sink.deliver(frame, &meta) == Delivered::Full {
                        break;
                    }
                    counters.count_received(frame.len());
                    taken += 1;
                }
                Err(_) => counters.receive_errors.add(1),
            }
            looked_at += 1;
            self.work.input.taken(end);
        }
        taken
    }

    fn arm(&mut self, waits: Waits) -> bool {
        let work = &*self.work;
        let receive = waits.receive && work.input.next() != Next::More;
        let room = work.sending().is_none() || work.output.has_room(work.wanted);
        receive || waits.send && room
    }

    fn sources<'a>(&'a self, waits: Waits, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        let work = &*self.work;
        match (&work.connection, &self.shared.origin) {
            (Some(connection), _) => {
                if waits.receive {
                    each(connection.fd.as_fd(), Interest::Readable);
                }
                // Also for what is left of a batch that ended.
                if !work.output.unwritten().is_empty() {
                    each(connection.fd.as_fd(), Interest::Writable);
                }
            }
            (None, Origin::Listen(listener)) if work.next_try.is_none() => {
                each(listener.fd.as_fd(), Interest::Readable);
            }
            (None, _) => {}
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match (&self.work.connection, &self.shared.origin) {
            (None, Origin::Connect(_) | Origin::Listen(_)) => self.work.next_try,
            _ => None,
        }
    }

    fn counters(&self) -> Arc<LinkCounters> {
        self.shared.counters.clone()
    }
}

impl Drop for StreamLane {
    fn drop(&mut self) {
        self.write();
        let limit = self.shared.options.send_bytes;
        let work = std::mem::replace(&mut *self.work, Work::new(None, limit));
        *lock(&self.shared.parked) = Some(Box::new(work));
    }
}
