//! Registers of 32 bits in BAR 0 (SDM §13.3, table 13-2), and bits in them.

use crate::frame::MacAddress;

/// Device control ([`Ctrl`]), SDM §13.4.1.
pub const CTRL: u32 = 0x0000;
/// A second place of [`CTRL`].
pub const CTRL_DUP: u32 = 0x0004;
/// Device status ([`Status`]), read only, SDM §13.4.2.
pub const STATUS: u32 = 0x0008;
/// The wires of the EEPROM ([`Eecd`]), SDM §13.4.3.
pub const EECD: u32 = 0x0010;
/// Reads a word of the EEPROM ([`eerd`]), SDM §13.4.4.
pub const EERD: u32 = 0x0014;
/// Extended device control, SDM §13.4.6.
pub const CTRL_EXT: u32 = 0x0018;
/// Flash access, SDM §13.4.5.
pub const FLA: u32 = 0x001c;
/// Registers of the PHY ([`Mdic`]), SDM §13.4.7.
pub const MDIC: u32 = 0x0020;
/// Flow control: low bytes of the address of pause frames, SDM §13.4.8.
pub const FCAL: u32 = 0x0028;
/// Flow control: high bytes of the address, SDM §13.4.9.
pub const FCAH: u32 = 0x002c;
/// Flow control: type of pause frames, SDM §13.4.10.
pub const FCT: u32 = 0x0030;
/// Type of VLAN frames, SDM §13.4.11.
pub const VET: u32 = 0x0038;
/// Why it interrupts ([`Cause`]); reading clears it, SDM §13.4.17.
pub const ICR: u32 = 0x00c0;
/// The least time between interrupts ([`interval_nanos`]), SDM §13.4.18.
pub const ITR: u32 = 0x00c4;
/// Sets causes, write only, SDM §13.4.19.
pub const ICS: u32 = 0x00c8;
/// Which causes interrupt; writing adds to them, SDM §13.4.20.
pub const IMS: u32 = 0x00d0;
/// Takes away from which causes interrupt, write only, SDM §13.4.21.
pub const IMC: u32 = 0x00d8;
/// Receive control ([`Rctl`]), SDM §13.4.22.
pub const RCTL: u32 = 0x0100;
/// Flow control: how long others are to pause, SDM §13.4.12.
pub const FCTTV: u32 = 0x0170;
/// Transmit configuration of fibre links, SDM §13.4.13.
pub const TXCW: u32 = 0x0178;
/// Receive configuration of fibre links, read only, SDM §13.4.14.
pub const RXCW: u32 = 0x0180;
/// Transmit control ([`Tctl`]), SDM §13.4.33.
pub const TCTL: u32 = 0x0400;
/// Transmit gap between frames, SDM §13.4.34.
pub const TIPG: u32 = 0x0410;
/// Adaptive gap throttle, SDM §13.4.35.
pub const AIT: u32 = 0x0458;
/// What the lamps show, SDM §13.4.15.
pub const LEDCTL: u32 = 0x0e00;
/// How the packet buffer is shared, SDM §13.4.16.
pub const PBA: u32 = 0x1000;
/// Flow control: when others may go on, SDM §13.4.23.
pub const FCRTL: u32 = 0x2160;
/// Flow control: when others are to pause, SDM §13.4.24.
pub const FCRTH: u32 = 0x2168;
/// Receive ring: low half of its address, 16-aligned, SDM §13.4.25.
pub const RDBAL: u32 = 0x2800;
/// Receive ring: high half of its address, SDM §13.4.26.
pub const RDBAH: u32 = 0x2804;
/// Receive ring: its length in bytes, a multiple of 128, SDM §13.4.27.
pub const RDLEN: u32 = 0x2808;
/// Receive ring: the next descriptor that the device fills, SDM §13.4.28.
pub const RDH: u32 = 0x2810;
/// Receive ring: the first descriptor that the device does not have,
/// SDM §13.4.29.
pub const RDT: u32 = 0x2818;
/// How long the interrupt after a frame is delayed ([`delay_nanos`]), started
/// anew by each frame, SDM §13.4.30.
pub const RDTR: u32 = 0x2820;
/// Thresholds of the receive ring.
pub const RXDCTL: u32 = 0x2828;
/// How long it is delayed at most ([`delay_nanos`]), SDM §13.4.31.
pub const RADV: u32 = 0x282c;
/// The longest frame that interrupts at once, SDM §13.4.32.
pub const RSRPD: u32 = 0x2c00;
/// Transmit ring: low half of its address, 16-aligned, SDM §13.4.36.
pub const TDBAL: u32 = 0x3800;
/// Transmit ring: high half of its address, SDM §13.4.37.
pub const TDBAH: u32 = 0x3804;
/// Transmit ring: its length in bytes, a multiple of 128, SDM §13.4.38.
pub const TDLEN: u32 = 0x3808;
/// Transmit ring: the next descriptor that the device takes, SDM §13.4.39.
pub const TDH: u32 = 0x3810;
/// Transmit ring: the first descriptor that the device does not have,
/// SDM §13.4.40.
pub const TDT: u32 = 0x3818;
/// How long an interrupt is delayed for descriptors that want that
/// ([`delay_nanos`]), started anew by each, SDM §13.4.41.
pub const TIDV: u32 = 0x3820;
/// Thresholds of the transmit ring ([`txdctl`]), SDM §13.4.43.
pub const TXDCTL: u32 = 0x3828;
/// How long it is delayed at most ([`delay_nanos`]), SDM §13.4.44.
pub const TADV: u32 = 0x382c;
/// Padding and threshold of segmentation, SDM §13.4.45.
pub const TSPMT: u32 = 0x3830;
/// Receive checksums ([`RxChecksum`]).
pub const RXCSUM: u32 = 0x5000;
/// Multicast table: [`MTA_WORDS`] words, SDM §13.5.1.
pub const MTA: u32 = 0x5200;
/// Words of the multicast table: one bit for each [`multicast_hash`].
pub const MTA_WORDS: usize = 128;
/// Receive addresses: [`RECEIVE_ADDRESSES`] pairs of words, SDM §13.5.2. The
/// first word has the first four bytes of an address.
pub const RAL: u32 = 0x5400;
/// The second word of the first receive address: its last two bytes, and
/// [`RAH_AV`], SDM §13.5.3.
pub const RAH: u32 = 0x5404;
/// Addresses that are received.
pub const RECEIVE_ADDRESSES: usize = 16;
/// In [`RAH`]: the address counts.
pub const RAH_AV: u32 = 1 << 31;
/// VLAN table: [`VFTA_WORDS`] words, SDM §13.5.4.
pub const VFTA: u32 = 0x5600;
/// Words of the VLAN table: one bit for each identifier.
pub const VFTA_WORDS: usize = 128;
/// Wake-up control, SDM §13.6.1.
pub const WUC: u32 = 0x5800;
/// What wakes up, SDM §13.6.2.
pub const WUFC: u32 = 0x5808;
/// What woke up, SDM §13.6.3.
pub const WUS: u32 = 0x5810;
/// Management control.
pub const MANC: u32 = 0x5820;

