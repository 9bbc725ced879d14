//! # pvkit-host
//!
//! The host's half of paravirtual I/O: devices that serve a guest's rings, the
//! emulated devices that they replace, and a KVM virtual machine monitor that
//! runs both.
//!
//! A tour, from what the host has to what the guest sees:
//!
//! - [`disk`]: what a disk really is: memory or a file; sectors in, sectors
//!   out.
//! - [`link`]: what a network card is plugged into; frames in, frames out. A
//!   [`tap`](link::tap) of the kernel, a [`switch`](link::switch) in this
//!   process, or a [`stream`](link::stream) socket; what a receiver does not
//!   take of a frame is [done in software](link::offload).
//! - [`memory`]: the guest's memory, never trusted, copied once; behind an
//!   [`Iommu`](memory::Iommu), if devices are to reach only parts of it.
//! - [`worker`]: the data plane of a device, driven by whoever links it; and
//!   [`executor`], which drives workers on threads for those who want that.
//! - [`virtio`]: the device half of both rings, the block device, the network
//!   device, and the virtio-mmio and virtio-pci transports.
//! - [`emulated`], [`pci`] and [`bus`]: a small PCI host bridge, with MSI-X for
//!   functions that want it; an IDE controller and network cards (82540EM)
//!   behind it, and a serial port.
//! - [`vmm`] runs a virtual machine on KVM.
//!
//! A monitor of your own needs only [`virtio`], [`disk`] and [`memory`]: no
//! threads are started, and no file descriptors polled, unless you ask for
//! them.
//!
//! ## A block device in a monitor of your own
//!
//! ```no_run
//! use pvkit_host::bus::BusDevice;
//! use pvkit_host::disk::{FileDisk, FileOptions};
//! use pvkit_host::executor::{ThreadOptions, Threads};
//! use pvkit_host::memory::GuestMemory;
//! use pvkit_host::virtio::block::{Block, BlockOptions};
//! use pvkit_host::virtio::transport::MmioTransport;
//! use pvkit_host::worker::SignalCounter;
//! use std::sync::Arc;
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
//! let memory = GuestMemory::new(Arc::new(map))?;
//! let disk = FileDisk::open("disk.img", FileOptions::default())?;
//! let device = Block::new(Arc::new(disk), BlockOptions::default())?;
//! // Your interrupt goes here; and your own event loop in place of threads.
//! let interrupt = Arc::new(SignalCounter::default());
//! let threads = Threads::new("disk", ThreadOptions::default());
//! let mut window = MmioTransport::new(Box::new(device), memory, Box::new(threads), interrupt)?;
//! // What the guest reads and writes in the window goes to these two.
//! let mut magic = [0; 4];
//! window.read(0, &mut magic);
//! assert_eq!(&magic, b"virt");
//! window.write(0x70, &[1, 0, 0, 0]);
//! # Ok(())
//! # }
//! ```
//!
//! ## What the devices promise
//!
//! Nothing that a guest writes, to memory or to registers, makes the host
//! panic, spin, allocate by the guest's numbers, or touch memory outside guest
//! RAM. A queue that breaks the protocol is retired and the device asks to be
//! reset; other queues and devices go on.
//!
//! ## Unsafe code
//!
//! It stands in [`memory`], in the system calls of the file disk and of taps,
//! and in the parts of [`vmm`] that talk to KVM. Every other module forbids it.
#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

pub mod bus;
pub mod disk;
pub mod emulated;
pub mod event;
pub mod executor;
pub mod link;
#[allow(unsafe_code)]
pub mod memory;
pub mod pci;
pub mod state;
pub mod virtio;
#[cfg(feature = "vmm")]
pub mod vmm;
pub mod worker;

mod log_limit;
mod message;
mod sync;

pub use message::one_line;
