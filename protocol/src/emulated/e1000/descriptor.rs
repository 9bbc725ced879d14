//! Descriptors: 16 bytes each, in rings (SDM §3.2 and §3.3).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a descriptor of either ring.
pub const BYTES: usize = 16;
/// Lengths of rings are multiples of so many bytes (SDM §13.4.27).
pub const RING_ALIGN: u32 = 128;
/// Most bytes of a ring: its length has 20 bits.
pub const MAX_RING_BYTES: u32 = 0xf_ff80;
/// Most bytes of a legacy descriptor that the chip takes (SDM §3.3.3).
pub const MAX_LEGACY_BYTES: u16 = 16_288;
/// Bits of the length of a data descriptor, and of a payload length.
pub const LENGTH_MASK: u32 = 0xf_ffff;

bitflags::bitflags! {
    /// Status of a receive descriptor (SDM §3.2.3.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct RxStatus: u8 {
        /// The device is done with it.
        const DD = 1 << 0;
        /// The frame ends here; the other bits, but [`DD`](Self::DD), count
        /// only with this one.
        const EOP = 1 << 1;
        /// The other checksum bits say nothing.
        const IXSM = 1 << 2;
        /// The frame had a VLAN tag, which is in `special`.
        const VP = 1 << 3;
        /// The TCP or UDP checksum was looked at.
        const TCPCS = 1 << 5;
        /// The IPv4 header checksum was looked at.
        const IPCS = 1 << 6;
        /// A filter that is not exact let it pass.
        const PIF = 1 << 7;
        const _ = !0;
    }

    /// Errors of a receive descriptor (SDM §3.2.3.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct RxError: u8 {
        /// Check sequence or alignment.
        const CE = 1 << 0;
        /// Symbol.
        const SE = 1 << 1;
        /// Sequence.
        const SEQ = 1 << 2;
        /// Carrier extension.
        const CXE = 1 << 4;
        /// TCP or UDP checksum.
        const TCPE = 1 << 5;
        /// IPv4 header checksum.
        const IPE = 1 << 6;
        /// Data.
        const RXE = 1 << 7;
        const _ = !0;
    }

    /// Command of a legacy or data descriptor (SDM §3.3.3.1 and §3.3.7.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct TxCommand: u8 {
        /// The frame ends here.
        const EOP = 1 << 0;
        /// Adds the check sequence.
        const IFCS = 1 << 1;
        /// Legacy: makes a checksum. Data: [`TSE`](Self::TSE).
        const IC = 1 << 2;
        /// Data: cuts into segments. Legacy: [`IC`](Self::IC).
        const TSE = 1 << 2;
        /// The device sets [`TX_DD`].
        const RS = 1 << 3;
        /// Reserved; of other chips, "report packet sent".
        const RPS = 1 << 4;
        /// Not a legacy descriptor.
        const DEXT = 1 << 5;
        /// Inserts the VLAN tag in `special`.
        const VLE = 1 << 6;
        /// The interrupt may be delayed.
        const IDE = 1 << 7;
    }

    /// Command of a context descriptor (SDM §3.3.6.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct TuCommand: u8 {
        /// TCP and not UDP.
        const TCP = 1 << 0;
        /// IPv4 and not IPv6.
        const IP = 1 << 1;
        /// It is for segmentation.
        const TSE = 1 << 2;
        /// The device sets [`TX_DD`].
        const RS = 1 << 3;
        /// Not a legacy descriptor.
        const DEXT = 1 << 5;
        /// The interrupt may be delayed.
        const IDE = 1 << 7;
        const _ = !0;
    }

    /// Options of a data descriptor (SDM §3.3.7.3); those of a frame's first
    /// one count.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct PacketOptions: u8 {
        /// Makes the checksum of the IPv4 header.
        const IXSM = 1 << 0;
        /// Makes the checksum of TCP or UDP.
        const TXSM = 1 << 1;
        const _ = !0;
    }
}

/// In the status of every transmit descriptor: the device is done with it (SDM
/// §3.3.3.2).
pub const TX_DD: u8 = 1 << 0;
/// In a byte of a transmit descriptor: where the status stands, which is all
/// that the device writes back.
pub const TX_STATUS_OFFSET: usize = 12;

/// A receive descriptor (SDM §3.2.3).
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
pub struct RxDescriptor {
    /// Address of the buffer.
    pub address: U64,
    /// Bytes in this buffer.
    pub length: U16,
    /// The packet checksum: the sum from
    /// [`RxChecksum::start`](super::RxChecksum::start) on.
    pub checksum: U16,
    /// [`RxStatus`].
    pub status: u8,
    /// [`RxError`].
    pub errors: u8,
    /// The VLAN tag that was taken out.
    pub special: U16,
}

