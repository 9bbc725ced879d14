//! The features, the configuration space, and the state of a network device
//! (virtio 1.3 §5.1.3, §5.1.4).
#![forbid(unsafe_code)]

use super::NetOptions;
use super::filter::{Filter, SavedFilter, SharedFilter};
use crate::link::{Link, LinkEvents, LinkShape};
use crate::virtio::device::ConfigEvents;
use pvkit_protocol::frame::Offloads;
use pvkit_protocol::virtio::net::{
    DUPLEX_FULL, DUPLEX_UNKNOWN, NetConfig, NetFeatures, NetStatus, SPEED_UNKNOWN,
};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Weak};
use zerocopy::IntoBytes;

/// Everything that a device with valid options offers.
pub(super) fn offered(options: &NetOptions) -> NetFeatures {
    let mut features = NetFeatures::MAC
        | NetFeatures::STATUS
        | NetFeatures::MTU
        | NetFeatures::SPEED_DUPLEX
        | NetFeatures::of_transmit_offloads(options.transmit)
        | NetFeatures::of_receive_offloads(options.receive);
    features.set(NetFeatures::MRG_RXBUF, options.mergeable);
    features.set(NetFeatures::MQ, options.pairs > 1);
    if options.control {
        features |= NetFeatures::CTRL_VQ
            | NetFeatures::CTRL_RX
            | NetFeatures::CTRL_RX_EXTRA
            | NetFeatures::CTRL_VLAN
            | NetFeatures::CTRL_MAC_ADDR
            | NetFeatures::GUEST_ANNOUNCE;
        let changeable = features.intersects(NetFeatures::GUEST_OFFLOADS);
        features.set(NetFeatures::CTRL_GUEST_OFFLOADS, changeable);
    }
    features.without_dangling()
}

/// The state that changes while the device works: its link, and what the driver
/// chose.
#[derive(Debug)]
pub(super) struct State {
    pub(super) filter: SharedFilter,
    /// Pairs that the driver uses.
    pairs: AtomicU16,
    up: AtomicBool,
    /// The driver is asked to announce itself (§5.1.6.5.4).
    announce: AtomicBool,
    /// It negotiated that.
    may_announce: AtomicBool,
}

/// A saved [`State`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedNet {
    filter: SavedFilter,
    pub(super) pairs: u16,
    up: bool,
    announce: bool,
}

impl State {
    pub(super) fn new(filter: Filter, up: bool) -> Self {
        Self {
            filter: SharedFilter::new(filter),
            pairs: AtomicU16::new(1),
            up: AtomicBool::new(up),
            announce: AtomicBool::new(false),
            may_announce: AtomicBool::new(false),
        }
    }

    /// The driver has announced itself.
    pub(super) fn announced(&self) {
        self.announce.store(false, Ordering::Release);
    }

