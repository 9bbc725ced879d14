//! Jobs on a card whose wire ends at a peer in the same memory.

use super::control::Mode;
use super::frame::MAX_BYTES;
use super::job::{NetJob, NetWork};
use super::peer::Peer;
use super::run::{NetError, NetOutcome, NetTarget, run};
use crate::report::Sample;
use crate::run::{Counts, Machine};
use crate::script::{Completion, Mark};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use pvkit_guest::fault::Fault;
use pvkit_guest::net::{
    FrameMeta, HEADROOM, HeldFrame, MacAddress, NetLimits, NetRx, NetTx, Offloads, Reason, Refused,
    RxFrame,
};
use std::sync::{Arc, Mutex, MutexGuard};
use zerocopy::FromZeros;

extern crate std;

type Buffer = Box<[u8]>;

/// What goes wrong on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// Every so many frames to the guest or the peer are lost.
    Loses(u64),
    /// A byte of every long frame to the guest changes.
    DamagesIn,
    /// The same, to the peer.
    DamagesOut,
    /// Frames to the guest come twice.
    Doubles,
    /// Every second long frame to the peer is the one before it once more.
    RepeatsOut,
    /// Long frames to the peer lose their last byte.
    CutsOut,
    /// Nothing goes to the guest.
    Silent,
    /// The device keeps every buffer.
    Keeps,
}

struct Wire {
    peer: Peer,
    trouble: Trouble,
    passed: u64,
    to_guest: VecDeque<Vec<u8>>,
    published: u64,
    last: Vec<u8>,
    tick: Arc<AtomicU64>,
}

impl Wire {
    fn now_us(&self) -> u64 {
        self.tick.load(Relaxed) / 10
    }

    fn lost(&mut self) -> bool {
        self.passed += 1;
        matches!(self.trouble, Trouble::Loses(each) if self.passed.is_multiple_of(each))
    }

    fn deliver_in(&mut self, mut frame: Vec<u8>) {
        if self.lost() || self.trouble == Trouble::Silent {
            return;
        }
        if self.trouble == Trouble::DamagesIn && frame.len() > 200 {
            frame[100] ^= 4;
        }
        if self.trouble == Trouble::Doubles {
            self.to_guest.push_back(frame.clone());
        }
        self.to_guest.push_back(frame);
    }

    fn deliver_out(&mut self, frame: &[u8]) {
        if self.lost() {
            return;
        }
        let mut frame = frame.to_vec();
        if self.trouble == Trouble::DamagesOut && frame.len() > 200 {
            frame[100] ^= 4;
        }
        if self.trouble == Trouble::RepeatsOut && frame.len() > 200 {
            // Each second one, so that as many come as were sent.
            if self.last.len() == frame.len() {
                frame = core::mem::take(&mut self.last);
            } else {
                self.last.clone_from(&frame);
            }
        }
        if self.trouble == Trouble::CutsOut && frame.len() > 200 {
            frame.pop();
        }
        let now = self.now_us();
        if let Some(answer) = self.peer.control(&frame, None, now) {
            self.deliver_in(answer.to_vec());
        } else if self.peer.data(&frame) {
            self.peer.turn_around(&mut frame);
            self.deliver_in(frame);
        }
    }

    fn generate(&mut self) {
        let now = self.now_us();
        let mut out = [0; MAX_BYTES];
        for _ in 0..self.peer.due(now, 4) {
            let bytes = self.peer.next(&mut out, now);
            self.deliver_in(out[..bytes].to_vec());
        }
    }
}

type Shared = Arc<Mutex<Wire>>;

fn lock(wire: &Shared) -> MutexGuard<'_, Wire> {
    wire.lock().unwrap()
}

const ROOM: usize = 32;

struct Tx {
    wire: Shared,
    queued: Vec<(Buffer, usize)>,
    done: VecDeque<Buffer>,
}

impl NetTx<Buffer> for Tx {
    fn submit(
        &mut self,
        buffer: Buffer,
        bytes: usize,
        meta: &FrameMeta,
    ) -> Result<(), Refused<Buffer>> {
        assert_eq!(*meta, FrameMeta::PLAIN);
        if self.room() == 0 {
            return Err(Refused {
                reason: Reason::Full,
                buffer: Some(buffer),
            });
        }
        self.queued.push((buffer, bytes));
        Ok(())
    }
    fn publish(&mut self) {
        let mut wire = lock(&self.wire);
        wire.published += 1;
        for (buffer, bytes) in self.queued.drain(..) {
            wire.deliver_out(&buffer[HEADROOM..HEADROOM + bytes]);
            if wire.trouble != Trouble::Keeps {
                self.done.push_back(buffer);
            }
        }
    }
    fn complete(&mut self) -> Result<Option<Buffer>, Fault> {
        Ok(self.done.pop_front())
    }
    fn arm(&mut self) -> bool {
        false
    }
    fn room(&self) -> usize {
        ROOM - self.queued.len() - self.done.len()
    }
}