/// Statistics, which reading clears, and which stop at their largest value
/// (SDM §13.7). Those of 64 bits are two registers; reading the high one
/// clears both.
pub mod statistic {
    /// The first of them, and [`CRCERRS`].
    pub const FIRST: u32 = CRCERRS;
    /// Frames with a wrong check sequence.
    pub const CRCERRS: u32 = 0x4000;
    /// Frames with a receive error.
    pub const RXERRC: u32 = 0x400c;
    /// Frames that found no room in the packet buffer.
    pub const MPC: u32 = 0x4010;
    /// Frames whose length is not what they say.
    pub const RLEC: u32 = 0x4040;
    /// Frames received of 64 bytes or fewer; the classes up to 127, 255, 511,
    /// 1023 and above follow.
    pub const PRC64: u32 = 0x405c;
    /// Frames received without error.
    pub const GPRC: u32 = 0x4074;
    /// Broadcast frames of those.
    pub const BPRC: u32 = 0x4078;
    /// Multicast frames of those.
    pub const MPRC: u32 = 0x407c;
    /// Frames sent.
    pub const GPTC: u32 = 0x4080;
    /// Bytes received without error, 64 bits.
    pub const GORCL: u32 = 0x4088;
    /// Its high half.
    pub const GORCH: u32 = 0x408c;
    /// Bytes sent, 64 bits.
    pub const GOTCL: u32 = 0x4090;
    /// Its high half.
    pub const GOTCH: u32 = 0x4094;
    /// Times that a frame found no descriptor.
    pub const RNBC: u32 = 0x40a0;
    /// Frames that were too short.
    pub const RUC: u32 = 0x40a4;
    /// Frames that were too long.
    pub const ROC: u32 = 0x40ac;
    /// Bytes of all frames received, 64 bits.
    pub const TORL: u32 = 0x40c0;
    /// Its high half.
    pub const TORH: u32 = 0x40c4;
    /// Bytes of all frames sent, 64 bits.
    pub const TOTL: u32 = 0x40c8;
    /// Its high half.
    pub const TOTH: u32 = 0x40cc;
    /// All frames received.
    pub const TPR: u32 = 0x40d0;
    /// All frames sent.
    pub const TPT: u32 = 0x40d4;
    /// Frames sent of 64 bytes or fewer; the classes up to 127, 255, 511, 1023
    /// and above follow.
    pub const PTC64: u32 = 0x40d8;
    /// Multicast frames sent.
    pub const MPTC: u32 = 0x40f0;
    /// Broadcast frames sent.
    pub const BPTC: u32 = 0x40f4;
    /// Frames cut into segments.
    pub const TSCTC: u32 = 0x40f8;
    /// Frames that were to be cut and could not be.
    pub const TSCTFC: u32 = 0x40fc;
    /// The last of them, and [`TSCTFC`].
    pub const LAST: u32 = TSCTFC;
    /// How many registers there are from [`FIRST`] to [`LAST`].
    pub const COUNT: usize = ((LAST - FIRST) / 4 + 1) as usize;

