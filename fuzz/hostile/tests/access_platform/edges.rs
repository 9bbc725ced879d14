//! A guest without a driver, whose descriptors name the edges of windows.

use super::{DeviceOptions, KINDS, PAGE, RecordingDisk, SECTORS, pattern};
use pvkit_host::memory::{GuestMemory, Iommu, IovaWindow, Snapshot};
use pvkit_host::virtio::queue::{Fault, Queue, QueueAddresses};
use pvkit_hostile::guest::{
    Guest, HIGH, LOW, Layout, Machine, indirect, linked, readable, writable,
};
use pvkit_join::Kind;
use pvkit_protocol::virtio::block::{RequestType, status};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// A window that the device may write, with one behind it that it may not.
const DATA: u64 = 0x9_0000_0000;
const READ_ONLY: u64 = DATA + PAGE;
/// A window that ends where addresses end.
const TOP: u64 = u64::MAX - PAGE + 1;
/// Bytes of the window of the rings.
const RINGS: u64 = 0x1_8000;

struct Scene {
    machine: Machine,
    guest: Guest,
    /// Guest memory as it is.
    all: Arc<Snapshot>,
}

impl Scene {
    fn new(kind: Kind) -> Self {
        let ranges = [LOW, HIGH].map(|range| {
            let len = range.end - range.start;
            (GuestAddress(range.start), len as usize)
        });
        let map = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let memory = GuestMemory::new(Arc::new(map)).unwrap();
        let iommu = Iommu::new(&memory);
        let window = |iova, addr, len, writable| IovaWindow {
            iova,
            addr,
            len,
            writable,
        };
        let windows = [
            window(LOW.start, LOW.start + 0x8000, RINGS, true),
            window(DATA, HIGH.start, PAGE, true),
            window(READ_ONLY, HIGH.start + PAGE, PAGE, false),
            window(TOP, HIGH.start + 4 * PAGE, PAGE, true),
        ];
        iommu.map_all(&windows).unwrap();
        let machine = Machine::over(kind, iommu.memory().clone());
        let options = DeviceOptions {
            queue_size: 8,
            ..DeviceOptions::default()
        };
        let disk = Arc::new(RecordingDisk::new(SECTORS));
        let mut guest = machine.guest(disk, options, LOW.start);
        guest.boot();
        assert!(guest.works(1));
        let all = memory.snapshot();
        let high = vec![0xc3; (HIGH.end - HIGH.start) as usize];
        all.write(HIGH.start, &high).unwrap();
        Self {
            machine,
            guest,
            all,
        }
    }

    /// What lies in the windows behind the rings, and beside them.
    fn high(&self) -> Vec<u8> {
        let mut bytes = vec![0; (HIGH.end - HIGH.start) as usize];
        self.all.read(HIGH.start, &mut bytes).unwrap();
        bytes
    }

    /// Posts a request for 512 bytes at `data`, with its status at `status`.
    fn post(&mut self, kind: RequestType, data: u64, status: u64) -> Option<Fault> {
        let guest = &mut self.guest;
        let header = guest.set_header(0, kind, 5);
        let data = match kind {
            RequestType::OUT => readable(data, 512),
            _ => writable(data, 512),
        };
        guest.post(&[readable(header, 16), data, writable(status, 1)]);
        guest.kick();
        guest.serve().fault
    }

    /// The device has broken; after a reset it works again.
    fn assert_recovers(&mut self) {
        let guest = &mut self.guest;
        assert!(guest.status().contains(DeviceStatus::DEVICE_NEEDS_RESET));
        assert!(guest.reset());
        guest.layout = Layout::at(LOW.start);
        guest.boot();
        assert!(guest.works(2));
    }
}

