//! # pvkit-protocol
//!
//! The one truth that both halves of pvkit obey: every wire format, register
//! and feature bit, and the arithmetic on them. Nothing in here touches a
//! device or memory, and nothing allocates.
//!
//! A tour:
//!
//! - [`virtio`]: feature bits and device status, the [`split`](virtio::split)
//!   ring, the registers of the [`mmio`](virtio::mmio) and
//!   [`pci`](virtio::pci) transports, and one module per device
//!   ([`block`](virtio::block), [`net`](virtio::net)).
//! - [`emulated`]: the devices of old that a virtual machine is born with, such
//!   as the [`ata`](emulated::ata) disk interface of a PIIX3 chip.
//! - [`frame`]: what accompanies an Ethernet frame, whatever the device; and
//!   [`inet`], as much of the Internet protocols as offloads need.
//! - [`pci`]: configuration mechanism 1, the type 0 configuration header,
//!   capabilities and MSI-X.
//! - [`detect`]: which hypervisor and container a machine runs on.
//! - [`pvh`]: how a virtual machine monitor starts an ELF image.
//!
//! Structures that lie in shared memory derive the `zerocopy` traits and use
//! little-endian field types, so that they have the same bytes on every
//! machine. Constants name the section of the document that defines them;
//! "virtio 1.3 §…" is the OASIS Virtual I/O Device Specification, version 1.3.
#![no_std]
#![forbid(unsafe_code)]

pub mod detect;
pub mod emulated;
pub mod frame;
pub mod inet;
pub mod pci;
pub mod pvh;
pub mod virtio;