    /// Which of the six classes of [`PRC64`] and [`PTC64`] a frame belongs to,
    /// by its length with check sequence.
    #[must_use]
    pub const fn size_class(bytes: u32) -> u32 {
        match bytes {
            0..=64 => 0,
            65..=127 => 1,
            128..=255 => 2,
            256..=511 => 3,
            512..=1023 => 4,
            _ => 5,
        }
    }
}

/// Fields of [`EERD`] (SDM §13.4.4).
pub mod eerd {
    /// Reads the word.
    pub const START: u32 = 1 << 0;
    /// The word is there.
    pub const DONE: u32 = 1 << 4;
    /// Where the number of the word stands, 8 bits.
    pub const ADDRESS_SHIFT: u32 = 8;
    /// Where the word stands, 16 bits.
    pub const DATA_SHIFT: u32 = 16;
}

/// Fields of [`TXDCTL`] (SDM §13.4.43).
pub mod txdctl {
    /// Where the threshold stands below which the ring is low
    /// ([`Cause::TXD_LOW`](super::Cause::TXD_LOW)): 7 bits, in units of 8
    /// descriptors.
    pub const LWTHRESH_SHIFT: u32 = 25;
    /// Where the write-back threshold stands: 6 bits.
    pub const WTHRESH_SHIFT: u32 = 16;
    /// Thresholds count descriptors and not cache lines.
    pub const GRAN: u32 = 1 << 24;
}

/// In [`RDTR`] and [`TIDV`]: the delayed interrupt comes now.
pub const FPD: u32 = 1 << 31;

