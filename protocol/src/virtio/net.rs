//! The network device (virtio 1.3 §5.1): feature bits, configuration space, the
//! header of every frame, and control commands.

use super::Features;
use crate::frame::{Checksum, FrameMeta, MacAddress, Offloads, SegmentKind, Segmentation};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

bitflags::bitflags! {
    /// Feature bits of the network device (§5.1.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct NetFeatures: u64 {
        /// The device completes partial checksums.
        const CSUM = 1 << 0;
        /// The driver takes frames with partial checksums.
        const GUEST_CSUM = 1 << 1;
        /// What the driver takes can be changed by command.
        const CTRL_GUEST_OFFLOADS = 1 << 2;
        /// `mtu` holds the largest payload.
        const MTU = 1 << 3;
        /// `mac` holds the device's address.
        const MAC = 1 << 5;
        /// The driver takes frames to be segmented: TCP over IPv4.
        const GUEST_TSO4 = 1 << 7;
        /// The same: TCP over IPv6.
        const GUEST_TSO6 = 1 << 8;
        /// The same with congestion flags.
        const GUEST_ECN = 1 << 9;
        /// The driver takes fragmented UDP.
        const GUEST_UFO = 1 << 10;
        /// The device takes frames to be segmented: TCP over IPv4.
        const HOST_TSO4 = 1 << 11;
        /// The same: TCP over IPv6.
        const HOST_TSO6 = 1 << 12;
        /// The same with congestion flags.
        const HOST_ECN = 1 << 13;
        /// The device takes UDP to be fragmented.
        const HOST_UFO = 1 << 14;
        /// A frame that was received may fill several buffers.
        const MRG_RXBUF = 1 << 15;
        /// `status` holds the state of the link.
        const STATUS = 1 << 16;
        /// There is a control queue.
        const CTRL_VQ = 1 << 17;
        /// Commands choose which frames are received.
        const CTRL_RX = 1 << 18;
        /// Commands choose which VLANs are received.
        const CTRL_VLAN = 1 << 19;
        /// More of [`CTRL_RX`](Self::CTRL_RX).
        const CTRL_RX_EXTRA = 1 << 20;
        /// The device may ask the driver to announce itself.
        const GUEST_ANNOUNCE = 1 << 21;
        /// There may be several pairs of queues.
        const MQ = 1 << 22;
        /// A command sets the address.
        const CTRL_MAC_ADDR = 1 << 23;
        /// The driver takes UDP to be segmented, over IPv4.
        const GUEST_USO4 = 1 << 54;
        /// The same over IPv6.
        const GUEST_USO6 = 1 << 55;
        /// The device takes UDP to be segmented.
        const HOST_USO = 1 << 56;
        /// `hdr_len` of a frame to be segmented is right.
        const GUEST_HDRLEN = 1 << 59;
        /// `speed` and `duplex` mean something.
        const SPEED_DUPLEX = 1 << 63;
    }
}

impl From<NetFeatures> for Features {
    fn from(set: NetFeatures) -> Self {
        Self::from_bits_retain(set.bits())
    }
}

impl From<Features> for NetFeatures {
    /// Keeps the bits that belong to the network device.
    fn from(set: Features) -> Self {
        Self::from_bits_truncate(set.bits())
    }
}

/// What [`NetFeatures`] say of offloads, from the driver to the device
/// (`HOST_*`) or back (`GUEST_*`), and the bit of each in
/// [`GuestOffloads`](NetFeatures::CTRL_GUEST_OFFLOADS), which is that of its
/// feature (§5.1.6.5.6).
const OFFLOADS: [(Offloads, NetFeatures, NetFeatures); 6] = [
    (
        Offloads::CHECKSUM,
        NetFeatures::CSUM,
        NetFeatures::GUEST_CSUM,
    ),
    (
        Offloads::TSO4,
        NetFeatures::HOST_TSO4,
        NetFeatures::GUEST_TSO4,
    ),
    (
        Offloads::TSO6,
        NetFeatures::HOST_TSO6,
        NetFeatures::GUEST_TSO6,
    ),
    (
        Offloads::TSO_ECN,
        NetFeatures::HOST_ECN,
        NetFeatures::GUEST_ECN,
    ),
    (
        Offloads::USO4,
        NetFeatures::HOST_USO,
        NetFeatures::GUEST_USO4,
    ),
    (
        Offloads::USO6,
        NetFeatures::HOST_USO,
        NetFeatures::GUEST_USO6,
    ),
];

