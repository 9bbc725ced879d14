//! Resets at the worst moment.

use super::{Ready, Scene, options};
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::{Guest, LOW, Layout, readable, writable};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::DeviceStatus;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::RequestType;
use pvkit_protocol::virtio::mmio;

/// Four reads that the disk holds.
fn hold_four(scene: &mut Scene) {
    scene.disk.allow(0);
    let guest = &mut scene.guest;
    for index in 0..4u16 {
        let sector = u64::from(index);
        let header = guest.set_header(sector, RequestType::IN, sector);
        let data = guest.layout.data + 0x400 * sector;
        guest.poke(data, &[0xee; 0x400]);
        guest.post_at(2 * index, &[readable(header, 16), writable(data, 513)]);
    }
    guest.kick();
    assert_eq!(guest.serve().fault, None);
    assert_eq!(guest.used(), []);
}

fn data_arrived(guest: &Guest) -> usize {
    let arrived = |sector: &u64| {
        let data = guest.layout.data + 0x400 * sector;
        guest.peek(data, 512) == pattern(*sector, 512)
    };
    (0..4).filter(arrived).count()
}

#[test]
fn a_reset_waits_until_the_disk_has_let_go() {
    let mut scene = Scene::new();
    hold_four(&mut scene);
    let guest = &mut scene.guest;
    let running = guest.status();
    guest.set_status(DeviceStatus::empty());
    for finished in 1..=4 {
        for _ in 0..50 {
            assert_eq!(guest.status(), running, "still busy: {finished} to finish");
        }
        assert_eq!(data_arrived(guest), finished - 1);
        scene.disk.allow(1);
    }
    assert!(guest.status().is_empty());
    assert_eq!(data_arrived(guest), 4, "before the status read 0");

    // From now on, the memory is the guest's alone.
    let before = guest.remember();
    scene.disk.allow(100);
    let steps = guest.steps();
    for _ in 0..10 {
        guest.kick();
        steps.poll(64);
        steps.run();
    }
    assert_eq!(guest.changed(&before, &[]), [0; 0]);
    guest.boot();
    assert!(guest.works(9));
}

#[test]
fn resets_during_a_reset_change_nothing() {
    let mut scene = Scene::new();
    hold_four(&mut scene);
    let guest = &mut scene.guest;
    for _ in 0..20 {
        guest.set_status(DeviceStatus::empty());
        guest.set_register(mmio::STATUS, 0x100);
    }
    assert!(!guest.status().is_empty());
    scene.disk.allow(100);
    assert!(guest.reset_finishes());
    assert_eq!(data_arrived(guest), 4);
    guest.boot();
    assert!(guest.works(9));
}

#[test]
fn nothing_that_is_written_during_a_reset_survives_it() {
    let mut scene = Scene::new();
    hold_four(&mut scene);
    let guest = &mut scene.guest;
    guest.set_status(DeviceStatus::empty());

    // A driver that does not wait, and sets up the device again.
    let all = DeviceStatus::all_of_a_driver();
    assert!(!guest.reset_is_over());
    guest.set_register(mmio::DRIVER_FEATURES_SEL, 1);
    guest.set_register(mmio::DRIVER_FEATURES, Features::VERSION_1.window(1));
    guest
        .place(Layout::at(LOW.start + 0x20000))
        .set_register(mmio::QUEUE_SIZE, 4)
        .set_register(mmio::QUEUE_READY, 1)
        .set_status(all)
        .set_status(all | DeviceStatus::FAILED)
        .kick();
    assert!(!guest.reset_is_over());
    scene.disk.allow(100);
    assert!(guest.reset_finishes());
    assert_eq!(guest.register(mmio::QUEUE_READY), 0);
    assert_eq!(guest.wire.device().driver_features(), Features::empty());
    let before = guest.remember();
    assert_eq!(guest.serve().polls, 1);
    assert_eq!(guest.changed(&before, &[]), [0; 0]);
    guest.boot();
    assert!(guest.works(9));
}

