//! What the data plane needs to know of registers: a copy that it takes when
//! something has changed.
#![forbid(unsafe_code)]

use super::ring::Place;
use pvkit_protocol::emulated::e1000::register::{
    MTA_WORDS, RAH_AV, RECEIVE_ADDRESSES, VFTA_WORDS, txdctl,
};
use pvkit_protocol::emulated::e1000::{Rctl, RxChecksum, Tctl, multicast_hash, vlan_hash};
use pvkit_protocol::frame::{MacAddress, ethertype};

/// Which frames are let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filtered {
    /// The frame is for this station.
    Exact,
    /// The frame is perhaps for this station.
    Inexact,
    /// It is not.
    Dropped,
}

/// Registers that the worker obeys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Settings {
    /// The configuration space lets the device use memory.
    pub(super) may_master: bool,
    /// CTRL.VME.
    pub(super) vlan_mode: bool,
    /// VET: the type of VLAN frames.
    pub(super) vlan_type: u16,
    pub(super) tctl: Tctl,
    pub(super) txdctl: u32,
    pub(super) tx: Place,
    pub(super) rctl: Rctl,
    pub(super) rx_checksum: RxChecksum,
    pub(super) rx: Place,
    /// RAL and RAH of each address.
    addresses: [[u32; 2]; RECEIVE_ADDRESSES],
    multicast: [u32; MTA_WORDS],
    vlans: [u32; VFTA_WORDS],
}

impl Settings {
    /// As after a reset, which takes the first address from the EEPROM.
    pub(super) fn new(mac: MacAddress) -> Self {
        let [a, b, c, d, e, f] = mac.0;
        let mut addresses = [[0; 2]; RECEIVE_ADDRESSES];
        if let Some(first) = addresses.first_mut() {
            *first = [
                u32::from_le_bytes([a, b, c, d]),
                u32::from_le_bytes([e, f, 0, 0]) | RAH_AV,
            ];
        }
        Self {
            may_master: false,
            vlan_mode: false,
            vlan_type: ethertype::VLAN,
            tctl: Tctl::empty(),
            txdctl: 0,
            tx: Place::default(),
            rctl: Rctl::empty(),
            rx_checksum: RxChecksum::empty(),
            rx: Place::default(),
            addresses,
            multicast: [0; MTA_WORDS],
            vlans: [0; VFTA_WORDS],
        }
    }

    pub(super) fn transmits(&self) -> bool {
        self.may_master && self.tctl.contains(Tctl::EN) && self.tx.count() != 0
    }

    pub(super) fn receives(&self) -> bool {
        self.may_master && self.rctl.contains(Rctl::EN) && self.rx.count() != 0
    }

    /// Fewer transmit descriptors than this are few; 0 if that is not told.
    pub(super) fn low_threshold(&self) -> u32 {
        (self.txdctl >> txdctl::LWTHRESH_SHIFT) * 8
    }

    /// The word of a receive address: RAL and RAH follow each other.
    pub(super) fn address_word(&mut self, index: usize) -> Option<&mut u32> {
        self.addresses.get_mut(index / 2)?.get_mut(index % 2)
    }

    pub(super) fn multicast_word(&mut self, index: usize) -> Option<&mut u32> {
        self.multicast.get_mut(index)
    }

    pub(super) fn vlan_word(&mut self, index: usize) -> Option<&mut u32> {
        self.vlans.get_mut(index)
    }

    /// Whether a frame to `to` is let in (SDM §3.2.1).
    #[inline]
    pub(super) fn filter(&self, to: MacAddress) -> Filtered {
        let [a, b, c, d, e, f] = to.0;
        let wanted = [
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, 0, 0]) | RAH_AV,
        ];
        // Bits between address and validity select nothing on this chip.
        let is =
            |[low, high]: &[u32; 2]| *low == wanted[0] && high & (RAH_AV | 0xffff) == wanted[1];
        if self.addresses.iter().any(is) {
            return Filtered::Exact;
        }
        let passes = if to == MacAddress::BROADCAST && self.rctl.contains(Rctl::BAM) {
            return Filtered::Exact;
        } else if to.is_multicast() {
            self.rctl.contains(Rctl::MPE) || bit(&self.multicast, multicast_hash(to, self.rctl))
        } else {
            self.rctl.contains(Rctl::UPE)
        };
        if passes {
            Filtered::Inexact
        } else {
            Filtered::Dropped
        }
    }

    /// Whether frames with a VLAN tag are let in.
    pub(super) fn lets_vlan_in(&self, tag: u16) -> bool {
        if !self.rctl.contains(Rctl::VFE) {
            return true;
        }
        let canonical = tag & 1 << 12 != 0;
        if self.rctl.contains(Rctl::CFIEN) && canonical != self.rctl.contains(Rctl::CFI) {
            return false;
        }
        bit(&self.vlans, vlan_hash(tag))
    }
}

/// One bit of a table.
fn bit(table: &[u32], index: u16) -> bool {
    table
        .get(usize::from(index / 32))
        .is_some_and(|word| word >> (index % 32) & 1 != 0)
}
