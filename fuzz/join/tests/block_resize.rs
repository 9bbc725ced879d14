//! A disk that grows under a running driver: the device announces its new size
//! (virtio 1.3 §5.2.4), and the driver uses it.

use pvkit_guest::block::{BlockOp, BlockQueue, Reason};
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::transport::MmioTransport as GuestTransport;
use pvkit_host::disk::{Disk, DiskError, DiskLane, DiskShape, MemoryDisk};
use pvkit_host::virtio::block::{Block as Device, BlockOptions as DeviceOptions};
use pvkit_host::virtio::transport::MmioTransport;
use pvkit_host::worker::SignalCounter;
use pvkit_join::arena::Arena;
use pvkit_join::disk::pattern;
use pvkit_join::stepped::stepped;
use pvkit_join::wire::Wire;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A disk whose medium is as large as `medium` says, once it looked.
#[derive(Debug)]
struct Growing {
    whole: MemoryDisk,
    medium: Arc<AtomicU64>,
    seen: AtomicU64,
}

impl Disk for Growing {
    fn shape(&self) -> DiskShape {
        DiskShape {
            sectors: self.seen.load(Ordering::Acquire),
            ..self.whole.shape()
        }
    }

    fn refresh(&self) -> Result<bool, DiskError> {
        let now = self.medium.load(Ordering::Acquire);
        if now == 0 {
            return Err(DiskError::Host(5));
        }
        Ok(self.seen.swap(now, Ordering::AcqRel) != now)
    }

    fn lane(&self, depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        self.whole.lane(depth)
    }
}

#[test]
fn the_driver_uses_what_a_disk_has_grown_by() {
    let medium = Arc::new(AtomicU64::new(32));
    let disk = Growing {
        whole: MemoryDisk::new(64),
        medium: medium.clone(),
        seen: AtomicU64::new(32),
    };
    let device = Device::new(Arc::new(disk), DeviceOptions::default()).unwrap();
    let resizer = device.resizer();
    let (executor, steps) = stepped();
    let interrupts = Arc::new(SignalCounter::default());
    let arena = Arena::new(8 << 20);
    let transport = MmioTransport::new(
        Box::new(device),
        arena.guest_memory().clone(),
        Box::new(executor),
        interrupts.clone(),
    );
    let wire = Wire::new(transport.unwrap());
    let (mut block, mut queue) = Block::open(
        GuestTransport::new(wire.clone()).unwrap(),
        arena.space(),
        BlockOptions::default(),
    )
    .unwrap();
    let data = pattern(7, 512);
    let op = BlockOp::Write { sector: 40 };
    let refused = queue.submit(op, Some(data.clone()), 1).unwrap_err();
    assert_ne!(refused.reason, Reason::Full, "beyond the end");

    // The same size again, and a size that cannot be read, announce nothing.
    let before = interrupts.count();
    assert_eq!(resizer.refresh(), Ok(32));
    medium.store(0, Ordering::Release);
    assert_eq!(resizer.refresh(), Err(DiskError::Host(5)));
    assert_eq!(interrupts.count(), before);

    medium.store(64, Ordering::Release);
    assert_eq!(resizer.refresh(), Ok(64));
    assert_eq!(interrupts.count(), before + 1);
    block.refresh(&mut queue).unwrap();
    queue.submit(op, Some(data.clone()), 2).unwrap();
    queue.publish();
    steps.run();
    let done = queue.complete().unwrap().expect("a completion");
    assert_eq!((done.tag, done.result), (2, Ok(())));
    let read = BlockOp::Read { sector: 40 };
    queue.submit(read, Some(vec![0; 512]), 3).unwrap();
    queue.publish();
    steps.run();
    let done = queue.complete().unwrap().expect("a completion");
    assert_eq!(done.buffer, Some(data));
    block.close(queue, &mut |_| {}).unwrap();
}
