//! A link in memory, whose other end is the test.

use pvkit_host::event::EventFd;
use pvkit_host::link::{
    Delivered, FrameSink, Link, LinkCounters, LinkError, LinkEvents, LinkLane, LinkShape, Sent,
    TxFrame, Waits,
};
use pvkit_host::worker::Interest;
use pvkit_protocol::frame::{FrameMeta, HEAD_BYTES, MAX_SEGMENTED_FRAME_BYTES, Offloads};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A frame, and what accompanies it.
pub(crate) type Frame = (Vec<u8>, FrameMeta);

#[derive(Debug)]
struct Wire {
    /// Frames for the device.
    inbox: Mutex<VecDeque<Frame>>,
    /// Frames of the device's.
    outbox: Mutex<Vec<Frame>>,
    /// How many more fit; `None` for any number.
    room: Mutex<Option<usize>>,
    arrived: EventFd,
    roomy: EventFd,
    open: AtomicBool,
    flushes: AtomicU64,
    counters: Arc<LinkCounters>,
}

#[derive(Debug)]
struct Inner {
    mtu: u16,
    wires: Vec<Arc<Wire>>,
    up: AtomicBool,
    refuses: AtomicBool,
    events: Mutex<Option<Arc<dyn LinkEvents>>>,
    receive: Mutex<Vec<Offloads>>,
    used: Mutex<Vec<u16>>,
}

/// A link whose other end is the test.
#[derive(Debug, Clone)]
pub(crate) struct TestLink(Arc<Inner>);

impl TestLink {
    pub(crate) fn new(lanes: u16) -> Self {
        let wire = || Wire {
            inbox: Mutex::default(),
            outbox: Mutex::default(),
            room: Mutex::default(),
            arrived: EventFd::new().unwrap(),
            roomy: EventFd::new().unwrap(),
            open: AtomicBool::new(false),
            flushes: AtomicU64::new(0),
            counters: Arc::default(),
        };
        Self(Arc::new(Inner {
            mtu: 1500,
            wires: (0..lanes).map(|_| Arc::new(wire())).collect(),
            up: AtomicBool::new(true),
            refuses: AtomicBool::new(false),
            events: Mutex::default(),
            receive: Mutex::default(),
            used: Mutex::default(),
        }))
    }

    /// A frame comes in.
    pub(crate) fn offer(&self, lane: usize, frame: &[u8], meta: FrameMeta) {
        let wire = &self.0.wires[lane];
        wire.inbox.lock().unwrap().push_back((frame.to_vec(), meta));
        wire.arrived.notify();
    }

    /// Frames that came in and were not taken.
    pub(crate) fn waiting(&self, lane: usize) -> usize {
        self.0.wires[lane].inbox.lock().unwrap().len()
    }

    /// What the device sent since the last call.
    pub(crate) fn sent(&self, lane: usize) -> Vec<Frame> {
        std::mem::take(&mut self.0.wires[lane].outbox.lock().unwrap())
    }

    /// Room for so many frames from now on.
    pub(crate) fn set_room(&self, lane: usize, room: Option<usize>) {
        let wire = &self.0.wires[lane];
        *wire.room.lock().unwrap() = room;
        if room != Some(0) {
            wire.roomy.notify();
        }
    }

    pub(crate) fn flushes(&self, lane: usize) -> u64 {
        self.0.wires[lane].flushes.load(Ordering::Relaxed)
    }

    pub(crate) fn set_up(&self, up: bool) {
        self.0.up.store(up, Ordering::Release);
        let events = self.0.events.lock().unwrap().clone();
        events.expect("somebody to tell").link_changed();
    }

    /// Refuses to change from now on.
    pub(crate) fn refuse(&self, refuses: bool) {
        self.0.refuses.store(refuses, Ordering::Release);
    }

    /// What the device said it takes, since the last call.
    pub(crate) fn receive_offloads(&self) -> Vec<Offloads> {
        std::mem::take(&mut self.0.receive.lock().unwrap())
    }

