//! What a network device offers, and its configuration space (virtio 1.3
//! §5.1.3, §5.1.4).
#![forbid(unsafe_code)]

use super::NetOptions;
use super::filter::{Filter, SharedFilter};
use crate::link::{Link, LinkEvents, LinkShape};
use crate::virtio::device::DeviceEvents;
use pvkit_protocol::virtio::net::{
    DUPLEX_FULL, DUPLEX_UNKNOWN, NetConfig, NetFeatures, NetStatus, SPEED_UNKNOWN,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use zerocopy::IntoBytes;

/// Everything that can be offered over a link of this shape, by options that
/// make sense.
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

/// What changes while the device works: its link, and what the driver chose.
#[derive(Debug)]
pub(super) struct State {
    pub(super) filter: SharedFilter,
    up: AtomicBool,
    /// The driver is to announce itself.
    announce: AtomicBool,
    /// It understands that.
    may_announce: AtomicBool,
}

impl State {
    pub(super) fn new(filter: Filter, up: bool) -> Self {
        Self {
            filter: SharedFilter::new(filter),
            up: AtomicBool::new(up),
            announce: AtomicBool::new(false),
            may_announce: AtomicBool::new(false),
        }
    }

    /// The driver has announced itself.
    pub(super) fn announced(&self) {
        self.announce.store(false, Ordering::Release);
    }

    /// The driver accepted these features, or none yet.
    pub(super) fn negotiated(&self, filter: Filter, features: NetFeatures) {
        let understood = features.contains(NetFeatures::GUEST_ANNOUNCE | NetFeatures::STATUS);
        self.may_announce.store(understood, Ordering::Release);
        self.announced();
        self.filter.change(|current| *current = filter);
    }

    /// Asks the link how it is; whether that is news.
    fn look(&self, link: &dyn Link) -> bool {
        let mut news = false;
        // Two threads may hear of two changes at once: who stored an old state
        // last sees that here. No lock, which the link's own could lock out.
        loop {
            let up = link.is_up();
            let was = self.up.swap(up, Ordering::AcqRel);
            news |= was != up;
            if up && !was && self.may_announce.load(Ordering::Acquire) {
                self.announce.store(true, Ordering::Release);
            }
            if link.is_up() == up {
                return news;
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

/// Brings news of the link to the driver.
#[derive(Debug)]
pub(super) struct News {
    link: Weak<dyn Link>,
    state: Arc<State>,
    events: Arc<dyn DeviceEvents>,
}

impl News {
    /// From now on, `events` hears of the link.
    pub(super) fn connect(link: &Arc<dyn Link>, state: &Arc<State>, events: Arc<dyn DeviceEvents>) {
        let news = Arc::new(Self {
            // The link will own this.
            link: Arc::downgrade(link),
            state: state.clone(),
            events,
        });
        link.connect(news.clone());
        // It may have changed before it knew whom to tell.
        news.link_changed();
    }
}

impl LinkEvents for News {
    fn link_changed(&self) {
        if let Some(link) = self.link.upgrade()
            && self.state.look(&*link)
        {
            self.events.config_changed();
        }
    }
}

/// The configuration space, as far as it does not change.
#[derive(Debug)]
pub(super) struct Config(NetConfig);

impl Config {
    pub(super) fn new(shape: LinkShape, mtu: u16, options: &NetOptions) -> Self {
        let mut fields = NetConfig::default();
        if options.pairs > 1 {
            fields.max_virtqueue_pairs.set(options.pairs);
        }
        fields.mtu.set(mtu);
        // Numbers from 0x8000_0000 on mean nothing (§5.1.4.1).
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
        fields.mac = state.filter.now(|filter| filter.mac);
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
    use pvkit_protocol::frame::{MacAddress, Offloads};
    use std::sync::atomic::AtomicU32;

    #[derive(Debug, Default)]
    struct Switched {
        up: AtomicBool,
        /// How often it is asked before it goes the other way.
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
    fn fields_are_read_at_any_offset_and_width() {
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
    fn a_speed_that_nobody_knows() {
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
    fn who_comes_back_announces_itself_if_it_can() {
        let can = NetFeatures::GUEST_ANNOUNCE | NetFeatures::STATUS;
        for (features, announces) in [(can, true), (NetFeatures::STATUS, false)] {
            let link = Switched::default();
            let state = state(false, features);
            assert!(!state.look(&link), "as before");
            link.up.store(true, Ordering::Relaxed);
            assert!(state.look(&link) && !state.look(&link));
            assert_eq!(state.status().contains(NetStatus::ANNOUNCE), announces);
            state.announced();
            assert_eq!(state.status(), NetStatus::LINK_UP);
        }
    }

    #[test]
    fn a_link_that_changes_while_it_is_asked() {
        for flips in 0..6 {
            let link = Switched::default();
            link.flips.store(flips, Ordering::Relaxed);
            let state = state(true, NetFeatures::empty());
            let news = state.look(&link);
            let up = state.status().contains(NetStatus::LINK_UP);
            assert_eq!(up, link.up.load(Ordering::Relaxed), "{flips}");
            assert!(news || up, "what it was is up");
        }
    }
}
