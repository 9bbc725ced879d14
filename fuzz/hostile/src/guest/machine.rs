//! The machine of a hostile guest: its memory, where the guest keeps what, and
//! how descriptors are written.
#![forbid(unsafe_code)]

use super::Guest;
use super::front::{Front, PciFront};
use pvkit_host::disk::Disk;
use pvkit_host::executor::Executor;
use pvkit_host::memory::GuestMemory;
use pvkit_host::virtio::block::{Block, BlockCounters, BlockOptions};
use pvkit_host::virtio::device::Device;
use pvkit_host::virtio::transport::MmioTransport;
use pvkit_host::worker::SignalCounter;
use pvkit_join::Kind;
use pvkit_join::stepped::stepped;
use pvkit_join::wire::Wire;
use pvkit_protocol::virtio::split::{Descriptor, DescriptorFlags};
use std::ops::Range;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// The first region of RAM: rings and buffers, unless a script puts them
/// elsewhere.
pub const LOW: Range<u64> = 0x1_0000..0x5_0000;
/// The second region follows the first without a gap for the guest, and lies
/// anywhere for the host.
pub const HIGH: Range<u64> = 0x5_0000..0x7_0000;
/// The last region lies as high as addresses go, but for a page.
pub const TOP: Range<u64> = 0xffff_ffff_ffff_0000..0xffff_ffff_ffff_f000;
/// An address in the hole between the regions.
pub const HOLE: u64 = 0x8_0000;
/// A region for rings of the largest size, on a [`Machine::wide`] one.
pub const WIDE: Range<u64> = 0x10_0000..0x20_0000;

/// Where a guest keeps what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
    /// Indirect tables, two pages.
    pub table: u64,
    /// Request headers.
    pub header: u64,
    /// Status bytes.
    pub status: u64,
    /// Data, 64 KiB.
    pub data: u64,
}

impl Layout {
    /// Everything in its own pages, 96 KiB from `base` on.
    #[must_use]
    pub const fn at(base: u64) -> Self {
        Self {
            descriptors: base,
            avail: base + 0x1000,
            used: base + 0x2000,
            table: base + 0x3000,
            header: base + 0x5000,
            status: base + 0x6000,
            data: base + 0x8000,
        }
    }
}

/// The memory that hostile guests share: one machine, several devices.
#[derive(Debug, Clone)]
pub struct Machine {
    memory: GuestMemory,
    kind: Kind,
}

impl Machine {
    /// Zeroed RAM at [`LOW`], [`HIGH`] and [`TOP`], and devices that guests
    /// reach by `kind`.
    ///
    /// # Panics
    /// If the host has no memory.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self::of(kind, &[LOW, HIGH, TOP])
    }

    /// The same, and RAM at [`WIDE`].
    ///
    /// # Panics
    /// If the host has no memory.
    #[must_use]
    pub fn wide(kind: Kind) -> Self {
        Self::of(kind, &[LOW, HIGH, WIDE, TOP])
    }

    fn of(kind: Kind, regions: &[Range<u64>]) -> Self {
        let ranges: Vec<_> = regions
            .iter()
            .map(|region| {
                let len = region.end - region.start;
                (GuestAddress(region.start), len as usize)
            })
            .collect();
        let map = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("guest memory");
        let memory = GuestMemory::new(Arc::new(map)).expect("a mapping");
        Self::over(kind, memory)
    }

    /// Memory of the test's choice, of which guests see what their devices do.
    #[must_use]
    pub fn over(kind: Kind, memory: GuestMemory) -> Self {
        Self { memory, kind }
    }

    /// The memory, as devices take it.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// A block device on this machine, stepped by hand, and who plays its
    /// guest.
    #[must_use]
    pub fn guest(&self, disk: Arc<dyn Disk>, options: BlockOptions, base: u64) -> Guest {
        let (executor, steps) = stepped();
        self.guest_on(disk, options, base, Box::new(executor))
            .stepped_by(steps)
    }

    /// The same, driven by `executor`.
    ///
    /// # Panics
    /// If the options make no sense, or the host has no resources.
    #[must_use]
    pub fn guest_on(
        &self,
        disk: Arc<dyn Disk>,
        options: BlockOptions,
        base: u64,
        executor: Box<dyn Executor>,
    ) -> Guest {
        let device = Block::new(disk, options).expect("block options");
        let counters = device.counters();
        self.guest_of(Box::new(device), counters, base, executor)
    }

    /// Any device, of which the guest plays with queue 0.
    ///
    /// # Panics
    /// If the host has no resources.
    #[must_use]
    pub fn guest_of(
        &self,
        device: Box<dyn Device>,
        counters: Arc<BlockCounters>,
        base: u64,
        executor: Box<dyn Executor>,
    ) -> Guest {
        let memory = self.memory.clone();
        let (front, interrupts): (Box<dyn Front>, _) = match self.kind {
            Kind::Mmio => {
                let interrupts = Arc::new(SignalCounter::default());
                let transport = MmioTransport::new(device, memory, executor, interrupts.clone());
                (Box::new(transport.expect("event counters")), interrupts)
            }
            // This guest always takes messages.
            Kind::Pci | Kind::PciIntx => {
                let front = PciFront::new(device, memory, executor);
                let interrupts = front.interrupts();
                (Box::new(front), interrupts)
            }
        };
        Guest {
            ram: self.memory.snapshot(),
            wire: Wire::new(front),
            steps: None,
            queue: 0,
            layout: Layout::at(base),
            size: 8,
            offered: 0,
            looked: 0,
            interrupts,
            counters,
        }
    }
}

/// A descriptor of a buffer that the device may read.
#[must_use]
pub const fn readable(addr: u64, len: u32) -> Descriptor {
    Descriptor::new(addr, len, DescriptorFlags::empty(), 0)
}

/// A descriptor of a buffer that the device may write.
#[must_use]
pub const fn writable(addr: u64, len: u32) -> Descriptor {
    Descriptor::new(addr, len, DescriptorFlags::WRITE, 0)
}

/// A descriptor of an indirect table.
#[must_use]
pub const fn indirect(addr: u64, bytes: u32) -> Descriptor {
    Descriptor::new(addr, bytes, DescriptorFlags::INDIRECT, 0)
}

/// The same descriptor, going on at `next`.
#[must_use]
pub fn then(descriptor: Descriptor, next: u16) -> Descriptor {
    Descriptor::new(
        descriptor.addr.get(),
        descriptor.len.get(),
        descriptor.flags() | DescriptorFlags::NEXT,
        next,
    )
}

/// A chain of descriptors that lie one behind the other, from `first` on.
#[must_use]
pub fn linked(first: u16, parts: &[Descriptor]) -> Vec<Descriptor> {
    let mut chain: Vec<_> = (first..)
        .zip(parts)
        .map(|(index, part)| then(*part, index.wrapping_add(1)))
        .collect();
    if let (Some(last), Some(part)) = (chain.last_mut(), parts.last()) {
        *last = *part;
    }
    chain
}
