//! Which features make sense together, and the configuration space (virtio 1.3
//! §5.1.3 and §5.1.4). None of what the device says is trusted.
#![forbid(unsafe_code)]

use super::NetOptions;
use super::rx::MAX_PIECES;
use crate::net::{LinkStatus, MacAddress, Offloads};
use crate::virtio::init::{self, InitError};
use crate::virtio::transport::Transport;
use core::mem::offset_of;
use pvkit_protocol::frame::{MAX_SEGMENTED_FRAME_BYTES, max_frame_bytes};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::net::{
    DUPLEX_FULL, DUPLEX_HALF, HEADER_BYTES, MIN_MTU, NetConfig, NetFeatures, NetStatus,
};
use zerocopy::{FromZeros, IntoBytes};

/// What frames of the longest kind need in buffers, header included.
pub(super) const LARGE_FRAME_BYTES: usize = HEADER_BYTES + MAX_SEGMENTED_FRAME_BYTES;

/// Features by which frames longer than the MTU are received.
const LARGE: NetFeatures = NetFeatures::GUEST_TSO4
    .union(NetFeatures::GUEST_TSO6)
    .union(NetFeatures::GUEST_ECN)
    .union(NetFeatures::GUEST_USO4)
    .union(NetFeatures::GUEST_USO6);

/// Features that the driver can use, with this many pairs, and with a control
/// queue if there is memory for it.
pub(super) fn supported(pairs: usize, control: bool) -> Features {
    let mut net = NetFeatures::MAC
        | NetFeatures::STATUS
        | NetFeatures::MTU
        | NetFeatures::CSUM
        | NetFeatures::GUEST_CSUM
        | NetFeatures::HOST_TSO4
        | NetFeatures::HOST_TSO6
        | NetFeatures::HOST_ECN
        | NetFeatures::HOST_USO
        | LARGE
        | NetFeatures::MRG_RXBUF
        | NetFeatures::CTRL_RX
        | NetFeatures::CTRL_RX_EXTRA
        | NetFeatures::CTRL_VLAN
        | NetFeatures::CTRL_MAC_ADDR
        | NetFeatures::CTRL_GUEST_OFFLOADS
        | NetFeatures::GUEST_ANNOUNCE
        | NetFeatures::SPEED_DUPLEX;
    net.set(NetFeatures::CTRL_VQ, control);
    net.set(NetFeatures::MQ, pairs > 1);
    Features::VERSION_1
        | Features::INDIRECT_DESC
        | Features::EVENT_IDX
        | Features::RING_PACKED
        | Features::IN_ORDER
        | Features::NOTIFICATION_DATA
        | Features::RING_RESET
        | Features::ACCESS_PLATFORM
        | Features::ORDER_PLATFORM
        | net.into()
}

/// Most buffers that one frame can fill. A device waits for ever for more
/// buffers than it is ever shown at once.
fn pieces(features: NetFeatures, options: &NetOptions) -> usize {
    if features.contains(NetFeatures::MRG_RXBUF) {
        let shown = options.receive_buffers.min(options.queue_size);
        usize::from(shown).clamp(1, MAX_PIECES)
    } else {
        1
    }
}

/// The set without what makes no sense without others: features whose
/// requirements are missing, and long frames that the receive buffers could
/// not hold (§5.1.6.3.1).
pub(super) fn settle(features: Features, options: &NetOptions) -> Features {
    let mut net = NetFeatures::from(features);
    let pieces = pieces(net, options);
    if options.buffer_bytes.saturating_mul(pieces) < LARGE_FRAME_BYTES {
        net.remove(LARGE);
    }
    if !net.contains(NetFeatures::STATUS) {
        // Without it nothing says that an announcement is due.
        net.remove(NetFeatures::GUEST_ANNOUNCE);
    }
    (features - NetFeatures::all().into()) | net.without_dangling().into()
}

/// Checks that the receive buffers hold a frame of the MTU.
pub(super) fn check_buffers(
    features: Features,
    mtu: u16,
    options: &NetOptions,
) -> Result<(), InitError> {
    let bytes = options.buffer_bytes;
    let frame = HEADER_BYTES + max_frame_bytes(mtu);
    let pieces = pieces(NetFeatures::from(features), options);
    // The header lies in one buffer, whatever else is merged.
    let need = frame.div_ceil(pieces).max(2 * HEADER_BYTES);
    if bytes < need {
        return Err(InitError::BufferBytes { have: bytes, need });
    }
    Ok(())
}

/// What a configuration says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) mac: Option<MacAddress>,
    pub(super) mtu: u16,
    pub(super) max_pairs: u16,
    pub(super) link: LinkStatus,
    pub(super) announce: bool,
}

