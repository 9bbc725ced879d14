//! # pvkit-guest
//!
//! Drivers for the devices that a hypervisor gives to a virtual machine, for
//! kernels, unikernels and firmware: `no_std`, nothing allocated on the hot
//! path, and no trust in what the device writes.
//!
//! A tour, from what a kernel provides to what it gets:
//!
//! - [`dma`]: the kernel says how devices reach its memory ([`dma::DmaSpace`]),
//!   and hands over buffers ([`dma::DmaBuf`]). A confidential guest shares only
//!   what [`bounce`] copies through.
//! - [`register`]: how registers and ports are reached.
//! - [`interrupt`] and [`doorbell`]: one bit of news in each direction.
//! - [`block`]: the contract of every disk driver here, whatever the family:
//!   submit, publish, complete, arm.
//! - [`net`]: the contract of every network driver here: frames out, frames in,
//!   and the work on them that one side leaves to the other.
//!   [`net::pool`] keeps buffers for it; the features `smoltcp` and `embassy`
//!   put those network stacks on top.
//! - [`virtio`]: virtio-blk and virtio-net on split and packed rings over
//!   virtio-mmio and virtio-pci.
//! - [`pci`]: finding functions, giving them ports and memory, and interrupts
//!   by message.
//! - [`emulated`]: drivers of the chips that hypervisors imitate, for
//!   comparison and for hosts that offer nothing better.
//! - [`quiesce`]: the proof that a device has let go of memory.
//! - [`fault`]: what a driver reports when the device breaks the rules.
//!
//! ## A disk in twenty lines
//!
//! ```no_run
//! # use std as alloc;
//! use core::ptr::NonNull;
//! use pvkit_guest::block::{BlockOp, BlockQueue};
//! use pvkit_guest::dma::LinearSpace;
//! use pvkit_guest::register::MmioRegisters;
//! use pvkit_guest::virtio::transport::MmioTransport;
//! use pvkit_guest::virtio::{Block, BlockOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let base = NonNull::new(core::ptr::with_exposed_provenance_mut(0xd000_0000)).unwrap();
//! // SAFETY: a virtio-mmio window, mapped uncached, that nobody else uses.
//! let registers = unsafe { MmioRegisters::new(base, 0x200) };
//! // SAFETY: memory is identity mapped, for devices too.
//! let space = unsafe { LinearSpace::new(0) };
//! let transport = MmioTransport::new(registers)?;
//! let (block, mut queue) = Block::open(transport, space, BlockOptions::default())?;
//!
//! let buffer = alloc::vec![0u8; 4096].into_boxed_slice();
//! queue.submit(BlockOp::Read { sector: 0 }, Some(buffer), 1).map_err(|r| r.reason)?;
//! queue.publish();
//! let done = loop {
//!     if let Some(done) = queue.complete()? {
//!         break done;
//!     }
//! };
//! done.result?;
//! println!("{} bytes of {} sectors", done.buffer.unwrap().len(), block.limits().capacity);
//! # Ok(())
//! # }
//! ```
//!
//! ## A network card in twenty more
//!
//! ```no_run
//! # use core::ptr::NonNull;
//! # use pvkit_guest::dma::LinearSpace;
//! # use pvkit_guest::register::MmioRegisters;
//! # use pvkit_guest::virtio::transport::MmioTransport;
//! use pvkit_guest::net::pool::Sender;
//! use pvkit_guest::net::{FrameMeta, NetRx};
//! use pvkit_guest::virtio::{Net, NetOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let base = NonNull::new(core::ptr::with_exposed_provenance_mut(0xd000_0200)).unwrap();
//! # // SAFETY: a virtio-mmio window, mapped uncached, that nobody else uses.
//! # let registers = unsafe { MmioRegisters::new(base, 0x200) };
//! # // SAFETY: memory is identity mapped, for devices too.
//! # let space = unsafe { LinearSpace::new(0) };
//! # let transport = MmioTransport::new(registers)?;
//! let buffer = || vec![0u8; 2048].into_boxed_slice();
//! let (net, (tx, mut rx)) =
//!     Net::open(transport, space, NetOptions::default(), &mut || Some(buffer()))?;
//! println!("{:?}, link {:?}", net.limits(), net.link());
//!
//! let mut sender = Sender::heap(tx, 64, buffer);
//! sender.send(60, &FrameMeta::PLAIN, |frame| frame.fill(0xff))?;
//! sender.publish();
//! loop {
//!     while let Some(frame) = rx.recv()? {
//!         println!("{} bytes", frame.bytes());
//!     }
//!     rx.publish();
//! }
//! # }
//! ```
//!
//! ## What the drivers promise
//!
//! A queue **owns** every buffer while the device has it, so the public
//! interface is safe. All that the driver needs to remember about a request
//! lies in private memory: ids and lengths that the device returns are checked
//! against it. A device that breaks the protocol yields one
//! [`Fault`](fault::Fault), after which the queue is retired until it is
//! recovered; it never causes a panic, an access out of bounds, or memory that
//! is freed while the device may still write to it.
//!
//! ## Unsafe code
//!
//! It stands in [`dma`], [`bounce`], [`register`], the transports, the
//! virtqueue, the record of lent buffers, the barriers, the two ways in which
//! the ATA driver moves data, and the rings of the e1000. No other module has
//! any.
#![no_std]
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

#[cfg(feature = "alloc")]
extern crate alloc;

pub mod block;
#[allow(unsafe_code)]
pub mod bounce;
#[allow(unsafe_code)]
pub mod dma;
pub mod doorbell;
pub mod emulated;
pub mod fault;
pub mod interrupt;
pub mod net;
pub mod pci;
#[allow(unsafe_code)]
pub mod quiesce;
#[allow(unsafe_code)]
pub mod register;
pub mod storage;
pub mod virtio;

mod barrier;
mod lent;
