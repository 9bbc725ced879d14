//! The other end of the wire, whatever that is: it answers control frames,
//! counts and compares data frames, and generates them.
//!
//! It has no clock and no wire: whoever has one calls it.

use super::control::{FRAME_BYTES, Message, Mode, Subject};
use super::frame::{self, MAX_BYTES, MIN_BYTES, Mismatch};
use pvkit_protocol::frame::MacAddress;

/// How often the end of generating is said: any frame may be lost.
const FINISHED_TIMES: u8 = 3;

/// What the peer is sending.
#[derive(Debug, Clone, Copy)]
struct Generator {
    to: MacAddress,
    bytes: usize,
    rate: u32,
    seed: u32,
    vary: bool,
    first: u64,
    count: u64,
    started_us: u64,
    limit_us: u64,
}

/// The other end of a wire.
#[derive(Debug)]
pub struct Peer {
    mac: MacAddress,
    mode: Mode,
    /// With [`Mode::Check`]: the number and the length of the next frame, if
    /// that was said.
    expected: Option<(u64, usize)>,
    /// The last request that was done.
    done: Option<u32>,
    received: u64,
    checked: u64,
    wrong: u64,
    first_wrong: Option<Mismatch>,
    generator: Option<Generator>,
    generated: u64,
    /// How often the end is still to be said, and to whom.
    finished: (u8, MacAddress),
    /// The frame that is generated, filled but for its number.
    frame: [u8; MAX_BYTES],
}

impl Peer {
    /// A peer with this address.
    #[must_use]
    pub fn new(mac: MacAddress) -> Self {
        Self {
            mac,
            mode: Mode::Count,
            expected: None,
            done: None,
            received: 0,
            checked: 0,
            wrong: 0,
            first_wrong: None,
            generator: None,
            generated: 0,
            finished: (0, MacAddress::default()),
            frame: [0; MAX_BYTES],
        }
    }

    /// What it does with data frames.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Takes a control frame. Returns the answer, unless it is none.
    /// `received` are the data frames that were received so far, if somebody
    /// else counts them.
    pub fn control(
        &mut self,
        frame: &[u8],
        received: Option<u64>,
        now_us: u64,
    ) -> Option<[u8; FRAME_BYTES]> {
        let (request, from) = Message::read(frame)?;
        if request.is_answer() {
            return None;
        }
        let subject = request.subject()?;
        let number = request.number.get();
        if self.done != Some(number) {
            self.act(subject, &request, from, now_us)?;
            self.done = Some(number);
        }
        let mut answer = request.answer();
        answer.received.set(received.unwrap_or(self.received));
        answer.checked.set(self.checked);
        answer.wrong.set(self.wrong);
        if let Some(wrong) = self.first_wrong {
            answer.wrong_sequence.set(wrong.sequence);
            answer.wrong_offset.set(wrong.offset as u64);
        }
        answer.generated.set(self.generated);
        let mut frame = [0; FRAME_BYTES];
        answer.write(&mut frame, from, self.mac);
        Some(frame)
    }

