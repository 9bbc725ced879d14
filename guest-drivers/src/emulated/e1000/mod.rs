//! The driver of the 82540EM (`e1000`) as hypervisors imitate it.
//!
//! It is the baseline that paravirtual network cards are compared with, and as
//! good as the chip allows. An access to a register costs an exit; these are
//! all that frames cause:
//!
//! | what | accesses |
//! |---|---|
//! | a batch of frames sent | 1 write (TDT), however many there are |
//! | frames found sent | none: the chip says so in memory, once for every [`report_every`](E1000Options::report_every) frames and for the last of a batch |
//! | frames received | none |
//! | buffers given back | 1 write (RDT) for every [`repost_every`](E1000Options::repost_every), and 1 read with [`read_back`](E1000Options::read_back) |
//! | an interrupt, with [`Masking::Never`] | 1 read (ICR) |
//! | an interrupt, with [`Masking::Claimed`] | 1 read (ICR), 1 write (IMC), and 1 write (IMS) when it is asked for again |
//!
//! Interrupts are moderated by the chip:
//! [`interrupts_per_second`](E1000Options::interrupts_per_second) bounds how
//! many there are, [`Delays`] let each wait for more frames.
//!
//! Checksums and segmentation of TCP are left to the chip. It remembers how the
//! last checksum was made: frames of one flow need no more descriptors with
//! checksums than without.
//!
//! [`E1000`] is the control half, [`E1000Tx`] and [`E1000Rx`] move frames, and
//! [`E1000Interrupts`] is for the handler; each can live on another thread or
//! CPU. No two of them share a register that would have to be read, changed and
//! written back.
//!
//! ```no_run
//! use pvkit_guest::dma::LinearSpace;
//! use pvkit_guest::emulated::e1000::{E1000, E1000Options, attach, find};
//! use pvkit_guest::net::{FrameMeta, HEADROOM, NetRx, NetTx};
//! use pvkit_guest::pci::{MemoryPool, PciConfig};
//! use pvkit_guest::register::{CpuPorts, MmioRegisters};
//!
//! # fn map(_: pvkit_guest::pci::MemoryBar) -> Option<MmioRegisters> { None }
//! # fn example(ports: CpuPorts, space: LinearSpace, frame: &[u8]) -> Option<()> {
//! let pci = PciConfig::new(ports);
//! // SAFETY: neither memory nor devices are there.
//! let mut free = unsafe { MemoryPool::new(0xe000_0000, 0xefff_ffff) };
//! let registers = attach(&pci, &find(&pci)?, &mut free, map).ok()?;
//! let options = E1000Options::default();
//! let (card, mut tx, mut rx) =
//!     E1000::open(registers, space, options, &mut || Some(vec![0; 2048])).ok()?;
//!
//! let mut buffer = vec![0; HEADROOM + frame.len()];
//! buffer[HEADROOM..].copy_from_slice(frame);
//! tx.submit(buffer, frame.len(), &FrameMeta::PLAIN).ok()?;
//! tx.publish();
//! while let Some(frame) = rx.recv().ok()? {
//!     println!("{} bytes for {}", frame.bytes(), card.mac());
//! }
//! # Some(())
//! # }
//! ```
//!
//! ## Chips
//!
//! The driver is for the chips of hypervisors. It does not wait the
//! milliseconds that a real one needs behind a reset, and does not program the
//! PHY, which negotiates by itself.

mod chip;
mod context;
mod eeprom;
mod interrupt;
mod life;
mod phy;
mod probe;
mod receive;
#[allow(unsafe_code)]
mod ring;
mod transmit;

pub use chip::ControlCounters;
pub use interrupt::{E1000Interrupts, InterruptCounters};
pub use life::{E1000, E1000Storage, Opened};
pub use probe::{attach, find};
pub use pvkit_protocol::emulated::e1000::Cause;
pub use receive::{E1000Rx, ReceiveCounters};
pub use ring::{RingStorage, Slot};
pub use transmit::{E1000Tx, TransmitCounters};

use crate::dma::DmaError;
use crate::fault::Fault;
use crate::net::Offloads;
use crate::pci::PciError;
use pvkit_protocol::frame::DEFAULT_MTU;
use thiserror::Error;

/// What happens to the interrupt of a cause that a handler has claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Masking {
    /// Nothing: it may interrupt again at once, and needs not be asked for
    /// again. For interrupts that the chip moderates.
    Never,
    /// It is masked until a half is armed again: two more register accesses
    /// for each time that the driver sleeps, but no interrupts while it works.
    Claimed,
}