bitflags::bitflags! {
    /// Device control (SDM §13.4.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Ctrl: u32 {
        /// Full duplex.
        const FD = 1 << 0;
        /// Link reset.
        const LRST = 1 << 3;
        /// Speed is detected.
        const ASDE = 1 << 5;
        /// Sets the link up.
        const SLU = 1 << 6;
        /// Inverts the loss-of-signal wire.
        const ILOS = 1 << 7;
        /// Speed, low bit: 10 for 1000 Mb/s.
        const SPEED_LOW = 1 << 8;
        /// Speed, high bit.
        const SPEED_HIGH = 1 << 9;
        /// Speed is as said.
        const FRCSPD = 1 << 11;
        /// Duplex is as said.
        const FRCDPX = 1 << 12;
        /// Resets everything but the PHY; clears itself.
        const RST = 1 << 26;
        /// Obeys pause frames.
        const RFCE = 1 << 27;
        /// Sends pause frames.
        const TFCE = 1 << 28;
        /// Takes VLAN tags out of frames that are received, and allows
        /// [`TxCommand::VLE`](super::TxCommand::VLE).
        const VME = 1 << 30;
        /// Resets the PHY while set.
        const PHY_RST = 1 << 31;
        const _ = !0;
    }

    /// Device status (SDM §13.4.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Status: u32 {
        /// Full duplex.
        const FD = 1 << 0;
        /// Link up.
        const LU = 1 << 1;
        /// Sending is paused.
        const TXOFF = 1 << 4;
        /// Fibre.
        const TBIMODE = 1 << 5;
        /// 100 Mb/s.
        const SPEED_100 = 1 << 6;
        /// 1000 Mb/s.
        const SPEED_1000 = 1 << 7;
        /// Detected speed, high bit: 1000 Mb/s.
        const ASDV_1000 = 1 << 9;
        /// On a bus of 66 MHz.
        const PCI66 = 1 << 11;
        const _ = !0;
    }

    /// The wires of the EEPROM (SDM §13.4.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Eecd: u32 {
        /// Clock.
        const SK = 1 << 0;
        /// Chip select.
        const CS = 1 << 1;
        /// To the EEPROM.
        const DI = 1 << 2;
        /// From the EEPROM.
        const DO = 1 << 3;
        /// Writes to flash are off.
        const FWE_DISABLED = 1 << 4;
        /// The driver wants the wires.
        const REQ = 1 << 6;
        /// The driver has the wires.
        const GNT = 1 << 7;
        /// There is an EEPROM.
        const PRES = 1 << 8;
        /// It has 256 words and not 64.
        const SIZE = 1 << 9;
        const _ = !0;
    }

    /// Access to registers of the PHY (SDM §13.4.7).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Mdic: u32 {
        /// Writes.
        const OP_WRITE = 1 << 26;
        /// Reads.
        const OP_READ = 1 << 27;
        /// The access is over.
        const READY = 1 << 28;
        /// The end of the access interrupts ([`Cause::MDAC`]).
        const INTERRUPT = 1 << 29;
        /// There is no such register.
        const ERROR = 1 << 30;
        const _ = !0;
    }

    /// Why the device interrupts (SDM §13.4.17).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Cause: u32 {
        /// Transmit descriptors were written back.
        const TXDW = 1 << 0;
        /// The transmit ring is empty.
        const TXQE = 1 << 1;
        /// The link went up or down.
        const LSC = 1 << 2;
        /// Sequence error.
        const RXSEQ = 1 << 3;
        /// Few receive descriptors are left ([`Rctl::min_threshold`]).
        const RXDMT0 = 1 << 4;
        /// A frame found no receive descriptor, or no room.
        const RXO = 1 << 6;
        /// Frames were received, and the delay is over.
        const RXT0 = 1 << 7;
        /// An access to the PHY is over.
        const MDAC = 1 << 9;
        /// Ordered sets of a fibre.
        const RXCFG = 1 << 10;
        /// The PHY interrupts.
        const PHYINT = 1 << 12;
        /// Few transmit descriptors are left in the ring.
        const TXD_LOW = 1 << 15;
        /// A small frame was received.
        const SRPD = 1 << 16;
        /// The interrupt was asserted: of chips after this one, and of no use
        /// here.
        const INT_ASSERTED = 1 << 31;
        const _ = !0;
    }

    /// Receive control (SDM §13.4.22).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Rctl: u32 {
        /// Receives.
        const EN = 1 << 1;
        /// Takes damaged frames.
        const SBP = 1 << 2;
        /// Takes all frames to one station.
        const UPE = 1 << 3;
        /// Takes all frames to groups.
        const MPE = 1 << 4;
        /// Takes frames of more than 1522 bytes.
        const LPE = 1 << 5;
        /// Loop-back, low bit.
        const LBM_LOW = 1 << 6;
        /// Loop-back, high bit.
        const LBM_HIGH = 1 << 7;
        /// Threshold of [`Cause::RXDMT0`], low bit; see
        /// [`min_threshold`](Self::min_threshold).
        const RDMTS_LOW = 1 << 8;
        /// High bit.
        const RDMTS_HIGH = 1 << 9;
        /// Which bits of an address are the index of the multicast table, low
        /// bit; see [`multicast_hash`].
        const MO_LOW = 1 << 12;
        /// High bit.
        const MO_HIGH = 1 << 13;
        /// Takes broadcast frames.
        const BAM = 1 << 15;
        /// Size of buffers, low bit; see [`buffer_bytes`].
        const BSIZE_LOW = 1 << 16;
        /// High bit.
        const BSIZE_HIGH = 1 << 17;
        /// Drops frames of VLANs that the table does not have.
        const VFE = 1 << 18;
        /// Compares the canonical form bit of VLAN tags.
        const CFIEN = 1 << 19;
        /// What it is to be.
        const CFI = 1 << 20;
        /// Drops pause frames.
        const DPF = 1 << 22;
        /// Passes control frames.
        const PMCF = 1 << 23;
        /// Buffers are 16 times as large.
        const BSEX = 1 << 25;
        /// Frames come without their check sequence.
        const SECRC = 1 << 26;
        const _ = !0;
    }

    /// Transmit control (SDM §13.4.33).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Tctl: u32 {
        /// Sends.
        const EN = 1 << 1;
        /// Pads short frames.
        const PSP = 1 << 3;
        /// Stops after the frame at hand.
        const SWXOFF = 1 << 22;
        /// Sends again after a late collision.
        const RTLC = 1 << 24;
        /// Does not send again after an underrun.
        const NRTU = 1 << 25;
        const _ = !0;
    }

    /// Receive checksums; the low byte is where the packet
    /// checksum begins.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct RxChecksum: u32 {
        /// IPv4 headers are checked.
        const IPOFL = 1 << 8;
        /// TCP and UDP are checked.
        const TUOFL = 1 << 9;
        /// The same over IPv6.
        const IPV6OFL = 1 << 10;
        const _ = !0;
    }
}

