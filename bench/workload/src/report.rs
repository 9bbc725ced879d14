//! What the guest tells the host: a header, a [`JobReport`] for each job, and
//! the time stamps of every request.

use crate::net::report::NetReport;
use crate::run::Outcome;
use pvkit_protocol::virtio::Features;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first bytes of a report.
pub const MAGIC: [u8; 8] = *b"pvkitrep";

/// The start of a report; [`JobReport`]s follow, then [`NetReport`]s, then
/// [`Sample`]s.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`], once the guest has started.
    pub magic: [u8; 8],
    /// Jobs that are over.
    pub done: U32,
    /// Padding, 0.
    pub reserved: U32,
}

/// Bytes of the message in a [`JobReport`].
pub const MESSAGE_BYTES: usize = 160;

/// How one job went. All counts are those of the timed part.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct JobReport {
    /// 1 if the job is over and its data was right; 2 if it failed, and
    /// `message` says why; 0 if it is not over.
    pub outcome: U32,
    /// Padding, 0.
    pub reserved: U32,
    /// Time stamp counter at its start.
    pub start: U64,
    /// Time stamp counter at its end.
    pub end: U64,
    /// Requests that were completed.
    pub requests: U64,
    /// Doorbells that the driver rang.
    pub kicks: U64,
    /// Interrupts that the guest took.
    pub interrupts: U64,
    /// Times that the guest halted.
    pub halts: U64,
    /// Accesses to memory-mapped registers, doorbells not included: reads.
    pub mmio_reads: U64,
    /// The same: writes.
    pub mmio_writes: U64,
    /// Port reads; of string reads, each piece of 1,024 bytes, since that is
    /// what KVM hands over at once.
    pub port_reads: U64,
    /// Port writes; of string writes, each element.
    pub port_writes: U64,
    /// Bytes that were compared with what they should be.
    pub verified_bytes: U64,
    /// The features that were negotiated.
    pub features: U64,
    /// Index of the first sample.
    pub first_sample: U64,
    /// Number of samples.
    pub samples: U64,
    /// UTF-8, padded with zeros.
    pub message: [u8; MESSAGE_BYTES],
}

/// [`JobReport::outcome`]: the job is over, and its data was right.
pub const OUTCOME_OK: u32 = 1;
/// [`JobReport::outcome`]: the job failed.
pub const OUTCOME_FAILED: u32 = 2;

/// When one request started and when it was done, by the time stamp counter.
/// In an open loop the start is when it should have started.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Sample {
    /// Ticks.
    pub start: U64,
    /// Ticks.
    pub end: U64,
}

impl JobReport {
    /// Says that the job went well, and what it came to: all but times and
    /// samples, which mean nothing everywhere.
    pub fn set_counts(&mut self, outcome: &Outcome, features: Features) {
        let counts = &outcome.counts;
        self.outcome.set(OUTCOME_OK);
        self.requests.set(outcome.requests);
        self.kicks.set(counts.kicks);
        self.interrupts.set(counts.interrupts);
        self.halts.set(counts.halts);
        self.mmio_reads.set(counts.mmio_reads);
        self.mmio_writes.set(counts.mmio_writes);
        self.port_reads.set(counts.port_reads);
        self.port_writes.set(counts.port_writes);
        self.verified_bytes.set(outcome.verified_bytes);
        self.features.set(features.bits());
    }

    /// The message, if there is one.
    #[must_use]
    pub fn message(&self) -> &str {
        let end = self
            .message
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(MESSAGE_BYTES);
        let bytes = self.message.get(..end).unwrap_or(&[]);
        core::str::from_utf8(bytes).unwrap_or("the guest's message is not readable")
    }

    /// Sets the message, cut to what fits.
    pub fn set_message(&mut self, text: &str) {
        let mut end = text.len().min(MESSAGE_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.message = [0; MESSAGE_BYTES];
        for (to, from) in self.message.iter_mut().zip(text.bytes().take(end)) {
            *to = from;
        }
    }
}

/// Offset of the first [`NetReport`] in a report of `jobs` jobs on disks.
#[must_use]
pub const fn net_reports_offset(jobs: usize) -> usize {
    size_of::<Header>() + jobs * size_of::<JobReport>()
}

/// Offset of the first sample in a report of `jobs` jobs on disks and
/// `net_jobs` on network cards.
#[must_use]
pub const fn samples_offset(jobs: usize, net_jobs: usize) -> usize {
    net_reports_offset(jobs) + net_jobs * size_of::<NetReport>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn messages_are_cut_at_characters() {
        let mut report = JobReport::new_zeroed();
        assert_eq!(report.message(), "");
        report.set_message("short");
        assert_eq!(report.message(), "short");
        let long = alloc::string::String::from_iter(core::iter::repeat_n('ü', 100));
        report.set_message(&long);
        assert_eq!(report.message().chars().count(), MESSAGE_BYTES / 2);
    }
}