/// How long the chip delays interrupts, in units of 1.024 µs; 0 does not delay
/// (SDM §13.4.30, .31, .41 and .44).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Delays {
    /// From the last frame received on.
    pub receive: u16,
    /// From the first frame received on; counts only if the one above does.
    pub receive_at_most: u16,
    /// From the last frame sent on.
    pub transmit: u16,
    /// From the first frame sent on; counts only if the one above does.
    pub transmit_at_most: u16,
}

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E1000Options {
    /// Descriptors of the ring that transmits: a power of two from 8 to 4,096.
    /// One always stays empty; a frame takes one for each segment of its
    /// buffer (and each 16,288 bytes), and one more where its checksum is made
    /// in another way than the last.
    pub transmit_descriptors: u16,
    /// Descriptors of the ring that receives, each with a buffer: a power of
    /// two from 8 to 4,096. One always stays empty.
    pub receive_descriptors: u16,
    /// Most segments of a buffer with a frame to be sent.
    pub max_segments: u16,
    /// Bytes of a buffer for frames received: 256, 512, 1,024, 2,048, 4,096,
    /// 8,192 or 16,384. Longer frames take several.
    pub buffer_bytes: u32,
    /// Largest payload of a frame, up to 16,362 bytes.
    pub mtu: u16,
    /// What the chip does for frames that are sent: of
    /// [`CHECKSUM`](Offloads::CHECKSUM), [`TSO4`](Offloads::TSO4) and
    /// [`TSO6`](Offloads::TSO6), the latter only with the first. QEMU's chip
    /// writes wrong lengths into segments over IPv6, so those are not among
    /// the default.
    pub transmit: Offloads,
    /// The chip checks the checksums of frames that are received.
    pub receive_checksums: bool,
    /// Receives all frames, and not only those to this station or to groups.
    pub promiscuous: bool,
    /// What happens to an interrupt that was claimed.
    pub masking: Masking,
    /// Most interrupts in a second; 0 for no bound. From 60 on the chip can do
    /// it.
    pub interrupts_per_second: u32,
    /// How long interrupts are delayed.
    pub delays: Delays,
    /// The link's going up and down interrupts ([`Cause::LSC`]).
    pub link_interrupts: bool,
    /// The chip reports one in so many frames sent, and the last of each batch.
    /// Cut to a quarter of the ring; 0 counts as 1.
    pub report_every: u16,
    /// The chip is shown buffers that came back in batches of so many, if it is
    /// not asked for sooner. Cut to a quarter of the ring; 0 counts as 1.
    pub repost_every: u16,
    /// Reads a register each time that the chip was shown buffers. Some
    /// monitors (QEMU) gather those writes until the CPU leaves the guest for
    /// another reason: a driver that polls would wait for them for ever.
    pub read_back: bool,
    /// How often a register is read in a row while the driver itself waits.
    pub max_polls: u32,
}

impl Default for E1000Options {
    fn default() -> Self {
        Self {
            transmit_descriptors: 256,
            receive_descriptors: 256,
            max_segments: 4,
            buffer_bytes: 2048,
            mtu: DEFAULT_MTU,
            transmit: Offloads::CHECKSUM.union(Offloads::TSO4),
            receive_checksums: true,
            promiscuous: false,
            masking: Masking::Never,
            interrupts_per_second: 20_000,
            delays: Delays::default(),
            link_interrupts: false,
            report_every: 32,
            repost_every: 64,
            read_back: false,
            max_polls: 1_000_000,
        }
    }
}

/// Why a card cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum E1000Error {
    /// The function is another card.
    #[error("{vendor:04x}:{device:04x} is no 82540EM")]
    Function {
        /// Vendor.
        vendor: u16,
        /// Device.
        device: u16,
    },
    /// The function cannot be used.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The window is too small for the registers.
    #[error("a window of {size:#x} bytes has no room for the registers")]
    Window {
        /// Its size.
        size: u64,
    },
    /// The kernel does not map the window.
    #[error("the window at {base:#x} cannot be mapped")]
    Map {
        /// Its address.
        base: u64,
    },
    /// Nothing answers.
    #[error("there is no device: its status reads as all ones")]
    Absent,
    /// A register did not become what it should in time.
    #[error("register {register:#x} still reads {value:#x} after {polls} reads")]
    Timeout {
        /// Offset of the register.
        register: u32,
        /// What it read as last.
        value: u32,
        /// How often it was read.
        polls: u32,
    },
    /// The card has no address that it could have.
    #[error("the card has no address")]
    NoAddress,
    /// The PHY has no such register.
    #[error("the PHY refuses register {register}")]
    Phy {
        /// Its number.
        register: u8,
    },
    /// A ring cannot have so many descriptors, or the longest frame would take
    /// most of them.
    #[error("a ring of {descriptors} descriptors")]
    RingSize {
        /// How many.
        descriptors: u16,
    },
    /// The chip has no buffers of this size.
    #[error("buffers of {bytes} bytes")]
    BufferBytes {
        /// The size.
        bytes: u32,
    },
    /// The chip cannot send or receive frames with so much payload.
    #[error("frames with {mtu} bytes of payload")]
    Mtu {
        /// The payload.
        mtu: u16,
    },
    /// The chip cannot do this for frames that are sent, or not without what
    /// it needs for that.
    #[error("the chip cannot do {0:?}")]
    Offloads(Offloads),
    /// Storage that was handed in is too small.
    #[error("{have} {what}, where {need} are needed")]
    Storage {
        /// What there are too few of.
        what: &'static str,
        /// How many there are.
        have: usize,
        /// How many are needed.
        need: usize,
    },
    /// There are too few buffers for frames to be received, or they are too
    /// small.
    #[error("{have} buffers of {least} bytes or more, where {need} are needed")]
    Stock {
        /// How many there are.
        have: usize,
        /// How many are needed.
        need: usize,
        /// Bytes that each needs.
        least: usize,
    },
    /// There is no memory for a ring, or the device cannot reach a buffer.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// A half belongs to another card.
    #[error("the half belongs to another card")]
    ForeignHalf,
}

/// Whether a half works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Live,
    /// A fault was found and not yet reported.
    Faulty(Fault),
    /// The fault was reported; nothing works until the card is recovered.
    Retired,
}