struct Rx {
    wire: Shared,
    held: Held,
}

/// A frame in two pieces.
struct Held(Vec<u8>);

impl HeldFrame for Held {
    fn piece(&self, index: usize) -> &[u8] {
        let (a, b) = self.0.split_at(self.0.len() / 3);
        [a, b].get(index).unwrap_or(&&[][..])
    }
    fn recycle(&mut self) {}
}

impl NetRx for Rx {
    fn recv(&mut self) -> Result<Option<RxFrame<'_>>, Fault> {
        let mut wire = lock(&self.wire);
        wire.generate();
        let Some(frame) = wire.to_guest.pop_front() else {
            return Ok(None);
        };
        let bytes = frame.len();
        self.held.0 = frame;
        Ok(Some(RxFrame::new(&mut self.held, bytes, FrameMeta::PLAIN)))
    }
    fn publish(&mut self) {}
    fn arm(&mut self) -> bool {
        !lock(&self.wire).to_guest.is_empty()
    }
}

struct Card {
    tx: Tx,
    rx: Rx,
}

impl NetTarget<Buffer> for Card {
    type Tx = Tx;
    type Rx = Rx;
    fn halves(&mut self) -> (&mut Tx, &mut Rx) {
        (&mut self.tx, &mut self.rx)
    }
    fn limits(&self) -> NetLimits {
        NetLimits {
            mac: Some(MacAddress::local(2)),
            mtu: 1500,
            transmit: Offloads::empty(),
            receive: Offloads::empty(),
            pairs: 1,
        }
    }
    fn acknowledge(&mut self) {}
    fn kicks(&self) -> u64 {
        lock(&self.tx.wire).published
    }
    fn buffer(&mut self, bytes: usize) -> Option<Buffer> {
        Some(vec![0; bytes].into_boxed_slice())
    }
}

/// Ten ticks in a microsecond; each look at the clock takes some.
struct Clock {
    tick: Arc<AtomicU64>,
    marks: Vec<Mark>,
}

impl Machine for Clock {
    fn now(&self) -> u64 {
        self.tick.fetch_add(20, Relaxed)
    }
    fn wait(&mut self) {
        self.tick.fetch_add(100, Relaxed);
    }
    fn mark(&mut self, mark: Mark) {
        self.marks.push(mark);
    }
    fn counts(&self) -> Counts {
        Counts::default()
    }
}

fn job(
    work: NetWork,
    trouble: Trouble,
    change: impl FnOnce(&mut NetJob),
) -> Result<NetOutcome, NetError> {
    let mut job = NetJob::new_zeroed();
    job.work = work.code();
    job.completion = Completion::Polled.code();
    job.frame_bytes.set(512);
    job.burst.set(16);
    job.verify.set(40);
    job.ticks_per_ms.set(10_000);
    job.duration_ticks.set(100_000);
    job.duration_us.set(10_000);
    job.max_samples.set(50);
    change(&mut job);
    let tick = Arc::new(AtomicU64::new(0));
    let wire = Arc::new(Mutex::new(Wire {
        peer: Peer::new(MacAddress::local(1)),
        trouble,
        passed: 0,
        to_guest: VecDeque::new(),
        published: 0,
        last: Vec::new(),
        tick: tick.clone(),
    }));
    let mut card = Card {
        tx: Tx {
            wire: wire.clone(),
            queued: Vec::new(),
            done: VecDeque::new(),
        },
        rx: Rx {
            wire: wire.clone(),
            held: Held(Vec::new()),
        },
    };
    let mut clock = Clock {
        tick,
        marks: Vec::new(),
    };
    let mut samples = vec![Sample::new_zeroed(); 100];
    let outcome = run(&job, 3, &mut card, &mut clock, &mut samples);
    if outcome.is_ok() {
        assert_eq!(clock.marks, [Mark::Start(3), Mark::End(3)]);
        // The next job finds the peer as this one did.
        assert_eq!(lock(&wire).peer.mode(), Mode::Count);
        assert!(!lock(&wire).peer.is_generating());
    }
    if matches!(outcome, Err(NetError::Tcp(_))) {
        assert_eq!(clock.marks, [], "nothing is measured before it connects");
    }
    outcome
}