impl RxDescriptor {
    /// The status.
    #[must_use]
    pub const fn status(&self) -> RxStatus {
        RxStatus::from_bits_retain(self.status)
    }

    /// The errors.
    #[must_use]
    pub const fn errors(&self) -> RxError {
        RxError::from_bits_retain(self.errors)
    }
}

/// What a transmit descriptor is (SDM §3.3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DescriptorType {
    /// [`LegacyDescriptor`].
    Legacy,
    /// [`ContextDescriptor`].
    Context,
    /// [`DataDescriptor`].
    Data,
    /// There is no such type.
    Unknown(u8),
}

/// A transmit descriptor of any type.
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
pub struct TxDescriptor {
    /// What the type says.
    pub low: U64,
    /// Length in bits 19:0, type in 23:20, command in 31:24; but the length
    /// of a legacy descriptor has 16 bits, and the rest is its checksum
    /// offset.
    pub command: U32,
    /// Status.
    pub status: u8,
    /// What the type says.
    pub options: u8,
    /// What the type says.
    pub special: U16,
}

impl TxDescriptor {
    /// What it is.
    #[must_use]
    pub const fn kind(&self) -> DescriptorType {
        if !self.command().contains(TxCommand::DEXT) {
            return DescriptorType::Legacy;
        }
        match (self.command.get() >> 20) as u8 & 0xf {
            0 => DescriptorType::Context,
            1 => DescriptorType::Data,
            other => DescriptorType::Unknown(other),
        }
    }

    /// The command: [`TxCommand::RS`], [`TxCommand::DEXT`] and
    /// [`TxCommand::IDE`] mean the same in every type.
    #[must_use]
    pub const fn command(&self) -> TxCommand {
        TxCommand::from_bits_truncate((self.command.get() >> 24) as u8)
    }

    /// It as a legacy descriptor.
    #[must_use]
    pub fn legacy(&self) -> LegacyDescriptor {
        zerocopy::transmute!(*self)
    }

    /// It as a context descriptor.
    #[must_use]
    pub fn context(&self) -> ContextDescriptor {
        zerocopy::transmute!(*self)
    }

    /// It as a data descriptor.
    #[must_use]
    pub fn data(&self) -> DataDescriptor {
        zerocopy::transmute!(*self)
    }
}

/// A legacy transmit descriptor (SDM §3.3.3).
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
pub struct LegacyDescriptor {
    /// Address of the buffer.
    pub address: U64,
    /// Its bytes.
    pub length: U16,
    /// Where in the frame the checksum is stored (CSO).
    pub checksum_offset: u8,
    /// [`TxCommand`].
    pub command: u8,
    /// [`TX_DD`].
    pub status: u8,
    /// Where in the frame the checksum begins (CSS).
    pub checksum_start: u8,
    /// VLAN tag.
    pub special: U16,
}

impl From<LegacyDescriptor> for TxDescriptor {
    fn from(descriptor: LegacyDescriptor) -> Self {
        zerocopy::transmute!(descriptor)
    }
}

/// A context descriptor (SDM §3.3.6): how checksums and segments of the data
/// descriptors that follow are made, until the next one. Offsets count from the
/// first byte of the frame; an end of 0 means the end of the packet.
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
pub struct ContextDescriptor {
    /// Where the sum of the IPv4 header begins (IPCSS).
    pub ip_start: u8,
    /// Where it is stored (IPCSO).
    pub ip_offset: u8,
    /// Its last byte (IPCSE).
    pub ip_end: U16,
    /// Where the sum of TCP or UDP begins (TUCSS).
    pub transport_start: u8,
    /// Where it is stored (TUCSO).
    pub transport_offset: u8,
    /// Its last byte (TUCSE).
    pub transport_end: U16,
    /// Bytes of payload of the packet in bits 19:0 (PAYLEN), type in 23:20,
    /// [`TuCommand`] in 31:24.
    pub command: U32,
    /// [`TX_DD`].
    pub status: u8,
    /// Bytes of headers that each segment repeats (HDRLEN).
    pub header_bytes: u8,
    /// Most bytes of payload of a segment (MSS).
    pub segment_bytes: U16,
}

