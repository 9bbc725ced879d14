//! The device against a model of a driver, written from the specification
//! (virtio 1.3 §2.7.9, §2.8): random chains with random names on rings of odd
//! sizes, a disk that finishes in any order, and events of which each has to
//! interrupt, or not.

use super::super::{SECTORS, Scene, options};
use pvkit_host::virtio::block::BlockOptions;
use pvkit_host::worker::Progress;
use pvkit_hostile::Noise;
use pvkit_hostile::guest::packed::PackedRing;
use pvkit_hostile::guest::{LOW, indirect, readable, writable};
use pvkit_join::disk::pattern;
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{RequestType, status};

/// Asks for everything, for nothing, or for a place.
#[derive(Debug, Clone, Copy)]
enum Asked {
    Always,
    Never,
    At(u32),
}

/// A request that the device has: where its memory is, and what should come.
#[derive(Debug, Clone, Copy)]
struct Sent {
    id: u16,
    place: u64,
    /// `None`: beyond the end of the disk.
    sector: Option<u64>,
    bytes: u32,
}

struct Model {
    name: String,
    noise: Noise,
    scene: Scene,
    ring: PackedRing,
    event_idx: bool,
    indirect: bool,
    /// In the order in which they were made available.
    sent: Vec<Sent>,
    /// Places for data that are free.
    places: Vec<u64>,
    asked: Asked,
    interrupts: u64,
    answers: usize,
    /// Answers that stood for more than one chain.
    batches: usize,
}

/// Chains that are in flight at most.
const PLACES: u64 = 40;
/// Bytes of a chain's data and status.
const PLACE: u64 = 0x600;

impl Model {
    fn new(seed: u64) -> Self {
        let mut noise = Noise::new(seed);
        let size = 1 + noise.below(40) as u16;
        let mut scene = Scene::cold(BlockOptions {
            queue_size: 64,
            in_order: true,
            ..options()
        });
        let guest = &mut scene.guest;
        let mut features = guest.offered_features();
        for feature in [
            Features::IN_ORDER,
            Features::EVENT_IDX,
            Features::INDIRECT_DESC,
        ] {
            features.set(feature, noise.below(2) == 0);
        }
        // A request of one descriptor is a table.
        if size == 1 {
            features |= Features::INDIRECT_DESC;
        }
        let ring = PackedRing::boot_with(guest, size, features);
        scene.disk.allow(0);
        let data = LOW.start + 0x1_0000;
        let interrupts = scene.guest.interrupts.count();
        Self {
            name: format!("seed {seed}, size {size}, {features:?}"),
            noise,
            ring,
            scene,
            event_idx: features.contains(Features::EVENT_IDX),
            indirect: features.contains(Features::INDIRECT_DESC),
            sent: Vec::new(),
            places: (0..PLACES).map(|n| data + PLACE * n).collect(),
            asked: Asked::Always,
            interrupts,
            answers: 0,
            batches: 0,
        }
    }

    /// A read of one or two sectors, in pieces of any length, sometimes beyond
    /// the end of the disk.
    fn post(&mut self) {
        let Some(place) = self.places.pop() else {
            return;
        };
        let noise = &mut self.noise;
        let bytes = 512 * (1 + noise.below(2) as u32);
        let (sector, found) = match noise.below(6) {
            0 => (SECTORS, None),
            _ => {
                let sector = noise.below(SECTORS - 1);
                (sector, Some(sector))
            }
        };
        let guest = &mut self.scene.guest;
        let index = (place - LOW.start - 0x1_0000) / PLACE;
        let header = guest.set_header(index, RequestType::IN, sector);
        guest.poke(place, &vec![0xee; bytes as usize + 1]);
        // Cut anywhere: data and status are one range.
        let mut parts = Vec::new();
        let cut = noise.below(17) as u32;
        if cut > 0 {
            parts.push(readable(header, cut));
        }
        if cut < 16 {
            parts.push(readable(header + u64::from(cut), 16 - cut));
        }
        let mut from = 0;
        for _ in 0..noise.below(4) {
            let len = noise.below(u64::from(bytes - from) + 1) as u32;
            if len > 0 {
                parts.push(writable(place + u64::from(from), len));
                from += len;
            }
        }
        parts.push(writable(place + u64::from(from), bytes + 1 - from));
        if self.indirect && noise.below(2) == 0 {
            // Eight entries at most; two pages hold tables for 64 chains.
            let table = LOW.start + 0x2_8000 + 0x80 * index;
            PackedRing::set_table(guest, table, &parts);
            parts = vec![indirect(table, 16 * parts.len() as u32)];
        }
        // Names are the driver's own affair, but no two alike are in flight.
        let mut id = noise.next_u64() as u16;
        while self.sent.iter().any(|sent| sent.id == id) {
            id = id.wrapping_add(1);
        }
        if parts.len() as u32 > self.ring.room() {
            self.places.push(place);
            return;
        }
        self.ring.post(guest, id, &parts);
        let sector = found;
        self.sent.push(Sent {
            id,
            place,
            sector,
            bytes,
        });
    }

