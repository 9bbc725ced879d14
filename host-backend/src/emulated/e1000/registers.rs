//! The registers as the driver sees them.
#![forbid(unsafe_code)]

use super::eeprom::Eeprom;
use super::interrupt::Timer;
use super::phy::{Phy, Written};
use super::settings::Settings;
use super::shared::{Plane, Shared, wake};
use super::statistics::Statistics;
use crate::sync::lock;
use pvkit_protocol::emulated::e1000::register::{self as reg, FPD, statistic};
use pvkit_protocol::emulated::e1000::{
    Cause, Ctrl, Eecd, Mdic, Rctl, RxChecksum, Status, Tctl, phy,
};
use pvkit_protocol::frame::MacAddress;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Where RAL, MTA and the like have their words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    Addresses,
    Multicast,
    Vlans,
}

impl Table {
    /// The table and the word that an offset means.
    fn find(offset: u32) -> Option<(Self, usize)> {
        for (table, first, words) in [
            (Self::Addresses, reg::RAL, 2 * reg::RECEIVE_ADDRESSES),
            (Self::Multicast, reg::MTA, reg::MTA_WORDS),
            (Self::Vlans, reg::VFTA, reg::VFTA_WORDS),
        ] {
            let Some(at) = offset.checked_sub(first) else {
                continue;
            };
            let index = (at / 4) as usize;
            if index < words {
                return Some((table, index));
            }
        }
        None
    }

    fn word(self, settings: &mut Settings, index: usize) -> Option<&mut u32> {
        match self {
            Self::Addresses => settings.address_word(index),
            Self::Multicast => settings.multicast_word(index),
            Self::Vlans => settings.vlan_word(index),
        }
    }
}

/// Registers that hold what was written, and do nothing: flow control, wake-up
/// and what concerns wires. Last, what they hold after a reset.
const STORED: [(u32, u32); 22] = [
    (reg::CTRL_EXT, 0),
    (reg::FLA, 0),
    (reg::FCAL, 0),
    (reg::FCAH, 0),
    (reg::FCT, 0),
    (reg::FCTTV, 0),
    (reg::TXCW, 0),
    (reg::TIPG, 0),
    (reg::AIT, 0),
    (reg::LEDCTL, 0x0706_8302),
    (reg::PBA, 0x0010_0030),
    (reg::FCRTL, 0),
    (reg::FCRTH, 0),
    (reg::RXDCTL, 1 << 16 | reg::txdctl::GRAN),
    (reg::RSRPD, 0),
    (reg::TSPMT, 0x0100_0400),
    (reg::WUC, 0),
    (reg::WUFC, 0),
    (reg::WUS, 0),
    (reg::MANC, 0),
    (reg::RXCW, 0),
    (reg::EERD, 0),
];

/// CTRL after a reset.
const CTRL: Ctrl = Ctrl::FD.union(Ctrl::SLU).union(Ctrl::SPEED_HIGH);

/// The registers.
#[derive(Debug)]
pub(super) struct Registers {
    shared: Arc<Shared>,
    mac: MacAddress,
    ctrl: Ctrl,
    mdic: Mdic,
    stored: [u32; STORED.len()],
    eeprom: Eeprom,
    phy: Phy,
    /// Frames that the link had lost when that was last asked.
    missed: u64,
}

impl Registers {
    pub(super) fn new(shared: Arc<Shared>, mac: MacAddress) -> Self {
        Self {
            missed: 0,
            shared,
            mac,
            ctrl: CTRL,
            mdic: Mdic::READY,
            stored: STORED.map(|(_, value)| value),
            eeprom: Eeprom::new(mac),
            phy: Phy::new(),
        }
    }

    fn stored(&mut self, offset: u32) -> Option<&mut u32> {
        let index = STORED.iter().position(|(at, _)| *at == offset)?;
        self.stored.get_mut(index)
    }

    /// A link, through a PHY that is on.
    fn link(&self) -> bool {
        self.shared.is_up() && self.phy.is_on()
    }

