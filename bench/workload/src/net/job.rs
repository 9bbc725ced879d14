//! Network jobs, as they stand in a script behind those of disks.

use crate::script::code;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One measurement on one network card.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct NetJob {
    /// A [`NetDevice`].
    pub device: U32,
    /// Which one of its kind: in the order of the command line, or of slots.
    pub index: U32,
    /// A [`NetWork`].
    pub work: U32,
    /// A [`Completion`](crate::script::Completion).
    pub completion: U32,
    /// Bytes of a frame, from its Ethernet header on, without check sequence.
    pub frame_bytes: U32,
    /// Frames that are shown to the device at once.
    pub burst: U32,
    /// Frames a second that the peer sends; 0 for as many as it can.
    pub rate: U32,
    /// Frames in each direction that are compared byte by byte, outside of the
    /// timed part.
    pub verify: U32,
    /// Bytes of a TCP stream.
    pub stream_bytes: U64,
    /// Length of the timed part in ticks.
    pub duration_ticks: U64,
    /// The same in microseconds, for the peer's clock.
    pub duration_us: U32,
    /// Ticks in a millisecond.
    pub ticks_per_ms: U32,
    /// Ends the timed part of a round trip early.
    pub max_samples: U32,
    /// Of the content of frames and streams.
    pub seed: U32,
    /// Features that the driver of a virtio device may use.
    pub allow_features: U64,
    /// Size of the queues.
    pub queue_size: U16,
    /// Not 0 if an e1000 is to hold its interrupts back.
    pub moderation: u8,
    /// Not 0 if a TCP stream is to be hashed at both ends, besides being
    /// compared with what it should be.
    pub hash: u8,
    /// Not 0 if the e1000's monitor gathers register writes: its driver has
    /// them arrive.
    pub read_back: u8,
    /// Padding, 0.
    pub reserved: [u8; 3],
    /// Frames that are sent to another guest.
    pub frames: U64,
    /// Most of them that may be on their way; 0 for no bound.
    pub window: U32,
    /// Padding, 0.
    pub reserved2: U32,
}

code! {
    /// The network card that a job uses.
    NetDevice {
        /// virtio-net on virtio-mmio.
        VirtioMmio = 0,
        /// virtio-net on virtio-pci.
        VirtioPci = 1,
        /// An 82540EM.
        E1000 = 2,
    }
}

code! {
    /// What a network job does.
    NetWork {
        /// Sends frames as fast as it can.
        Transmit = 0,
        /// Receives what the peer sends.
        Receive = 1,
        /// Sends one frame, and waits until it comes back.
        RoundTrip = 2,
        /// Fetches a stream by TCP.
        TcpReceive = 3,
        /// Sends a stream by TCP.
        TcpSend = 4,
        /// Sends frames to another guest that does the same job, and receives
        /// its frames.
        Exchange = 5,
    }
}
