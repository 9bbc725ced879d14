//! A device that lies: a small virtio block device that does everything right
//! until a script changes what a register reads as, or serves the rings by
//! hand.
//!
//! It answers register accesses behind a [`Wire`], and reaches the rings by
//! the guest addresses that the driver gave it.
#![forbid(unsafe_code)]

pub mod packed;

use super::liar::{self, Chain, Liar, Place, Role};
use pvkit_join::arena::Arena;
use pvkit_join::disk::pattern;
use pvkit_join::wire::Wire;
use pvkit_protocol::virtio::block::{
    BlockConfig, BlockFeatures, ID_BYTES, RequestHeader, RequestType, SECTOR_BYTES,
};
use pvkit_protocol::virtio::mmio::InterruptStatus;
use pvkit_protocol::virtio::split::AVAIL_IDX;
use pvkit_protocol::virtio::{Features, device_id};
use std::fmt;
use zerocopy::{FromZeros, IntoBytes};

pub use super::liar::transport;

/// A block device that lies when it is told to.
pub type Device = Liar<LyingDisk>;

/// The driver's end of a wire to a [`Device`].
pub type Transport = liar::Transport<LyingDisk>;

/// A request that the driver made available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The driver's name for it: the descriptor that it starts with, or a
    /// packed ring's id.
    pub head: u16,
    /// How far it moves the ring on: one used element, or as many descriptors
    /// as it has in a packed ring.
    pub units: u16,
    /// The request's header.
    pub header: RequestHeader,
    /// Data for the device to read.
    pub readable: Vec<(u64, u32)>,
    /// Data for the device to write, without the status byte.
    pub writable: Vec<(u64, u32)>,
    /// Where the status byte is.
    pub status: u64,
    /// All addresses of descriptors that belong to it: in the table of the
    /// queue, or indirect.
    pub descriptors: Vec<u64>,
}

impl Taken {
    /// Bytes that the device may write, the status byte included.
    #[must_use]
    pub fn room(&self) -> u32 {
        let data: u32 = self.writable.iter().map(|(_, len)| len).sum();
        data + 1
    }
}

/// What makes a [`Device`] a block device.
pub struct LyingDisk {
    /// Its configuration space.
    pub config: BlockConfig,
    /// Its content.
    pub disk: Vec<u8>,
    /// What the driver told about its queue.
    pub place: Place,
    /// Doorbells.
    pub kicks: u64,
    /// The value of the last doorbell.
    pub rung_with: u32,
    /// Index of the next used element.
    pub next_used: u16,
    next_avail: u16,
    /// Where it stands in a packed ring.
    pub packed: packed::Places,
}

impl fmt::Debug for LyingDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LyingDisk")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Role for LyingDisk {
    const DEVICE_ID: u32 = device_id::BLOCK;

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn place(&mut self, _queue: usize) -> Option<&mut Place> {
        Some(&mut self.place)
    }

    fn reset(&mut self) {
        self.place = Place::default();
        self.next_avail = 0;
        self.next_used = 0;
        self.packed = packed::Places::default();
    }

    fn reset_queue(&mut self, _queue: usize) {}

    fn rung(device: &mut Device, value: u32) {
        device.kicks += 1;
        device.rung_with = value;
    }
}

/// An honest device that sees `arena`, with the [`pattern`] of each sector on
/// its disk.
#[must_use]
pub fn device(arena: &Arena, sectors: u64) -> Wire<Device> {
    let block = BlockFeatures::SEG_MAX
        | BlockFeatures::SIZE_MAX
        | BlockFeatures::BLK_SIZE
        | BlockFeatures::FLUSH;
    let mut config = BlockConfig::new_zeroed();
    config.capacity.set(sectors);
    config.seg_max.set(16);
    config.size_max.set(1 << 20);
    config.blk_size.set(512);
    let features =
        Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX | block.into();
    let role = LyingDisk {
        config,
        disk: pattern(0, sectors as usize * SECTOR_BYTES as usize),
        place: Place::default(),
        kicks: 0,
        rung_with: 0,
        next_used: 0,
        next_avail: 0,
        packed: packed::Places::default(),
    };
    Wire::new(Liar::new(arena, features, 256, role))
}

