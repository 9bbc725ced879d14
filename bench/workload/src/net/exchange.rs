//! Two guests that send each other frames.
//!
//! Each says now and then, in a control frame, how many frames it has sent and
//! received. With a window, a sender is never further ahead of what the other
//! has said than that, so nothing may be lost that fits the buffers in between;
//! without, it sends as fast as it can.

use super::control::{FRAME_BYTES, Message, Subject};
use super::frame;
use super::run::{NetError, NetOutcome, NetTarget, PATIENCE_MS, Runner};
use crate::run::{Machine, Outcome};
use crate::script::Mark;
use pvkit_guest::net::{HEADROOM, MacAddress, NetBuf, NetRx, NetTx};

/// One in so many frames is compared byte by byte.
const CHECK_EVERY: u64 = 64;
/// Most frames that are received before others are sent.
const TURN: u32 = 128;
/// How often a guest says where it is, if nothing else makes it.
const SAY_EVERY_MS: u64 = 1;
/// For how long a guest that is done answers one that is not.
const LINGER_MS: u64 = 50;

/// Where one of the two is.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// Frames that it sends in all.
    total: u64,
    sent: u64,
    received: u64,
    /// It knows that the other one has sent all.
    knows: bool,
    /// It has said something.
    known: bool,
}

impl Progress {
    fn has_sent_all(&self) -> bool {
        self.known && self.sent == self.total
    }
}

/// What came in.
enum Got {
    Nothing,
    Data,
    Other,
}

