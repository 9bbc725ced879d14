//! The driver of ATA disks on IDE controllers such as the PIIX3.
//!
//! It is the baseline that paravirtual disks are compared with, and as good as
//! the interface allows: one command is all that a drive takes at a time, and
//! each of its registers costs an exit. Two modes:
//!
//! - [`Mode::Pio`]: the processor moves every word. Blocks of up to 128 sectors
//!   (READ and WRITE MULTIPLE) go straight between data register and buffer in
//!   one `rep insw` or `rep outsw`.
//! - [`Mode::Dma`]: the controller's bus master moves the data. Its table of
//!   regions is allocated once and its address written once; only its entries
//!   are rewritten for each request, in memory.
//!
//! Either way completions are polled for, with the drive's interrupt masked
//! ([`Completion::Polled`]), or told by interrupt ([`Completion::Interrupt`]).
//! Register accesses for a request of 4 KiB, with a string access counted once
//! for each 1,024 bytes as KVM batches them:
//!
//! | request | accesses | which |
//! |---|---|---|
//! | DMA read or write | 10 | 5 of the task file, command, start, status, bus-master status, stop |
//! | PIO read | 11 | 5 of the task file, command, status, 4 of data |
//! | PIO write | 12 | the same, and the status at the end |
//!
//! An interrupt costs no further access: the status that says how the command
//! ended also acknowledges it.
//!
//! One driver owns a channel, and drives one of its two drives:
//!
//! ```no_run
//! use pvkit_guest::block::{BlockOp, BlockQueue};
//! use pvkit_guest::dma::LinearSpace;
//! use pvkit_guest::emulated::ata::{Ata, AtaOptions, find_controller};
//! use pvkit_guest::pci::{PciConfig, PortPool};
//! use pvkit_guest::register::CpuPorts;
//!
//! # fn example(ports: CpuPorts, space: LinearSpace) -> Option<()> {
//! let pci = PciConfig::new(ports);
//! // SAFETY: no device is there.
//! let mut free = unsafe { PortPool::new(0xc000, 0xcfff) };
//! let [primary, _] = find_controller(&pci, &mut free).ok()??;
//! let mut disk = Ata::open(pci.into_access(), space, primary, AtaOptions::default()).ok()?;
//! let buffer = vec![0u8; 4096];
//! disk.submit(BlockOp::Read { sector: 0 }, Some(buffer), 1).ok()?;
//! disk.publish();
//! while disk.complete().ok()?.is_none() {}
//! # Some(())
//! # }
//! ```
//!
//! ## Chips
//!
//! The driver is for the controllers of hypervisors. It does not program
//! transfer timings, which real cables need, and does not wait for the 400 ns
//! that a real drive may take to show that it is busy.

#[allow(unsafe_code)]
mod direct;
#[allow(unsafe_code)]
mod engine;
mod identify;
mod probe;
mod queue;
mod registers;

pub use probe::find_controller;
pub use queue::{Ata, AtaCounters};

use crate::dma::DmaError;
use crate::pci::PciError;
use pvkit_protocol::emulated::ata::ChannelPorts;
use thiserror::Error;

/// Where a channel's registers stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channel {
    /// First of the 8 ports of the command block.
    pub command: u16,
    /// Port of alternate status and device control.
    pub control: u16,
    /// First of the 8 ports of the bus master, if there is one.
    pub bus_master: Option<u16>,
}

impl Channel {
    /// A channel in compatibility mode.
    #[must_use]
    pub const fn legacy(ports: ChannelPorts, bus_master: Option<u16>) -> Self {
        Self {
            command: ports.command,
            control: ports.control,
            bus_master,
        }
    }
}

/// Who moves the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The processor, through the data register.
    Pio,
    /// The controller's bus master. Buffers lie at even addresses below 4 GiB,
    /// in pieces of even length.
    Dma,
}

/// How the driver learns that a request is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Completion {
    /// The caller polls; the drive's interrupt is masked.
    Polled,
    /// The drive interrupts.
    Interrupt,
}

/// One of the two drives of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Drive {
    /// Drive 0.
    Zero,
    /// Drive 1.
    One,
}

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtaOptions {
    /// Who moves the data.
    pub mode: Mode,
    /// How the driver learns that a request is done.
    pub completion: Completion,
    /// Which drive.
    pub drive: Drive,
    /// Most segments of a buffer, for DMA.
    pub max_segments: u16,
    /// Longest request in bytes; cut to whole sectors, and to what the drive
    /// can do in one command: 128 KiB, or 32 MiB with 48-bit addresses.
    pub max_bytes: u32,
    /// How often a register is read in a row while the driver itself waits:
    /// after resets, and in the short time in which a bus master finishes.
    pub max_polls: u32,
}

impl Default for AtaOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Dma,
            completion: Completion::Polled,
            drive: Drive::Zero,
            max_segments: 16,
            max_bytes: 1 << 20,
            max_polls: 1_000_000,
        }
    }
}

/// Why a drive cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AtaError {
    /// Nothing answers.
    #[error("there is no drive: the status register reads {status:#04x}")]
    NoDrive {
        /// What the status register reads as.
        status: u8,
    },
    /// The drive is no disk but takes packets: a CD drive, say.
    #[error("the drive is a packet device")]
    PacketDevice,
    /// The drive has the signature of nothing known.
    #[error("the drive's signature is {mid:#04x} {high:#04x}")]
    Signature {
        /// What LBA mid reads as.
        mid: u8,
        /// What LBA high reads as.
        high: u8,
    },
    /// A register did not become what it should in time.
    #[error("register {register:#x} still reads {value:#04x} after {polls} reads")]
    Timeout {
        /// Port of the register.
        register: u16,
        /// What it read as last.
        value: u8,
        /// How often it was read.
        polls: u32,
    },
    /// The drive refuses a command that it must know.
    #[error("the drive refuses command {command:#04x}: status {status:#04x}")]
    Refused {
        /// The command.
        command: u8,
        /// What the status register reads as.
        status: u8,
    },
    /// A word of IDENTIFY DEVICE says that this driver cannot use the drive,
    /// or makes no sense.
    #[error("word {word} of IDENTIFY DEVICE is {value:#x}")]
    Identify {
        /// Index of the (first) word.
        word: usize,
        /// The number there.
        value: u64,
    },
    /// DMA was asked for, and there is no bus master.
    #[error("the channel has no bus master")]
    NoBusMaster,
    /// The controller's channels are not in compatibility mode.
    #[error("the controller has programming interface {prog_if:#04x}: not in compatibility mode")]
    NativeMode {
        /// What its configuration space says.
        prog_if: u8,
    },
    /// After a reset there is another drive.
    #[error("the drive was replaced")]
    Replaced,
    /// Storage that was handed in is too small.
    #[error("room for {have} segments, where {need} are needed")]
    Storage {
        /// What was handed in.
        have: usize,
        /// What is needed.
        need: usize,
    },
    /// There is no memory for the table of regions, or the bus master cannot
    /// reach it.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// The controller's function cannot be used.
    #[error(transparent)]
    Pci(#[from] PciError),
}
