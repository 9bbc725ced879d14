//! Commands on the control queue (virtio 1.3 §5.1.6.5).
//!
//! One command is outstanding at a time. What the device has agreed to is
//! remembered, and asked for again after a reset.
#![forbid(unsafe_code)]

use super::Net;
use crate::dma::DmaSpace;
use crate::fault::Fault;
use crate::net::{MacAddress, Offloads};
use crate::virtio::queue::PostError;
use crate::virtio::transport::Transport;
use core::hint::spin_loop;
use pvkit_protocol::virtio::net::{
    self, ControlHeader, NetFeatures, ack, announce, class, guest_offloads, mac, mq, rx, vlan,
};
use thiserror::Error;
use zerocopy::IntoBytes;

/// Most addresses of [`Command::MacTable`].
pub const MAC_TABLE: usize = 64;
/// Most bytes of the data of a command: two counts and all addresses.
pub(super) const DATA_BYTES: usize = 2 * size_of::<u32>() + MAC_TABLE * size_of::<MacAddress>();

/// Something to ask of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command<'a> {
    /// Receive all frames, whoever they are for (CTRL_RX).
    Promiscuous(bool),
    /// Receive all frames to groups (CTRL_RX).
    AllMulticast(bool),
    /// Receive all frames to single stations (CTRL_RX_EXTRA).
    AllUnicast(bool),
    /// Receive no frames to groups (CTRL_RX_EXTRA).
    NoMulticast(bool),
    /// Receive no frames to single stations (CTRL_RX_EXTRA).
    NoUnicast(bool),
    /// Receive no frames to all (CTRL_RX_EXTRA).
    NoBroadcast(bool),
    /// Receive frames to these addresses besides the device's own, instead of
    /// those that were asked for before: at most [`MAC_TABLE`] (CTRL_RX).
    MacTable {
        /// Single stations.
        unicast: &'a [MacAddress],
        /// Groups.
        multicast: &'a [MacAddress],
    },
    /// The device's own address, from now on (CTRL_MAC_ADDR).
    SetMac(MacAddress),
    /// Receive frames of this VLAN, too (CTRL_VLAN). With this feature, a
    /// device may keep back those of every VLAN that was not added.
    AddVlan(u16),
    /// Receive them no longer (CTRL_VLAN).
    DeleteVlan(u16),
    /// The driver has announced itself, as the device asked
    /// ([`Net::announce_pending`], GUEST_ANNOUNCE).
    Announced,
    /// How many pairs of queues the device uses from now on, of those that were
    /// opened (MQ). After a reset it is 1.
    Pairs(u16),
    /// What the device may leave to the driver from now on, of
    /// [`NetLimits::receive`](crate::net::NetLimits::receive)
    /// (CTRL_GUEST_OFFLOADS).
    ReceiveOffloads(Offloads),
}

/// Why a command was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The device said no.
    #[error("the device refuses the command")]
    Refused,
    /// It did not answer in time. The command may still be done; until it is
    /// answered, or the device is recovered, others are
    /// [`Busy`](ControlError::Busy).
    #[error("the device did not answer the command in time")]
    Timeout,
    /// The feature that it needs was not negotiated.
    #[error("the device does not know the command")]
    Unsupported,
    /// An earlier command was not answered yet.
    #[error("the device has not answered the command before")]
    Busy,
    /// There is no such VLAN, pair or offload, the address is no single
    /// station's, or there are too many addresses.
    #[error("the command's argument makes no sense")]
    Argument,
    /// The device said neither yes nor no; nothing at all if this is
    /// [`TRAILER_UNWRITTEN`](crate::virtio::queue::TRAILER_UNWRITTEN).
    #[error("the device answers the command with {0:#x}, which means nothing")]
    Answer(u8),
    /// It broke the rules of the control queue, which is retired until the
    /// device is recovered.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Commands of [`class::RX`], and the feature that each needs.
const MODES: [(u8, NetFeatures); 6] = [
    (rx::PROMISC, NetFeatures::CTRL_RX),
    (rx::ALLMULTI, NetFeatures::CTRL_RX),
    (rx::ALLUNI, NetFeatures::CTRL_RX_EXTRA),
    (rx::NOMULTI, NetFeatures::CTRL_RX_EXTRA),
    (rx::NOUNI, NetFeatures::CTRL_RX_EXTRA),
    (rx::NOBCAST, NetFeatures::CTRL_RX_EXTRA),
];

