//! The internal PHY, behind MDIC. Negotiation with what the link is plugged
//! into is over as soon as it begins: 1000 Mb/s, full duplex.
#![forbid(unsafe_code)]

use pvkit_protocol::emulated::e1000::phy::{self, Control, SpecificStatus, Status};

/// What the control register holds after a reset.
const CONTROL: Control = Control::AUTONEG
    .union(Control::DUPLEX)
    .union(Control::SPEED_HIGH);

/// What a write came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// Nothing that the controller sees.
    Stored,
    /// The link is made anew.
    Renegotiated,
}

/// Registers of the PHY.
#[derive(Debug)]
pub(super) struct Phy {
    stored: [u16; phy::REGISTERS],
    control: Control,
    /// The link was lost since the status was read.
    lost: bool,
}

impl Phy {
    pub(super) fn new() -> Self {
        let mut phy = Self {
            stored: [0; phy::REGISTERS],
            control: CONTROL,
            lost: false,
        };
        phy.reset();
        phy
    }

    /// As after power-on.
    pub(super) fn reset(&mut self) {
        self.stored = [0; phy::REGISTERS];
        self.control = CONTROL;
        for (register, value) in [
            (
                phy::AUTONEG_ADVERTISEMENT,
                phy::ABILITY_10_100 | phy::ABILITY_SELECTOR,
            ),
            (phy::GIGABIT_CONTROL, phy::GIGABIT_ADVERTISE_FULL),
        ] {
            self.store(register, value);
        }
    }

    fn store(&mut self, register: u8, value: u16) {
        if let Some(place) = self.stored.get_mut(usize::from(register)) {
            *place = value;
        }
    }

    /// Whether it is on: without, there is no link.
    pub(super) fn is_on(&self) -> bool {
        !self.control.contains(Control::POWER_DOWN)
    }

    /// The link was lost.
    pub(super) fn lose_link(&mut self) {
        self.lost = true;
    }

    /// A read of register 0 to 31, while there is a link or not.
    pub(super) fn read(&mut self, register: u8, link: bool) -> u16 {
        let link = link && self.is_on();
        let if_link = |value| if link { value } else { 0 };
        match register {
            phy::CONTROL => self.control.bits(),
            phy::STATUS => {
                let mut status = Status::EXTENDED
                    | Status::AUTONEG_ABILITY
                    | Status::PREAMBLE_SUPPRESSION
                    | Status::EXTENDED_STATUS
                    | Status::HALF_10
                    | Status::FULL_10
                    | Status::HALF_100
                    | Status::FULL_100;
                let lost = std::mem::take(&mut self.lost);
                status.set(Status::LINK, link && !lost);
                status.set(Status::AUTONEG_COMPLETE, link);
                status.bits()
            }
            phy::ID1 => (phy::ID >> 16) as u16,
            phy::ID2 => phy::ID as u16,
            phy::LINK_PARTNER_ABILITY => {
                if_link(phy::ABILITY_10_100 | phy::ABILITY_SELECTOR | phy::ABILITY_ACKNOWLEDGED)
            }
            phy::AUTONEG_EXPANSION => if_link(phy::EXPANSION_PARTNER),
            phy::GIGABIT_STATUS => if_link(phy::GIGABIT_PARTNER | phy::GIGABIT_RECEIVERS),
            phy::EXTENDED_STATUS => phy::EXTENDED_GIGABIT,
            phy::SPECIFIC_STATUS => {
                let status = SpecificStatus::LINK
                    | SpecificStatus::RESOLVED
                    | SpecificStatus::DUPLEX
                    | SpecificStatus::SPEED_1000;
                if_link(status.bits())
            }
            // Nothing happens that it would interrupt for.
            phy::INTERRUPT_STATUS | phy::RECEIVE_ERRORS => 0,
            other => self.stored.get(usize::from(other)).copied().unwrap_or(0),
        }
    }

    /// A write of register 0 to 31.
    pub(super) fn write(&mut self, register: u8, value: u16) -> Written {
        if register != phy::CONTROL {
            self.store(register, value);
            return Written::Stored;
        }
        let value = Control::from_bits_retain(value);
        let was_on = self.is_on();
        let resets = value.contains(Control::RESET);
        if resets {
            self.reset();
        } else {
            self.control = value - Control::RESTART_AUTONEG;
        }
        let restarts = resets || value.contains(Control::RESTART_AUTONEG) || !was_on;
        if restarts && self.is_on() {
            Written::Renegotiated
        } else {
            Written::Stored
        }
    }
}
