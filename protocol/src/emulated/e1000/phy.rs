//! Registers of the internal PHY, by number: those of IEEE 802.3 §22.2.4 and
//! §40.5.1, and those that Marvell's PHYs of this family add (SDM §13.4.7.1).

/// Control ([`Control`]).
pub const CONTROL: u8 = 0;
/// Status ([`Status`]).
pub const STATUS: u8 = 1;
/// Identifier, high word.
pub const ID1: u8 = 2;
/// Identifier, low word, with a revision in the lowest four bits.
pub const ID2: u8 = 3;
/// What is offered.
pub const AUTONEG_ADVERTISEMENT: u8 = 4;
/// What the link partner offers.
pub const LINK_PARTNER_ABILITY: u8 = 5;
/// How negotiation went.
pub const AUTONEG_EXPANSION: u8 = 6;
/// Next page to be sent.
pub const NEXT_PAGE: u8 = 7;
/// Next page of the link partner.
pub const LINK_PARTNER_NEXT_PAGE: u8 = 8;
/// 1000BASE-T control.
pub const GIGABIT_CONTROL: u8 = 9;
/// 1000BASE-T status.
pub const GIGABIT_STATUS: u8 = 10;
/// Extended status.
pub const EXTENDED_STATUS: u8 = 15;
/// Control of this family.
pub const SPECIFIC_CONTROL: u8 = 16;
/// Status of this family ([`SpecificStatus`]).
pub const SPECIFIC_STATUS: u8 = 17;
/// Which events interrupt.
pub const INTERRUPT_ENABLE: u8 = 18;
/// Events.
pub const INTERRUPT_STATUS: u8 = 19;
/// More control of this family.
pub const EXTENDED_SPECIFIC_CONTROL: u8 = 20;
/// Receive errors.
pub const RECEIVE_ERRORS: u8 = 21;
/// Registers there are room for.
pub const REGISTERS: usize = 32;

/// The address of the internal PHY.
pub const ADDRESS: u8 = 1;
/// The identifier that drivers expect of an 82540EM (Linux calls it
/// M88E1011_I), without revision.
pub const ID: u32 = 0x0141_0c20;
/// Bits of the identifier that are a revision.
pub const REVISION_MASK: u32 = 0xf;

/// In [`GIGABIT_CONTROL`]: offers 1000BASE-T, full duplex.
pub const GIGABIT_ADVERTISE_FULL: u16 = 1 << 9;
/// In [`GIGABIT_STATUS`]: the link partner can do 1000BASE-T, half and full
/// duplex.
pub const GIGABIT_PARTNER: u16 = 0b11 << 10;
/// In [`GIGABIT_STATUS`]: both receivers are fine.
pub const GIGABIT_RECEIVERS: u16 = 0b11 << 12;
/// In [`EXTENDED_STATUS`]: 1000BASE-T, half and full duplex.
pub const EXTENDED_GIGABIT: u16 = 0b11 << 12;
/// In [`AUTONEG_EXPANSION`]: the link partner negotiates.
pub const EXPANSION_PARTNER: u16 = 1 << 0;
/// In [`AUTONEG_ADVERTISEMENT`] and [`LINK_PARTNER_ABILITY`]: 10BASE-T and
/// 100BASE-TX, half and full duplex.
pub const ABILITY_10_100: u16 = 0b1111 << 5;
/// The same: pause frames, both directions.
pub const ABILITY_PAUSE: u16 = 0b11 << 10;
/// In [`LINK_PARTNER_ABILITY`]: it has seen what is offered.
pub const ABILITY_ACKNOWLEDGED: u16 = 1 << 14;
/// The same: IEEE 802.3.
pub const ABILITY_SELECTOR: u16 = 1;

bitflags::bitflags! {
    /// Control (IEEE 802.3 §22.2.4.1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Control: u16 {
        /// Speed, high bit: 10 for 1000 Mb/s.
        const SPEED_HIGH = 1 << 6;
        /// Full duplex.
        const DUPLEX = 1 << 8;
        /// Negotiates anew; clears itself.
        const RESTART_AUTONEG = 1 << 9;
        /// Isolated from the controller.
        const ISOLATE = 1 << 10;
        /// Off.
        const POWER_DOWN = 1 << 11;
        /// Negotiates.
        const AUTONEG = 1 << 12;
        /// Speed, low bit.
        const SPEED_LOW = 1 << 13;
        /// Returns what it is sent.
        const LOOPBACK = 1 << 14;
        /// Resets; clears itself.
        const RESET = 1 << 15;
        const _ = !0;
    }

    /// Status (IEEE 802.3 §22.2.4.2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Status: u16 {
        /// There are registers beyond the first two.
        const EXTENDED = 1 << 0;
        /// There is a link; once it was lost, 0 until it was read.
        const LINK = 1 << 2;
        /// Can negotiate.
        const AUTONEG_ABILITY = 1 << 3;
        /// Negotiation is over.
        const AUTONEG_COMPLETE = 1 << 5;
        /// Takes accesses without preamble.
        const PREAMBLE_SUPPRESSION = 1 << 6;
        /// There is an extended status.
        const EXTENDED_STATUS = 1 << 8;
        /// 10BASE-T, half duplex.
        const HALF_10 = 1 << 11;
        /// 10BASE-T, full duplex.
        const FULL_10 = 1 << 12;
        /// 100BASE-X, half duplex.
        const HALF_100 = 1 << 13;
        /// 100BASE-X, full duplex.
        const FULL_100 = 1 << 14;
        const _ = !0;
    }

    /// Status of this family of PHYs.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct SpecificStatus: u16 {
        /// There is a link.
        const LINK = 1 << 10;
        /// Speed and duplex are settled.
        const RESOLVED = 1 << 11;
        /// Full duplex.
        const DUPLEX = 1 << 13;
        /// 1000 Mb/s.
        const SPEED_1000 = 1 << 15;
        const _ = !0;
    }
}