fn bad<T>(field: &'static str, value: u64) -> Result<T, InitError> {
    Err(InitError::Config { field, value })
}

/// Reads the configuration, and checks it.
pub(super) fn read<T: Transport>(
    transport: &T,
    features: Features,
    options: &NetOptions,
) -> Result<Said, InitError> {
    let has = NetFeatures::from(features);
    macro_rules! fields {
        ($transport:ident, $($feature:ident => $($field:ident),+;)+) => {{
            let mut config = NetConfig::new_zeroed();
            $(
                // A field without its feature must not be accessed (§2.5.1).
                if has.contains(NetFeatures::$feature) {
                    $($transport.read_config(
                        offset_of!(NetConfig, $field),
                        config.$field.as_mut_bytes(),
                    );)+
                }
            )+
            config
        }};
    }
    let config = init::read_config(transport, |transport| {
        fields! { transport,
            MAC => mac;
            STATUS => status;
            MQ => max_virtqueue_pairs;
            MTU => mtu;
            SPEED_DUPLEX => speed, duplex;
        }
    })?;
    check(&config, has, options)
}

fn check(config: &NetConfig, has: NetFeatures, options: &NetOptions) -> Result<Said, InitError> {
    let mac = has.contains(NetFeatures::MAC).then_some(config.mac);
    if let Some(mac) = mac.filter(|mac| !mac.is_unicast()) {
        let [a, b, c, d, e, f] = mac.0;
        return bad("mac", u64::from_be_bytes([0, 0, a, b, c, d, e, f]));
    }
    let mtu = if has.contains(NetFeatures::MTU) {
        config.mtu.get()
    } else {
        options.mtu
    };
    if mtu < MIN_MTU {
        return bad("mtu", mtu.into());
    }
    let max_pairs = if has.contains(NetFeatures::MQ) {
        config.max_virtqueue_pairs.get()
    } else {
        1
    };
    // The control queue has the number behind all pairs, and numbers have 16
    // bits.
    if max_pairs == 0 || max_pairs > u16::MAX / 2 {
        return bad("max_virtqueue_pairs", max_pairs.into());
    }
    let status = NetStatus::from_bits_retain(config.status.get());
    let knows_speed = has.contains(NetFeatures::SPEED_DUPLEX);
    Ok(Said {
        mac,
        mtu,
        max_pairs,
        link: LinkStatus {
            up: !has.contains(NetFeatures::STATUS) || status.contains(NetStatus::LINK_UP),
            // Larger numbers mean that it is not known (§5.1.4).
            speed_mbps: Some(config.speed.get())
                .filter(|speed| knows_speed && *speed <= i32::MAX as u32),
            full_duplex: match config.duplex {
                DUPLEX_FULL if knows_speed => Some(true),
                DUPLEX_HALF if knows_speed => Some(false),
                _ => None,
            },
        },
        announce: has.contains(NetFeatures::GUEST_ANNOUNCE) && status.contains(NetStatus::ANNOUNCE),
    })
}

/// What the device leaves to the driver, and what it does for it.
pub(super) fn offloads(features: Features) -> (Offloads, Offloads) {
    let net = NetFeatures::from(features);
    (net.transmit_offloads(), net.receive_offloads())
}

#[cfg(test)]
mod tests {
    use super::{LARGE, check, check_buffers, settle, supported};
    use crate::virtio::init::InitError;
    use crate::virtio::net::NetOptions;
    use pvkit_protocol::frame::MacAddress;
    use pvkit_protocol::virtio::Features;
    use pvkit_protocol::virtio::net::{NetConfig, NetFeatures};

    fn buffers(buffer_bytes: usize) -> NetOptions {
        NetOptions {
            buffer_bytes,
            ..NetOptions::default()
        }
    }

    fn settled(net: NetFeatures, buffer_bytes: usize) -> NetFeatures {
        NetFeatures::from(settle(Features::from(net), &buffers(buffer_bytes)))
    }

    #[test]
    fn a_frame_fills_no_more_buffers_than_there_are() {
        let merged = Features::from(LARGE | NetFeatures::GUEST_CSUM | NetFeatures::MRG_RXBUF);
        let few = |receive_buffers, queue_size| NetOptions {
            receive_buffers,
            queue_size,
            ..NetOptions::default()
        };
        for (buffers, ring, fits) in [(33, 64, true), (32, 64, false), (64, 32, false)] {
            let settled = settle(merged, &few(buffers, ring));
            assert_eq!(settled == merged, fits, "{buffers} of {ring}");
        }
        let short = NetOptions {
            buffer_bytes: 512,
            ..few(2, 64)
        };
        assert_eq!(
            check_buffers(merged, 1500, &short),
            Err(InitError::BufferBytes {
                have: 512,
                need: 765
            })
        );
    }