    fn status(&self) -> Status {
        let mut status = Status::FD | Status::SPEED_1000 | Status::ASDV_1000;
        status.set(Status::LU, self.link());
        status
    }

    /// Wakes the worker if there is a time to wait for, which may be new.
    fn follow_deadline(&self) {
        if self.shared.interrupts.is_waiting() {
            self.shared.wake(wake::ANY);
        }
    }

    /// A read of 32 bits.
    pub(super) fn read(&mut self, offset: u32) -> u32 {
        let shared = self.shared.clone();
        match offset {
            reg::ICR => shared.interrupts.take().bits(),
            reg::IMS => shared.interrupts.mask().bits(),
            reg::TDH => shared.tx_head.load(Ordering::Acquire),
            reg::TDT => shared.tx_tail.load(Ordering::Relaxed),
            reg::RDH => shared.rx_head.load(Ordering::Acquire),
            reg::RDT => shared.rx_tail.load(Ordering::Relaxed),
            reg::STATUS => self.status().bits(),
            reg::CTRL | reg::CTRL_DUP => self.ctrl.bits(),
            reg::EECD => self.eeprom.wires().bits(),
            reg::MDIC => self.mdic.bits(),
            reg::ITR => shared.interrupts.interval(),
            reg::RDTR => shared.interrupts.delays(Timer::Receive).0,
            reg::RADV => shared.interrupts.delays(Timer::Receive).1,
            reg::TIDV => shared.interrupts.delays(Timer::Transmit).0,
            reg::TADV => shared.interrupts.delays(Timer::Transmit).1,
            statistic::MPC => self.missed(),
            offset if Statistics::has(offset) => lock(&shared.statistics).take(offset),
            offset => self.read_setting(offset),
        }
    }

    fn read_setting(&mut self, offset: u32) -> u32 {
        if let Some(value) = self.stored(offset) {
            return *value;
        }
        let shared = self.shared.clone();
        // The tables are copied for a read, which nobody does often.
        let mut settings = shared.settings(Settings::clone);
        match offset {
            reg::VET => u32::from(settings.vlan_type),
            reg::RCTL => settings.rctl.bits(),
            reg::TCTL => settings.tctl.bits(),
            reg::TXDCTL => settings.txdctl,
            reg::RXCSUM => settings.rx_checksum.bits(),
            reg::RDBAL => settings.rx.base as u32,
            reg::RDBAH => (settings.rx.base >> 32) as u32,
            reg::RDLEN => settings.rx.bytes,
            reg::TDBAL => settings.tx.base as u32,
            reg::TDBAH => (settings.tx.base >> 32) as u32,
            reg::TDLEN => settings.tx.bytes,
            offset => Table::find(offset)
                .and_then(|(table, index)| table.word(&mut settings, index).copied())
                .unwrap_or(0),
        }
    }

    /// Frames that the link lost because there was no room for them.
    fn missed(&mut self) -> u32 {
        let now = self.shared.link_counters.receive_drops.get();
        let new = now.wrapping_sub(std::mem::replace(&mut self.missed, now));
        u32::try_from(new).unwrap_or(u32::MAX)
    }