impl NetFeatures {
    /// All bits by which the driver says what it takes, and which commands can
    /// change ([`CTRL_GUEST_OFFLOADS`](Self::CTRL_GUEST_OFFLOADS)).
    pub const GUEST_OFFLOADS: Self = Self::GUEST_CSUM
        .union(Self::GUEST_TSO4)
        .union(Self::GUEST_TSO6)
        .union(Self::GUEST_ECN)
        .union(Self::GUEST_UFO)
        .union(Self::GUEST_USO4)
        .union(Self::GUEST_USO6);

    /// What the driver may leave to the device.
    #[must_use]
    pub fn transmit_offloads(self) -> Offloads {
        OFFLOADS
            .iter()
            .filter(|(_, host, _)| self.contains(*host))
            .map(|(offload, _, _)| *offload)
            .collect()
    }

    /// What the device may leave to the driver.
    #[must_use]
    pub fn receive_offloads(self) -> Offloads {
        OFFLOADS
            .iter()
            .filter(|(_, _, guest)| self.contains(*guest))
            .map(|(offload, _, _)| *offload)
            .collect()
    }

    /// The features by which a device offers to take work off the driver.
    #[must_use]
    pub fn of_transmit_offloads(offloads: Offloads) -> Self {
        OFFLOADS
            .iter()
            .filter(|(offload, _, _)| offloads.contains(*offload))
            .map(|(_, host, _)| *host)
            .collect()
    }

    /// The features by which a driver offers to take work off the device.
    #[must_use]
    pub fn of_receive_offloads(offloads: Offloads) -> Self {
        OFFLOADS
            .iter()
            .filter(|(offload, _, _)| offloads.contains(*offload))
            .map(|(_, _, guest)| *guest)
            .collect()
    }

    /// The set without those whose requirements it lacks (§5.1.3.1).
    #[must_use]
    pub fn without_dangling(self) -> Self {
        let mut set = self;
        let mut need = |feature: Self, needs: Self| {
            if !set.intersects(needs) {
                set.remove(feature);
            }
        };
        let segmented = [
            Self::GUEST_TSO4,
            Self::GUEST_TSO6,
            Self::GUEST_UFO,
            Self::GUEST_USO4,
            Self::GUEST_USO6,
        ];
        for feature in segmented {
            need(feature, Self::GUEST_CSUM);
        }
        need(Self::GUEST_ECN, Self::GUEST_TSO4 | Self::GUEST_TSO6);
        for feature in [
            Self::HOST_TSO4,
            Self::HOST_TSO6,
            Self::HOST_UFO,
            Self::HOST_USO,
        ] {
            need(feature, Self::CSUM);
        }
        need(Self::HOST_ECN, Self::HOST_TSO4 | Self::HOST_TSO6);
        for feature in [
            Self::CTRL_RX,
            Self::CTRL_VLAN,
            Self::GUEST_ANNOUNCE,
            Self::MQ,
            Self::CTRL_MAC_ADDR,
            Self::CTRL_GUEST_OFFLOADS,
        ] {
            need(feature, Self::CTRL_VQ);
        }
        need(Self::CTRL_RX_EXTRA, Self::CTRL_RX);
        set
    }
}

bitflags::bitflags! {
    /// [`NetConfig::status`] (§5.1.4).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct NetStatus: u16 {
        /// The link is up.
        const LINK_UP = 1;
        /// The driver is to announce itself, and to say when it has.
        const ANNOUNCE = 2;
    }
}

