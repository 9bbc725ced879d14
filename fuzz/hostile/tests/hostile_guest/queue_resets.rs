//! A guest that resets its queue alone (RING_RESET, virtio 1.3 §2.6.1), at the
//! wrong moment or not as it should.

use super::{KIND, Scene, options};
use pvkit_hostile::guest::{Guest, LOW, Layout, readable, writable};
use pvkit_join::Kind;
use pvkit_protocol::virtio::block::RequestType;
use pvkit_protocol::virtio::{DeviceStatus, Features, mmio};

/// A guest that negotiated RING_RESET.
fn booted(scene: &mut Scene) {
    let features = scene.guest.split_ring_features() | Features::RING_RESET;
    scene.guest.boot_with(features);
}

fn reset_queue(guest: &mut Guest) {
    guest.set_register(mmio::QUEUE_RESET, 1);
    let finished = (0..1000).any(|_| guest.register(mmio::QUEUE_RESET) == 0);
    assert!(finished, "the reset does not end");
}

/// One request that the disk keeps.
fn one_in_flight(scene: &mut Scene) {
    scene.disk.allow(0);
    let guest = &mut scene.guest;
    let header = guest.set_header(0, RequestType::IN, 3);
    let data = guest.layout.data;
    guest.post(&[readable(header, 16), writable(data, 513)]);
    guest.kick();
    assert_eq!(guest.serve().fault, None);
    assert_eq!(guest.used(), []);
}

#[test]
fn a_queue_is_reset_and_goes_on_elsewhere() {
    let mut scene = Scene::cold(options());
    booted(&mut scene);
    let guest = &mut scene.guest;
    for round in 0..20u64 {
        assert!(guest.works(round % 8));
        reset_queue(guest);
        assert_eq!(guest.register(mmio::QUEUE_READY), 0);
        assert!(guest.status().contains(DeviceStatus::DRIVER_OK));
        assert_eq!(guest.register(mmio::QUEUE_RESET), 0);
        // Doorbells of a queue that is not there, and a reset of it.
        guest.set_register(mmio::QUEUE_NOTIFY, 0);
        guest.set_register(mmio::QUEUE_RESET, 1);
        assert_eq!(guest.register(mmio::QUEUE_RESET), 0);
        guest.layout = Layout::at(LOW.start + 0x10000 * (1 + round % 3));
        guest.size = 4 << (round % 2);
        guest.set_up_queue();
        assert_eq!(guest.register(mmio::QUEUE_READY), 1);
        assert!(guest.works(round % 8));
    }
    assert!(scene.other.works(1));
}

#[test]
fn a_queue_is_not_reset_when_it_cannot_be() {
    // Without the feature, and before DRIVER_OK.
    let mut scene = Scene::new();
    scene.guest.set_register(mmio::QUEUE_RESET, 1);
    assert!(scene.guest.works(1));
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    let features = guest.split_ring_features() | Features::RING_RESET;
    assert!(guest.negotiate(features));
    guest.set_up_queue();
    guest.set_register(mmio::QUEUE_RESET, 1);
    assert_eq!(guest.register(mmio::QUEUE_READY), 1);
    guest.go();
    assert!(guest.works(1));
    // Other values, and queues that do not exist.
    for value in [0, 2, 3, u32::MAX] {
        guest.set_register(mmio::QUEUE_RESET, value);
        assert!(guest.works(1), "{value}");
    }
    for queue in [1, 7, 0x1_0000, u32::MAX] {
        guest.set_register(mmio::QUEUE_SEL, queue);
        guest.set_register(mmio::QUEUE_RESET, 1);
        assert_eq!(guest.register(mmio::QUEUE_RESET), 0);
        guest.set_register(mmio::QUEUE_READY, 1);
    }
    guest.set_register(mmio::QUEUE_SEL, 0);
    assert!(guest.works(1));
}

#[test]
fn a_queue_that_the_disk_holds_back_is_reset_when_the_disk_is_done() {
    let mut scene = Scene::cold(options());
    booted(&mut scene);
    one_in_flight(&mut scene);
    let guest = &mut scene.guest;
    guest.set_register(mmio::QUEUE_RESET, 1);
    for _ in 0..10 {
        assert_eq!(guest.register(mmio::QUEUE_RESET), 1);
        // Nothing can be set up meanwhile.
        guest.set_register(mmio::QUEUE_READY, 1);
        guest.set_register(mmio::QUEUE_SIZE, 2);
    }
    scene.disk.allow(1);
    let finished = (0..1000).any(|_| guest.register(mmio::QUEUE_RESET) == 0);
    assert!(finished);
    guest.set_up_queue();
    scene.disk.allow(usize::MAX);
    assert!(guest.works(1));
}

#[test]
fn a_device_reset_in_the_middle_of_a_queue_s_reset_wins() {
    let mut scene = Scene::cold(options());
    booted(&mut scene);
    one_in_flight(&mut scene);
    scene.guest.set_register(mmio::QUEUE_RESET, 1);
    scene.guest.set_status(DeviceStatus::empty());
    assert!(!scene.guest.status().is_empty(), "the disk has a request");
    scene.guest.set_register(mmio::QUEUE_RESET, 1);
    scene.disk.allow(usize::MAX);
    assert!(scene.guest.reset_finishes());
    assert_eq!(scene.guest.register(mmio::QUEUE_RESET), 0);
    booted(&mut scene);
    assert!(scene.guest.works(1));
    assert!(scene.other.works(1));
}

#[test]
fn a_queue_that_broke_is_reset_but_the_device_still_asks_for_more() {
    let mut scene = Scene::cold(options());
    booted(&mut scene);
    let guest = &mut scene.guest;
    // An index that jumps.
    guest.set_index(guest.offered.wrapping_add(1000));
    assert!(guest.serve().fault.is_some());
    assert!(guest.status().contains(DeviceStatus::DEVICE_NEEDS_RESET));
    reset_queue(guest);
    guest.set_up_queue();
    assert!(guest.works(2), "a new life of the queue");
    assert!(guest.status().contains(DeviceStatus::DEVICE_NEEDS_RESET));
    assert!(guest.reset());
    guest.boot();
    assert!(guest.works(2));
}

#[test]
fn virtio_mmio_lets_a_queue_be_disabled_at_any_time() {
    if KIND != Kind::Mmio {
        return;
    }
    // Without any feature for it (§4.2.2.2): the driver writes 0, and reads
    // until it is 0.
    let mut scene = Scene::new();
    one_in_flight(&mut scene);
    let guest = &mut scene.guest;
    guest.set_register(mmio::QUEUE_READY, 0);
    for _ in 0..10 {
        assert_eq!(
            guest.register(mmio::QUEUE_READY),
            1,
            "the disk has a request"
        );
    }
    scene.disk.allow(usize::MAX);
    let stopped = (0..1000).any(|_| guest.register(mmio::QUEUE_READY) == 0);
    assert!(stopped);
    let before = guest.remember();
    guest.kick();
    guest.set_register(mmio::QUEUE_READY, 0);
    guest.serve();
    assert_eq!(guest.changed(&before, &[]), [0; 0], "no queue, no work");
    guest.layout = Layout::at(LOW.start + 0x10000);
    guest.set_up_queue();
    assert!(guest.works(2));
    assert!(guest.status().contains(DeviceStatus::DRIVER_OK));
    assert!(scene.other.works(1));
}