    #[test]
    fn long_frames_need_long_buffers_or_merged_ones() {
        let large = LARGE | NetFeatures::GUEST_CSUM;
        let merged = large | NetFeatures::MRG_RXBUF;
        assert_eq!(settled(large, 65_565), large);
        assert_eq!(settled(large, 65_564), NetFeatures::GUEST_CSUM);
        assert_eq!(settled(merged, 2048), merged);
        let short = NetFeatures::GUEST_CSUM | NetFeatures::MRG_RXBUF;
        assert_eq!(settled(merged, 1024), short);
    }

    #[test]
    fn nothing_is_negotiated_without_what_it_needs() {
        let all = NetFeatures::from(supported(4, true));
        assert_eq!(settled(all, 2048), all);
        for (without, gone) in [
            (NetFeatures::GUEST_CSUM, LARGE),
            (
                NetFeatures::CTRL_VQ,
                NetFeatures::MQ | NetFeatures::CTRL_RX | NetFeatures::CTRL_RX_EXTRA,
            ),
            (NetFeatures::CTRL_RX, NetFeatures::CTRL_RX_EXTRA),
            (NetFeatures::STATUS, NetFeatures::GUEST_ANNOUNCE),
            (
                NetFeatures::CSUM,
                NetFeatures::HOST_TSO4 | NetFeatures::HOST_ECN | NetFeatures::HOST_USO,
            ),
        ] {
            let settled = settled(all - without, 2048);
            assert!(!settled.intersects(gone | without), "{without:?}");
        }
        let kept = Features::EVENT_IDX | Features::VERSION_1;
        assert_eq!(settle(kept, &buffers(0)), kept);
        assert!(!NetFeatures::from(supported(1, true)).contains(NetFeatures::MQ));
        assert!(!NetFeatures::from(supported(2, false)).contains(NetFeatures::CTRL_VQ));
    }

    #[test]
    fn configurations_that_cannot_be_are_refused() {
        let has = NetFeatures::all();
        let options = NetOptions::default();
        let good = NetConfig {
            mac: MacAddress::local(1),
            status: 3.into(),
            max_virtqueue_pairs: 4.into(),
            mtu: 1500.into(),
            speed: 10_000.into(),
            duplex: 1,
        };
        let said = check(&good, has, &options).unwrap();
        assert_eq!((said.mtu, said.max_pairs), (1500, 4));
        assert_eq!((said.link.up, said.announce), (true, true));
        assert_eq!(said.link.speed_mbps, Some(10_000));
        assert_eq!(said.link.full_duplex, Some(true));

        let field = |config: NetConfig| match check(&config, has, &options) {
            Err(InitError::Config { field, value }) => (field, value),
            other => panic!("{other:?}"),
        };
        for mtu in [0, 67] {
            let bad = NetConfig {
                mtu: mtu.into(),
                ..good
            };
            assert_eq!(field(bad), ("mtu", mtu.into()));
        }
        for pairs in [0, 0x8000, 0xffff] {
            let bad = NetConfig {
                max_virtqueue_pairs: pairs.into(),
                ..good
            };
            assert_eq!(field(bad), ("max_virtqueue_pairs", pairs.into()));
        }
        for mac in [MacAddress::default(), MacAddress::BROADCAST] {
            assert_eq!(field(NetConfig { mac, ..good }).0, "mac");
        }
        let vague = NetConfig {
            speed: u32::MAX.into(),
            duplex: 7,
            ..good
        };
        let link = check(&vague, has, &options).unwrap().link;
        assert_eq!((link.speed_mbps, link.full_duplex), (None, None));
        // Fields without their feature mean nothing.
        let link = check(&NetConfig::default(), NetFeatures::empty(), &options).unwrap();
        assert!(link.link.up && link.mac.is_none() && link.max_pairs == 1);
    }

    #[test]
    fn buffers_hold_a_frame_of_the_mtu() {
        let plain = Features::empty();
        let merged = NetFeatures::MRG_RXBUF.into();
        assert!(check_buffers(plain, 1500, &buffers(1530)).is_ok());
        let need = 1530;
        assert_eq!(
            check_buffers(plain, 1500, &buffers(1529)),
            Err(InitError::BufferBytes { have: 1529, need })
        );
        assert!(check_buffers(merged, 9000, &buffers(256)).is_ok());
        assert!(check_buffers(merged, 1500, &buffers(16)).is_err());
    }
}
