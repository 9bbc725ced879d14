//! # pvkit-join
//!
//! The shipped drivers and the shipped devices, joined in one process with no
//! virtual machine between them: what tests, fuzz targets and the benchmark
//! without `/dev/kvm` run on.
//!
//! - [`arena`] is the guest's memory, and how the driver shares it.
//! - [`wire`] carries the driver's register accesses to the device, and counts
//!   them; [`port`] does the same for ports.
//! - [`pci`] is a machine with a virtio device on a PCI bus; [`any`] makes one
//!   type of both transports.
//! - [`ide`] is a machine with an IDE controller on a PCI bus.
//! - [`mod@stepped`] drives the device's lanes by hand, so that every run is the
//!   same; [`Threads`](pvkit_host::executor::Threads) of the host crate drives
//!   them on threads of their own.
//! - [`mod@conformance`] runs the same tests on every way in which both can come
//!   together.
//! - [`disk`] is a disk that holds requests back until it is told to go on.
//! - [`hostile`] has a guest that writes what it likes, and a device that
//!   lies.
//! - [`fuzz`] plays scripts in which everything changes under both sides.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod any;
#[allow(unsafe_code)]
pub mod arena;
pub mod conformance;
pub mod disk;
#[allow(unsafe_code)]
pub mod fuzz;
pub mod hostile;
pub mod ide;
pub mod pci;
#[allow(unsafe_code)]
pub mod port;
pub mod stepped;
#[allow(unsafe_code)]
pub mod wire;

use any::AnyTransport;
use arena::{Arena, ArenaSpace, BASE};
use pci::{AnyWire, VirtioPci};
use pvkit_guest::virtio::transport::MmioTransport as GuestTransport;
use pvkit_host::disk::Disk;
use pvkit_host::executor::Executor;
use pvkit_host::memory::{GuestMemory, Iommu, IovaWindow};
use pvkit_host::virtio::block::{Block, BlockCounters, BlockOptions};
use pvkit_host::virtio::transport::{MmioTransport as HostTransport, PciOptions};
use pvkit_host::worker::SignalCounter;
use std::sync::Arc;
use stepped::{Steps, stepped};
use wire::Wire;

/// How driver and device find each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// By virtio-mmio.
    Mmio,
    /// By virtio-pci, with a vector for configuration changes and one for the
    /// queue.
    Pci,
    /// By virtio-pci without MSI-X: by the function's pin.
    PciIntx,
}

impl Kind {
    /// The kind of a test program: one whose name ends in `_pci` is the same
    /// as another over virtio-pci.
    #[must_use]
    pub const fn of_program(name: &str) -> Self {
        match name.as_bytes() {
            [.., b'_', b'p', b'c', b'i'] => Self::Pci,
            _ => Self::Mmio,
        }
    }
}

/// A virtio block device, ready for a driver.
#[derive(Debug)]
pub struct Join {
    /// The guest's memory.
    pub arena: Arena,
    /// The device's registers. On PCI they are reached through
    /// [`pci`](Join::pci), and this counts.
    pub wire: AnyWire,
    /// What the device's first queue has done.
    pub counters: Arc<BlockCounters>,
    /// What each of its queues has done.
    pub queue_counters: Vec<Arc<BlockCounters>>,
    /// Interrupts that the driver was sent.
    pub interrupts: Arc<SignalCounter>,
    /// The machine, if the device is on PCI.
    pub pci: Option<VirtioPci>,
    kind: Kind,
    /// What the device sees the arena through, if not as it is.
    pub iommu: Option<Iommu>,
}

/// Where the arena starts for a device that was [translated](Join::translated):
/// at no address that fits 32 bits.
pub const IOVA: u64 = 0x5a_0000_0000;

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
        let arena = Arena::new(bytes);
        let memory = arena.guest_memory().clone();
        Self::over(kind, disk, options, executor, arena, memory)
    }

    /// The same with an IOMMU in front of the device, which shows it all of
    /// the guest's memory from [`IOVA`] on, in windows of 64 KiB.
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
        let arena = Arena::new(bytes);
        let iommu = Iommu::new(arena.guest_memory());
        let bytes = arena.bytes() as u64;
        let windows: Vec<_> = (0..bytes)
            .step_by(0x1_0000)
            .map(|offset| IovaWindow {
                iova: IOVA + offset,
                addr: BASE + offset,
                len: (bytes - offset).min(0x1_0000),
                writable: true,
            })
            .collect();
        iommu.map_all(&windows).expect("windows");
        Self::behind(kind, disk, options, executor, &arena, iommu)
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
        let memory = iommu.memory().clone();
        let join = Self::over(kind, disk, options, executor, arena.clone(), memory);
        Self {
            iommu: Some(iommu),
            ..join
        }
    }

    fn over(
        kind: Kind,
        disk: Arc<dyn Disk>,
        options: BlockOptions,
        executor: Box<dyn Executor>,
        arena: Arena,
        memory: GuestMemory,
    ) -> Self {
        let device = Block::new(disk, options).expect("block options");
        let counters = device.counters();
        let queue_counters = device.queue_counters();
        let device = Box::new(device);
        if kind == Kind::Mmio {
            let interrupts = Arc::new(SignalCounter::default());
            let transport = HostTransport::new(device, memory, executor, interrupts.clone());
            return Self {
                arena,
                wire: Wire::new(Box::new(transport.expect("event counters"))),
                counters,
                queue_counters,
                interrupts,
                pci: None,
                kind,
                iommu: None,
            };
        }
        let options = match kind {
            Kind::PciIntx => PciOptions::default().with_vectors(0),
            _ => PciOptions::default(),
        };
        let pci = VirtioPci::new(device, memory, executor, options);
        Self {
            arena,
            wire: pci.wire.clone(),
            counters,
            queue_counters,
            interrupts: pci.interrupts.all.clone(),
            pci: Some(pci),
            kind,
            iommu: None,
        }
    }

    /// The same, driven by hand.
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

    /// The driver's view of the device. With [`Kind::Pci`], configuration
    /// changes have vector 0 and queues have vector 1, unless the driver asks
    /// for others.
    ///
    /// # Panics
    /// If the device is not what it should be.
    #[must_use]
    pub fn transport(&self) -> AnyTransport<AnyWire> {
        let Some(pci) = &self.pci else {
            let transport = GuestTransport::new(self.wire.clone());
            return AnyTransport::Mmio(transport.expect("a virtio-mmio device"));
        };
        let mut free = pci.free();
        let transport = pci.transport(&mut free);
        if self.kind == Kind::PciIntx {
            return AnyTransport::Pci {
                transport: Box::new(transport),
                vectors: None,
            };
        }
        let msix = pci.msix(&mut free);
        AnyTransport::Pci {
            transport: Box::new(transport.with_msix(&msix)),
            vectors: Some([0, 1]),
        }
    }

    /// How the driver shares memory with the device; if that is behind an
    /// IOMMU, one that shows all of it as for a
    /// [translated](Join::translated) one.
    #[must_use]
    pub fn space(&self) -> ArenaSpace {
        let offset = self.iommu.as_ref().map_or(0, |_| IOVA - BASE);
        self.arena.space().seen_from(offset)
    }
}