    pub(super) fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Relaxed);
    }

    pub(super) fn save(&self) -> SavedNet {
        let Self {
            filter,
            pairs,
            up,
            announce,
            // Follows from the features.
            may_announce: _,
        } = self;
        SavedNet {
            filter: filter.read(Filter::save),
            pairs: pairs.load(Ordering::Relaxed),
            up: up.load(Ordering::Acquire),
            announce: announce.load(Ordering::Acquire),
        }
    }

    /// Takes over what was saved; `None` if a driver with these features cannot
    /// have brought it about. Otherwise the offloads for the link.
    pub(super) fn restore(&self, saved: &SavedNet, features: NetFeatures) -> Option<Offloads> {
        let SavedNet {
            filter,
            pairs,
            up,
            announce,
        } = saved;
        let filter = Filter::open(filter, features)?;
        let receive = filter.receive;
        self.filter.change(|current| *current = filter);
        self.set_pairs(*pairs);
        self.up.store(*up, Ordering::Release);
        let announce = *announce && self.may_announce.load(Ordering::Acquire);
        self.announce.store(announce, Ordering::Release);
        Some(receive)
    }

    /// Asks the driver to announce itself, if it can: it may be reachable by
    /// another way now. Whether it can.
    pub(super) fn request_announcement(&self) -> bool {
        let may = self.may_announce.load(Ordering::Acquire) && self.up.load(Ordering::Acquire);
        if may {
            self.announce.store(true, Ordering::Release);
        }
        may
    }

    /// The driver accepted these features, or none yet.
    pub(super) fn negotiated(&self, filter: Filter, features: NetFeatures) {
        let may_announce = features.contains(NetFeatures::GUEST_ANNOUNCE | NetFeatures::STATUS);
        self.may_announce.store(may_announce, Ordering::Release);
        self.announced();
        self.set_pairs(1);
        self.filter.change(|current| *current = filter);
    }

    /// Follows the state of the link; whether it changed.
    fn follow_link(&self, link: &dyn Link) -> bool {
        let mut changed = false;
        // Two threads may report two changes at once: the one that stored the
        // older state last sees that below. A lock could deadlock with the
        // link's own.
        loop {
            let up = link.is_up();
            let was = self.up.swap(up, Ordering::AcqRel);
            changed |= was != up;
            if up && !was && self.may_announce.load(Ordering::Acquire) {
                self.announce.store(true, Ordering::Release);
            }
            if link.is_up() == up {
                return changed;
            }
        }
    }

    fn status(&self) -> NetStatus {
        let mut status = NetStatus::empty();
        status.set(NetStatus::LINK_UP, self.up.load(Ordering::Acquire));
        status.set(NetStatus::ANNOUNCE, self.announce.load(Ordering::Acquire));
        status
    }
}

/// Tells the driver of changes of the link.
#[derive(Debug)]
pub(super) struct LinkListener {
    link: Weak<dyn Link>,
    state: Arc<State>,
    events: Arc<dyn ConfigEvents>,
}

impl LinkListener {
    /// Connects `events` to the link.
    pub(super) fn connect(
        link: &Arc<dyn Link>,
        state: &Arc<State>,
        events: Arc<dyn ConfigEvents>,
    ) -> Arc<Self> {
        let listener = Arc::new(Self {
            // The link will own this listener.
            link: Arc::downgrade(link),
            state: state.clone(),
            events,
        });
        link.connect(listener.clone());
        // The link may have changed before it was connected.
        listener.link_changed();
        listener
    }

    /// Follows the link after a restore, and has the driver announce itself: the
    /// network may know it at another place.
    pub(super) fn restored(&self) {
        let link = self.link.upgrade();
        let changed = link.is_some_and(|link| self.state.follow_link(&*link));
        if self.state.request_announcement() || changed {
            self.events.config_changed();
        }
    }
}

impl LinkEvents for LinkListener {
    fn link_changed(&self) {
        if let Some(link) = self.link.upgrade()
            && self.state.follow_link(&*link)
        {
            self.events.config_changed();
        }
    }
}

/// The configuration space; the fields that change are filled in when it is
/// read.
#[derive(Debug)]
pub(super) struct Config(NetConfig);

impl Config {
    pub(super) fn new(shape: LinkShape, mtu: u16, options: &NetOptions) -> Self {
        let mut fields = NetConfig::default();
        if options.pairs > 1 {
            fields.max_virtqueue_pairs.set(options.pairs);
        }
        fields.mtu.set(mtu);
        // Values from 0x8000_0000 on have no meaning (§5.1.4.1).
        let speed = shape.speed_mbps.filter(|speed| *speed <= i32::MAX as u32);
        fields.speed.set(speed.unwrap_or(SPEED_UNKNOWN));
        fields.duplex = match speed {
            Some(_) => DUPLEX_FULL,
            None => DUPLEX_UNKNOWN,
        };
        Self(fields)
    }

