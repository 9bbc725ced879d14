//! A lane of a port: where frames find their way.
#![forbid(unsafe_code)]

use super::inbox::{Inbox, Pushed, Reading};
use super::{Port, Ports, Registered};
use crate::event::EventFd;
use crate::link::offload::{finish, is_taken, told};
use crate::link::state::{Gathered, copy_frame};
use crate::link::{Delivered, FrameSink, LinkCounters, LinkLane, Sent, TxFrame, Waits};
use crate::worker::Interest;
use pvkit_protocol::frame::{MacAddress, max_frame_bytes};
use pvkit_protocol::inet::{Headers, IpVersion, protocol};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub(super) struct SwitchLane {
    own: Arc<Registered>,
    inbox: Arc<Inbox>,
    reading: Reading,
    /// The list of ports, and which one of them it is.
    ports: Arc<Ports>,
    changes: u64,
    gathered: Gathered,
    /// Inboxes with a receiver that sleeps, to be rung at the end of the batch.
    asleep: Vec<Arc<Inbox>>,
    /// A batch has begun, at this second since the switch was made: the clock
    /// is read once a batch.
    began: Option<u32>,
}

impl std::fmt::Debug for SwitchLane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwitchLane")
            .field("port", &self.own.port.id)
            .finish_non_exhaustive()
    }
}

/// A number that is the same for all frames of one flow.
fn flow(head: &[u8]) -> u32 {
    let Some(headers) = Headers::parse(head) else {
        return 0;
    };
    let network = usize::from(headers.network);
    let addresses = match headers.version {
        IpVersion::V4 => head.get(network + 12..network + 20),
        IpVersion::V6 => head.get(network + 8..network + 40),
    };
    let transport = usize::from(headers.transport);
    let ports = match headers.protocol {
        // Only the first fragment has ports.
        protocol::TCP | protocol::UDP if !headers.fragment => head.get(transport..transport + 4),
        _ => None,
    };
    let mut hash = 0u64;
    for part in [addresses, ports].into_iter().flatten() {
        for word in part.as_chunks::<4>().0 {
            hash = (hash ^ u64::from(u32::from_be_bytes(*word)))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(32);
        }
    }
    // Rotated, the low half holds the bits that depend on all others.
    hash as u32
}

/// The lane of a port that gets a frame.
fn steer<'a>(port: &'a Port, head: &[u8]) -> Option<&'a Arc<Inbox>> {
    let lane = match port.used.load(Ordering::Relaxed) {
        0 | 1 => 0,
        used => flow(head) % u32::from(used),
    };
    port.inboxes.get(lane as usize)
}

/// A frame whose way is known.
struct Routed<'a, 'b> {
    frame: &'a TxFrame<'b>,
    gathered: &'a mut Gathered,
    asleep: &'a mut Vec<Arc<Inbox>>,
    /// Longest frame that is not segmented.
    max: usize,
    /// It was finished in software, for one port at least.
    finished: bool,
    /// It could not be: it is not what it says, or what comes of it is too
    /// long.
    bad: bool,
}

impl Routed<'_, '_> {
    /// Whether it is to be cut into frames that are longer than a port's may
    /// be: its sender says how long.
    fn is_cut_long(&self) -> bool {
        self.frame.meta.segments.is_some_and(|segments| {
            let segment = usize::from(segments.header_bytes) + usize::from(segments.size);
            segment.min(self.frame.bytes()) > self.max
        })
    }

    fn to(&mut self, port: &Port) {
        let Some(inbox) = steer(port, self.frame.head) else {
            return;
        };
        let takes = port.takes();
        let (frame, meta) = (self.frame, &self.frame.meta);
        let mut pushed = Pushed::Quiet;
        if is_taken(frame.head, meta, takes) {
            pushed = inbox.push(frame.bytes(), &told(meta, takes), |room| {
                copy_frame(frame, room);
            });
        } else if self.is_cut_long() {
            self.bad = true;
        } else if let Some(copy) = self.gathered.copy(frame) {
            let result = finish(copy, meta, takes, |head, rest, meta| {
                let one = inbox.push(head.len() + rest.len(), meta, |room| {
                    if let Some((to_head, to_rest)) = room.split_at_mut_checked(head.len()) {
                        to_head.copy_from_slice(head);
                        to_rest.copy_from_slice(rest);
                    }
                });
                if one == Pushed::Asleep {
                    pushed = one;
                }
            });
            match result {
                Ok(_) => self.finished = true,
                Err(_) => self.bad = true,
            }
        } else {
            self.bad = true;
        }
        if pushed == Pushed::Asleep && !self.asleep.iter().any(|one| Arc::ptr_eq(one, inbox)) {
            self.asleep.push(inbox.clone());
        }
    }
}