    /// A write of 32 bits.
    pub(super) fn write(&mut self, offset: u32, value: u32) {
        let shared = self.shared.clone();
        let interrupts = &shared.interrupts;
        match offset {
            reg::TDT => {
                shared.tx_tail.store(value & 0xffff, Ordering::Release);
                shared.wake(wake::TRANSMIT);
            }
            reg::RDT => {
                shared.rx_tail.store(value & 0xffff, Ordering::Release);
                shared.wake(wake::RECEIVE);
            }
            reg::IMS => {
                interrupts.enable(Cause::from_bits_retain(value));
                self.follow_deadline();
            }
            reg::IMC => interrupts.disable(Cause::from_bits_retain(value)),
            reg::ICR => interrupts.clear(Cause::from_bits_retain(value)),
            reg::ICS => {
                interrupts.raise(Cause::from_bits_retain(value));
                self.follow_deadline();
            }
            reg::ITR => {
                interrupts.set_interval(value);
                self.follow_deadline();
            }
            reg::RDTR => self.set_delay(Timer::Receive, value),
            reg::TIDV => self.set_delay(Timer::Transmit, value),
            reg::RADV => interrupts.set_absolute(Timer::Receive, value),
            reg::TADV => interrupts.set_absolute(Timer::Transmit, value),
            reg::CTRL | reg::CTRL_DUP => self.write_ctrl(Ctrl::from_bits_retain(value)),
            reg::EECD => self.eeprom.set_wires(Eecd::from_bits_retain(value)),
            reg::EERD => {
                let word = self.eeprom.read_word(value);
                if let Some(place) = self.stored(reg::EERD) {
                    *place = word;
                }
            }
            reg::MDIC => self.write_mdic(Mdic::from_bits_retain(value)),
            // Read only.
            reg::STATUS | reg::RXCW => {}
            offset => self.write_setting(offset, value),
        }
    }

    fn set_delay(&self, timer: Timer, value: u32) {
        self.shared.interrupts.set_delay(timer, value);
        if value & FPD != 0 {
            self.shared.interrupts.flush(timer);
        }
        self.follow_deadline();
    }

    fn write_setting(&mut self, offset: u32, value: u32) {
        if let Some(place) = self.stored(offset) {
            *place = value;
            return;
        }
        let shared = self.shared.clone();
        match offset {
            reg::VET => shared.change(|settings| settings.vlan_type = value as u16),
            reg::RXCSUM => {
                shared
                    .change(|settings| settings.rx_checksum = RxChecksum::from_bits_retain(value));
            }
            reg::TXDCTL => shared.change(|settings| settings.txdctl = value),
            reg::RCTL => {
                let rctl = Rctl::from_bits_retain(value);
                let before = shared.change(|settings| std::mem::replace(&mut settings.rctl, rctl));
                if (before ^ rctl).contains(Rctl::EN) {
                    self.restart_receive();
                }
            }
            reg::TCTL => {
                let tctl = Tctl::from_bits_retain(value);
                let before = shared.change(|settings| std::mem::replace(&mut settings.tctl, tctl));
                if (before ^ tctl).contains(Tctl::EN) {
                    self.restart_transmit();
                }
            }
            reg::RDBAL | reg::RDBAH | reg::RDLEN => {
                shared.change(|settings| match offset {
                    reg::RDBAL => settings.rx.set_low(value),
                    reg::RDBAH => settings.rx.set_high(value),
                    _ => settings.rx.set_bytes(value),
                });
                self.restart_receive();
            }
            reg::TDBAL | reg::TDBAH | reg::TDLEN => {
                shared.change(|settings| match offset {
                    reg::TDBAL => settings.tx.set_low(value),
                    reg::TDBAH => settings.tx.set_high(value),
                    _ => settings.tx.set_bytes(value),
                });
                self.restart_transmit();
            }
            reg::RDH => {
                self.restart_receive_at(Some(value & 0xffff));
            }
            reg::TDH => {
                self.restart_transmit_at(Some(value & 0xffff));
            }
            offset => {
                if let Some((table, index)) = Table::find(offset) {
                    shared.change(|settings| {
                        if let Some(word) = table.word(settings, index) {
                            *word = value;
                        }
                    });
                } else {
                    log::debug!("e1000: a write of {value:#x} to {offset:#x}");
                }
                return;
            }
        }
        // A worker that waits may have to wait for something else now.
        shared.wake(wake::ANY);
    }

    fn restart_receive(&self) {
        self.restart_receive_at(None);
    }

