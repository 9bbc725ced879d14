//! virtio over PCI: what the other transports do not have. The block tests run
//! over it in `block_operations_pci` and `block_counts_pci`.

mod hostile_guest;
mod interrupts;
mod lying_device;

use pvkit_guest::block::{BlockOp, BlockQueue};
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_guest::virtio::transport::PciTransport;
use pvkit_host::disk::MemoryDisk;
use pvkit_host::virtio::block::{Block as Device, BlockOptions as DeviceOptions};
use pvkit_host::virtio::transport::PciOptions;
use pvkit_join::arena::{Arena, ArenaSpace};
use pvkit_join::disk::pattern;
use pvkit_join::pci::{AnyWire, VirtioPci};
use pvkit_join::stepped::{Steps, stepped};
use std::sync::Arc;

type Transport = PciTransport<AnyWire>;
type Queue = QueueOf<Vec<u8>, ArenaSpace, Transport>;

/// A machine with a block device of 64 sectors, stepped by hand.
struct Scene {
    arena: Arena,
    pci: VirtioPci,
    steps: Steps,
}

impl Scene {
    fn new(options: PciOptions) -> Self {
        Self::of(DeviceOptions::default(), options)
    }

    fn of(device: DeviceOptions, options: PciOptions) -> Self {
        let arena = Arena::new(4 << 20);
        let disk = MemoryDisk::from_bytes(pattern(0, 64 * 512));
        let device = Device::new(Arc::new(disk), device).unwrap();
        let (executor, steps) = stepped();
        let memory = arena.guest_memory().clone();
        let pci = VirtioPci::new(Box::new(device), memory, Box::new(executor), options);
        Self { arena, pci, steps }
    }

    fn open(&self, transport: Transport, options: BlockOptions) -> (Block<Transport>, Queue) {
        Block::open(transport, self.arena.space(), options).unwrap()
    }

    /// One read of each sector, from submission to completion.
    fn read(&self, queue: &mut Queue, sector: u64) {
        self.submit(queue, sector);
        self.steps.run();
        self.complete(queue, sector);
    }

    fn submit(&self, queue: &mut Queue, sector: u64) {
        let op = BlockOp::Read { sector };
        queue.submit(op, Some(vec![0; 512]), sector).unwrap();
        queue.publish();
    }

    fn complete(&self, queue: &mut Queue, sector: u64) {
        let done = queue.complete().unwrap().expect("a completion");
        done.result.unwrap();
        assert_eq!(done.buffer.unwrap(), pattern(sector, 512));
    }
}