    /// How many lanes the device said it uses, since the last call.
    pub(crate) fn used_lanes(&self) -> Vec<u16> {
        std::mem::take(&mut self.0.used.lock().unwrap())
    }

    fn agree(&self) -> Result<(), LinkError> {
        if self.0.refuses.load(Ordering::Acquire) {
            return Err(LinkError::Host {
                what: "a test",
                source: io::ErrorKind::PermissionDenied.into(),
            });
        }
        Ok(())
    }
}

impl Link for TestLink {
    fn shape(&self) -> LinkShape {
        LinkShape {
            mtu: self.0.mtu,
            lanes: self.0.wires.len() as u16,
            cheap: Offloads::all(),
            speed_mbps: Some(10_000),
        }
    }

    fn is_up(&self) -> bool {
        self.0.up.load(Ordering::Acquire)
    }

    fn connect(&self, events: Arc<dyn LinkEvents>) {
        *self.0.events.lock().unwrap() = Some(events);
    }

    fn lane(&self, index: u16) -> Result<Box<dyn LinkLane>, LinkError> {
        let lanes = self.0.wires.len() as u16;
        let wire = self.0.wires.get(usize::from(index));
        let wire = wire.ok_or(LinkError::NoLane { index, lanes })?.clone();
        assert!(!wire.open.swap(true, Ordering::AcqRel), "open twice");
        Ok(Box::new(Lane(wire)))
    }

    fn set_receive(&self, offloads: Offloads) -> Result<(), LinkError> {
        self.agree()?;
        self.0.receive.lock().unwrap().push(offloads);
        Ok(())
    }

    fn use_lanes(&self, count: u16) -> Result<(), LinkError> {
        self.agree()?;
        assert!((1..=self.0.wires.len()).contains(&usize::from(count)));
        self.0.used.lock().unwrap().push(count);
        Ok(())
    }
}

#[derive(Debug)]
struct Lane(Arc<Wire>);

impl Drop for Lane {
    fn drop(&mut self) {
        self.0.open.store(false, Ordering::Release);
    }
}

impl LinkLane for Lane {
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let TxFrame { head, rest, meta } = frame;
        // What a link relies on.
        assert!(rest.bytes() == 0 || head.len() >= HEAD_BYTES);
        let checked = meta.check(
            head,
            frame.bytes(),
            MAX_SEGMENTED_FRAME_BYTES,
            Offloads::all(),
        );
        assert_eq!(checked, Ok(*meta), "a frame that is as it says");
        if let Some(room) = &mut *self.0.room.lock().unwrap() {
            let Some(less) = room.checked_sub(1) else {
                return Sent::Full;
            };
            *room = less;
        }
        let mut bytes = head.to_vec();
        bytes.resize(frame.bytes(), 0);
        assert_eq!(rest.gather(&mut bytes[head.len()..]) as u64, rest.bytes());
        self.0.outbox.lock().unwrap().push((bytes, *meta));
        Sent::Done
    }

    fn flush(&mut self) {
        self.0.flushes.fetch_add(1, Ordering::Relaxed);
    }

    fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32 {
        self.0.arrived.take();
        let mut count = 0;
        while count < budget {
            // Not locked while the device looks: it may be told news.
            let Some((frame, meta)) = self.0.inbox.lock().unwrap().front().cloned() else {
                break;
            };
            if sink.deliver(&frame, &meta) == Delivered::Full {
                break;
            }
            self.0.inbox.lock().unwrap().pop_front();
            count += 1;
        }
        count
    }

    fn arm(&mut self, waits: Waits) -> bool {
        self.0.roomy.take();
        let roomy = *self.0.room.lock().unwrap() != Some(0);
        let arrived = !self.0.inbox.lock().unwrap().is_empty();
        waits.receive && arrived || waits.send && roomy
    }

    fn sources<'a>(&'a self, waits: Waits, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        if waits.receive {
            each(self.0.arrived.as_fd(), Interest::Readable);
        }
        if waits.send {
            each(self.0.roomy.as_fd(), Interest::Readable);
        }
    }

    fn counters(&self) -> Arc<LinkCounters> {
        self.0.counters.clone()
    }
}