/// Words of the set of all VLANs.
const VLAN_WORDS: usize = vlan::COUNT as usize / 64;

#[derive(Debug, Clone, Copy)]
struct Table {
    addresses: [MacAddress; MAC_TABLE],
    unicast: usize,
    multicast: usize,
}

impl Table {
    const EMPTY: Self = Self {
        addresses: [MacAddress([0; 6]); MAC_TABLE],
        unicast: 0,
        multicast: 0,
    };

    fn of(unicast: &[MacAddress], multicast: &[MacAddress]) -> Option<Self> {
        let mut table = Self {
            unicast: unicast.len(),
            multicast: multicast.len(),
            ..Self::EMPTY
        };
        let all = table.addresses.get_mut(..unicast.len() + multicast.len())?;
        let (singles, groups) = all.split_at_mut_checked(unicast.len())?;
        singles.copy_from_slice(unicast);
        groups.copy_from_slice(multicast);
        Some(table)
    }

    fn parts(&self) -> (&[MacAddress], &[MacAddress]) {
        let end = self.unicast + self.multicast;
        let all = self.addresses.get(..end).unwrap_or(&[]);
        all.split_at_checked(self.unicast).unwrap_or((&[], &[]))
    }
}

/// What changes once the device has said yes.
#[derive(Debug, Clone, Copy)]
enum Change {
    Nothing,
    Mode(usize, bool),
    Mac(MacAddress),
    Table,
    Vlan(u16, bool),
    Pairs(u16),
    Offloads(Offloads),
}

/// What the device was asked for.
#[derive(Debug)]
pub(super) struct Settings {
    modes: [Option<bool>; MODES.len()],
    pub(super) mac: Option<MacAddress>,
    table: Option<Table>,
    /// The table that was asked for last.
    next_table: Table,
    vlans: [u64; VLAN_WORDS],
    /// Whether some VLAN is in the set.
    any_vlan: bool,
    pairs: Option<u16>,
    offloads: Option<Offloads>,
    /// What the outstanding command is about.
    pending: Option<Change>,
}

impl Settings {
    pub(super) const fn new() -> Self {
        Self {
            modes: [None; MODES.len()],
            mac: None,
            table: None,
            next_table: Table::EMPTY,
            vlans: [0; VLAN_WORDS],
            any_vlan: false,
            pairs: None,
            offloads: None,
            pending: None,
        }
    }

    /// The device forgot about the command.
    pub(super) fn forget_pending(&mut self) {
        self.pending = None;
    }

    fn has_vlan(&self, id: u16) -> bool {
        let word = self.vlans.get(usize::from(id / 64));
        word.is_some_and(|word| word & (1 << (id % 64)) != 0)
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Nothing => {}
            Change::Mode(mode, on) => {
                if let Some(place) = self.modes.get_mut(mode) {
                    *place = Some(on);
                }
            }
            Change::Mac(address) => self.mac = Some(address),
            Change::Table => self.table = Some(self.next_table),
            Change::Vlan(id, on) => {
                let bit = 1 << (id % 64);
                if let Some(word) = self.vlans.get_mut(usize::from(id / 64)) {
                    *word = if on { *word | bit } else { *word & !bit };
                }
                self.any_vlan |= on;
            }
            Change::Pairs(pairs) => self.pairs = Some(pairs),
            Change::Offloads(offloads) => self.offloads = Some(offloads),
        }
    }
}

/// The data of a command.
struct Data {
    bytes: [u8; DATA_BYTES],
    count: usize,
}

impl Data {
    fn of(parts: &[&[u8]]) -> Self {
        let mut data = Self {
            bytes: [0; DATA_BYTES],
            count: 0,
        };
        for part in parts {
            let end = data.count + part.len();
            if let Some(place) = data.bytes.get_mut(data.count..end) {
                place.copy_from_slice(part);
                data.count = end;
            }
        }
        data
    }
}

/// A command as it looks on the wire: header, data, what it needs, and what it
/// changes.
struct Encoded {
    header: ControlHeader,
    data: Data,
    needs: NetFeatures,
    change: Change,
}