/// The configuration space (§5.1.4). Fields whose feature was not offered
/// read as 0.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct NetConfig {
    /// The device's address, with [`NetFeatures::MAC`].
    pub mac: MacAddress,
    /// [`NetStatus`], with [`NetFeatures::STATUS`].
    pub status: U16,
    /// Most pairs of queues, with [`NetFeatures::MQ`].
    pub max_virtqueue_pairs: U16,
    /// Largest payload of a frame, with [`NetFeatures::MTU`].
    pub mtu: U16,
    /// Speed in megabits a second, or [`SPEED_UNKNOWN`], with
    /// [`NetFeatures::SPEED_DUPLEX`].
    pub speed: U32,
    /// [`DUPLEX_FULL`], [`DUPLEX_HALF`] or [`DUPLEX_UNKNOWN`].
    pub duplex: u8,
}

/// Bytes of [`NetConfig`].
pub const CONFIG_BYTES: usize = size_of::<NetConfig>();
/// [`NetConfig::speed`]: not known.
pub const SPEED_UNKNOWN: u32 = 0xffff_ffff;
/// [`NetConfig::duplex`]: one direction at a time.
pub const DUPLEX_HALF: u8 = 0;
/// [`NetConfig::duplex`]: both at once.
pub const DUPLEX_FULL: u8 = 1;
/// [`NetConfig::duplex`]: not known.
pub const DUPLEX_UNKNOWN: u8 = 0xff;
/// Least [`NetConfig::mtu`] (§5.1.4.1).
pub const MIN_MTU: u16 = 68;
/// Most pairs of queues (§5.1.6.5.5).
pub const MAX_PAIRS: u16 = 0x8000;

/// The queue that receives, of a pair (§5.1.2).
#[must_use]
pub const fn receive_queue(pair: u16) -> u16 {
    pair * 2
}

/// The queue that transmits, of a pair (§5.1.2).
#[must_use]
pub const fn transmit_queue(pair: u16) -> u16 {
    pair * 2 + 1
}

/// The control queue: behind all pairs if several were negotiated, and behind
/// the first if not (§5.1.2).
#[must_use]
pub const fn control_queue(features: NetFeatures, max_pairs: u16) -> u16 {
    if features.contains(NetFeatures::MQ) {
        max_pairs * 2
    } else {
        2
    }
}

bitflags::bitflags! {
    /// [`NetHeader::flags`] (§5.1.6).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct NetHeaderFlags: u8 {
        /// The checksum is partial: `csum_start` and `csum_offset` say where.
        const NEEDS_CSUM = 1;
        /// The checksum was found right.
        const DATA_VALID = 2;
    }
}

/// Values of [`NetHeader::gso_type`] (§5.1.6).
pub mod gso {
    /// Not to be segmented.
    pub const NONE: u8 = 0;
    /// TCP over IPv4.
    pub const TCPV4: u8 = 1;
    /// UDP to be fragmented.
    pub const UDP: u8 = 3;
    /// TCP over IPv6.
    pub const TCPV6: u8 = 4;
    /// UDP to be cut into datagrams.
    pub const UDP_L4: u8 = 5;
    /// Added to those of TCP: with congestion flags.
    pub const ECN: u8 = 0x80;
}

/// What stands before each frame (§5.1.6), both ways.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct NetHeader {
    /// [`NetHeaderFlags`].
    pub flags: u8,
    /// One of [`gso`].
    pub gso_type: u8,
    /// Bytes of headers of a frame to be segmented: a hint.
    pub hdr_len: U16,
    /// Payload of a segment.
    pub gso_size: U16,
    /// Where the sum of a partial checksum begins.
    pub csum_start: U16,
    /// Where its field stands from there.
    pub csum_offset: U16,
    /// Buffers that the frame fills, with [`NetFeatures::MRG_RXBUF`]; 1 without,
    /// and 0 or anything when transmitted.
    pub num_buffers: U16,
}

/// Bytes of [`NetHeader`].
pub const HEADER_BYTES: usize = size_of::<NetHeader>();

