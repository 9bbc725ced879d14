//! Packed rings (virtio 1.3 §2.8), with and without IN_ORDER, that no driver
//! may lay out.

mod chains;
mod in_flight;
mod model;
mod places;
mod queue;
mod rings;
mod threads;

use super::{Scene, options};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_host::virtio::queue::Fault;
use pvkit_hostile::guest::packed::PackedRing;
use pvkit_hostile::guest::{Guest, readable, writable};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::block::{RequestType, status};
use pvkit_protocol::virtio::split::Descriptor;

/// Sizes to try, most of them no powers of two.
const SIZES: [u16; 5] = [2, 3, 5, 7, 8];

/// A device whose queue of `size` has served a request.
pub(super) fn scene(size: u16, in_order: bool) -> (Scene, PackedRing) {
    let mut scene = Scene::cold(BlockOptions {
        in_order,
        ..options()
    });
    let mut ring = PackedRing::boot(&mut scene.guest, size);
    assert!(ring.works(&mut scene.guest, 1));
    (scene, ring)
}

/// Plays `script` on a queue of each size, with and without IN_ORDER, and
/// expects the device to break with a fault, having written nothing but
/// (perhaps) what it asks the driver.
fn attack(
    name: &str,
    fault: impl Fn(&PackedRing) -> Fault,
    script: impl Fn(&mut Guest, &mut PackedRing),
) {
    for (size, in_order) in SIZES
        .iter()
        .flat_map(|size| [(*size, false), (*size, true)])
    {
        let name = format!("{name}, size {size}, in order {in_order}");
        let (mut scene, mut ring) = scene(size, in_order);
        let guest = &mut scene.guest;
        let fault = fault(&ring);
        script(guest, &mut ring);
        let before = guest.remember();
        guest.kick();
        let served = guest.serve();
        assert_eq!(served.fault, Some(fault), "{name}");
        assert!(served.polls <= 3, "{name}: {} polls", served.polls);
        let event = (guest.layout.used, 4);
        assert_eq!(guest.changed(&before, &[event]), [0; 0], "{name}");
        scene.assert_broken_until_reset(&name);
        assert!(scene.guest.reset());
        let mut ring = PackedRing::boot(&mut scene.guest, size);
        assert!(ring.works(&mut scene.guest, 1), "{name}: packed again");
    }
}

/// The descriptor where the next chain goes.
fn head(ring: &PackedRing) -> u16 {
    (ring.posted % ring.size) as u16
}

/// A read of sector 1, in two descriptors.
fn parts(guest: &mut Guest) -> [Descriptor; 2] {
    let header = guest.set_header(0, RequestType::IN, 1);
    [readable(header, 16), writable(guest.layout.data, 513)]
}

/// As many reads of two descriptors as there is room for, the n-th of sector
/// n, to `0x400 * n` from the data on.
fn fill(guest: &mut Guest, ring: &mut PackedRing, id: impl Fn(u16) -> u16) -> u16 {
    let count = (ring.room() / 2) as u16;
    for n in 0..count {
        let sector = u64::from(n);
        let header = guest.set_header(sector, RequestType::IN, sector);
        let data = guest.layout.data + 0x400 * sector;
        guest.poke(data, &[0xee; 0x400]);
        ring.post(guest, id(n), &[readable(header, 16), writable(data, 513)]);
    }
    count
}

fn assert_filled(guest: &Guest, count: u16) {
    for sector in 0..u64::from(count) {
        let mut expected = pattern(sector, 512);
        expected.push(status::OK);
        let data = guest.layout.data + 0x400 * sector;
        assert_eq!(guest.peek(data, 513), expected, "sector {sector}");
    }
}
