//! The receive filter and the receive offloads of a driver (virtio 1.3 §5.1.6.5.1
//! to §5.1.6.5.3, §5.1.6.5.6): written by commands, read for every frame.
#![forbid(unsafe_code)]

use crate::sync::lock;
use pvkit_protocol::frame::{ETHERNET_HEADER_BYTES, MacAddress, Offloads, ethertype};
use pvkit_protocol::virtio::net::{NetFeatures, vlan};
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Maximum length of an address list; a longer one matches every address.
pub(super) const MAX_ADDRESSES: usize = 64;

bitflags::bitflags! {
    /// The receive modes of whole classes of frames.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(super) struct Modes: u8 {
        /// All frames.
        const PROMISC = 1;
        /// All multicast frames.
        const ALLMULTI = 2;
        /// All unicast frames.
        const ALLUNI = 4;
        /// No multicast frames.
        const NOMULTI = 8;
        /// No unicast frames.
        const NOUNI = 16;
        /// No broadcast frames.
        const NOBCAST = 32;
    }
}

/// A list of addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    list: [MacAddress; MAX_ADDRESSES],
    count: usize,
    /// The list was too long: every address matches.
    all: bool,
}

impl Addresses {
    pub(super) const NONE: Self = Self {
        list: [MacAddress([0; 6]); MAX_ADDRESSES],
        count: 0,
        all: false,
    };

    /// The list of every address.
    pub(super) const ALL: Self = Self {
        all: true,
        ..Self::NONE
    };

    /// Adds one.
    pub(super) fn push(&mut self, address: MacAddress) {
        match self.list.get_mut(self.count) {
            Some(entry) => {
                *entry = address;
                self.count += 1;
            }
            None => self.all = true,
        }
    }

    fn as_slice(&self) -> &[MacAddress] {
        self.list.get(..self.count).unwrap_or(&[])
    }

    fn has(&self, address: MacAddress) -> bool {
        self.all || self.as_slice().contains(&address)
    }

    fn save(&self) -> SavedAddresses {
        if self.all {
            SavedAddresses::All
        } else {
            SavedAddresses::List(self.as_slice().iter().map(|address| address.0).collect())
        }
    }
}

/// The VLANs that are received: a bit for each.
type Vlans = [u64; vlan::COUNT as usize / 64];

/// A saved list of addresses.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SavedAddresses {
    All,
    List(Vec<[u8; 6]>),
}

impl SavedAddresses {
    fn open(&self) -> Addresses {
        match self {
            Self::All => Addresses::ALL,
            Self::List(list) => {
                let mut addresses = Addresses::NONE;
                list.iter()
                    .for_each(|address| addresses.push(MacAddress(*address)));
                addresses
            }
        }
    }
}

/// A saved [`Filter`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedFilter {
    mac: [u8; 6],
    modes: u8,
    unicast: SavedAddresses,
    multicast: SavedAddresses,
    vlans: Option<Vec<u64>>,
    receive: u8,
}

/// The frames that a driver wants to receive, and their offloads.
#[derive(Debug, Clone)]
pub(super) struct Filter {
    /// The device's own address.
    pub(super) mac: MacAddress,
    pub(super) modes: Modes,
    /// Unicast addresses.
    pub(super) unicast: Addresses,
    /// Multicast addresses.
    pub(super) multicast: Addresses,
    /// With CTRL_VLAN; frames of all VLANs are received without.
    vlans: Option<Vlans>,
    /// The offloads that received frames may leave to the driver.
    pub(super) receive: Offloads,
}

impl Filter {
    /// The filter before any command. A driver that cannot choose gets every
    /// frame, and so does one that has not chosen yet: it may use an address
    /// that the device does not know.
    pub(super) fn new(mac: MacAddress, features: NetFeatures) -> Self {
        let vlans = features.contains(NetFeatures::CTRL_VLAN);
        Self {
            mac,
            modes: Modes::PROMISC,
            unicast: Addresses::NONE,
            multicast: Addresses::NONE,
            vlans: vlans.then_some([0; _]),
            receive: features.receive_offloads(),
        }
    }

    pub(super) fn save(&self) -> SavedFilter {
        let Self {
            mac,
            modes,
            unicast,
            multicast,
            vlans,
            receive,
        } = self;
        SavedFilter {
            mac: mac.0,
            modes: modes.bits(),
            unicast: unicast.save(),
            multicast: multicast.save(),
            vlans: vlans.map(|vlans| vlans.to_vec()),
            receive: receive.bits(),
        }
    }

