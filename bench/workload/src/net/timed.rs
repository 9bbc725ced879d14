//! The timed parts: sending, receiving, and going there and back.

use super::control::{Mode, Subject};
use super::frame;
use super::run::{Got, NetError, NetOutcome, NetTarget, PATIENCE_MS, Runner};
use crate::report::Sample;
use crate::run::{Machine, Outcome};
use crate::script::Mark;
use pvkit_guest::net::{HEADROOM, NetBuf, NetTx};
use zerocopy::little_endian::U64;

/// Frames before the timed part of a round trip.
const WARMUP_TRIPS: u64 = 64;
/// Frames before the timed part of a job that receives.
const WARMUP_FRAMES: u64 = 256;

impl<B, T, M> Runner<'_, B, T, M>
where
    B: NetBuf,
    T: NetTarget<B>,
    M: Machine,
{
    /// Makes data frames of all buffers, complete but for their numbers.
    fn fill_spare(&mut self) -> Result<(), NetError> {
        self.drain()?;
        let (peer, mac, bytes) = (self.peer, self.mac, self.frame_bytes);
        for (index, buffer) in (0u32..).zip(&mut self.spare) {
            let seed = self.job.seed.get().wrapping_add(index);
            if let Some(place) = buffer.as_mut().get_mut(HEADROOM..HEADROOM + bytes) {
                frame::fill(place, peer, mac, 0, seed);
            }
        }
        Ok(())
    }

    pub(super) fn transmit(&mut self, number: u32) -> Result<NetOutcome, NetError> {
        let burst = self.job.burst.get() as usize;
        // A short ring is refilled by halves, so that it does not run dry.
        let step = burst.min(self.tx().room() / 2).max(1);
        self.set_mode(Mode::Count)?;
        self.fill_spare()?;
        // Warm-up.
        self.bursts(burst, step, 0)?;
        let before = self.peer_counters()?;
        // The request has lain in one of the buffers.
        self.fill_spare()?;
        self.machine.mark(Mark::Start(number));
        let counts = self.counts();
        let start = self.machine.now();
        let sent = self.bursts(burst, step, self.job.duration_ticks.get())?;
        let end = self.machine.now();
        let counts = self.counts().since(&counts);
        self.machine.mark(Mark::End(number));
        let after = self.peer_counters()?;
        let received = after.received.get().saturating_sub(before.received.get());
        Ok(NetOutcome {
            common: Outcome {
                start,
                end,
                requests: received,
                counts,
                ..Outcome::default()
            },
            sent,
            received,
            ..NetOutcome::default()
        })
    }

    /// Sends bursts for so many ticks, at least one, until all of them are
    /// sent; returns the number of frames.
    fn bursts(&mut self, burst: usize, step: usize, ticks: u64) -> Result<u64, NetError> {
        let start = self.machine.now();
        let mut last = start;
        let mut sent = 0;
        loop {
            self.reap()?;
            let room = self.tx().room().min(self.spare.len());
            if room < step {
                self.wait_for_device(last)?;
                continue;
            }
            for _ in 0..room.min(burst) {
                let sequence = self.next_sequence();
                let Some(mut buffer) = self.spare.pop() else {
                    break;
                };
                let frame = buffer.as_mut().get_mut(HEADROOM..).unwrap_or(&mut []);
                frame::stamp(frame, sequence);
                if !self.try_submit(buffer, self.frame_bytes)? {
                    break;
                }
                sent += 1;
            }
            self.tx().publish();
            last = self.machine.now();
            if last.saturating_sub(start) >= ticks {
                self.drain()?;
                return Ok(sent);
            }
        }
    }

    pub(super) fn receive(&mut self, number: u32) -> Result<NetOutcome, NetError> {
        self.set_mode(Mode::Count)?;
        let mut request = self.new_request(Subject::Generate);
        request.frame_bytes.set(self.frame_bytes as u32);
        request.rate = self.job.rate;
        request.seed = self.job.seed;
        request.count.set(u64::MAX);
        request.first.set(self.next_sequence());
        let duration_us = u64::from(self.job.duration_us.get());
        request.limit_us.set(2 * duration_us + 1_000_000);
        self.ask(&request)?;

        // Until the stream is steady.
        let mut last = self.received_after(None, WARMUP_FRAMES, u64::MAX)?.last;
        self.machine.mark(Mark::Start(number));
        let counts = self.counts();
        let start = self.machine.now();
        let first = last;
        let window = self.received_after(last, u64::MAX, self.job.duration_ticks.get())?;
        let end = self.machine.now();
        let counts = self.counts().since(&counts);
        self.machine.mark(Mark::End(number));
        last = window.last.or(last);
        let request = self.new_request(Subject::Stop);
        self.ask(&request)?;
        let sent = last.unwrap_or(0).saturating_sub(first.unwrap_or(0));
        Ok(NetOutcome {
            common: Outcome {
                start,
                end,
                requests: window.received,
                counts,
                ..Outcome::default()
            },
            sent,
            received: window.received,
            ..NetOutcome::default()
        })
    }

    /// Receives data frames that come after the number `last`, until there were
    /// `most`, or `ticks` are over, or the peer has finished.
    fn received_after(
        &mut self,
        mut last: Option<u64>,
        most: u64,
        ticks: u64,
    ) -> Result<Window, NetError> {
        let start = self.machine.now();
        let mut heard = start;
        let mut received = 0;
        let patience = self.ticks(PATIENCE_MS);
        loop {
            match self.receive_one()? {
                Some(Got::Data { sequence }) => {
                    if let Some(before) = last.filter(|before| sequence <= *before) {
                        return Err(NetError::Order {
                            before,
                            found: sequence,
                        });
                    }
                    last = Some(sequence);
                    received += 1;
                    // Looking at the clock takes longer than at a frame.
                    if received % 16 != 0 && received < most {
                        continue;
                    }
                    heard = self.machine.now();
                }
                Some(Got::Control(message)) if message.subject() == Some(Subject::Finished) => {
                    break;
                }
                Some(_) => {}
                None => self.idle(),
            }
            let now = self.machine.now();
            if received >= most || now.saturating_sub(start) >= ticks {
                break;
            }
            if now.saturating_sub(heard) > patience {
                return Err(NetError::NothingReceived { received });
            }
        }
        Ok(Window { received, last })
    }

    pub(super) fn round_trip(
        &mut self,
        number: u32,
        samples: &mut [Sample],
    ) -> Result<NetOutcome, NetError> {
        self.set_mode(Mode::Echo)?;
        for _ in 0..WARMUP_TRIPS {
            self.trip()?;
        }
        self.machine.mark(Mark::Start(number));
        let counts = self.counts();
        let start = self.machine.now();
        let mut end = start;
        let mut trips = 0;
        let most = (self.job.max_samples.get() as usize).min(samples.len());
        for sample in samples.iter_mut().take(most) {
            let (sent, back) = self.trip()?;
            *sample = Sample {
                start: U64::new(sent),
                end: U64::new(back),
            };
            trips += 1;
            end = back;
            if end.saturating_sub(start) >= self.job.duration_ticks.get() {
                break;
            }
        }
        let counts = self.counts().since(&counts);
        self.machine.mark(Mark::End(number));
        self.set_mode(Mode::Count)?;
        Ok(NetOutcome {
            common: Outcome {
                start,
                end,
                requests: trips,
                counts,
                samples: trips as usize,
                ..Outcome::default()
            },
            sent: trips,
            received: trips,
            ..NetOutcome::default()
        })
    }

    /// Sends a frame and waits until it is back; says when either was.
    fn trip(&mut self) -> Result<(u64, u64), NetError> {
        let sequence = self.next_sequence();
        let (peer, mac) = (self.peer, self.mac);
        let (bytes, seed) = (self.frame_bytes, self.job.seed.get());
        // Filled before the time is taken.
        let mut buffer = self.take()?;
        if let Some(place) = buffer.as_mut().get_mut(HEADROOM..HEADROOM + bytes) {
            frame::fill(place, peer, mac, sequence, seed);
        }
        let start = self.machine.now();
        if !self.try_submit(buffer, bytes)? {
            return Err(NetError::Stalled {
                sent: self.in_flight,
            });
        }
        self.tx().publish();
        let patience = self.ticks(PATIENCE_MS);
        loop {
            match self.receive_one()? {
                Some(Got::Data { sequence: found }) if found == sequence => {
                    let end = self.machine.now();
                    self.reap()?;
                    return Ok((start, end));
                }
                Some(Got::Data { sequence: found }) if found > sequence => {
                    return Err(NetError::Order {
                        before: sequence,
                        found,
                    });
                }
                Some(_) => {}
                None => self.idle(),
            }
            if self.machine.now().saturating_sub(start) > patience {
                return Err(NetError::NothingReceived { received: 0 });
            }
        }
    }
}

/// What came in for a while.
struct Window {
    received: u64,
    last: Option<u64>,
}
