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