    /// The filter that was saved, if a driver with these features can have set
    /// it.
    pub(super) fn open(saved: &SavedFilter, features: NetFeatures) -> Option<Self> {
        let SavedFilter {
            mac,
            modes,
            unicast,
            multicast,
            vlans,
            receive,
        } = saved;
        let mac = MacAddress(*mac);
        let receive = Offloads::from_bits(*receive)?;
        let vlans = match vlans {
            Some(vlans) => Some(<Vlans>::try_from(vlans.as_slice()).ok()?),
            None => None,
        };
        let possible = mac.is_unicast()
            && vlans.is_some() == features.contains(NetFeatures::CTRL_VLAN)
            && features.receive_offloads().contains(receive);
        possible.then_some(Self {
            mac,
            modes: Modes::from_bits(*modes)?,
            unicast: unicast.open(),
            multicast: multicast.open(),
            vlans,
            receive,
        })
    }

    /// Receives frames of a VLAN from now on, or no more; `false` if the number
    /// is out of range.
    pub(super) fn set_vlan(&mut self, number: u16, wanted: bool) -> bool {
        let Some(vlans) = &mut self.vlans else {
            return false;
        };
        let Some(word) = vlans.get_mut(usize::from(number / 64)) else {
            return false;
        };
        let bit = 1 << (number % 64);
        if wanted {
            *word |= bit;
        } else {
            *word &= !bit;
        }
        true
    }

    /// Whether the driver wants this frame, which has an Ethernet header at
    /// least.
    #[inline]
    pub(super) fn wants(&self, frame: &[u8]) -> bool {
        if frame.len() < ETHERNET_HEADER_BYTES {
            return false;
        }
        self.modes.contains(Modes::PROMISC) || self.wants_chosen(frame)
    }

    fn wants_chosen(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk().map(|bytes| MacAddress(*bytes)) else {
            return false;
        };
        self.has_vlan(frame) && self.has_address(to)
    }

    fn has_address(&self, to: MacAddress) -> bool {
        let modes = self.modes;
        if to == MacAddress::BROADCAST {
            !modes.contains(Modes::NOBCAST)
        } else if to.is_multicast() {
            !modes.contains(Modes::NOMULTI)
                && (modes.contains(Modes::ALLMULTI) || self.multicast.has(to))
        } else {
            !modes.contains(Modes::NOUNI)
                && (modes.contains(Modes::ALLUNI) || to == self.mac || self.unicast.has(to))
        }
    }

    fn has_vlan(&self, frame: &[u8]) -> bool {
        let Some(vlans) = &self.vlans else {
            return true;
        };
        let word = |at: usize| {
            let bytes = frame.get(at..)?.first_chunk()?;
            Some(u16::from_be_bytes(*bytes))
        };
        if word(ETHERNET_HEADER_BYTES - 2) != Some(ethertype::VLAN) {
            return true;
        }
        // A tag that is cut off names no VLAN.
        let Some(tag) = word(ETHERNET_HEADER_BYTES) else {
            return false;
        };
        let number = tag % vlan::COUNT;
        // 0 is a priority, and no VLAN (IEEE 802.1Q §9.6).
        let word = vlans.get(usize::from(number / 64)).copied().unwrap_or(0);
        number == 0 || word & (1 << (number % 64)) != 0
    }
}

/// The filter that commands change and all pairs use.
#[derive(Debug)]
pub(super) struct SharedFilter {
    /// A number that changes with the filter; readable without the lock.
    version: AtomicU64,
    current: Mutex<Filter>,
}

impl SharedFilter {
    pub(super) fn new(filter: Filter) -> Self {
        Self {
            version: AtomicU64::new(0),
            current: Mutex::new(filter),
        }
    }

    /// Changes the filter: for every frame that is offered after this.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Filter) -> T) -> T {
        let mut current = lock(&self.current);
        let result = change(&mut current);
        self.version.fetch_add(1, Ordering::Release);
        result
    }

    /// Reads the current filter.
    pub(super) fn read<T>(&self, read: impl FnOnce(&Filter) -> T) -> T {
        read(&lock(&self.current))
    }

    /// A private copy.
    pub(super) fn view(&self) -> View {
        let current = lock(&self.current);
        View {
            version: self.version.load(Ordering::Acquire),
            filter: current.clone(),
        }
    }
}

/// A copy of the filter, for one pair.
#[derive(Debug)]
pub(super) struct View {
    version: u64,
    filter: Filter,
}