    /// The worker has the receive ring as it is now, from `head` on, or from
    /// where it was.
    fn restart_receive_at(&self, head: Option<u32>) {
        let shared = &*self.shared;
        let place = shared.settings(|settings| settings.rx);
        shared.quiesce(|Plane { receive, .. }| {
            let head = head.unwrap_or_else(|| shared.rx_head.load(Ordering::Acquire));
            shared.rx_head.store(head, Ordering::Release);
            receive.restart(place, head);
        });
    }

    fn restart_transmit(&self) {
        self.restart_transmit_at(None);
    }

    /// The same for the transmit ring.
    fn restart_transmit_at(&self, head: Option<u32>) {
        let shared = &*self.shared;
        let place = shared.settings(|settings| settings.tx);
        shared.quiesce(|Plane { transmit, .. }| {
            let head = head.unwrap_or_else(|| shared.tx_head.load(Ordering::Acquire));
            shared.tx_head.store(head, Ordering::Release);
            transmit.restart(place, head);
        });
    }

    /// Whether the device may use memory: what the configuration space says.
    pub(super) fn set_master(&self, may_master: bool) {
        let shared = &*self.shared;
        let before =
            shared.change(|settings| std::mem::replace(&mut settings.may_master, may_master));
        if before != may_master {
            self.restart_receive();
            self.restart_transmit();
        }
    }

    fn write_ctrl(&mut self, value: Ctrl) {
        if value.contains(Ctrl::RST) {
            self.reset();
            return;
        }
        if value.contains(Ctrl::PHY_RST) {
            self.phy.reset();
            self.renegotiated();
        }
        self.ctrl = value - Ctrl::PHY_RST;
        let vlan_mode = value.contains(Ctrl::VME);
        if self.shared.settings(|settings| settings.vlan_mode) != vlan_mode {
            self.shared
                .change(|settings| settings.vlan_mode = vlan_mode);
        }
    }

    /// Everything but the PHY is as after power-on.
    pub(super) fn reset(&mut self) {
        let shared = self.shared.clone();
        shared.counters.resets.add(1);
        let fresh = Settings::new(self.mac);
        shared.change(|settings| {
            let may_master = settings.may_master;
            *settings = fresh;
            settings.may_master = may_master;
        });
        shared.quiesce(|plane| {
            plane.transmit.reset();
            plane.receive.reset();
            for register in [
                &shared.tx_head,
                &shared.tx_tail,
                &shared.rx_head,
                &shared.rx_tail,
            ] {
                register.store(0, Ordering::Release);
            }
            // Behind it, nothing of before can come any more.
            shared.interrupts.reset();
            *lock(&shared.statistics) = Statistics::default();
        });
        self.ctrl = CTRL;
        self.mdic = Mdic::READY;
        self.stored = STORED.map(|(_, value)| value);
        self.eeprom = Eeprom::new(self.mac);
    }

    fn write_mdic(&mut self, value: Mdic) {
        let register = value.register();
        let mut result = (value - Mdic::ERROR) | Mdic::READY;
        let ours = value.phy() == phy::ADDRESS;
        if value.contains(Mdic::OP_READ) {
            if self.shared.link_lost.swap(false, Ordering::AcqRel) {
                self.phy.lose_link();
            }
            let data = if ours {
                let link = self.shared.is_up();
                self.phy.read(register, link)
            } else {
                0xffff
            };
            result = Mdic::from_bits_retain(result.bits() & !Mdic::DATA | u32::from(data));
        } else if value.contains(Mdic::OP_WRITE)
            && ours
            && self.phy.write(register, value.data()) == Written::Renegotiated
        {
            self.renegotiated();
        }
        result.set(Mdic::ERROR, !ours);
        self.mdic = result;
        if value.contains(Mdic::INTERRUPT) {
            self.shared.interrupts.raise(Cause::MDAC);
            self.follow_deadline();
        }
    }

    /// The link was made anew, if there is one.
    fn renegotiated(&self) {
        if self.link() {
            self.shared.interrupts.raise(Cause::LSC);
            self.follow_deadline();
        }
    }
}