    /// Does what a request says; `None` if it makes no sense.
    fn act(
        &mut self,
        subject: Subject,
        request: &Message,
        from: MacAddress,
        now_us: u64,
    ) -> Option<()> {
        match subject {
            Subject::Counters => {}
            Subject::Finished | Subject::Progress => return None,
            Subject::Stop => {
                self.generator = None;
                self.finished.0 = 0;
            }
            Subject::Mode => {
                self.mode = request.mode()?;
                let bytes = request.frame_bytes.get() as usize;
                self.expected = (bytes != 0).then(|| (request.first.get(), bytes));
            }
            Subject::Generate => {
                let bytes = request.frame_bytes.get() as usize;
                if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) {
                    return None;
                }
                let generator = Generator {
                    to: from,
                    bytes,
                    rate: request.rate.get(),
                    seed: request.seed.get(),
                    vary: request.vary.get() != 0,
                    first: request.first.get(),
                    count: request.count.get(),
                    started_us: now_us,
                    limit_us: request.limit_us.get(),
                };
                let frame = self.frame.get_mut(..bytes)?;
                frame::fill(frame, from, self.mac, generator.first, generator.seed);
                self.generated = 0;
                self.finished.0 = 0;
                self.generator = Some(generator);
            }
        }
        Some(())
    }

    /// Takes a data frame: counts it, and compares it if that is asked for.
    /// `true` if it is to be sent back.
    pub fn data(&mut self, frame: &[u8]) -> bool {
        let Some(sequence) = frame::sequence(frame) else {
            return false;
        };
        self.received += 1;
        match self.mode {
            Mode::Count => false,
            Mode::Echo => true,
            Mode::Check => {
                self.checked += 1;
                let (number, bytes) = self.expected.unwrap_or((sequence, frame.len()));
                if let Err(wrong) = frame::check(frame, number, bytes) {
                    self.wrong += 1;
                    self.first_wrong.get_or_insert(wrong);
                }
                if let Some((next, _)) = &mut self.expected {
                    // One that is lost makes one wrong, not all that follow.
                    *next = sequence.wrapping_add(1);
                }
                false
            }
        }
    }

    /// Makes a data frame one that goes back to its sender.
    pub fn turn_around(&self, frame: &mut [u8]) {
        if let Some(sender) = frame::source(frame) {
            let kind = frame::kind(frame);
            frame::set_header(frame, sender, self.mac, kind);
        }
    }

    /// Whether it has frames to send of its own, now or later.
    #[must_use]
    pub fn is_generating(&self) -> bool {
        self.generator.is_some() || self.finished.0 > 0
    }

    /// How many generated frames are due, at most `most`.
    #[must_use]
    pub fn due(&self, now_us: u64, most: u64) -> u64 {
        let Some(generator) = &self.generator else {
            return u64::from(self.finished.0).min(most);
        };
        let elapsed = now_us.saturating_sub(generator.started_us);
        if elapsed >= generator.limit_us {
            return 1;
        }
        let by_rate = match generator.rate {
            0 => u64::MAX,
            rate => {
                let by_now = u128::from(elapsed) * u128::from(rate) / 1_000_000;
                u64::try_from(by_now).unwrap_or(u64::MAX)
            }
        };
        // One more, which says that this is the end.
        let left = generator.count.saturating_sub(self.generated).max(1);
        by_rate.saturating_sub(self.generated).min(left).min(most)
    }

    /// When the next frame is due; `None` if nothing is generated, or it is
    /// now.
    #[must_use]
    pub fn next_us(&self) -> Option<u64> {
        let generator = self.generator.as_ref()?;
        if generator.rate == 0 {
            return None;
        }
        let next = (u128::from(self.generated) + 1) * 1_000_000;
        let next = next.div_ceil(u128::from(generator.rate));
        Some(
            generator
                .started_us
                .saturating_add(u64::try_from(next).ok()?),
        )
    }

    /// Writes the next frame that is [`due`](Self::due) to `out`, which has
    /// room for [`MAX_BYTES`]; returns its length, and 0 if nothing is due.
    pub fn next(&mut self, out: &mut [u8], now_us: u64) -> usize {
        if let Some(generator) = self.generator {
            let elapsed = now_us.saturating_sub(generator.started_us);
            if self.generated < generator.count && elapsed < generator.limit_us {
                let Some(frame) = self.frame.get_mut(..generator.bytes) else {
                    return 0;
                };
                let sequence = generator.first.wrapping_add(self.generated);
                if generator.vary {
                    let seed = generator.seed.wrapping_add(self.generated as u32);
                    frame::fill(frame, generator.to, self.mac, sequence, seed);
                } else {
                    frame::stamp(frame, sequence);
                }
                if let Some(out) = out.get_mut(..generator.bytes) {
                    out.copy_from_slice(frame);
                }
                self.generated += 1;
                return generator.bytes;
            }
            self.finished = (FINISHED_TIMES, generator.to);
            self.generator = None;
        }
        let (times, to) = self.finished;
        if times == 0 {
            return 0;
        }
        self.finished.0 -= 1;
        let mut message = Message::request(Subject::Finished, 0).answer();
        message.generated.set(self.generated);
        message.write(out, to, self.mac);
        FRAME_BYTES
    }

    /// Takes the frame back that [`next`](Self::next) wrote last, because the
    /// wire has no room: it will be written again.
    pub fn again(&mut self) {
        if self.generator.is_some() {
            self.generated = self.generated.saturating_sub(1);
        } else {
            self.finished.0 += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: MacAddress = MacAddress::local(1);
    const GUEST: MacAddress = MacAddress::local(2);

    fn ask(peer: &mut Peer, message: &Message, now: u64) -> Option<Message> {
        let mut frame = [0; FRAME_BYTES];
        message.write(&mut frame, MacAddress::BROADCAST, GUEST);
        let answer = peer.control(&frame, None, now)?;
        let (answer, from) = Message::read(&answer).unwrap();
        assert_eq!(from, PEER);
        assert!(answer.is_answer() && answer.number == message.number);
        // An answer is not a request.
        let mut frame = [0; FRAME_BYTES];
        answer.write(&mut frame, PEER, GUEST);
        assert_eq!(peer.control(&frame, None, now), None);
        Some(answer)
    }

    #[test]
    fn data_is_counted_and_compared() {
        let mut peer = Peer::new(PEER);
        let mut frame = [0; 64];
        frame::fill(&mut frame, PEER, GUEST, 5, 1);
        assert!(!peer.data(&frame));
        ask(&mut peer, &Message::mode_request(Mode::Check, 1), 0).unwrap();
        assert!(!peer.data(&frame));
        frame[40] ^= 1;
        peer.data(&frame);
        peer.data(&[0; 64]);
        let answer = ask(&mut peer, &Message::request(Subject::Counters, 2), 0).unwrap();
        let counts = [answer.received, answer.checked, answer.wrong];
        assert_eq!(counts.map(zerocopy::U64::get), [3, 2, 1]);
        assert_eq!(answer.wrong_sequence.get(), 5);
        assert_eq!(answer.wrong_offset.get(), 40);
        ask(&mut peer, &Message::mode_request(Mode::Echo, 3), 0).unwrap();
        assert!(peer.data(&frame));
        peer.turn_around(&mut frame);
        assert_eq!(frame::source(&frame), Some(PEER));
        assert_eq!(frame[..6], GUEST.0);
    }

    #[test]
    fn frames_that_are_lost_doubled_or_cut_are_wrong() {
        let mut peer = Peer::new(PEER);
        let mut request = Message::mode_request(Mode::Check, 1);
        request.first.set(5);
        request.frame_bytes.set(64);
        ask(&mut peer, &request, 0).unwrap();
        let mut wrong = 0;
        for (sequence, bytes, bad) in [
            (5, 64, false),
            (6, 64, false),
            (6, 64, true),
            (7, 64, false),
            (9, 64, true),
            (10, 63, true),
            (11, 64, false),
            (3, 64, true),
        ] {
            let mut frame = [0; 64];
            frame::fill(&mut frame[..bytes], PEER, GUEST, sequence, 1);
            peer.data(&frame[..bytes]);
            wrong += u64::from(bad);
            let answer = ask(&mut peer, &Message::request(Subject::Counters, 2), 0).unwrap();
            assert_eq!(answer.wrong.get(), wrong, "{sequence}");
        }
    }

    fn generate(number: u32, rate: u32, count: u64) -> Message {
        let mut message = Message::request(Subject::Generate, number);
        message.frame_bytes.set(64);
        message.rate.set(rate);
        message.count.set(count);
        message.first.set(100);
        message.limit_us.set(1000);
        message
    }

    #[test]
    fn frames_are_generated_once_and_the_end_is_said() {
        let mut peer = Peer::new(PEER);
        let mut out = [0; MAX_BYTES];
        assert_eq!(peer.due(0, 9), 0);
        ask(&mut peer, &generate(1, 0, 3), 0).unwrap();
        let mut seen = 0;
        while seen < 3 {
            assert!(peer.due(0, 9) > 0);
            let bytes = peer.next(&mut out, 0);
            frame::check(&out[..bytes], 100 + seen, 64).unwrap();
            seen += 1;
            // The answer got lost: it is not started again.
            let answer = ask(&mut peer, &generate(1, 0, 3), 0).unwrap();
            assert_eq!(answer.generated.get(), seen);
        }
        // No room on the wire.
        peer.again();
        assert_eq!(peer.next(&mut out, 0), 64);
        for _ in 0..FINISHED_TIMES {
            assert!(peer.is_generating());
            let bytes = peer.next(&mut out, 0);
            let (message, _) = Message::read(&out[..bytes]).unwrap();
            assert_eq!(message.subject(), Some(Subject::Finished));
            assert_eq!(message.generated.get(), 3);
        }
        assert!(!peer.is_generating());
        assert_eq!((peer.due(0, 9), peer.next(&mut out, 0)), (0, 0));
    }

    #[test]
    fn a_rate_is_kept_and_time_ends_it() {
        let mut peer = Peer::new(PEER);
        let mut out = [0; MAX_BYTES];
        ask(&mut peer, &generate(1, 100_000, u64::MAX), 50).unwrap();
        assert_eq!((peer.due(50, 9), peer.next_us()), (0, Some(60)));
        assert_eq!(peer.due(75, 9), 2);
        assert_eq!(peer.due(500, 9), 9);
        assert_eq!(peer.next(&mut out, 60), 64);
        assert_eq!((peer.due(60, 9), peer.next_us()), (0, Some(70)));
        assert_eq!(peer.due(1050, 9), 1, "the end");
        let bytes = peer.next(&mut out, 1050);
        assert!(Message::read(&out[..bytes]).is_some());
        ask(&mut peer, &Message::request(Subject::Stop, 2), 0).unwrap();
        assert!(!peer.is_generating());
    }

    #[test]
    fn nonsense_is_not_answered() {
        let mut peer = Peer::new(PEER);
        for bytes in [0, MIN_BYTES - 1, MAX_BYTES + 1] {
            let mut message = generate(1, 0, 1);
            message.frame_bytes.set(bytes as u32);
            assert_eq!(ask(&mut peer, &message, 0), None);
        }
        assert_eq!(
            ask(&mut peer, &Message::request(Subject::Finished, 1), 0),
            None
        );
        assert_eq!(peer.control(&[0; 64], None, 0), None);
        assert!(!peer.is_generating());
    }
}
