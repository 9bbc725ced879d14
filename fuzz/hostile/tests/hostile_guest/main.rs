//! A hostile guest against the shipped block device: whatever it writes to
//! memory or registers, the device neither panics nor hangs nor touches memory
//! that the guest did not name; it reports the fault, asks for a reset, works
//! again after it, and other devices never notice.

mod chains;
mod draining;
mod lanes;
mod memory;
mod packed;
mod queue_resets;
mod ranges;
mod registers;
mod requests;
mod resets;
mod rings;
mod threads;

use pvkit_host::virtio::block::BlockOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::{Guest, HIGH, LOW, Machine};
use pvkit_join::Kind;
use pvkit_join::disk::RecordingDisk;
use pvkit_protocol::virtio::DeviceStatus;
use pvkit_protocol::virtio::mmio::InterruptStatus;
use std::sync::Arc;

/// The transport of this test program: the one whose name ends in `_pci` is
/// the same over virtio-pci.
const KIND: Kind = Kind::of_program(env!("CARGO_CRATE_NAME"));

/// Sectors of the disks.
const SECTORS: u64 = 64;

/// A hostile guest, and an honest one whose device shares the memory.
struct Scene {
    machine: Machine,
    guest: Guest,
    disk: RecordingDisk,
    other: Guest,
}

fn options() -> BlockOptions {
    BlockOptions {
        queue_size: 8,
        ..BlockOptions::default()
    }
}

impl Scene {
    /// Two devices at power-on.
    fn cold(options: BlockOptions) -> Self {
        let machine = Machine::new(KIND);
        let disk = RecordingDisk::new(SECTORS);
        let guest = machine.guest(Arc::new(disk.clone()), options.clone(), LOW.start);
        let mut other = machine.guest(
            Arc::new(RecordingDisk::new(SECTORS)),
            BlockOptions::default(),
            HIGH.start,
        );
        other.boot();
        assert!(other.works(2));
        Self {
            machine,
            guest,
            disk,
            other,
        }
    }

    /// Two devices that have served a request each.
    fn new() -> Self {
        let mut scene = Self::cold(options());
        scene.guest.boot();
        assert!(scene.guest.works(1));
        scene
    }

    /// The queue is retired: the device asks for a reset and an interrupt says
    /// so; it does nothing more, whatever the guest does; the other device
    /// works. After a reset, this one does too.
    fn assert_broken_until_reset(&mut self, name: &str) {
        let guest = &mut self.guest;
        assert_eq!(
            guest.status(),
            DeviceStatus::all_of_a_driver() | DeviceStatus::DEVICE_NEEDS_RESET,
            "{name}"
        );
        assert!(
            guest
                .interrupt_status()
                .contains(InterruptStatus::CONFIG_CHANGE),
            "{name}"
        );
        assert!(guest.interrupts.count() > 0, "{name}");

        // Whatever lies in the ring, nothing is done any more.
        let before = guest.remember();
        guest.kick();
        for _ in 0..3 {
            let served = guest.serve();
            assert_eq!(served.fault, None, "{name}: reported once");
        }
        assert_eq!(guest.changed(&before, &[]), [0; 0], "{name}: retired");

        assert!(self.other.works(5), "{name}: the other device");
        assert!(self.guest.reset(), "{name}: the reset finishes");
        assert!(self.guest.interrupt_status().is_empty(), "{name}");
        self.guest.layout = pvkit_hostile::guest::Layout::at(LOW.start);
        self.guest.size = 8;
        self.guest.boot();
        assert!(self.guest.works(3), "{name}: the device works again");
    }
}

/// Plays `script` on a queue that works, and expects the device to break with
/// `fault`, having written nothing but (perhaps) its used ring.
fn attack(name: &str, fault: Fault, script: impl FnOnce(&mut Guest)) {
    let mut scene = Scene::new();
    let guest = &mut scene.guest;
    script(guest);
    let before = guest.remember();
    guest.kick();
    let served = guest.serve();
    assert_eq!(served.fault, Some(fault), "{name}");
    assert!(served.polls <= 3, "{name}: {} polls", served.polls);
    let used_ring = guest.used_ring();
    assert_eq!(guest.changed(&before, &[used_ring]), [0; 0], "{name}");
    assert_eq!(guest.used(), [], "{name}: nothing was answered");
    scene.assert_broken_until_reset(name);
}

/// The status of a driver that is ready.
trait Ready {
    fn all_of_a_driver() -> Self;
}

impl Ready for DeviceStatus {
    fn all_of_a_driver() -> Self {
        Self::ACKNOWLEDGE | Self::DRIVER | Self::FEATURES_OK | Self::DRIVER_OK
    }
}

#[test]
fn the_right_way_works_for_thousands_of_requests() {
    let mut scene = Scene::new();
    for round in 0..3_000 {
        assert!(scene.guest.works(round % SECTORS), "round {round}");
    }
    assert!(
        !scene
            .guest
            .status()
            .contains(DeviceStatus::DEVICE_NEEDS_RESET)
    );
}