#[test]
fn data_at_the_edges() {
    use RequestType as R;
    let address = |addr| {
        Some(Fault::Address {
            head: 0,
            addr,
            len: 512,
        })
    };
    for kind in KINDS {
        let mut scene = Scene::new(kind);
        for (request, addr, reached) in [
            (R::IN, DATA, true),
            (R::IN, DATA + 0xe00, true),
            (R::IN, TOP, true),
            (R::IN, u64::MAX - 511, true),
            (R::OUT, DATA, true),
            // Across two windows, of which the second is not writable.
            (R::OUT, DATA + 0xe01, true),
            (R::OUT, READ_ONLY + 0xe00, true),
            (R::OUT, u64::MAX - 511, true),
            (R::IN, DATA + 0xe01, false),
            (R::IN, DATA - 1, false),
            (R::IN, DATA - 512, false),
            (R::IN, READ_ONLY, false),
            (R::IN, READ_ONLY + 0xe00, false),
            (R::IN, READ_ONLY + PAGE, false),
            (R::IN, u64::MAX - 510, false),
            (R::IN, u64::MAX, false),
            (R::IN, TOP - 1, false),
            (R::IN, LOW.start + RINGS - 511, false),
            // Where guest memory is for the guest.
            (R::IN, HIGH.start, false),
            (R::IN, LOW.start + RINGS, false),
            (R::IN, 0, false),
            (R::OUT, DATA - 1, false),
            (R::OUT, READ_ONLY + 0xe01, false),
            (R::OUT, u64::MAX - 510, false),
            (R::OUT, HIGH.start, false),
        ] {
            let name = format!("{request:?} at {addr:#x}");
            let before = scene.high();
            let status_at = scene.guest.layout.status;
            let fault = scene.post(request, addr, status_at);
            if !reached {
                assert_eq!(fault, address(addr), "{name}");
                assert!(scene.high() == before, "{name}: nothing is written");
                scene.assert_recovers();
                continue;
            }
            assert_eq!(fault, None, "{name}");
            assert_eq!(scene.guest.peek(status_at, 1), [status::OK], "{name}");
            assert_eq!(scene.guest.used().len(), 1);
            if request == R::OUT {
                assert!(scene.high() == before, "{name}: nothing is written");
            } else {
                let data = scene.guest.peek(addr, 512);
                assert_eq!(data, pattern(5, 512), "{name}");
                let after = scene.high();
                let changed = after.iter().zip(&before).filter(|(new, old)| new != old);
                assert!(changed.count() <= 512, "{name}");
            }
        }
    }
}

#[test]
fn status_headers_and_tables_at_the_edges() {
    for kind in KINDS {
        let mut scene = Scene::new(kind);
        for at in [DATA, READ_ONLY - 1, u64::MAX] {
            assert_eq!(scene.post(RequestType::FLUSH, DATA + 16, at), None);
            assert_eq!(scene.guest.peek(at, 1), [status::OK]);
            assert_eq!(scene.guest.used().len(), 1);
        }
        for at in [
            DATA - 1,
            READ_ONLY,
            READ_ONLY + PAGE - 1,
            READ_ONLY + PAGE,
            TOP - 1,
        ] {
            let before = scene.high();
            let fault = Fault::Address {
                head: 0,
                addr: at,
                len: 1,
            };
            assert_eq!(scene.post(RequestType::IN, DATA, at), Some(fault));
            assert!(scene.high() == before);
            scene.assert_recovers();
        }
        // A header is only read, so it may lie across both windows.
        let header = scene.guest.set_header(0, RequestType::FLUSH, 0);
        let bytes = scene.guest.peek(header, 16);
        let status_at = scene.guest.layout.status;
        for (at, reached) in [
            (READ_ONLY - 8, true),
            (READ_ONLY + PAGE - 16, true),
            (READ_ONLY + PAGE - 15, false),
            (DATA - 8, false),
        ] {
            // As the guest sees it, one page after the other.
            if at >= DATA {
                let len = bytes.len().min((READ_ONLY + PAGE - at) as usize);
                let addr = HIGH.start + (at - DATA);
                scene.all.write(addr, &bytes[..len]).unwrap();
            }
            let parts = [readable(at, 16), writable(status_at, 1)];
            let fault = scene.guest.post(&parts).serve().fault;
            if reached {
                assert_eq!(fault, None);
                assert_eq!(scene.guest.used().len(), 1);
            } else {
                let (head, addr, len) = (0, at, 16);
                assert_eq!(fault, Some(Fault::Address { head, addr, len }));
                scene.assert_recovers();
            }
        }
        // So is a table.
        let header = scene.guest.set_header(0, RequestType::FLUSH, 0);
        let parts = linked(0, &[readable(header, 16), writable(status_at, 1)]);
        let table = scene.guest.layout.table;
        scene.guest.set_table(table, &parts);
        let bytes = scene.guest.peek(table, 32);
        scene.all.write(HIGH.start + 2 * PAGE - 32, &bytes).unwrap();
        let at = READ_ONLY + PAGE - 32;
        assert_eq!(scene.guest.post(&[indirect(at, 32)]).serve().fault, None);
        assert_eq!(scene.guest.used().len(), 1);
        let fault = scene.guest.post(&[indirect(at + 16, 32)]).serve().fault;
        let (head, addr) = (0, at + 16);
        assert_eq!(fault, Some(Fault::IndirectAddr { head, addr }));
        scene.assert_recovers();
    }
}

