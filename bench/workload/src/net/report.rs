//! How a network job went.

use super::run::NetOutcome;
use crate::report::JobReport;
use pvkit_protocol::virtio::Features;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// How one network job went. All counts are those of the timed part.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct NetReport {
    /// What it has in common with a job on a disk. `requests` are the frames
    /// that the receiver counts; in a round trip, those that came back; with
    /// TCP, all frames that the guest's driver sent or received.
    pub job: JobReport,
    /// Frames that the sender counts: of TCP, those of the guest.
    pub sent: U64,
    /// Frames that the receiver counts: of TCP, those that the guest received.
    pub received: U64,
    /// Bytes of payload that a TCP stream moved.
    pub stream_bytes: U64,
    /// Offloads in use as [`Offloads`](pvkit_protocol::frame::Offloads):
    /// transmit, in the low half, and receive.
    pub offloads: U32,
    /// Padding, 0.
    pub reserved: U32,
}

impl NetReport {
    /// Says that the job went well, and what it came to.
    pub fn set(&mut self, outcome: &NetOutcome, features: Features) {
        self.job.set_counts(&outcome.common, features);
        self.job.start.set(outcome.common.start);
        self.job.end.set(outcome.common.end);
        self.job.samples.set(outcome.common.samples as u64);
        self.sent.set(outcome.sent);
        self.received.set(outcome.received);
        self.stream_bytes.set(outcome.stream_bytes);
        let transmit = u32::from(outcome.transmit.bits());
        let receive = u32::from(outcome.receive.bits());
        self.offloads.set(transmit | receive << 16);
    }
}