impl View {
    /// The current filter; takes no lock unless it changed.
    #[inline]
    pub(super) fn current(&mut self, shared: &SharedFilter) -> &Filter {
        if shared.version.load(Ordering::Acquire) != self.version {
            *self = shared.view();
        }
        &self.filter
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
    const GROUP: MacAddress = MacAddress([3, 0, 0, 0, 0, 1]);

    fn frame(to: MacAddress, vlan: Option<u16>) -> Vec<u8> {
        let mut frame = to.0.to_vec();
        frame.extend(OTHER.0);
        if let Some(tag) = vlan {
            frame.extend([0x81, 0]);
            frame.extend(tag.to_be_bytes());
        }
        frame.extend([8, 0, 1, 2, 3]);
        frame
    }

    /// Which of own, other, group and broadcast are wanted.
    fn wanted(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, MacAddress::BROADCAST].map(|to| filter.wants(&frame(to, None)))
    }

    fn chosen() -> Filter {
        let mut filter = Filter::new(OWN, NetFeatures::all());
        filter.modes = Modes::empty();
        filter
    }

    #[test]
    fn everything_until_the_driver_chooses() {
        let filter = Filter::new(OWN, NetFeatures::all());
        assert_eq!(wanted(&filter), [true; 4]);
        assert!(filter.wants(&frame(OTHER, Some(7))));
        assert!(!filter.wants(&frame(OWN, None)[..13]), "no frame");
    }

    #[test]
    fn modes_and_lists() {
        let mut filter = chosen();
        assert_eq!(wanted(&filter), [true, false, false, true]);
        for (modes, expected) in [
            (Modes::ALLMULTI, [true, false, true, true]),
            (Modes::ALLUNI, [true, true, false, true]),
            (Modes::NOUNI, [false, false, false, true]),
            (Modes::NOUNI | Modes::ALLUNI, [false, false, false, true]),
            (Modes::NOMULTI | Modes::ALLMULTI, [true, false, false, true]),
            (Modes::NOBCAST, [true, false, false, false]),
            (Modes::PROMISC | Modes::NOUNI, [true; 4]),
        ] {
            filter.modes = modes;
            assert_eq!(wanted(&filter), expected, "{modes:?}");
        }
        filter.modes = Modes::empty();
        filter.unicast.push(OTHER);
        assert_eq!(wanted(&filter), [true, true, false, true]);
        filter.multicast.push(GROUP);
        assert_eq!(wanted(&filter), [true; 4]);
    }

    #[test]
    fn a_list_that_is_too_long_means_all() {
        let mut filter = chosen();
        for low in 0..MAX_ADDRESSES as u32 {
            filter.unicast.push(MacAddress::local(low));
        }
        assert_eq!(wanted(&filter), [true, false, false, true]);
        assert!(filter.wants(&frame(MacAddress::local(63), None)));
        filter.unicast.push(MacAddress::local(64));
        assert_eq!(wanted(&filter), [true, true, false, true]);
        filter.multicast = Addresses::ALL;
        assert_eq!(wanted(&filter), [true; 4]);
    }

    #[test]
    fn vlans() {
        let mut filter = chosen();
        let wants = |filter: &Filter, tag| filter.wants(&frame(OWN, Some(tag)));
        assert!(!wants(&filter, 7));
        assert!(wants(&filter, 0) && wants(&filter, 0xe000), "a priority");
        assert!(filter.set_vlan(7, true) && filter.set_vlan(4095, true));
        assert!(wants(&filter, 7) && wants(&filter, 0x2007) && wants(&filter, 0xffff));
        assert!(!wants(&filter, 8) && !filter.wants(&frame(OTHER, Some(7))));
        assert!(filter.set_vlan(7, false));
        assert!(!wants(&filter, 7));
        assert!(!filter.set_vlan(4096, true) && !filter.set_vlan(u16::MAX, true));
        assert!(!filter.wants(&frame(OWN, Some(7))[..15]), "half a tag");
        let mut without = Filter::new(OWN, NetFeatures::empty());
        without.modes = Modes::empty();
        assert!(wants(&without, 7));
        assert!(!without.set_vlan(7, true));
    }

    #[test]
    fn a_view_follows() {
        let shared = SharedFilter::new(chosen());
        let mut view = shared.view();
        assert!(!view.current(&shared).wants(&frame(OTHER, None)));
        shared.change(|filter| filter.modes = Modes::ALLUNI);
        assert!(view.current(&shared).wants(&frame(OTHER, None)));
    }
}
