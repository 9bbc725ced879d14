//! What the guest says to its peer in band, and hears from it.
//!
//! Any such frame may be lost: the guest asks again under the same number, and
//! the peer does once what was asked once.

use super::frame::{kind, set_header, source};
use pvkit_protocol::frame::{ETHERNET_HEADER_BYTES, MacAddress, ethertype};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// [`Message::magic`].
const MAGIC: [u8; 4] = *b"pvkc";
/// Bytes of a control frame.
pub const FRAME_BYTES: usize = ETHERNET_HEADER_BYTES + size_of::<Message>();

/// What a control frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// How many frames were seen.
    Counters,
    /// Send frames.
    Generate,
    /// Send no more.
    Stop,
    /// What to do with data frames, as [`Mode`].
    Mode,
    /// The peer has sent all that it was asked to generate; nobody asked for
    /// this message.
    Finished,
    /// Where another guest is that exchanges frames with this one: `count`,
    /// `generated` and `received` of its own. An answer if it knows that this
    /// one has sent all.
    Progress,
}

impl Subject {
    const fn code(self) -> u32 {
        match self {
            Self::Counters => 1,
            Self::Generate => 2,
            Self::Stop => 3,
            Self::Mode => 4,
            Self::Finished => 5,
            Self::Progress => 6,
        }
    }

    const fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Counters),
            2 => Some(Self::Generate),
            3 => Some(Self::Stop),
            4 => Some(Self::Mode),
            5 => Some(Self::Finished),
            6 => Some(Self::Progress),
            _ => None,
        }
    }
}

/// What the peer does with data frames, besides counting them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Nothing.
    #[default]
    Count,
    /// It compares every byte.
    Check,
    /// It sends them back.
    Echo,
}

impl Mode {
    const fn code(self) -> u32 {
        match self {
            Self::Count => 0,
            Self::Check => 1,
            Self::Echo => 2,
        }
    }

    const fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Count),
            1 => Some(Self::Check),
            2 => Some(Self::Echo),
            _ => None,
        }
    }
}

/// What follows the Ethernet header of a control frame.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Message {
    /// Says that it is one.
    magic: [u8; 4],
    subject: U32,
    /// Of the request; an answer has the same.
    pub number: U32,
    /// Not 0 in answers.
    answer: U32,
    /// [`Subject::Mode`]: which one.
    mode: U32,
    /// [`Subject::Generate`]: bytes of a frame. [`Mode::Check`]: the same, or 0
    /// for any.
    pub frame_bytes: U32,
    /// The same: frames a second; 0 for as many as it can.
    pub rate: U32,
    /// The same: the seed of the first frame.
    pub seed: U32,
    /// The same: not 0 if each frame is to have another seed, which costs the
    /// peer time.
    pub vary: U32,
    /// The same: most frames.
    pub count: U64,
    /// The same: the first sequence number, also with [`Mode::Check`] unless
    /// `frame_bytes` is 0; each is one more than the one before.
    pub first: U64,
    /// The same: most microseconds.
    pub limit_us: U64,
    /// In answers: data frames received so far.
    pub received: U64,
    /// Of those, how many were compared.
    pub checked: U64,
    /// Of those, how many were wrong.
    pub wrong: U64,
    /// The number of the first that was.
    pub wrong_sequence: U64,
    /// Where it was wrong.
    pub wrong_offset: U64,
    /// Data frames generated since the last [`Subject::Generate`].
    pub generated: U64,
}

impl Message {
    /// A request.
    #[must_use]
    pub fn request(subject: Subject, number: u32) -> Self {
        let mut message = Self::new_zeroed();
        message.magic = MAGIC;
        message.subject.set(subject.code());
        message.number.set(number);
        message
    }

    /// The request to go over to a mode.
    #[must_use]
    pub fn mode_request(mode: Mode, number: u32) -> Self {
        let mut message = Self::request(Subject::Mode, number);
        message.mode.set(mode.code());
        message
    }

    /// The start of an answer to this.
    #[must_use]
    pub fn answer(&self) -> Self {
        let mut message = *self;
        message.answer.set(1);
        message
    }

    /// Whether it is an answer.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        self.answer.get() != 0
    }

    /// What it is about.
    #[must_use]
    pub fn subject(&self) -> Option<Subject> {
        Subject::from_code(self.subject.get())
    }

    /// The mode that is asked for.
    #[must_use]
    pub fn mode(&self) -> Option<Mode> {
        Mode::from_code(self.mode.get())
    }

    /// Puts it into a frame of [`FRAME_BYTES`].
    pub fn write(&self, frame: &mut [u8], to: MacAddress, from: MacAddress) {
        set_header(frame, to, from, ethertype::LOCAL_2);
        if let Some(place) = frame.get_mut(ETHERNET_HEADER_BYTES..FRAME_BYTES) {
            place.copy_from_slice(self.as_bytes());
        }
    }

    /// The message in a frame, and who sent it; `None` if it is no control
    /// frame.
    #[must_use]
    pub fn read(frame: &[u8]) -> Option<(Self, MacAddress)> {
        if kind(frame) != ethertype::LOCAL_2 {
            return None;
        }
        let (message, _) = Self::read_from_prefix(frame.get(ETHERNET_HEADER_BYTES..)?).ok()?;
        (message.magic == MAGIC).then_some((message, source(frame)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_round_trip_and_other_frames_are_none() {
        let (to, from) = (MacAddress::local(1), MacAddress::local(2));
        for subject in [
            Subject::Counters,
            Subject::Generate,
            Subject::Stop,
            Subject::Finished,
        ] {
            let mut message = Message::request(subject, 7).answer();
            message.received.set(u64::MAX);
            let mut frame = [0; FRAME_BYTES + 3];
            message.write(&mut frame, to, from);
            let (read, source) = Message::read(&frame).unwrap();
            assert_eq!((read, source), (message, from));
            assert_eq!(read.subject(), Some(subject));
            assert!(read.is_answer());
            for cut in 0..FRAME_BYTES {
                assert_eq!(Message::read(&frame[..cut]), None);
            }
            frame[14] ^= 1;
            assert_eq!(Message::read(&frame), None);
        }
        for mode in [Mode::Count, Mode::Check, Mode::Echo] {
            let request = Message::mode_request(mode, 1);
            assert_eq!(request.mode(), Some(mode));
            assert_eq!(request.subject(), Some(Subject::Mode));
            assert!(!request.is_answer());
        }
        let mut odd = Message::mode_request(Mode::Echo, 1);
        odd.mode.set(9);
        odd.subject.set(9);
        assert_eq!((odd.mode(), odd.subject()), (None, None));
    }
}