impl NetHeader {
    /// The header of a frame that fills `buffers` buffers.
    #[must_use]
    pub fn new(meta: &FrameMeta, buffers: u16) -> Self {
        let mut header = Self {
            num_buffers: U16::new(buffers),
            ..Self::default()
        };
        match meta.checksum {
            Checksum::Unknown => {}
            Checksum::Valid => header.flags = NetHeaderFlags::DATA_VALID.bits(),
            Checksum::Partial { start, offset } => {
                header.flags = NetHeaderFlags::NEEDS_CSUM.bits();
                header.csum_start.set(start);
                header.csum_offset.set(offset);
            }
        }
        if let Some(segments) = &meta.segments {
            header.gso_type = match segments.kind {
                SegmentKind::Tcp4 => gso::TCPV4,
                SegmentKind::Tcp6 => gso::TCPV6,
                SegmentKind::Udp => gso::UDP_L4,
            };
            if segments.ecn {
                header.gso_type |= gso::ECN;
            }
            header.gso_size.set(segments.size);
            header.hdr_len.set(segments.header_bytes);
        }
        header
    }

    /// Whether it says nothing of its frame: then that has
    /// [`FrameMeta::PLAIN`].
    #[inline]
    #[must_use]
    pub const fn is_plain(&self) -> bool {
        self.flags == 0 && self.gso_type == gso::NONE
    }

    /// What it says of its frame; to be
    /// [checked](crate::frame::FrameMeta::check) against that. `None` for a
    /// kind of segmentation that is not known here.
    #[must_use]
    pub fn meta(&self) -> Option<FrameMeta> {
        let flags = NetHeaderFlags::from_bits_retain(self.flags);
        let checksum = if flags.contains(NetHeaderFlags::NEEDS_CSUM) {
            Checksum::Partial {
                start: self.csum_start.get(),
                offset: self.csum_offset.get(),
            }
        } else if flags.contains(NetHeaderFlags::DATA_VALID) {
            Checksum::Valid
        } else {
            Checksum::Unknown
        };
        let ecn = self.gso_type & gso::ECN != 0;
        let kind = match self.gso_type & !gso::ECN {
            gso::NONE if !ecn => {
                return Some(FrameMeta {
                    checksum,
                    segments: None,
                });
            }
            gso::TCPV4 => SegmentKind::Tcp4,
            gso::TCPV6 => SegmentKind::Tcp6,
            gso::UDP_L4 if !ecn => SegmentKind::Udp,
            _ => return None,
        };
        Some(FrameMeta {
            checksum,
            segments: Some(Segmentation {
                kind,
                ecn,
                size: self.gso_size.get(),
                header_bytes: self.hdr_len.get(),
            }),
        })
    }
}

/// The start of a command on the control queue (§5.1.6.5).
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct ControlHeader {
    /// One of [`class`].
    pub class: u8,
    /// A command of that class.
    pub command: u8,
}

/// Values of the byte that ends every command (§5.1.6.5).
pub mod ack {
    /// Done.
    pub const OK: u8 = 0;
    /// Refused.
    pub const ERR: u8 = 1;
}

/// Classes of commands, and their commands (§5.1.6.5).
pub mod class {
    /// Which frames are received: one byte, 0 or 1.
    pub const RX: u8 = 0;
    /// Addresses.
    pub const MAC: u8 = 1;
    /// VLANs: a [`U16`](zerocopy::little_endian::U16).
    pub const VLAN: u8 = 2;
    /// Announcements.
    pub const ANNOUNCE: u8 = 3;
    /// Queues.
    pub const MQ: u8 = 4;
    /// What the driver takes.
    pub const GUEST_OFFLOADS: u8 = 5;
}

/// Commands of [`class::RX`] (§5.1.6.5.1).
pub mod rx {
    /// All frames.
    pub const PROMISC: u8 = 0;
    /// All frames to groups.
    pub const ALLMULTI: u8 = 1;
    /// All frames to single stations.
    pub const ALLUNI: u8 = 2;
    /// No frames to groups.
    pub const NOMULTI: u8 = 3;
    /// No frames to single stations.
    pub const NOUNI: u8 = 4;
    /// No frames to all.
    pub const NOBCAST: u8 = 5;
}