impl Encoded {
    fn new((class, command): (u8, u8), data: &[&[u8]], needs: NetFeatures, change: Change) -> Self {
        Self {
            header: ControlHeader { class, command },
            data: Data::of(data),
            needs,
            change,
        }
    }

    fn mode(mode: usize, on: bool) -> Option<Self> {
        let (command, needs) = *MODES.get(mode)?;
        let change = Change::Mode(mode, on);
        Some(Self::new(
            (class::RX, command),
            &[&[u8::from(on)]],
            needs,
            change,
        ))
    }
}

impl<T: Transport, S: DmaSpace<Addr = u64>> Net<T, S> {
    /// `None` if the argument makes no sense.
    fn encode(&self, command: &Command<'_>) -> Option<Encoded> {
        Some(match *command {
            Command::Promiscuous(on) => Encoded::mode(0, on)?,
            Command::AllMulticast(on) => Encoded::mode(1, on)?,
            Command::AllUnicast(on) => Encoded::mode(2, on)?,
            Command::NoMulticast(on) => Encoded::mode(3, on)?,
            Command::NoUnicast(on) => Encoded::mode(4, on)?,
            Command::NoBroadcast(on) => Encoded::mode(5, on)?,
            Command::MacTable { unicast, multicast } => {
                let all = unicast.len().checked_add(multicast.len())?;
                if all > MAC_TABLE
                    || unicast.iter().any(|address| !address.is_unicast())
                    || multicast.iter().any(|address| !address.is_multicast())
                {
                    return None;
                }
                let counts = [unicast, multicast].map(|list| (list.len() as u32).to_le_bytes());
                let [singles, groups] = &counts;
                let data = [
                    &singles[..],
                    unicast.as_bytes(),
                    &groups[..],
                    multicast.as_bytes(),
                ];
                let name = (class::MAC, mac::TABLE_SET);
                Encoded::new(name, &data, NetFeatures::CTRL_RX, Change::Table)
            }
            Command::SetMac(address) => {
                if !address.is_unicast() {
                    return None;
                }
                let name = (class::MAC, mac::ADDR_SET);
                let needs = NetFeatures::CTRL_MAC_ADDR;
                Encoded::new(name, &[&address.0], needs, Change::Mac(address))
            }
            Command::AddVlan(id) | Command::DeleteVlan(id) => {
                if id >= vlan::COUNT {
                    return None;
                }
                let on = matches!(command, Command::AddVlan(_));
                let name = (class::VLAN, if on { vlan::ADD } else { vlan::DEL });
                let needs = NetFeatures::CTRL_VLAN;
                Encoded::new(name, &[&id.to_le_bytes()], needs, Change::Vlan(id, on))
            }
            Command::Announced => Encoded::new(
                (class::ANNOUNCE, announce::ACK),
                &[],
                NetFeatures::GUEST_ANNOUNCE,
                Change::Nothing,
            ),
            Command::Pairs(pairs) => {
                if !(1..=self.limits.pairs).contains(&pairs) {
                    return None;
                }
                let name = (class::MQ, mq::VQ_PAIRS_SET);
                let change = Change::Pairs(pairs);
                Encoded::new(name, &[&pairs.to_le_bytes()], NetFeatures::MQ, change)
            }
            Command::ReceiveOffloads(offloads) => {
                if !self.limits.receive.contains(offloads) {
                    return None;
                }
                let bits = net::guest_offloads(NetFeatures::of_receive_offloads(offloads));
                Encoded::new(
                    (class::GUEST_OFFLOADS, guest_offloads::SET),
                    &[bits.as_bytes()],
                    NetFeatures::CTRL_GUEST_OFFLOADS,
                    Change::Offloads(offloads),
                )
            }
        })
    }