impl Ctrl {
    /// Where the speed stands: 2 bits, as in [`Status`].
    pub const SPEED_SHIFT: u32 = 8;
}

impl Mdic {
    /// Where the data stands: the low 16 bits.
    pub const DATA: u32 = 0xffff;
    /// Where the number of the register stands, 5 bits.
    pub const REGISTER_SHIFT: u32 = 16;
    /// Where the address of the PHY stands, 5 bits.
    pub const PHY_SHIFT: u32 = 21;

    /// An access to a register of the internal PHY.
    #[must_use]
    pub const fn access(op: Self, register: u8, data: u16) -> Self {
        Self::from_bits_retain(
            op.bits()
                | (super::phy::ADDRESS as u32) << Self::PHY_SHIFT
                | (register as u32 & 0x1f) << Self::REGISTER_SHIFT
                | data as u32,
        )
    }

    /// The register that is meant.
    #[must_use]
    pub const fn register(self) -> u8 {
        (self.bits() >> Self::REGISTER_SHIFT) as u8 & 0x1f
    }

    /// The PHY that is meant.
    #[must_use]
    pub const fn phy(self) -> u8 {
        (self.bits() >> Self::PHY_SHIFT) as u8 & 0x1f
    }

    /// The data.
    #[must_use]
    pub const fn data(self) -> u16 {
        self.bits() as u16
    }
}

