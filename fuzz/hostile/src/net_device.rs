//! A network device that lies: it does everything right until a script changes
//! what a register reads as, or serves its rings by hand.
//!
//! In each of its queues, places are counted from 0 without end.
#![forbid(unsafe_code)]

use super::liar::{self, Liar, Place, Role, WRITE};
use pvkit_join::arena::Arena;
use pvkit_join::wire::Wire;
use pvkit_protocol::frame::MacAddress;
use pvkit_protocol::virtio::mmio::InterruptStatus;
use pvkit_protocol::virtio::net::{NetConfig, NetFeatures, NetHeader, NetStatus, ack};
use pvkit_protocol::virtio::{Features, device_id};
use zerocopy::IntoBytes;

pub use super::liar::{Chain, transport};

/// Queues that it can have.
pub const QUEUES: usize = 9;

/// A network device that lies when it is told to.
pub type NetDevice = Liar<LyingCard>;

/// The driver's end of a wire to a [`NetDevice`].
pub type Transport = liar::Transport<LyingCard>;

/// A queue as the device sees it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lane {
    /// What the driver told about it.
    pub place: Place,
    /// Entries, or descriptors of a packed ring, that were fetched.
    pub fetched: u32,
    /// The same that were given back.
    pub used: u32,
    /// Doorbells.
    pub kicks: u64,
}

/// What the device does with commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Uses them with this byte written.
    Byte(u8),
    /// Uses them with nothing written.
    Nothing,
    /// Never uses them.
    Never,
}

/// What makes a [`NetDevice`] a network device.
#[derive(Debug)]
pub struct LyingCard {
    /// Its configuration space.
    pub config: NetConfig,
    /// Its queues.
    pub lanes: [Lane; QUEUES],
    /// What it does with commands, on doorbells of the control queue.
    pub answer: Answer,
    /// Which queue has commands.
    pub control: usize,
    /// The commands so far.
    pub commands: Vec<Vec<u8>>,
}

impl Role for LyingCard {
    const DEVICE_ID: u32 = device_id::NETWORK;

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn place(&mut self, queue: usize) -> Option<&mut Place> {
        self.lanes.get_mut(queue).map(|lane| &mut lane.place)
    }

    fn reset(&mut self) {
        self.lanes = [Lane::default(); QUEUES];
    }

    fn reset_queue(&mut self, queue: usize) {
        if let Some(lane) = self.lanes.get_mut(queue) {
            *lane = Lane::default();
        }
    }

    fn rung(device: &mut NetDevice, value: u32) {
        let queue = value as usize & 0xffff;
        if let Some(lane) = device.lanes.get_mut(queue) {
            lane.kicks += 1;
        }
        if queue == device.control {
            device.serve_control();
        }
    }
}

/// An honest device that sees `arena`, with one pair of queues and a control
/// queue, and with every feature of a network device that the driver knows but
/// for [`NetFeatures::MQ`].
#[must_use]
pub fn net_device(arena: &Arena) -> Wire<NetDevice> {
    let net = NetFeatures::all()
        - NetFeatures::MQ
        - NetFeatures::GUEST_UFO
        - NetFeatures::HOST_UFO
        - NetFeatures::GUEST_HDRLEN;
    let config = NetConfig {
        mac: MacAddress::local(1),
        status: NetStatus::LINK_UP.bits().into(),
        max_virtqueue_pairs: 1.into(),
        mtu: 1500.into(),
        speed: 10_000.into(),
        duplex: 1,
    };
    let features = Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX | net.into();
    let role = LyingCard {
        config,
        lanes: [Lane::default(); QUEUES],
        answer: Answer::Byte(ack::OK),
        control: 2,
        commands: Vec::new(),
    };
    Wire::new(Liar::new(arena, features, 64, role))
}

/// # Memory and rings
impl NetDevice {
    /// Fetches every chain that is available in a queue.
    ///
    /// # Panics
    /// If the driver broke the protocol: it is the honest one here.
    pub fn fetch(&mut self, queue: usize) -> Vec<Chain> {
        let mut chains = Vec::new();
        while let Some(chain) = self.next(queue) {
            self.lanes[queue].fetched += u32::from(chain.units);
            chains.push(chain);
            let lane = &self.lanes[queue];
            let taken = lane.fetched - lane.used;
            assert!(taken <= lane.place.size, "an honest driver");
        }
        chains
    }