impl<B, T, M> Runner<'_, B, T, M>
where
    B: NetBuf,
    T: NetTarget<B>,
    M: Machine,
{
    /// Sends so many frames to the other guest, and receives what it sends,
    /// until each knows that the other one is done.
    pub(super) fn exchange(&mut self, number: u32) -> Result<NetOutcome, NetError> {
        let window = u64::from(self.job.window.get());
        let mut own = Progress {
            total: self.job.frames.get(),
            known: true,
            ..Progress::default()
        };
        let mut other = Progress::default();
        let mut state = Exchange {
            heard_at: self.machine.now(),
            ..Exchange::default()
        };
        while !other.known {
            self.say(&own, &mut state, MacAddress::BROADCAST)?;
            let said = self.machine.now();
            while !other.known && self.machine.now() - said < self.ticks(SAY_EVERY_MS) {
                self.take_in(&mut own, &mut other, &mut state)?;
            }
            self.check_patience(&mut state)?;
        }
        self.machine.mark(Mark::Start(number));
        let counts = self.counts();
        let start = self.machine.now();
        while !(own.has_sent_all() && other.has_sent_all() && other.knows) {
            let may = match window {
                0 => own.total,
                window => own.total.min(other.received + window),
            };
            self.send_up_to(&mut own, may)?;
            self.take_in(&mut own, &mut other, &mut state)?;
            // Half a window is in flight before the other hears of it.
            let due = window != 0 && own.received - state.said >= window / 2;
            if due || self.machine.now() - state.said_at >= self.ticks(SAY_EVERY_MS) {
                self.say(&own, &mut state, self.peer)?;
            }
            self.check_patience(&mut state)?;
        }
        let end = self.machine.now();
        let counts = self.counts().since(&counts);
        self.machine.mark(Mark::End(number));
        // The other one may not know yet.
        self.say(&own, &mut state, self.peer)?;
        while self.machine.now() - end < self.ticks(LINGER_MS) {
            if self.take_in(&mut own, &mut other, &mut state)? {
                self.say(&own, &mut state, self.peer)?;
            }
        }
        self.drain()?;
        if window != 0 && own.received != other.total {
            return Err(NetError::Lost {
                sent: other.total,
                received: own.received,
            });
        }
        Ok(NetOutcome {
            common: Outcome {
                start,
                end,
                requests: own.sent + own.received,
                counts,
                verified_bytes: state.verified,
                ..Outcome::default()
            },
            sent: own.sent,
            received: own.received,
            ..NetOutcome::default()
        })
    }

    fn send_up_to(&mut self, own: &mut Progress, may: u64) -> Result<(), NetError> {
        self.reap()?;
        let (to, from) = (self.peer, self.mac);
        let (bytes, seed) = (self.frame_bytes, self.job.seed.get());
        let most = own.sent + u64::from(self.job.burst.get());
        let before = own.sent;
        while own.sent < may.min(most) {
            let Some(mut buffer) = self.spare.pop() else {
                break;
            };
            if let Some(place) = buffer.as_mut().get_mut(HEADROOM..HEADROOM + bytes) {
                frame::fill(place, to, from, own.sent + 1, seed);
            }
            if !self.try_submit(buffer, bytes)? {
                break;
            }
            own.sent += 1;
        }
        if own.sent != before {
            self.tx().publish();
        }
        Ok(())
    }

    /// Receives what is there, within bounds; whether the other one has said
    /// something.
    fn take_in(
        &mut self,
        own: &mut Progress,
        other: &mut Progress,
        state: &mut Exchange,
    ) -> Result<bool, NetError> {
        let mut heard = false;
        for _ in 0..TURN {
            match self.take_one(own, other, state)? {
                Got::Nothing => break,
                Got::Data => own.received += 1,
                Got::Other => heard = true,
            }
            state.moved = true;
        }
        self.rx().publish();
        own.knows = other.has_sent_all();
        Ok(heard)
    }

    fn take_one(
        &mut self,
        own: &Progress,
        other: &mut Progress,
        state: &mut Exchange,
    ) -> Result<Got, NetError> {
        let bytes = self.frame_bytes;
        let lossless = self.job.window.get() != 0;
        let Some(frame) = self.target.halves().1.recv()? else {
            return Ok(Got::Nothing);
        };
        let mut copy = [0; FRAME_BYTES];
        let whole = match frame.as_slice() {
            Some(whole) => whole,
            None => {
                let count = frame.copy_to(&mut copy);
                copy.get(..count).unwrap_or(&[])
            }
        };
        if let Some(sequence) = frame::sequence(whole) {
            let gap = lossless && sequence != state.last + 1;
            if gap || sequence <= state.last {
                return Err(NetError::Order {
                    before: state.last,
                    found: sequence,
                });
            }
            state.last = sequence;
            if own.received.is_multiple_of(CHECK_EVERY) && whole.len() == frame.bytes() {
                frame::check(whole, sequence, bytes)?;
                state.verified += bytes as u64;
            }
            return Ok(Got::Data);
        }
        if let Some((message, from)) = Message::read(whole)
            && message.subject() == Some(Subject::Progress)
        {
            *other = Progress {
                total: message.count.get(),
                sent: message.generated.get(),
                received: message.received.get().max(other.received),
                knows: other.knows || message.is_answer(),
                known: true,
            };
            self.peer = from;
        }
        Ok(Got::Other)
    }

    /// Tells the other one where this one is.
    fn say(
        &mut self,
        own: &Progress,
        state: &mut Exchange,
        to: MacAddress,
    ) -> Result<(), NetError> {
        let mut message = self.new_request(Subject::Progress);
        if own.knows {
            message = message.answer();
        }
        message.count.set(own.total);
        message.generated.set(own.sent);
        message.received.set(own.received);
        state.said = own.received;
        state.said_at = self.machine.now();
        let from = self.mac;
        self.send(FRAME_BYTES, |place| message.write(place, to, from))
    }

    fn check_patience(&mut self, state: &mut Exchange) -> Result<(), NetError> {
        let now = self.machine.now();
        if core::mem::take(&mut state.moved) {
            state.heard_at = now;
        }
        if now - state.heard_at > self.ticks(PATIENCE_MS) {
            return Err(NetError::NothingReceived {
                received: state.last,
            });
        }
        Ok(())
    }
}

/// What has to be remembered on the way.
#[derive(Debug, Default)]
struct Exchange {
    /// Number of the last frame that came.
    last: u64,
    /// What was received when the other one was last told, and when that was.
    said: u64,
    said_at: u64,
    /// Something came in since it was last looked.
    moved: bool,
    /// When that was.
    heard_at: u64,
    verified: u64,
}
