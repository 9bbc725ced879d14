//! # pvkit-join
//!
//! The shipped drivers and the shipped devices, joined in one process with no
//! virtual machine between them: what tests, fuzz targets and the benchmark
//! without `/dev/kvm` run on.
//!
//! - [`arena`] is the guest's memory, and how the driver shares it.
//! - [`wire`] carries the driver's register accesses to the device, and counts
//!   them; [`port`] does the same for ports.
//! - [`ide`] is a machine with an IDE controller on a PCI bus.
//! - [`mod@stepped`] drives the device's lanes by hand, so that every run is the
//!   same; [`Threads`](pvkit_host::executor::Threads) of the host crate drives
//!   them on threads of their own.
//! - [`disk`] is a disk that holds requests back until it is told to go on.
//! - [`hostile`] has a guest that writes what it likes, and a device that
//!   lies.
//! - [`fuzz`] plays scripts in which everything changes under both sides.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod arena;
pub mod disk;
#[allow(unsafe_code)]
pub mod fuzz;
pub mod hostile;
pub mod ide;
#[allow(unsafe_code)]
pub mod port;
pub mod stepped;
#[allow(unsafe_code)]
pub mod wire;

use arena::{Arena, ArenaSpace};
use pvkit_guest::virtio::transport::MmioTransport as GuestTransport;
use pvkit_host::disk::Disk;
use pvkit_host::executor::Executor;
use pvkit_host::virtio::block::{Block, BlockCounters, BlockOptions};
use pvkit_host::virtio::transport::MmioTransport as HostTransport;
use pvkit_host::worker::SignalCounter;
use std::sync::Arc;
use stepped::{Steps, stepped};
use wire::Wire;

/// A virtio block device, ready for a driver.
#[derive(Debug)]
pub struct Join {
    /// The guest's memory.
    pub arena: Arena,
    /// The device's registers.
    pub wire: Wire,
    /// What the device's first queue has done.
    pub counters: Arc<BlockCounters>,
    /// What each of its queues has done.
    pub queue_counters: Vec<Arc<BlockCounters>>,
    /// Interrupts that the driver was sent.
    pub interrupts: Arc<SignalCounter>,
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
        disk: Arc<dyn Disk>,
        options: BlockOptions,
        executor: Box<dyn Executor>,
        bytes: usize,
    ) -> Self {
        let arena = Arena::new(bytes);
        let device = Block::new(disk, options).expect("block options");
        let counters = device.counters();
        let queue_counters = device.queue_counters();
        let interrupts = Arc::new(SignalCounter::default());
        let transport = HostTransport::new(
            Box::new(device),
            arena.guest_memory().clone(),
            executor,
            interrupts.clone(),
        )
        .expect("event counters");
        Self {
            arena,
            wire: Wire::new(transport),
            counters,
            queue_counters,
            interrupts,
        }
    }

    /// The same, driven by hand.
    #[must_use]
    pub fn stepped(disk: Arc<dyn Disk>, options: BlockOptions, bytes: usize) -> (Self, Steps) {
        let (executor, steps) = stepped();
        (Self::new(disk, options, Box::new(executor), bytes), steps)
    }

    /// The driver's view of the device.
    ///
    /// # Panics
    /// If the device is not what it should be.
    #[must_use]
    pub fn transport(&self) -> GuestTransport<Wire> {
        GuestTransport::new(self.wire.clone()).expect("a virtio-mmio device")
    }

    /// How the driver shares memory with the device.
    #[must_use]
    pub fn space(&self) -> ArenaSpace {
        self.arena.space()
    }
}