/// Commands of [`class::MAC`] (§5.1.6.5.2).
pub mod mac {
    /// Two lists, each a count and as many addresses: single stations, groups.
    pub const TABLE_SET: u8 = 0;
    /// The device's own address.
    pub const ADDR_SET: u8 = 1;
}

/// Commands of [`class::VLAN`] (§5.1.6.5.3).
pub mod vlan {
    /// Receive one more.
    pub const ADD: u8 = 0;
    /// Receive one less.
    pub const DEL: u8 = 1;
    /// VLANs have numbers below this.
    pub const COUNT: u16 = 4096;
}

/// Commands of [`class::ANNOUNCE`] (§5.1.6.5.4).
pub mod announce {
    /// The driver has announced itself.
    pub const ACK: u8 = 0;
}

/// Commands of [`class::MQ`] (§5.1.6.5.5).
pub mod mq {
    /// How many pairs are used from now on: a
    /// [`U16`](zerocopy::little_endian::U16).
    pub const VQ_PAIRS_SET: u8 = 0;
}

/// Commands of [`class::GUEST_OFFLOADS`] (§5.1.6.5.6).
pub mod guest_offloads {
    /// What the driver takes from now on: the bits of those features, as a
    /// [`U64`](zerocopy::little_endian::U64).
    pub const SET: u8 = 0;
}

/// The argument of [`guest_offloads::SET`].
#[must_use]
pub fn guest_offloads(features: NetFeatures) -> U64 {
    U64::new((features & NetFeatures::GUEST_OFFLOADS).bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_specification() {
        assert_eq!(HEADER_BYTES, 12);
        assert_eq!(CONFIG_BYTES, 17);
        assert_eq!(core::mem::offset_of!(NetConfig, speed), 12);
        assert_eq!(core::mem::offset_of!(NetHeader, num_buffers), 10);
    }

    #[test]
    fn headers_round_trip() {
        let checksum = Checksum::Partial {
            start: 34,
            offset: 16,
        };
        let segments = |kind, ecn| {
            Some(Segmentation {
                kind,
                ecn,
                size: 1448,
                header_bytes: 66,
            })
        };
        for meta in [
            FrameMeta::PLAIN,
            FrameMeta {
                checksum: Checksum::Valid,
                segments: None,
            },
            FrameMeta {
                checksum,
                segments: None,
            },
            FrameMeta {
                checksum,
                segments: segments(SegmentKind::Tcp4, true),
            },
            FrameMeta {
                checksum,
                segments: segments(SegmentKind::Tcp6, false),
            },
            FrameMeta {
                checksum,
                segments: segments(SegmentKind::Udp, false),
            },
        ] {
            assert_eq!(NetHeader::new(&meta, 1).meta(), Some(meta));
        }
        for gso_type in [gso::ECN, gso::UDP, gso::UDP_L4 | gso::ECN, 2, 6, 0x7f] {
            let header = NetHeader {
                gso_type,
                ..NetHeader::default()
            };
            assert_eq!(header.meta(), None, "{gso_type:#x}");
        }
    }

    #[test]
    fn offloads_and_features_mean_each_other() {
        let all = NetFeatures::all();
        assert_eq!(all.transmit_offloads(), Offloads::all());
        assert_eq!(all.receive_offloads(), Offloads::all());
        let features = NetFeatures::of_receive_offloads(Offloads::CHECKSUM | Offloads::USO6);
        assert_eq!(features, NetFeatures::GUEST_CSUM | NetFeatures::GUEST_USO6);
        assert_eq!(
            NetFeatures::of_transmit_offloads(Offloads::USO4),
            NetFeatures::HOST_USO
        );
        assert_eq!(
            (all - NetFeatures::CSUM)
                .without_dangling()
                .transmit_offloads(),
            Offloads::empty()
        );
    }
}