    fn ask(&mut self) {
        let at = self.ring.looked;
        let (bits, asked) = match self.noise.below(4) {
            0 => (0, Asked::Always),
            1 => (1 << 16, Asked::Never),
            _ if !self.event_idx => (0, Asked::Always),
            more => {
                let size = u64::from(self.ring.size);
                let later = if more == 2 { 0 } else { self.noise.below(size) };
                let place = self.ring.off_wrap(at + later as u32);
                (2 << 16 | place, Asked::At(place))
            }
        };
        PackedRing::ask(&mut self.scene.guest, bits);
        self.asked = asked;
    }

    /// The disk may finish some, the device polls, and the driver looks.
    fn poll(&mut self) {
        let allowed = self.noise.below(4) as usize;
        self.scene.disk.allow(allowed);
        let guest = &mut self.scene.guest;
        for progress in guest.steps().poll(1 + self.noise.below(20) as u32) {
            assert!(
                matches!(progress, Progress::More | Progress::Drained),
                "{}: {progress:?}",
                self.name
            );
        }
        let old = self.ring.looked;
        let used = self.ring.used(guest);
        let new = self.ring.looked;
        let wanted = match self.asked {
            _ if new == old => false,
            Asked::Always => true,
            Asked::Never => false,
            Asked::At(place) => (old..new).any(|count| self.ring.off_wrap(count) == place),
        };
        self.interrupts += u64::from(wanted);
        assert_eq!(
            guest.interrupts.count(),
            self.interrupts,
            "{}: {:?}",
            self.name,
            self.asked
        );
        for used in used {
            let named = self.sent.iter().position(|sent| sent.id == used.id);
            let named = named.expect("the ring knows it");
            let first = named + 1 - used.chains;
            assert!(first == 0 || !self.ring.in_order, "the oldest first");
            for (place, sent) in (first..).zip(self.sent.drain(first..=named)) {
                let Sent {
                    place: data, bytes, ..
                } = sent;
                let mut expected = vec![0xee; bytes as usize];
                let mut result = status::IOERR;
                if let Some(sector) = sent.sector {
                    expected = pattern(sector, bytes as usize);
                    result = status::OK;
                } else {
                    assert_eq!(place, named, "{}: a failed one is named", self.name);
                }
                expected.push(result);
                let found = guest.peek(data, bytes as usize + 1);
                assert!(found == expected, "{}: {sent:?}", self.name);
                if place == named {
                    let len = if sent.sector.is_some() { bytes + 1 } else { 1 };
                    assert_eq!((used.len, used.write), (len, true), "{}", self.name);
                }
                self.places.push(data);
            }
            self.answers += used.chains;
            self.batches += usize::from(used.chains > 1);
        }
    }

    /// The device is about to sleep: what it asks for is where the next chain
    /// will be, unless there is one already.
    fn arm(&mut self) {
        let guest = &mut self.scene.guest;
        if guest.steps().arm() {
            return;
        }
        let expected = if self.event_idx {
            2 << 16 | self.ring.off_wrap(self.ring.posted)
        } else {
            0
        };
        assert_eq!(PackedRing::asked(guest), expected, "{}", self.name);
    }
}

#[test]
fn packed_rings_against_a_model() {
    let (mut answers, mut batches, mut interrupts) = (0, 0, 0);
    for seed in 0..200 {
        let mut model = Model::new(seed);
        for _ in 0..1_200 {
            match model.noise.below(16) {
                0..8 => model.post(),
                8..14 => model.poll(),
                14 => model.ask(),
                _ => model.arm(),
            }
        }
        let mut patience = 0..1_000;
        while !model.sent.is_empty() {
            assert!(patience.next().is_some(), "{}", model.name);
            model.poll();
        }
        model.poll();
        model.arm();
        assert_eq!(model.ring.room(), model.ring.size, "{}", model.name);
        assert!(model.answers > 0, "{}: {}", model.name, model.answers);
        answers += model.answers;
        batches += model.batches;
        interrupts += model.interrupts;
        assert!(model.scene.other.works(seed % SECTORS));
    }
    assert!(
        answers > 40_000 && batches > 3_000 && interrupts > 10_000,
        "{answers}, {batches}, {interrupts}"
    );
}