trait IsOver {
    fn reset_is_over(&self) -> bool;
}

impl IsOver for Guest {
    fn reset_is_over(&self) -> bool {
        self.status().is_empty()
    }
}

#[test]
fn new_requests_during_a_reset_are_not_fetched() {
    let mut scene = Scene::new();
    hold_four(&mut scene);
    let guest = &mut scene.guest;
    guest.set_status(DeviceStatus::empty());
    // The rings break, too: nobody looks any more.
    guest.set_index(0x4000);
    guest.kick();
    assert!(!guest.reset_is_over());
    scene.disk.allow(100);
    assert!(guest.reset_finishes());
    assert_eq!(scene.disk.ops.lock().unwrap().len(), 1 + 4);
    guest.boot();
    assert!(guest.works(9));
}

#[test]
fn a_reset_of_a_broken_queue_waits_for_the_disk_too() {
    let mut scene = Scene::new();
    hold_four(&mut scene);
    let guest = &mut scene.guest;
    guest.set_index(0x4000);
    assert!(matches!(guest.serve().fault, Some(Fault::IndexJump { .. })));
    guest.set_status(DeviceStatus::empty());
    for _ in 0..50 {
        let status = guest.status();
        assert!(status.contains(DeviceStatus::DEVICE_NEEDS_RESET));
    }
    assert_eq!(data_arrived(guest), 0);
    scene.disk.allow(100);
    assert!(guest.reset_finishes());
    assert_eq!(data_arrived(guest), 4);
    let before = guest.remember();
    guest.serve();
    assert_eq!(guest.changed(&before, &[]), [0; 0]);
    guest.boot();
    assert!(guest.works(9));
}

#[test]
fn a_reset_with_a_request_that_the_disk_has_no_room_for() {
    let mut scene = Scene::cold(options());
    let mut disk = scene.disk.clone();
    disk.depth = 2;
    scene.guest = scene
        .machine
        .guest(std::sync::Arc::new(disk), options(), LOW.start);
    scene.guest.boot();
    hold_four(&mut scene);
    let guest = &mut scene.guest;
    guest.set_status(DeviceStatus::empty());
    assert!(!guest.reset_is_over());
    for _ in 0..3 {
        assert!(!guest.reset_is_over());
        scene.disk.allow(1);
    }
    assert!(guest.reset_finishes());
    // Two that were held and one that was fetched; the fourth never was.
    assert_eq!(data_arrived(guest), 3);
}

#[test]
fn a_reset_of_a_device_that_does_nothing() {
    let mut scene = Scene::cold(options());
    let guest = &mut scene.guest;
    assert!(guest.reset(), "at power-on");
    assert!(guest.reset(), "twice");
    guest.set_status(DeviceStatus::ACKNOWLEDGE);
    assert!(guest.reset());
    let features = guest.split_ring_features();
    assert!(guest.negotiate(features));
    guest.set_up_queue();
    assert!(guest.reset(), "before DRIVER_OK");
    assert_eq!(guest.register(mmio::QUEUE_READY), 0);
    guest.boot();
    assert!(guest.works(1));
}

#[test]
fn a_thousand_lives() {
    let mut scene = Scene::new();
    let features = scene.guest.split_ring_features();
    for life in 0..1_000u64 {
        let guest = &mut scene.guest;
        assert!(guest.reset());
        // A different device each time, as far as rings are concerned.
        let mut features = features;
        features.set(Features::EVENT_IDX, life & 1 == 0);
        features.set(Features::INDIRECT_DESC, life & 2 == 0);
        guest.size = 1 << (life % 3 + 1);
        guest.layout = Layout::at(LOW.start + 0x100 * (life % 7));
        if guest.size == 2 {
            guest.size = 4;
        }
        guest.boot_with(features);
        assert!(guest.works(life % 64), "life {life}");
        if life % 5 == 0 {
            guest.set_index(0x7000);
            assert!(guest.serve().fault.is_some());
        }
    }
    assert!(scene.other.works(1));
}
