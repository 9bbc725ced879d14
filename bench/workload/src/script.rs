//! What the host tells the guest to do: a header and a list of jobs, handed
//! over as a module at boot.

use crate::net::job::NetJob;
use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The port to which the guest writes [`Mark`]s, as 32-bit values. Nothing
/// else is there on QEMU, which ignores the writes.
pub const MARK_PORT: u16 = 0x1510;

/// The first bytes of a script.
pub const MAGIC: [u8; 8] = *b"pvkitjob";
/// The version of this format.
pub const VERSION: u32 = 4;

/// The start of a script; [`Job`]s follow, then [`NetJob`]s.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U32,
    /// Number of jobs on disks.
    pub jobs: U32,
    /// Number of jobs on network cards.
    pub net_jobs: U32,
    /// Padding, 0.
    pub reserved: U32,
    /// Guest address of the memory for the [`report`](crate::report).
    pub report_addr: U64,
    /// Its size in bytes.
    pub report_bytes: U64,
}

/// One measurement of one case on one device.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Job {
    /// A [`Device`].
    pub device: U32,
    /// Which virtio device of its transport: in the order of the command line,
    /// or of slots.
    pub index: U32,
    /// An [`Access`].
    pub access: U32,
    /// A [`Completion`].
    pub completion: U32,
    /// Requests in flight; for an open loop, the most.
    pub depth: U32,
    /// Bytes of a request; a multiple of 512.
    pub block_bytes: U32,
    /// First sector of the region that is used.
    pub first_sector: U64,
    /// Size of the region in sectors.
    pub sectors: U64,
    /// Rounds in which the region was written, for reads: the earliest.
    pub earliest_round: U32,
    /// The round of this job's own writes; for reads, the latest round that
    /// may be found.
    pub round: U32,
    /// 0 for a closed loop; otherwise ticks between the starts of requests.
    pub interval_ticks: U64,
    /// Length of the timed part in ticks.
    pub duration_ticks: U64,
    /// Ends the timed part early.
    pub max_requests: U32,
    /// Requests before the timed part.
    pub warmup: U32,
    /// Requests that are checked after the timed part, besides those whose
    /// data is still in memory.
    pub verify: U32,
    /// Ticks to poll for a completion before halting, if completion is by
    /// interrupt.
    pub spin_ticks: U32,
    /// Of the generator that chooses sectors.
    pub seed: U64,
    /// Features that the driver may use.
    pub allow_features: U64,
    /// A [`Driver`].
    pub driver: U32,
    /// Size of the queue.
    pub queue_size: U16,
    /// Padding, 0.
    pub reserved: [u8; 2],
}

/// A set of named values that fit 32 bits.
macro_rules! code {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name {
            $($(#[$value_doc])* $value = $number,)*
        }

        impl $name {
            /// The value as it stands in a script.
            #[must_use]
            pub const fn code(self) -> U32 {
                U32::new(self as u32)
            }

            /// The value that a script means.
            #[must_use]
            pub const fn from_code(code: U32) -> Option<Self> {
                match code.get() {
                    $($number => Some(Self::$value),)*
                    _ => None,
                }
            }
        }
    };
}
pub(crate) use code;

code! {
    /// The device that a job uses, and how.
    Device {
        /// virtio-blk on virtio-mmio.
        VirtioMmio = 0,
        /// The first IDE drive, by bus-master DMA.
        IdeDma = 1,
        /// The first IDE drive, by programmed I/O.
        IdePio = 2,
        /// virtio-blk on virtio-pci. Completion by interrupt is by MSI-X, or by
        /// the function's pin if it has no vectors.
        VirtioPci = 3,
    }
}

code! {
    /// The guest's driver of a virtio device.
    Driver {
        /// Our own.
        Pvkit = 0,
        /// The crate `virtio-drivers`: virtio-mmio only, polled.
        VirtioDrivers = 1,
    }
}

code! {
    /// How a job chooses sectors, and what it does there.
    Access {
        /// Reads at random places.
        RandomRead = 0,
        /// Writes at random places.
        RandomWrite = 1,
        /// Reads one place after the other.
        SequentialRead = 2,
        /// Writes one place after the other.
        SequentialWrite = 3,
    }
}

impl Access {
    /// Whether data goes to the disk.
    #[must_use]
    pub const fn is_write(self) -> bool {
        matches!(self, Self::RandomWrite | Self::SequentialWrite)
    }

    /// Whether places are chosen at random.
    #[must_use]
    pub const fn is_random(self) -> bool {
        matches!(self, Self::RandomRead | Self::RandomWrite)
    }
}

code! {
    /// How the guest learns that a request is done.
    Completion {
        /// It looks, again and again.
        Polled = 0,
        /// It is interrupted, after looking for a while.
        Interrupt = 1,
    }
}

/// What the guest says at the moments that matter, so that the host can read
/// its own counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// The timed part of a job starts.
    Start(u32),
    /// The timed part of a job is over.
    End(u32),
    /// A job is over, its verification included.
    Done(u32),
}

