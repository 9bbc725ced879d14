//! Running one job on one network card.

pub use super::error::NetError;

use super::control::{FRAME_BYTES, Message, Mode, Subject};
use super::frame::{self, MAX_BYTES, MIN_BYTES};
use super::job::{NetJob, NetWork};
use super::tcp;
use crate::report::Sample;
use crate::run::{Counts, Machine, Outcome};
use crate::script::Completion;
use alloc::vec::Vec;
use core::hint::spin_loop;
use pvkit_guest::net::{
    FrameMeta, HEADROOM, MacAddress, NetBuf, NetLimits, NetRx, NetTx, Offloads, Reason, RxFrame,
};

/// A network card and the driver that a job goes through.
pub trait NetTarget<B: NetBuf> {
    /// The half of the driver that transmits.
    type Tx: NetTx<B>;
    /// The half that receives.
    type Rx: NetRx;
    /// Both halves.
    fn halves(&mut self) -> (&mut Self::Tx, &mut Self::Rx);
    /// What the card can do.
    fn limits(&self) -> NetLimits;
    /// What has to be done about an interrupt before frames are taken.
    fn acknowledge(&mut self);
    /// Doorbells rung so far, of both halves.
    fn kicks(&self) -> u64;
    /// A buffer for frames, if there is memory.
    fn buffer(&mut self, bytes: usize) -> Option<B>;
}

/// What a job came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetOutcome {
    /// What it has in common with a job on a disk.
    pub common: Outcome,
    /// See [`NetReport`](super::report::NetReport), as for all fields.
    pub sent: u64,
    /// Frames that the receiver counts.
    pub received: u64,
    /// Payload of a stream.
    pub stream_bytes: u64,
    /// Offloads in use.
    pub transmit: Offloads,
    /// The same, the other way.
    pub receive: Offloads,
}

/// How often a control frame is sent before the peer counts as gone.
const TRIES: u32 = 100;
/// How long an answer may take before the request is sent again.
const ANSWER_MS: u64 = 20;
/// How long nothing may happen.
pub(super) const PATIENCE_MS: u64 = 2000;
/// After so many frames the device gets their buffers back.
const PUBLISH_EVERY: u32 = 64;
/// What has to be seen of a data frame for its number.
const HEAD: usize = MIN_BYTES;

pub(super) struct Runner<'a, B, T, M> {
    pub(super) target: &'a mut T,
    pub(super) machine: &'a mut M,
    pub(super) job: &'a NetJob,
    pub(super) mac: MacAddress,
    pub(super) peer: MacAddress,
    pub(super) completion: Completion,
    /// Buffers for frames.
    pub(super) spare: Vec<B>,
    /// Frames that the device has.
    pub(super) in_flight: u64,
    /// Number of the last request to the peer.
    request: u32,
    /// Number of the next data frame.
    sequence: u64,
    pub(super) frame_bytes: usize,
    unpublished: u32,
}

/// Runs a job: warm-up, timed part, verification. Round trips write samples as
/// far as there is room, and end when there is none.
///
/// # Errors
/// [`NetError`] says what went wrong.
pub fn run<B, T, M>(
    job: &NetJob,
    number: u32,
    target: &mut T,
    machine: &mut M,
    samples: &mut [Sample],
) -> Result<NetOutcome, NetError>
where
    B: NetBuf,
    T: NetTarget<B>,
    M: Machine,
{
    let bad = |field, value: u32| NetError::Job {
        field,
        value: u64::from(value),
    };
    let work = NetWork::from_code(job.work).ok_or(bad("work", job.work.get()))?;
    let limits = target.limits();
    let mut runner = Runner::new(job, number, target, machine)?;
    let mut outcome = match work {
        NetWork::Transmit => runner.transmit(number)?,
        NetWork::Receive => runner.receive(number)?,
        NetWork::RoundTrip => runner.round_trip(number, samples)?,
        NetWork::TcpReceive => tcp::run(&mut runner, number, true)?,
        NetWork::TcpSend => tcp::run(&mut runner, number, false)?,
        NetWork::Exchange => runner.exchange(number)?,
    };
    if matches!(
        work,
        NetWork::Transmit | NetWork::Receive | NetWork::RoundTrip
    ) {
        outcome.common.verified_bytes = runner.verify(u64::from(job.verify.get()))?;
    }
    outcome.transmit = limits.transmit;
    outcome.receive = limits.receive;
    Ok(outcome)
}