    /// Hands a command to the device, and does not wait;
    /// [`poll_command`](Net::poll_command) has the answer.
    ///
    /// # Errors
    /// [`ControlError`], but [`Refused`](ControlError::Refused) and
    /// [`Timeout`](ControlError::Timeout); the device has not heard of it then.
    pub fn submit_command(&mut self, command: &Command<'_>) -> Result<(), ControlError> {
        // A late answer to a command that timed out.
        if self.settings.pending.is_some() {
            let _ = self.poll_command();
        }
        if self.settings.pending.is_some() {
            return Err(ControlError::Busy);
        }
        let negotiated = NetFeatures::from(self.features);
        let encoded = self.encode(command);
        let needs = encoded.as_ref().map(|encoded| encoded.needs);
        // What is not there cannot be asked for wrongly.
        if self.control.is_none() || needs.is_some_and(|needs| !negotiated.contains(needs)) {
            return Err(ControlError::Unsupported);
        }
        let encoded = encoded.ok_or(ControlError::Argument)?;
        if let Command::MacTable { unicast, multicast } = command {
            self.settings.next_table =
                Table::of(unicast, multicast).ok_or(ControlError::Argument)?;
        }
        let data = encoded.data.bytes.get(..encoded.data.count).unwrap_or(&[]);
        let queue = self.control.as_mut().ok_or(ControlError::Unsupported)?;
        queue
            .post_inline(encoded.header.as_bytes(), data, ())
            .map_err(|error| match error {
                PostError::Retired => ControlError::Fault(Fault::NeedsReset),
                _ => ControlError::Busy,
            })?;
        queue.publish();
        self.settings.pending = Some(encoded.change);
        Ok(())
    }

    /// The answer to the outstanding command, if it is there. `None` also if
    /// there is no such command.
    pub fn poll_command(&mut self) -> Option<Result<(), ControlError>> {
        self.settings.pending?;
        let done = match self.control.as_mut()?.complete() {
            Ok(done) => done?,
            Err(fault) => {
                self.settings.forget_pending();
                return Some(Err(fault.into()));
            }
        };
        let change = self.settings.pending.take();
        Some(match done.trailer {
            ack::OK => {
                if let Some(change) = change {
                    self.settings.apply(change);
                    self.limits.mac = self.settings.mac.or(self.limits.mac);
                }
                Ok(())
            }
            ack::ERR => Err(ControlError::Refused),
            other => Err(ControlError::Answer(other)),
        })
    }

    /// Hands a command to the device, and waits for the answer: looks for it
    /// as often as [`NetOptions::control_polls`](super::NetOptions) says.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn command(&mut self, command: &Command<'_>) -> Result<(), ControlError> {
        let mut left = self.options.control_polls;
        self.command_with(command, &mut || {
            spin_loop();
            left = left.saturating_sub(1);
            left > 0
        })
    }

    /// The same, with `wait` called between looking and looking again: until
    /// there is an answer, or it says `false`.
    ///
    /// # Errors
    /// [`ControlError`]; [`Timeout`](ControlError::Timeout) if `wait` ended it.
    pub fn command_with(
        &mut self,
        command: &Command<'_>,
        wait: &mut dyn FnMut() -> bool,
    ) -> Result<(), ControlError> {
        self.submit_command(command)?;
        loop {
            if let Some(answer) = self.poll_command() {
                return answer;
            }
            if !wait() {
                return Err(ControlError::Timeout);
            }
        }
    }

    /// Asks for everything again that the device had agreed to before a reset.
    pub(super) fn replay(&mut self, wait: &mut dyn FnMut() -> bool) -> Result<(), ControlError> {
        if let Some(pairs) = self.settings.pairs {
            self.command_with(&Command::Pairs(pairs), wait)?;
        }
        if let Some(address) = self.settings.mac {
            self.command_with(&Command::SetMac(address), wait)?;
        }
        if let Some(table) = self.settings.table {
            let (unicast, multicast) = table.parts();
            self.command_with(&Command::MacTable { unicast, multicast }, wait)?;
        }
        for (mode, make) in [
            Command::Promiscuous as fn(bool) -> Command<'static>,
            Command::AllMulticast,
            Command::AllUnicast,
            Command::NoMulticast,
            Command::NoUnicast,
            Command::NoBroadcast,
        ]
        .into_iter()
        .enumerate()
        {
            if let Some(Some(on)) = self.settings.modes.get(mode).copied() {
                self.command_with(&make(on), wait)?;
            }
        }
        if self.settings.any_vlan {
            for id in 0..vlan::COUNT {
                if self.settings.has_vlan(id) {
                    self.command_with(&Command::AddVlan(id), wait)?;
                }
            }
        }
        if let Some(offloads) = self.settings.offloads {
            self.command_with(&Command::ReceiveOffloads(offloads), wait)?;
        }
        Ok(())
    }
}