    fn next(&self, queue: usize) -> Option<Chain> {
        let Lane { place, fetched, .. } = self.lanes[queue];
        if place.ready == 0 {
            return None;
        }
        self.chain_after(place, fetched)
    }

    /// Asks for a doorbell at the next chain, where that takes asking.
    fn ask(&mut self, queue: usize) {
        let Lane { place, fetched, .. } = self.lanes[queue];
        if !self.is_packed() {
            self.ask_in(place, fetched as u16);
        }
    }

    /// What the driver gave to read.
    ///
    /// # Panics
    /// If it is not RAM.
    #[must_use]
    pub fn read_chain(&self, chain: &Chain) -> Vec<u8> {
        let mut all = Vec::new();
        for (addr, len) in &chain.readable {
            let start = all.len();
            all.resize(start + *len as usize, 0);
            self.ram.read(*addr, &mut all[start..]).expect("RAM");
        }
        all
    }

    /// Writes from the start of a chain; says how much of it fits.
    pub fn fill(&mut self, chain: &Chain, bytes: &[u8]) -> u32 {
        let mut rest = bytes;
        for (addr, len) in &chain.writable {
            let (now, later) = rest.split_at(rest.len().min(*len as usize));
            self.poke(*addr, now);
            rest = later;
        }
        (bytes.len() - rest.len()) as u32
    }

    /// Gives a chain back, whatever its name and length are. A split ring's
    /// index is not shown.
    pub fn push(&mut self, queue: usize, id: u32, len: u32, units: u16) -> &mut Self {
        let Lane { place, used, .. } = self.lanes[queue];
        if self.is_packed() {
            self.lanes[queue].used += u32::from(units);
            let flags = place.used_flags(used) | if len > 0 { WRITE } else { 0 };
            return self.put_packed(place, used, id as u16, len, flags);
        }
        self.lanes[queue].used += 1;
        self.put_split(place, used, id, len)
    }

    /// Shows all used elements, and interrupts.
    pub fn publish(&mut self, queue: usize) -> &mut Self {
        let Lane { place, used, .. } = self.lanes[queue];
        self.interrupt |= InterruptStatus::USED_BUFFER.bits();
        if !self.is_packed() {
            self.show_in(place, used as u16);
        }
        self
    }

    /// Receives a frame into the chains, as an honest device does; says how
    /// many it took.
    ///
    /// # Panics
    /// If they are too short.
    pub fn deliver(
        &mut self,
        queue: usize,
        chains: &[Chain],
        header: NetHeader,
        frame: &[u8],
    ) -> usize {
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(frame);
        let mut rest = &bytes[..];
        let mut used = Vec::new();
        for chain in chains {
            let count = self.fill(chain, rest);
            used.push((chain, count));
            rest = &rest[count as usize..];
            if rest.is_empty() {
                break;
            }
        }
        assert!(rest.is_empty(), "room for the frame");
        let count = used.len();
        if header.num_buffers == 0 {
            let (addr, _) = chains[0].writable[0];
            self.poke(addr + 10, &(count as u16).to_le_bytes());
        }
        for (chain, len) in used {
            self.push(queue, u32::from(chain.head), len, chain.units);
        }
        self.publish(queue);
        count
    }

    /// Sends everything that is in a queue; the frames with their headers.
    pub fn transmit(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let chains = self.fetch(queue);
        let frames = chains.iter().map(|chain| self.read_chain(chain)).collect();
        for chain in &chains {
            self.push(queue, u32::from(chain.head), 0, chain.units);
        }
        self.publish(queue);
        frames
    }

    fn serve_control(&mut self) {
        let chains = self.fetch(self.control);
        self.ask(self.control);
        for chain in chains {
            let command = self.read_chain(&chain);
            self.commands.push(command);
            let (byte, len) = match self.answer {
                Answer::Byte(byte) => (Some(byte), 1),
                Answer::Nothing => (None, 0),
                Answer::Never => continue,
            };
            if let Some(byte) = byte {
                self.fill(&chain, &[byte]);
            }
            self.push(self.control, u32::from(chain.head), len, chain.units);
            self.publish(self.control);
        }
    }
}