    pub(super) fn read(&self, state: &State, offset: u32, out: &mut [u8]) {
        out.fill(0);
        let mut fields = self.0;
        fields.mac = state.filter.read(|filter| filter.mac);
        fields.status.set(state.status().bits());
        let rest = fields.as_bytes().get(offset as usize..).unwrap_or(&[]);
        for (to, from) in out.iter_mut().zip(rest) {
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{LinkError, LinkLane};
    use pvkit_protocol::frame::MacAddress;
    use std::sync::atomic::AtomicU32;

    #[derive(Debug, Default)]
    struct Switched {
        up: AtomicBool,
        /// How many calls of `is_up` change its state.
        flips: AtomicU32,
    }

    impl Link for Switched {
        fn shape(&self) -> LinkShape {
            LinkShape {
                mtu: 9000,
                lanes: 4,
                cheap: Offloads::empty(),
                speed_mbps: Some(2500),
            }
        }
        fn is_up(&self) -> bool {
            let flips = self.flips.load(Ordering::Relaxed);
            if flips > 0 {
                self.flips.store(flips - 1, Ordering::Relaxed);
                return !self.up.fetch_not(Ordering::Relaxed);
            }
            self.up.load(Ordering::Relaxed)
        }
        fn connect(&self, _events: Arc<dyn LinkEvents>) {}
        fn lane(&self, index: u16) -> Result<Box<dyn LinkLane>, LinkError> {
            Err(LinkError::NoLane { index, lanes: 0 })
        }
        fn set_receive(&self, _offloads: Offloads) -> Result<(), LinkError> {
            Ok(())
        }
        fn use_lanes(&self, _count: u16) -> Result<(), LinkError> {
            Ok(())
        }
    }

    fn state(up: bool, features: NetFeatures) -> State {
        let filter = Filter::new(MacAddress::local(1), features);
        let state = State::new(filter.clone(), up);
        state.negotiated(filter, features);
        state
    }

    #[test]
    fn config_reads_at_any_offset_width() {
        let options = NetOptions {
            pairs: 3,
            ..NetOptions::default()
        };
        let shape = Switched::default().shape();
        let config = Config::new(shape, 1400, &options);
        let state = state(true, NetFeatures::empty());
        let mac = MacAddress::local(1).0;
        let mut all = [0; 20];
        config.read(&state, 0, &mut all);
        assert_eq!(all[..6], mac);
        // Up, three pairs, 1,400 bytes, 2,500 Mbit/s, both ways at once.
        let rest = [1, 0, 3, 0, 120, 5, 196, 9, 0, 0, 1, 0, 0, 0];
        assert_eq!(all[6..], rest);
        for offset in 0..20 {
            for width in [1, 2, 4, 8] {
                let mut some = vec![0x5a; width];
                config.read(&state, offset as u32, &mut some);
                let expected = (offset..offset + width).map(|at| all.get(at).copied());
                let expected: Vec<_> = expected.map(Option::unwrap_or_default).collect();
                assert_eq!(some, expected, "{width} bytes at {offset}");
            }
        }
        config.read(&state, u32::MAX, &mut all);
        assert_eq!(all, [0; 20]);
    }

    #[test]
    fn unknown_speed_has_unknown_duplex() {
        for speed_mbps in [None, Some(0x8000_0000)] {
            let shape = LinkShape {
                speed_mbps,
                ..Switched::default().shape()
            };
            let Config(fields) = Config::new(shape, 1500, &NetOptions::default());
            assert_eq!(fields.speed.get(), SPEED_UNKNOWN);
            assert_eq!(fields.duplex, DUPLEX_UNKNOWN);
        }
    }

    #[test]
    fn returning_link_requests_announcement() {
        let can = NetFeatures::GUEST_ANNOUNCE | NetFeatures::STATUS;
        for (features, announces) in [(can, true), (NetFeatures::STATUS, false)] {
            let link = Switched::default();
            let state = state(false, features);
            assert!(!state.follow_link(&link), "as before");
            link.up.store(true, Ordering::Relaxed);
            assert!(state.follow_link(&link) && !state.follow_link(&link));
            assert_eq!(state.status().contains(NetStatus::ANNOUNCE), announces);
            state.announced();
            assert_eq!(state.status(), NetStatus::LINK_UP);
        }
    }

    #[test]
    fn link_changing_during_query_is_followed() {
        for flips in 0..6 {
            let link = Switched::default();
            link.flips.store(flips, Ordering::Relaxed);
            let state = state(true, NetFeatures::empty());
            let changed = state.follow_link(&link);
            let up = state.status().contains(NetStatus::LINK_UP);
            assert_eq!(up, link.up.load(Ordering::Relaxed), "{flips}");
            assert!(changed || up, "what it was is up");
        }
    }
}