/// # The ring
impl Device {
    /// Overwrites everything that the driver wrote for the device: the
    /// descriptor table, the available ring, and of each given chain its
    /// header and indirect table. A driver that reads any of it back is lost.
    pub fn scribble(&mut self, chains: &[Taken], byte: u8) -> &mut Self {
        let Place {
            size,
            descriptors,
            avail,
            ..
        } = self.place;
        self.poke(descriptors, &vec![byte; 16 * size as usize]);
        // Not the flags and not `used_event`: those are the driver's to write
        // again at any time.
        self.poke(avail + AVAIL_IDX as u64, &vec![byte; 2 + 2 * size as usize]);
        for chain in chains {
            for descriptor in &chain.descriptors {
                self.poke(*descriptor, &[byte; 16]);
            }
        }
        self
    }

    /// Fetches every chain that is available.
    ///
    /// # Panics
    /// If the driver broke the protocol: it is the honest one here.
    pub fn fetch(&mut self) -> Vec<Taken> {
        let mut chains = Vec::new();
        while let Some(chain) = self.next_chain() {
            let taken = if self.is_packed() {
                self.packed.fetched += u32::from(chain.units);
                self.packed.fetched - self.packed.used
            } else {
                self.next_avail = self.next_avail.wrapping_add(1);
                chains.len() as u32 + 1
            };
            assert!(taken <= self.place.size, "an honest driver");
            chains.push(self.taken(chain));
        }
        chains
    }

    fn next_chain(&self) -> Option<Chain> {
        let count = if self.is_packed() {
            self.packed.fetched
        } else {
            self.next_avail.into()
        };
        self.chain_after(self.place, count)
    }

    fn taken(&self, chain: Chain) -> Taken {
        let Chain {
            head,
            units,
            mut readable,
            mut writable,
            descriptors,
            ..
        } = chain;
        let (header, _) = readable.remove(0);
        let (status, _) = writable.pop().expect("a status byte");
        Taken {
            head,
            units,
            header: zerocopy::transmute!(self.peek::<16>(header)),
            readable,
            writable,
            status,
            descriptors,
        }
    }

    /// Does what a request asks for, but for the status byte and the used
    /// element; says how many bytes it wrote.
    pub fn execute(&mut self, chain: &Taken) -> u32 {
        let start = (chain.header.sector.get() * SECTOR_BYTES) as usize;
        let id = *b"a device that lies\0\0";
        let (source, mut at): (&[u8], _) = match RequestType(chain.header.kind.get()) {
            RequestType::IN => (&self.role.disk, start),
            RequestType::GET_ID => (&id, 0),
            RequestType::OUT => {
                let mut at = start;
                for (addr, len) in &chain.readable {
                    let end = at + *len as usize;
                    let to = &mut self.role.disk[at..end];
                    self.ram.read(*addr, to).expect("RAM");
                    at = end;
                }
                return 0;
            }
            _ => return 0,
        };
        debug_assert_eq!(id.len(), ID_BYTES);
        let mut written = 0;
        for (addr, len) in &chain.writable {
            let end = at + *len as usize;
            self.ram.write(*addr, &source[at..end]).expect("RAM");
            at = end;
            written += len;
        }
        written
    }

    /// Writes the status byte of a chain.
    pub fn finish(&mut self, chain: &Taken, status: u8) -> &mut Self {
        self.poke(chain.status, &[status])
    }

    /// Writes the next used element of a split ring, without showing it.
    pub fn push(&mut self, id: u32, len: u32) -> &mut Self {
        let count = self.next_used;
        self.next_used = count.wrapping_add(1);
        self.put_split(self.place, count.into(), id, len)
    }

    /// Shows a used index, whatever it is.
    pub fn show(&mut self, index: u16) -> &mut Self {
        self.show_in(self.place, index)
    }

    /// Shows all used elements, and interrupts.
    pub fn publish(&mut self) -> &mut Self {
        self.interrupt |= InterruptStatus::USED_BUFFER.bits();
        if self.is_packed() {
            // Used descriptors show themselves.
            return self;
        }
        self.show(self.next_used)
    }

    /// Writes `avail_event`.
    pub fn set_avail_event(&mut self, event: u16) -> &mut Self {
        self.ask_in(self.place, event)
    }

    /// Does one request rightly, up to its used element, which is not shown in
    /// a split ring.
    pub fn answer(&mut self, chain: &Taken) -> &mut Self {
        self.answer_batch(std::slice::from_ref(chain))
    }

    /// Serves everything that is available as it should be.
    pub fn serve(&mut self) -> usize {
        if self.place.ready == 0 {
            return 0;
        }
        let chains = self.fetch();
        for chain in &chains {
            self.answer(chain);
        }
        self.publish();
        chains.len()
    }
}