impl ContextDescriptor {
    /// What stands in `command`: payload of `payload` bytes, and the type.
    /// [`TuCommand::DEXT`] is added.
    #[must_use]
    pub const fn command_word(payload: u32, command: TuCommand) -> U32 {
        let command = command.bits() | TuCommand::DEXT.bits();
        U32::new(payload & LENGTH_MASK | (command as u32) << 24)
    }

    /// Bytes of payload of the packet, without headers.
    #[must_use]
    pub const fn payload_bytes(&self) -> u32 {
        self.command.get() & LENGTH_MASK
    }

    /// The command.
    #[must_use]
    pub const fn command(&self) -> TuCommand {
        TuCommand::from_bits_retain((self.command.get() >> 24) as u8)
    }
}

impl From<ContextDescriptor> for TxDescriptor {
    fn from(descriptor: ContextDescriptor) -> Self {
        zerocopy::transmute!(descriptor)
    }
}

/// A data descriptor (SDM §3.3.7).
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
pub struct DataDescriptor {
    /// Address of the buffer.
    pub address: U64,
    /// Its bytes in bits 19:0, type in 23:20, [`TxCommand`] in 31:24.
    pub command: U32,
    /// [`TX_DD`].
    pub status: u8,
    /// [`PacketOptions`].
    pub options: u8,
    /// VLAN tag.
    pub special: U16,
}

impl DataDescriptor {
    /// What stands in `command`: a buffer of `length` bytes, and the type.
    /// [`TxCommand::DEXT`] is added.
    #[must_use]
    pub const fn command_word(length: u32, command: TxCommand) -> U32 {
        let command = command.bits() | TxCommand::DEXT.bits();
        U32::new(length & LENGTH_MASK | 1 << 20 | (command as u32) << 24)
    }

    /// Bytes of the buffer.
    #[must_use]
    pub const fn length(&self) -> u32 {
        self.command.get() & LENGTH_MASK
    }

    /// The options.
    #[must_use]
    pub const fn options(&self) -> PacketOptions {
        PacketOptions::from_bits_retain(self.options)
    }
}

impl From<DataDescriptor> for TxDescriptor {
    fn from(descriptor: DataDescriptor) -> Self {
        zerocopy::transmute!(descriptor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_told_apart() {
        let legacy = LegacyDescriptor {
            address: U64::new(0x1234_5678_9abc),
            length: U16::new(60),
            checksum_offset: 0xff,
            command: (TxCommand::EOP | TxCommand::IC | TxCommand::RS).bits(),
            ..LegacyDescriptor::default()
        };
        let any = TxDescriptor::from(legacy);
        assert_eq!(any.kind(), DescriptorType::Legacy);
        assert_eq!(any.legacy(), legacy);
        assert!(any.command().contains(TxCommand::RS));

        let context = ContextDescriptor {
            command: ContextDescriptor::command_word(65_000, TuCommand::TSE | TuCommand::TCP),
            header_bytes: 54,
            segment_bytes: U16::new(1460),
            ..ContextDescriptor::default()
        };
        let any = TxDescriptor::from(context);
        assert_eq!(any.kind(), DescriptorType::Context);
        assert_eq!(any.context().payload_bytes(), 65_000);
        assert!(any.context().command().contains(TuCommand::TSE));
        assert_eq!(any.options, 54);

        let data = DataDescriptor {
            command: DataDescriptor::command_word(0xf_ffff, TxCommand::EOP),
            ..DataDescriptor::default()
        };
        let mut any = TxDescriptor::from(data);
        assert_eq!(any.kind(), DescriptorType::Data);
        assert_eq!(any.data().length(), 0xf_ffff);
        any.command.set(any.command.get() | 0xf << 20);
        assert_eq!(any.kind(), DescriptorType::Unknown(15));
    }

    #[test]
    fn bytes_stand_where_the_manual_says() {
        assert_eq!(size_of::<RxDescriptor>(), BYTES);
        assert_eq!(size_of::<TxDescriptor>(), BYTES);
        let context = ContextDescriptor {
            ip_start: 14,
            ip_offset: 24,
            ip_end: U16::new(33),
            transport_start: 34,
            transport_offset: 50,
            transport_end: U16::ZERO,
            command: ContextDescriptor::command_word(0x12345, TuCommand::TSE),
            status: TX_DD,
            header_bytes: 54,
            segment_bytes: U16::new(0x5b4),
        };
        assert_eq!(
            context.as_bytes(),
            [
                14, 24, 33, 0, 34, 50, 0, 0, 0x45, 0x23, 0x01, 0x24, 1, 54, 0xb4, 5
            ]
        );
        assert_eq!(context.as_bytes()[TX_STATUS_OFFSET], TX_DD);
    }
}