impl SwitchLane {
    pub(super) fn new(own: Arc<Registered>, inbox: Arc<Inbox>, reading: Reading) -> Self {
        let (changes, ports) = own.shared.ports();
        Self {
            own,
            inbox,
            reading,
            ports,
            changes,
            gathered: Gathered::default(),
            asleep: Vec::new(),
            began: None,
        }
    }

    /// What becomes readable when a frame comes in, once armed.
    pub(super) fn event(&self) -> &EventFd {
        self.inbox.event()
    }

    fn now(&mut self) -> u32 {
        let started = self.own.shared.started;
        *self
            .began
            .get_or_insert_with(|| u32::try_from(started.elapsed().as_secs()).unwrap_or(u32::MAX))
    }
}

impl LinkLane for SwitchLane {
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let shared = &self.own.shared;
        if shared.changes.load(Ordering::Acquire) != self.changes {
            (self.changes, self.ports) = shared.ports();
        }
        let own = self.own.port.id;
        let (Some(to), Some(from)) = (frame.head.first_chunk(), frame.head.get(6..12)) else {
            self.inbox.counters().send_drops.add(1);
            return Sent::Done;
        };
        let now = self.now();
        let to = MacAddress(*to);
        let table = &self.own.shared.table;
        if let Ok(from) = from.try_into() {
            table.learn(MacAddress(from), own, now);
        }
        let known = match to.is_multicast() {
            true => None,
            false => table.lookup(to, now),
        };
        let mut routed = Routed {
            frame,
            gathered: &mut self.gathered,
            asleep: &mut self.asleep,
            max: max_frame_bytes(self.own.shared.options.mtu),
            finished: false,
            bad: false,
        };
        let mut reached = false;
        match known {
            // Whoever it is for has seen it already.
            Some(port) if port == own => reached = true,
            Some(port) => {
                if let Some(Some(port)) = self.ports.get(usize::from(port)) {
                    routed.to(port);
                    reached = true;
                }
            }
            None => {
                for port in self.ports.iter().flatten() {
                    if port.id != own {
                        routed.to(port);
                        reached = true;
                    }
                }
            }
        }
        if routed.finished {
            self.inbox.counters().finished.add(1);
        }
        if reached && !routed.bad {
            self.inbox.counters().count_sent(1, frame.bytes() as u64);
        } else {
            self.inbox.counters().send_drops.add(1);
        }
        Sent::Done
    }

    fn flush(&mut self) {
        self.began = None;
        for inbox in self.asleep.drain(..) {
            inbox.ring();
        }
    }

    fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32 {
        self.inbox.disarm();
        let mut taken = 0;
        while taken < budget {
            let Some((frame, meta)) = self.reading.next() else {
                if self.inbox.swap(&mut self.reading) {
                    continue;
                }
                break;
            };
            if sink.deliver(frame, meta) == Delivered::Full {
                break;
            }
            self.inbox.counters().count_received(frame.len());
            self.reading.taken();
            taken += 1;
        }
        taken
    }

    fn arm(&mut self, waits: Waits) -> bool {
        // There is always room: a switch drops rather than wait.
        waits.send || waits.receive && (self.reading.next().is_some() || self.inbox.arm())
    }

    fn sources<'a>(&'a self, waits: Waits, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        if waits.receive {
            each(self.inbox.event().as_fd(), Interest::Readable);
        }
    }

    fn counters(&self) -> Arc<LinkCounters> {
        self.inbox.counters().clone()
    }
}

impl Drop for SwitchLane {
    fn drop(&mut self) {
        self.flush();
        self.inbox.close(&self.reading);
    }
}
