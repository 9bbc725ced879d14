//! A virtio device of any type, ready for a driver: the part of a join that
//! does not depend on what the device is for.
#![forbid(unsafe_code)]

use crate::any::AnyTransport;
use crate::arena::{Arena, ArenaSpace, BASE};
use crate::pci::{AnyWire, VirtioPci};
use crate::wire::Wire;
use pvkit_guest::virtio::transport::MmioTransport as GuestTransport;
use pvkit_host::executor::Executor;
use pvkit_host::memory::{GuestMemory, Iommu, IovaWindow};
use pvkit_host::virtio::device::Device;
use pvkit_host::virtio::transport::{MmioTransport as HostTransport, PciOptions};
use pvkit_host::worker::SignalCounter;
use std::sync::Arc;

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

/// A virtio device, ready for a driver.
#[derive(Debug)]
pub struct Machine {
    /// The guest's memory.
    pub arena: Arena,
    /// The device's registers. On PCI they are reached through
    /// [`pci`](Machine::pci), and this counts.
    pub wire: AnyWire,
    /// Interrupts that the driver was sent.
    pub interrupts: Arc<SignalCounter>,
    /// The machine, if the device is on PCI.
    pub pci: Option<VirtioPci>,
    kind: Kind,
    /// What the device sees the arena through, if not as it is.
    pub iommu: Option<Iommu>,
}

/// Where the arena starts for a device that was
/// [translated](Machine::translated): at no address that fits 32 bits.
pub const IOVA: u64 = 0x5a_0000_0000;

impl Machine {
    /// A machine with `device`, driven by `executor`, and a guest with `bytes`
    /// of memory.
    ///
    /// # Panics
    /// If the host has no memory: this is for tests.
    #[must_use]
    pub fn new(
        kind: Kind,
        device: Box<dyn Device>,
        executor: Box<dyn Executor>,
        bytes: usize,
    ) -> Self {
        let arena = Arena::new(bytes);
        let memory = arena.guest_memory().clone();
        Self::over(kind, device, executor, arena, memory)
    }

    /// The same with an IOMMU in front of the device, which shows it all of
    /// the guest's memory from [`IOVA`] on, in windows of 64 KiB.
    ///
    /// # Panics
    /// See [`new`](Machine::new).
    #[must_use]
    pub fn translated(
        kind: Kind,
        device: Box<dyn Device>,
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
        Self::behind(kind, device, executor, &arena, iommu)
    }

    /// A device behind `iommu`, in the guest that `arena` is the memory of.
    ///
    /// # Panics
    /// See [`new`](Machine::new).
    #[must_use]
    pub fn behind(
        kind: Kind,
        device: Box<dyn Device>,
        executor: Box<dyn Executor>,
        arena: &Arena,
        iommu: Iommu,
    ) -> Self {
        let memory = iommu.memory().clone();
        let machine = Self::over(kind, device, executor, arena.clone(), memory);
        Self {
            iommu: Some(iommu),
            ..machine
        }
    }

    fn over(
        kind: Kind,
        device: Box<dyn Device>,
        executor: Box<dyn Executor>,
        arena: Arena,
        memory: GuestMemory,
    ) -> Self {
        if kind == Kind::Mmio {
            let interrupts = Arc::new(SignalCounter::default());
            let transport = HostTransport::new(device, memory, executor, interrupts.clone());
            return Self {
                arena,
                wire: Wire::new(Box::new(transport.expect("event counters"))),
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
            interrupts: pci.interrupts.all.clone(),
            pci: Some(pci),
            kind,
            iommu: None,
        }
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
    /// [translated](Machine::translated) one.
    #[must_use]
    pub fn space(&self) -> ArenaSpace {
        let offset = self.iommu.as_ref().map_or(0, |_| IOVA - BASE);
        self.arena.space().seen_from(offset)
    }
}
