//! Frames in both directions, compared byte by byte, outside of what is timed.

use super::control::{Message, Mode, Subject};
use super::frame::{self, MAX_BYTES};
use super::run::{NetError, NetTarget, Runner};
use crate::run::Machine;
use core::hint::spin_loop;
use pvkit_guest::net::{NetBuf, NetRx};
use pvkit_protocol::frame::MIN_WIRE_FRAME_BYTES;

/// Frames that are sent before the peer is asked how many came: it has room
/// for so many.
const BATCH: u64 = 32;
/// How often the peer is asked until all frames have come.
const TRIES: u32 = 100;
/// Frames a second, so that none is lost for want of time.
const RATE: u32 = 20_000;
/// How long after its last frame a batch counts as over.
const SILENCE_MS: u64 = 200;

impl<B, T, M> Runner<'_, B, T, M>
where
    B: NetBuf,
    T: NetTarget<B>,
    M: Machine,
{
    /// Sends and receives `count` frames, of the job's length and of others.
    /// Returns how many bytes were compared.
    pub(super) fn verify(&mut self, count: u64) -> Result<u64, NetError> {
        let mut bytes = 0;
        let own = self.frame_bytes;
        // Shorter ones are padded on their way.
        let shortest = MIN_WIRE_FRAME_BYTES;
        for (index, length) in [own, shortest, own, MAX_BYTES].into_iter().enumerate() {
            let share = (count / 4).max(u64::from(count > 0 && index == 0));
            bytes += self.verify_transmit(share, length)?;
            bytes += self.verify_receive(share, length)?;
        }
        Ok(bytes)
    }

    fn verify_transmit(&mut self, count: u64, bytes: usize) -> Result<u64, NetError> {
        let number = self.new_request(Subject::Mode).number.get();
        let mut request = Message::mode_request(Mode::Check, number);
        request.first.set(self.next_sequence() + 1);
        request.frame_bytes.set(bytes as u32);
        let before = self.ask(&request)?;
        let mut sent = 0;
        let mut done = before;
        while sent < count {
            let batch = BATCH.min(count - sent);
            for _ in 0..batch {
                let sequence = self.next_sequence();
                let (peer, mac) = (self.peer, self.mac);
                let seed = self.job.seed.get().wrapping_add(sequence as u32);
                self.send(bytes, |place| frame::fill(place, peer, mac, sequence, seed))?;
            }
            sent += batch;
            done = self.checked_by_peer(before.checked.get() + sent)?;
        }
        let checked = done.checked.get().saturating_sub(before.checked.get());
        let wrong = done.wrong.get().saturating_sub(before.wrong.get());
        self.set_mode(Mode::Count)?;
        if checked != count {
            return Err(NetError::Lost {
                sent: count,
                received: checked,
            });
        }
        if wrong > 0 {
            return Err(NetError::WrongAtPeer {
                wrong,
                checked,
                sequence: done.wrong_sequence.get(),
                offset: done.wrong_offset.get(),
            });
        }
        Ok(checked * bytes as u64)
    }

    /// The peer's counters once it has compared so many frames, or does not get
    /// any more.
    fn checked_by_peer(&mut self, expected: u64) -> Result<Message, NetError> {
        let mut last = self.peer_counters()?;
        for _ in 0..TRIES {
            if last.checked.get() >= expected {
                break;
            }
            let since = self.machine.now();
            while self.machine.now().saturating_sub(since) < self.ticks(1) {
                spin_loop();
            }
            last = self.peer_counters()?;
        }
        Ok(last)
    }

    fn verify_receive(&mut self, count: u64, bytes: usize) -> Result<u64, NetError> {
        if count == 0 {
            return Ok(0);
        }
        let mut request = self.new_request(Subject::Generate);
        let first = self.next_sequence();
        request.frame_bytes.set(bytes as u32);
        request.rate.set(RATE);
        request.seed.set(self.job.seed.get() ^ 0x5eed);
        request.vary.set(1);
        request.count.set(count);
        request.first.set(first);
        request.limit_us.set(10_000_000);
        self.ask(&request)?;
        let mut copy = [0; MAX_BYTES];
        let mut received = 0;
        let mut heard = self.machine.now();
        while received < count {
            let found = self.target.halves().1.recv()?;
            let copied = found.map(|frame| frame.copy_to(&mut copy));
            self.rx().publish();
            let now = self.machine.now();
            let Some(copied) = copied else {
                if now.saturating_sub(heard) > self.ticks(SILENCE_MS) {
                    break;
                }
                spin_loop();
                continue;
            };
            let copy = copy.get(..copied).unwrap_or(&[]);
            if frame::sequence(copy).is_none() {
                continue;
            }
            heard = now;
            frame::check(copy, first + received, bytes)?;
            received += 1;
        }
        let request = self.new_request(Subject::Stop);
        self.ask(&request)?;
        if received < count {
            return Err(NetError::Lost {
                sent: count,
                received,
            });
        }
        Ok(received * bytes as u64)
    }
}