#[test]
fn rings_at_the_edges() {
    for kind in KINDS {
        let mut scene = Scene::new(kind);
        let good = Layout::at(LOW.start);
        let end = LOW.start + RINGS;
        for (layout, starts) in [
            (
                Layout {
                    descriptors: READ_ONLY,
                    ..good
                },
                true,
            ),
            (
                Layout {
                    avail: READ_ONLY + PAGE - 22,
                    ..good
                },
                true,
            ),
            (
                Layout {
                    used: READ_ONLY - 72,
                    ..good
                },
                true,
            ),
            (
                Layout {
                    used: end - 72,
                    ..good
                },
                true,
            ),
            (
                Layout {
                    used: READ_ONLY,
                    ..good
                },
                false,
            ),
            (
                Layout {
                    used: READ_ONLY - 68,
                    ..good
                },
                false,
            ),
            (
                Layout {
                    used: end - 68,
                    ..good
                },
                false,
            ),
            (
                Layout {
                    descriptors: DATA - 16,
                    ..good
                },
                false,
            ),
            (
                Layout {
                    descriptors: READ_ONLY + PAGE - 112,
                    ..good
                },
                false,
            ),
            (
                Layout {
                    avail: READ_ONLY + PAGE - 20,
                    ..good
                },
                false,
            ),
            (
                Layout {
                    used: u64::MAX - 67,
                    ..good
                },
                false,
            ),
            (
                Layout {
                    used: HIGH.start,
                    ..good
                },
                false,
            ),
        ] {
            let guest = &mut scene.guest;
            assert!(guest.reset());
            guest.layout = layout;
            guest.boot();
            let broken = guest.status().contains(DeviceStatus::DEVICE_NEEDS_RESET);
            assert_eq!(broken, !starts, "{layout:x?}");
        }
        assert!(scene.guest.reset());
        scene.guest.layout = good;
        scene.guest.boot();
        assert!(scene.guest.works(3));
    }
}

#[test]
fn a_packed_ring_is_written_where_the_device_writes() {
    let scene = Scene::new(Kind::Mmio);
    let features = Features::VERSION_1 | Features::RING_PACKED | Features::ACCESS_PLATFORM;
    let at = |descriptors, driver, device| QueueAddresses {
        size: 8,
        descriptors,
        driver,
        device,
    };
    let rings = LOW.start;
    for (at, works) in [
        (at(rings, DATA, DATA + 4), true),
        (at(rings, READ_ONLY, DATA), true),
        (
            at(READ_ONLY - 128, READ_ONLY + PAGE - 4, READ_ONLY - 132),
            true,
        ),
        (at(READ_ONLY, DATA, DATA + 4), false),
        (at(READ_ONLY - 112, DATA, DATA + 4), false),
        (at(rings, DATA, READ_ONLY), false),
        (at(rings, READ_ONLY + PAGE, DATA), false),
        (at(rings, DATA - 4, DATA), false),
    ] {
        let queue = Queue::new(scene.machine.memory(), at, features, 16, None);
        assert_eq!(queue.is_ok(), works, "{at:x?}");
    }
}