impl Mark {
    /// As written to [`MARK_PORT`].
    #[must_use]
    pub const fn encode(self) -> u32 {
        match self {
            Self::Start(job) => job << 2,
            Self::End(job) => job << 2 | 1,
            Self::Done(job) => job << 2 | 2,
        }
    }

    /// The mark that a value stands for.
    #[must_use]
    pub const fn decode(value: u32) -> Option<Self> {
        let job = value >> 2;
        match value & 3 {
            0 => Some(Self::Start(job)),
            1 => Some(Self::End(job)),
            2 => Some(Self::Done(job)),
            _ => None,
        }
    }
}

/// A script that cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ScriptError {
    /// It is shorter than its header and its jobs.
    #[error("the script has {bytes} bytes, too few")]
    Short {
        /// Its length.
        bytes: usize,
    },
    /// It does not start with the magic bytes.
    #[error("this is no script")]
    Magic,
    /// It has another version.
    #[error("script version {0} instead of {VERSION}")]
    Version(u32),
}

/// A script, taken apart. Jobs are numbered in this order: those on disks, then
/// those on network cards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Script<'a> {
    /// Its start.
    pub header: Header,
    /// What is to be done to disks.
    pub jobs: &'a [Job],
    /// What is to be done to network cards.
    pub net_jobs: &'a [NetJob],
}

/// Takes a script apart.
///
/// # Errors
/// [`ScriptError`] if it is not one.
pub fn parse(script: &[u8]) -> Result<Script<'_>, ScriptError> {
    let short = ScriptError::Short {
        bytes: script.len(),
    };
    let (header, rest) = Header::read_from_prefix(script).map_err(|_| short)?;
    if header.magic != MAGIC {
        return Err(ScriptError::Magic);
    }
    if header.version.get() != VERSION {
        return Err(ScriptError::Version(header.version.get()));
    }
    let count = header.jobs.get() as usize;
    let (jobs, rest) = <[Job]>::ref_from_prefix_with_elems(rest, count).map_err(|_| short)?;
    let count = header.net_jobs.get() as usize;
    let (net_jobs, _) = <[NetJob]>::ref_from_prefix_with_elems(rest, count).map_err(|_| short)?;
    Ok(Script {
        header,
        jobs,
        net_jobs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use zerocopy::FromZeros;

    #[test]
    fn a_script_round_trips_and_damaged_ones_are_refused() {
        let header = Header {
            magic: MAGIC,
            version: U32::new(VERSION),
            jobs: U32::new(2),
            net_jobs: U32::new(1),
            reserved: U32::ZERO,
            report_addr: U64::new(1),
            report_bytes: U64::new(2),
        };
        let mut job = Job::new_zeroed();
        job.depth = U32::new(32);
        let mut script: Vec<u8> = header.as_bytes().into();
        script.extend([job, job].as_bytes());
        let without_net = script.len();
        let mut net_job = NetJob::new_zeroed();
        net_job.burst = U32::new(256);
        script.extend(net_job.as_bytes());
        let parsed = parse(&script).unwrap();
        assert_eq!(parsed.header, header);
        assert_eq!(parsed.jobs, [job, job]);
        assert_eq!(parsed.net_jobs, [net_job]);
        for cut in [0, 10, without_net - 1, without_net, script.len() - 1] {
            assert_eq!(
                parse(&script[..cut]),
                Err(ScriptError::Short { bytes: cut })
            );
        }
        script[8] = 9;
        assert_eq!(parse(&script), Err(ScriptError::Version(9)));
        script[0] = 0;
        assert_eq!(parse(&script), Err(ScriptError::Magic));
    }

    #[test]
    fn marks_and_codes_round_trip() {
        for mark in [Mark::Start(3), Mark::End(0), Mark::Done(1 << 20)] {
            assert_eq!(Mark::decode(mark.encode()), Some(mark));
        }
        assert_eq!(Mark::decode(3), None);
        assert_eq!(
            Device::from_code(Device::IdePio.code()),
            Some(Device::IdePio)
        );
        assert_eq!(Device::from_code(U32::new(99)), None);
    }
}
