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
//! - [`memory`]: the guest's memory, never trusted, copied once.
//! - [`worker`]: the data plane of a device, driven by whoever links it; and
//!   [`executor`], which drives workers on threads for those who want that.
//! - [`virtio`]: the device half of the split ring, the block device, and the
//!   virtio-mmio transport.
//! - [`emulated`], [`pci`] and [`bus`]: an IDE controller behind a small PCI
//!   host bridge, and a serial port.
//! - [`vmm`] runs a virtual machine on KVM.
//!
//! A monitor of your own needs only [`virtio`], [`disk`] and [`memory`]: no
//! threads are started, and no file descriptors polled, unless you ask for
//! them.
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
//! It stands in [`memory`], in the file disk's system calls, and in the parts
//! of [`vmm`] that talk to KVM. Every other module forbids it.
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
#[allow(unsafe_code)]
pub mod memory;
pub mod pci;
pub mod virtio;
#[cfg(feature = "vmm")]
pub mod vmm;
pub mod worker;

mod sync;