#[test]
fn transmitted_frames_are_counted_at_the_receiver_in_bursts() {
    let outcome = job(NetWork::Transmit, Trouble::None, |_| {}).unwrap();
    assert!(outcome.sent > 100);
    assert_eq!(
        (outcome.received, outcome.common.requests),
        (outcome.sent, outcome.sent)
    );
    assert_eq!(outcome.common.counts.kicks * 16, outcome.sent);
    assert!(outcome.common.verified_bytes > 20 * 512);
    let lossy = job(NetWork::Transmit, Trouble::Loses(53), |job| {
        job.verify.set(0);
    });
    let lossy = lossy.unwrap();
    assert!(lossy.received < lossy.sent && lossy.received > lossy.sent / 2);
}

#[test]
fn received_frames_are_counted_and_gaps_seen() {
    for completion in [Completion::Polled, Completion::Interrupt] {
        let outcome = job(NetWork::Receive, Trouble::None, |job| {
            job.completion = completion.code();
        });
        let outcome = outcome.unwrap();
        assert!(outcome.received > 100);
        assert_eq!(outcome.received, outcome.sent);
    }
    let slow = job(NetWork::Receive, Trouble::None, |job| job.rate.set(100_000)).unwrap();
    assert!((900..1100).contains(&slow.received), "{}", slow.received);
    let lossy = job(NetWork::Receive, Trouble::Loses(53), |job| {
        job.verify.set(0);
    });
    let lossy = lossy.unwrap();
    assert!(lossy.received < lossy.sent && lossy.received > lossy.sent / 2);
}

#[test]
fn round_trips_are_samples() {
    for completion in [Completion::Polled, Completion::Interrupt] {
        let outcome = job(NetWork::RoundTrip, Trouble::None, |job| {
            job.completion = completion.code();
        });
        let outcome = outcome.unwrap();
        assert_eq!(outcome.common.samples, 50);
        assert_eq!(outcome.received, 50);
        assert_eq!(outcome.common.counts.kicks, 50);
    }
}

#[test]
fn every_wrong_byte_fails_the_job() {
    for work in [NetWork::Transmit, NetWork::Receive, NetWork::RoundTrip] {
        let error = job(work, Trouble::DamagesIn, |_| {}).unwrap_err();
        assert!(
            matches!(error, NetError::Data(wrong) if wrong.offset == 100),
            "{error}"
        );
        let error = job(work, Trouble::DamagesOut, |_| {}).unwrap_err();
        assert!(
            matches!(error, NetError::WrongAtPeer { offset: 100, .. }),
            "{error}"
        );
    }
}

#[test]
fn frames_that_come_twice_or_cut_to_the_peer_fail_the_job() {
    for trouble in [Trouble::RepeatsOut, Trouble::CutsOut] {
        let error = job(NetWork::Transmit, trouble, |_| {}).unwrap_err();
        assert!(matches!(error, NetError::WrongAtPeer { .. }), "{error}");
    }
}

#[test]
fn a_wire_that_is_broken_ends_the_job() {
    let error = job(NetWork::Receive, Trouble::Doubles, |_| {}).unwrap_err();
    assert!(matches!(error, NetError::Order { .. }), "{error}");
    for work in [NetWork::Transmit, NetWork::RoundTrip] {
        let error = job(work, Trouble::Silent, |_| {}).unwrap_err();
        assert!(matches!(error, NetError::NoAnswer(_)), "{error}");
    }
    let error = job(NetWork::Transmit, Trouble::Keeps, |_| {}).unwrap_err();
    assert!(matches!(error, NetError::Stalled { .. }), "{error}");
    let error = job(NetWork::Transmit, Trouble::Loses(11), |_| {}).unwrap_err();
    assert!(matches!(error, NetError::Lost { .. }), "{error}");
}

#[test]
fn a_connection_that_is_not_made_is_not_measured() {
    for work in [NetWork::TcpReceive, NetWork::TcpSend] {
        let error = job(work, Trouble::None, |job| {
            job.ticks_per_ms.set(100);
            job.stream_bytes.set(1000);
        });
        assert!(matches!(error, Err(NetError::Tcp(_))), "{error:?}");
    }
}

#[test]
fn jobs_that_make_no_sense_are_refused() {
    type Change = fn(&mut NetJob);
    let changes: [(&str, Change); 5] = [
        ("frame_bytes", |job| job.frame_bytes.set(20)),
        ("frame_bytes", |job| job.frame_bytes.set(1515)),
        ("burst", |job| job.burst.set(0)),
        ("work", |job| job.work.set(9)),
        ("ticks_per_ms", |job| job.ticks_per_ms.set(0)),
    ];
    for (name, change) in changes {
        let error = job(NetWork::Transmit, Trouble::None, change).unwrap_err();
        assert!(
            matches!(error, NetError::Job { field, .. } if field == name),
            "{error}"
        );
    }
}