/// What a frame that came in is.
pub(super) enum Got {
    Data { sequence: u64 },
    Control(Message),
    Other,
}

/// Looks at the start of a frame.
pub(super) fn look(frame: &RxFrame<'_>) -> Got {
    let mut copy = [0; FRAME_BYTES];
    let whole = frame.as_slice();
    let head = whole.and_then(|bytes| bytes.get(..HEAD));
    if let Some(sequence) = head.and_then(frame::sequence) {
        return Got::Data { sequence };
    }
    let count = frame.copy_to(&mut copy);
    let copy = copy.get(..count).unwrap_or(&[]);
    if let Some(sequence) = frame::sequence(copy) {
        return Got::Data { sequence };
    }
    Message::read(copy).map_or(Got::Other, |(message, _)| Got::Control(message))
}

impl<'a, B, T, M> Runner<'a, B, T, M>
where
    B: NetBuf,
    T: NetTarget<B>,
    M: Machine,
{
    fn new(
        job: &'a NetJob,
        number: u32,
        target: &'a mut T,
        machine: &'a mut M,
    ) -> Result<Self, NetError> {
        let bad = |field, value: u32| NetError::Job {
            field,
            value: u64::from(value),
        };
        let frame_bytes = job.frame_bytes.get();
        if !(MIN_BYTES..=MAX_BYTES).contains(&(frame_bytes as usize)) {
            return Err(bad("frame_bytes", frame_bytes));
        }
        let burst = job.burst.get();
        if !(1..=4096).contains(&burst) {
            return Err(bad("burst", burst));
        }
        let completion =
            Completion::from_code(job.completion).ok_or(bad("completion", job.completion.get()))?;
        let ticks = job.ticks_per_ms.get();
        if ticks == 0 {
            return Err(bad("ticks_per_ms", ticks));
        }
        let mac = target.limits().mac.ok_or(NetError::NoAddress)?;
        let count = 2 * burst as usize;
        let mut spare = Vec::new();
        spare.try_reserve(count).map_err(|_| NetError::Memory)?;
        for _ in 0..count {
            let bytes = HEADROOM + MAX_BYTES.max(FRAME_BYTES);
            spare.push(target.buffer(bytes).ok_or(NetError::Memory)?);
        }
        Ok(Self {
            target,
            machine,
            job,
            mac,
            peer: MacAddress::BROADCAST,
            completion,
            spare,
            in_flight: 0,
            // Those of two jobs must not be the same.
            request: number << 16,
            sequence: u64::from(number) << 40,
            frame_bytes: frame_bytes as usize,
            unpublished: 0,
        })
    }

    pub(super) fn ticks(&self, milliseconds: u64) -> u64 {
        milliseconds * u64::from(self.job.ticks_per_ms.get())
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            kicks: self.target.kicks(),
            ..self.machine.counts()
        }
    }

    pub(super) fn tx(&mut self) -> &mut T::Tx {
        self.target.halves().0
    }

    pub(super) fn rx(&mut self) -> &mut T::Rx {
        self.target.halves().1
    }

    /// Takes back the buffers of frames that were sent.
    pub(super) fn reap(&mut self) -> Result<(), NetError> {
        while let Some(buffer) = self.target.halves().0.complete()? {
            self.in_flight = self.in_flight.saturating_sub(1);
            self.spare.push(buffer);
        }
        Ok(())
    }

    /// A spare buffer; waits for one if all are on their way.
    pub(super) fn take(&mut self) -> Result<B, NetError> {
        let start = self.machine.now();
        loop {
            if let Some(buffer) = self.spare.pop() {
                return Ok(buffer);
            }
            self.reap()?;
            if self.spare.is_empty() {
                self.wait_for_device(start)?;
            }
        }
    }

    pub(super) fn wait_for_device(&mut self, since: u64) -> Result<(), NetError> {
        if self.machine.now().saturating_sub(since) > self.ticks(PATIENCE_MS) {
            return Err(NetError::Stalled {
                sent: self.in_flight,
            });
        }
        spin_loop();
        Ok(())
    }

    /// Queues a frame if there is room, or keeps its buffer.
    pub(super) fn try_submit(&mut self, buffer: B, bytes: usize) -> Result<bool, NetError> {
        let tx = self.target.halves().0;
        match tx.submit(buffer, bytes, &FrameMeta::PLAIN) {
            Ok(()) => {
                self.in_flight += 1;
                Ok(true)
            }
            Err(refused) => {
                let buffer = refused.buffer.ok_or(NetError::BufferLost)?;
                self.spare.push(buffer);
                match refused.reason {
                    Reason::Full => Ok(false),
                    reason => Err(NetError::Refused(reason)),
                }
            }
        }
    }

    /// Sends one frame, at once.
    pub(super) fn send(
        &mut self,
        bytes: usize,
        mut write: impl FnMut(&mut [u8]),
    ) -> Result<(), NetError> {
        let start = self.machine.now();
        loop {
            let mut buffer = self.take()?;
            if let Some(place) = buffer.as_mut().get_mut(HEADROOM..HEADROOM + bytes) {
                write(place);
            }
            if self.try_submit(buffer, bytes)? {
                self.tx().publish();
                return Ok(());
            }
            self.reap()?;
            self.wait_for_device(start)?;
        }
    }

    /// Waits until the device has sent everything.
    pub(super) fn drain(&mut self) -> Result<(), NetError> {
        let start = self.machine.now();
        loop {
            self.reap()?;
            if self.in_flight == 0 {
                return Ok(());
            }
            self.wait_for_device(start)?;
        }
    }

    /// Says that a frame was received and its buffer is free.
    fn recycled(&mut self) {
        self.unpublished += 1;
        if self.unpublished >= PUBLISH_EVERY {
            self.publish_rx();
        }
    }

    fn publish_rx(&mut self) {
        self.unpublished = 0;
        self.rx().publish();
    }

    /// The next frame's start, if there is one.
    pub(super) fn receive_one(&mut self) -> Result<Option<Got>, NetError> {
        let got = match self.target.halves().1.recv()? {
            Some(frame) => look(&frame),
            None => return Ok(None),
        };
        self.recycled();
        Ok(Some(got))
    }

    /// Nothing is there to be received: sleeps, if completion is by interrupt.
    pub(super) fn idle(&mut self) {
        if self.completion == Completion::Polled {
            spin_loop();
            return;
        }
        self.unpublished = 0;
        if !self.rx().arm() {
            self.machine.wait();
            self.target.acknowledge();
        }
    }

    pub(super) fn new_request(&mut self, subject: Subject) -> Message {
        self.request = self.request.wrapping_add(1);
        Message::request(subject, self.request)
    }

    /// Asks the peer until it answers.
    pub(super) fn ask(&mut self, message: &Message) -> Result<Message, NetError> {
        let (to, from) = (self.peer, self.mac);
        for _ in 0..TRIES {
            self.send(FRAME_BYTES, |place| message.write(place, to, from))?;
            let sent = self.machine.now();
            let patience = self.ticks(ANSWER_MS);
            loop {
                let mut copy = [0; FRAME_BYTES];
                let got = self
                    .target
                    .halves()
                    .1
                    .recv()?
                    .map(|frame| frame.copy_to(&mut copy));
                if let Some(count) = got {
                    self.recycled();
                    let answer = Message::read(copy.get(..count).unwrap_or(&[]));
                    if let Some((answer, peer)) = answer
                        && answer.is_answer()
                        && answer.number == message.number
                    {
                        self.peer = peer;
                        return Ok(answer);
                    }
                } else {
                    if self.unpublished > 0 {
                        self.publish_rx();
                    }
                    spin_loop();
                }
                // While frames pour in, too.
                if self.machine.now().saturating_sub(sent) > patience {
                    break;
                }
            }
            self.reap()?;
        }
        let subject = message.subject().unwrap_or(Subject::Counters);
        Err(NetError::NoAnswer(subject))
    }

    pub(super) fn peer_counters(&mut self) -> Result<Message, NetError> {
        let request = self.new_request(Subject::Counters);
        self.ask(&request)
    }

    pub(super) fn set_mode(&mut self, mode: Mode) -> Result<Message, NetError> {
        self.request = self.request.wrapping_add(1);
        let request = Message::mode_request(mode, self.request);
        self.ask(&request)
    }

    pub(super) fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }
}
