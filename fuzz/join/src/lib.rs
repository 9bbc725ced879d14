//! # pvkit-join
//!
//! The shipped drivers and the shipped devices, joined in one process with no
//! virtual machine between them: what tests, fuzz targets and the benchmark
//! without `/dev/kvm` run on.
//!
//! - [`arena`] is the guest's memory, and how the driver shares it.
//! - [`wire`] carries the driver's register accesses to the device, and counts
//!   them; [`port`] does the same for ports.
//! - [`Machine`] is a virtio device of any type with registers and memory; a
//!   [`Join`] is one with a block device, a [`NetJoin`](net::NetJoin) one with a
//!   network device.
//! - [`pci`] is a machine with a virtio device on a PCI bus; [`any`] makes one
//!   type of both transports.
//! - [`ide`] is a machine with an IDE controller on a PCI bus.
//! - [`e1000`] is a machine with a network card of old on a PCI bus.
//! - [`mod@stepped`] drives the device's lanes by hand, so that every run is the
//!   same; [`Threads`](pvkit_host::executor::Threads) of the host crate drives
//!   them on threads of their own.
//! - [`mod@conformance`] runs the same tests on every way in which both can come
//!   together.
//! - [`packets`] makes TCP and UDP packets, and checks what comes of them.
//! - [`unchecked`] is what only a kernel may do in a machine.
//! - [`disk`] is a disk that holds requests back until it is told to go on.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod any;
#[allow(unsafe_code)]
pub mod arena;
pub mod conformance;
pub mod disk;
pub mod e1000;
pub mod ide;
pub mod machine;
pub mod net;
pub mod packets;
pub mod pci;
#[allow(unsafe_code)]
pub mod port;
pub mod stepped;
#[allow(unsafe_code)]
pub mod unchecked;
#[allow(unsafe_code)]
pub mod wire;

pub use machine::{IOVA, Kind, Machine};

use arena::Arena;
use pvkit_host::disk::Disk;
use pvkit_host::executor::Executor;
use pvkit_host::memory::Iommu;
use pvkit_host::virtio::block::{Block, BlockCounters, BlockOptions};
use std::ops::Deref;
use std::sync::Arc;
use stepped::{Steps, stepped};

/// A virtio block device, ready for a driver.
#[derive(Debug)]
pub struct Join {
    /// The machine that has it.
    pub machine: Machine,
    /// What the device's first queue has done.
    pub counters: Arc<BlockCounters>,
    /// What each of its queues has done.
    pub queue_counters: Vec<Arc<BlockCounters>>,
}

impl Deref for Join {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Join {
    /// A device on `disk`, driven by `executor`, and a guest with `bytes` of
    /// memory.
    ///
    /// # Panics
    /// If the options make no sense, or the host has no memory: this is for
    /// tests.
    #[must_use]
    pub fn new(
        kind: Kind,
        disk: Arc<dyn Disk>,
        options: BlockOptions,
        executor: Box<dyn Executor>,
        bytes: usize,
    ) -> Self {
        Self::with(disk, options, |device| {
            Machine::new(kind, device, executor, bytes)
        })
    }

    /// The same behind an IOMMU; see [`Machine::translated`].
    ///
    /// # Panics
    /// See [`new`](Join::new).
    #[must_use]
    pub fn translated(
        kind: Kind,
        disk: Arc<dyn Disk>,
        options: BlockOptions,
        executor: Box<dyn Executor>,
        bytes: usize,
    ) -> Self {
        Self::with(disk, options, |device| {
            Machine::translated(kind, device, executor, bytes)
        })
    }

    /// A device behind `iommu`, in the guest that `arena` is the memory of.
    ///
    /// # Panics
    /// See [`new`](Join::new).
    #[must_use]
    pub fn behind(
        kind: Kind,
        disk: Arc<dyn Disk>,
        options: BlockOptions,
        executor: Box<dyn Executor>,
        arena: &Arena,
        iommu: Iommu,
    ) -> Self {
        Self::with(disk, options, |device| {
            Machine::behind(kind, device, executor, arena, iommu)
        })
    }

    fn with(
        disk: Arc<dyn Disk>,
        options: BlockOptions,
        machine: impl FnOnce(Box<Block>) -> Machine,
    ) -> Self {
        let device = Block::new(disk, options).expect("block options");
        Self {
            counters: device.counters(),
            queue_counters: device.queue_counters(),
            machine: machine(Box::new(device)),
        }
    }

    /// The same as [`new`](Join::new), driven by hand.
    #[must_use]
    pub fn stepped(
        kind: Kind,
        disk: Arc<dyn Disk>,
        options: BlockOptions,
        bytes: usize,
    ) -> (Self, Steps) {
        let (executor, steps) = stepped();
        let join = Self::new(kind, disk, options, Box::new(executor), bytes);
        (join, steps)
    }
}