impl Rctl {
    /// How many descriptors of a ring of `count` are few
    /// ([`Cause::RXDMT0`]): a half, a quarter or an eighth. The fourth value
    /// is reserved, and taken as an eighth.
    #[must_use]
    pub const fn min_threshold(self, count: u32) -> u32 {
        match self.bits() >> 8 & 3 {
            0 => count / 2,
            1 => count / 4,
            _ => count / 8,
        }
    }
}

impl RxChecksum {
    /// Where the packet checksum begins (PCSS).
    #[must_use]
    pub const fn start(self) -> u8 {
        self.bits() as u8
    }
}

/// Bytes of each receive buffer. Reserved values (2048 times 16) are taken as
/// without the extension.
#[must_use]
pub const fn buffer_bytes(rctl: Rctl) -> u32 {
    let bytes = 2048 >> (rctl.bits() >> 16 & 3);
    if rctl.contains(Rctl::BSEX) && bytes != 2048 {
        bytes * 16
    } else {
        bytes
    }
}

/// The least time between interrupts that a value of [`ITR`] asks for, in
/// nanoseconds; 0 for none (SDM §13.4.18).
#[must_use]
pub const fn interval_nanos(itr: u32) -> u64 {
    (itr & 0xffff) as u64 * 256
}

/// A delay in nanoseconds, of [`RDTR`], [`RADV`], [`TIDV`] or [`TADV`]; 0 for
/// none. They count 1.024 µs.
#[must_use]
pub const fn delay_nanos(value: u32) -> u64 {
    (value & 0xffff) as u64 * 1024
}

/// The bit of the multicast table that an address belongs to (SDM §13.5.1):
/// word `hash / 32`, bit `hash % 32`.
#[must_use]
pub const fn multicast_hash(address: MacAddress, rctl: Rctl) -> u16 {
    let [.., low, high] = address.0;
    let word = (high as u16) << 8 | low as u16;
    let shift = match rctl.bits() >> 12 & 3 {
        0 => 4,
        1 => 3,
        2 => 2,
        _ => 0,
    };
    word >> shift & 0xfff
}

/// The bit of the VLAN table that an identifier belongs to (SDM §13.5.4).
#[must_use]
pub const fn vlan_hash(tag: u16) -> u16 {
    tag & 0xfff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_have_the_sizes_of_the_manual() {
        let sizes = |bsex| {
            [0, 1, 2, 3].map(|bsize: u32| buffer_bytes(Rctl::from_bits_retain(bsize << 16) | bsex))
        };
        assert_eq!(sizes(Rctl::empty()), [2048, 1024, 512, 256]);
        assert_eq!(sizes(Rctl::BSEX), [2048, 16384, 8192, 4096]);
    }

    #[test]
    fn intervals_and_delays_are_in_the_units_of_the_manual() {
        // 8000 interrupts a second, as the manual counts them: 125 µs.
        assert_eq!(interval_nanos(488), 124_928);
        assert_eq!(interval_nanos(0xabcd_0000), 0);
        assert_eq!(delay_nanos(FPD | 8), 8192);
    }

    #[test]
    fn the_multicast_example_of_the_manual() {
        // SDM §13.5.1: 12:34:56:78:9a:bc, of which 0xbc9a is looked at.
        let address = MacAddress([0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc]);
        let hash = |mo: u32| multicast_hash(address, Rctl::from_bits_retain(mo << 12));
        assert_eq!(
            [hash(0), hash(1), hash(2), hash(3)],
            [0xbc9, 0x793, 0xf26, 0xc9a]
        );
    }

    #[test]
    fn thresholds_are_parts_of_a_ring() {
        let part = |rdmts: u32| Rctl::from_bits_retain(rdmts << 8).min_threshold(256);
        assert_eq!([part(0), part(1), part(2), part(3)], [128, 64, 32, 32]);
    }

    #[test]
    fn an_access_to_the_phy_is_read_as_written() {
        let mdic = Mdic::access(Mdic::OP_WRITE, 0x11, 0xabcd);
        assert_eq!(
            (mdic.register(), mdic.phy(), mdic.data()),
            (0x11, 1, 0xabcd)
        );
        assert!(mdic.contains(Mdic::OP_WRITE) && !mdic.contains(Mdic::OP_READ));
    }
}
