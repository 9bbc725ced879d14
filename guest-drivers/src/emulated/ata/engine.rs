//! The bus master of a channel, and the buffer that it has: given back only
//! once it has let go.

use super::AtaError;
use crate::dma::{Direction, DmaBuf, DmaError, DmaRegion, DmaSpace, Segment};
use crate::fault::Fault;
use crate::lent::{Lent, Window};
use crate::register::{OwnedPorts, PortIo};
use crate::storage::Storage;
use core::alloc::Layout;
use core::fmt;
use pvkit_protocol::emulated::ata::{
    BusMasterCommand, BusMasterStatus, MAX_SECTORS_LBA48, Prd, SECTOR_BYTES, bus_master,
};
use zerocopy::little_endian::{U16, U32};

/// The table of regions: allocated once, rewritten for each request.
struct Table<S: DmaSpace<Addr = u64>> {
    region: DmaRegion<S>,
    entries: usize,
}

/// Bytes of an entry.
const ENTRY: usize = size_of::<Prd>();
/// Longest table: it must not cross a 64 KiB boundary.
const MAX_ENTRIES: usize = Prd::BOUNDARY as usize / ENTRY;
/// First address that the bus master cannot reach.
const LIMIT: u64 = 1 << 32;
/// Longest request that a command can move.
const MAX_BYTES: u32 = MAX_SECTORS_LBA48 * SECTOR_BYTES as u32;

/// Entries for a buffer of so many segments and bytes, wherever they lie: a
/// segment has a region for each 64 KiB that it touches.
fn entries_for(segments: u16, bytes: u32) -> usize {
    2 * usize::from(segments) + (bytes.min(MAX_BYTES) / Prd::BOUNDARY) as usize
}

impl<S: DmaSpace<Addr = u64>> Table<S> {
    fn new(space: &S, entries: usize) -> Result<Self, DmaError> {
        let bytes = entries * ENTRY;
        // Aligned to its size rounded up, it crosses no boundary.
        let align = bytes.next_power_of_two();
        let error = DmaError::OutOfMemory { bytes, align };
        let layout = Layout::from_size_align(bytes, align).map_err(|_| error)?;
        let region = space.alloc(layout)?;
        let table = Self { region, entries };
        table.addr()?;
        Ok(table)
    }

    /// Where the table lies for the bus master.
    fn addr(&self) -> Result<u32, DmaError> {
        let addr = self.region.addr();
        u32::try_from(addr).map_err(|_| DmaError::NotAddressable {
            addr: addr as usize,
        })
    }

    /// Describes the segments of a request.
    fn fill(&self, segments: &[Segment<u64>]) -> Result<(), DmaError> {
        let mut index = 0;
        let mut last = None;
        let mut put = |region: Prd| {
            if index >= self.entries {
                return Err(DmaError::TooManySegments { max: self.entries });
            }
            let bytes: [u8; ENTRY] = zerocopy::transmute!(region);
            self.region
                .write_u64(index * ENTRY, u64::from_le_bytes(bytes));
            index += 1;
            Ok(())
        };
        for segment in segments {
            let Segment { addr, len } = *segment;
            let (mut at, mut left) = (addr, u64::from(len));
            if at.checked_add(left).is_none_or(|end| end > LIMIT) {
                return Err(DmaError::NotAddressable {
                    addr: addr as usize,
                });
            }
            if (at | left) & 1 != 0 {
                return Err(DmaError::Misaligned {
                    addr: addr as usize,
                    bytes: len,
                    align: 2,
                });
            }
            while left > 0 {
                let boundary = u64::from(Prd::BOUNDARY);
                let now = left.min(boundary - at % boundary);
                let region = Prd {
                    // Below 4 GiB (checked above).
                    addr: U32::new(at as u32),
                    // 64 KiB are written as 0.
                    byte_count: U16::new(now as u16),
                    flags: U16::ZERO,
                };
                if let Some(region) = last.replace(region) {
                    put(region)?;
                }
                at += now;
                left -= now;
            }
        }
        match last {
            Some(region) => put(Prd {
                flags: U16::new(Prd::END_OF_TABLE),
                ..region
            }),
            None => Ok(()),
        }
    }
}

/// A buffer that the table describes.
struct Loaded<B: DmaBuf> {
    lent: Lent<B>,
    bytes: usize,
    segments: usize,
    direction: Direction,
}

/// The bus master of a channel.
pub(super) struct Engine<B: DmaBuf, P, S: DmaSpace<Addr = u64>> {
    ports: OwnedPorts<P>,
    /// First of its ports.
    base: u16,
    space: S,
    /// `None` only while it is dropped.
    table: Option<Table<S>>,
    room: Storage<Segment<u64>>,
    loaded: Option<Loaded<B>>,
    /// It was started, and has not been seen to stop.
    running: bool,
}

impl<B: DmaBuf, P, S: DmaSpace<Addr = u64>> fmt::Debug for Engine<B, P, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("base", &self.base)
            .field("loaded", &self.loaded.is_some())
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl<B: DmaBuf, P: PortIo, S: DmaSpace<Addr = u64>> Engine<B, P, S> {
    /// The bus master at `base`, for buffers of up to as many segments as
    /// there is room for.
    pub(super) fn new(
        ports: OwnedPorts<P>,
        base: u16,
        space: S,
        room: Storage<Segment<u64>>,
        max_bytes: u32,
    ) -> Result<Self, AtaError> {
        let segments = u16::try_from(room.len()).unwrap_or(u16::MAX);
        let entries = entries_for(segments, max_bytes).min(MAX_ENTRIES);
        let table = Table::new(&space, entries)?;
        Ok(Self {
            ports,
            base,
            space,
            table: Some(table),
            room,
            loaded: None,
            running: false,
        })
    }

    /// Tells the bus master where the table lies: once is enough.
    pub(super) fn show_table(&self) -> Result<(), DmaError> {
        if let Some(table) = &self.table {
            let addr = table.addr()?;
            self.ports
                .write_u32(self.port(bus_master::PRDT_ADDRESS), addr);
        }
        Ok(())
    }

    /// A port of its block; behind the last one comes the first, as on the
    /// bus.
    fn port(&self, offset: u16) -> u16 {
        self.base.wrapping_add(offset)
    }

    fn status_port(&self) -> u16 {
        self.port(bus_master::STATUS)
    }

    fn status(&self) -> BusMasterStatus {
        BusMasterStatus::from_bits_retain(self.ports.read_u8(self.status_port()))
    }

    fn command(&self, command: BusMasterCommand) {
        self.ports
            .write_u8(self.port(bus_master::COMMAND), command.bits());
    }

    /// Takes a buffer and describes it in the table. On failure hands it back,
    /// unless the space cannot take back what it already mapped.
    pub(super) fn load(
        &mut self,
        buffer: B,
        direction: Direction,
    ) -> Result<(), (Option<B>, DmaError)> {
        if self.running || self.loaded.is_some() {
            // One at a time: the table is in use.
            return Err((Some(buffer), DmaError::TooManySegments { max: 0 }));
        }
        let bytes = buffer.bytes();
        let (lent, segments) =
            Lent::lend(&self.space, buffer, Window::ALL, direction, &mut self.room)?;
        let described = self.room.get(..segments).unwrap_or(&[]);
        let filled = self
            .table
            .as_ref()
            .map_or(Ok(()), |table| table.fill(described));
        if let Err(error) = filled {
            // SAFETY: the bus master does not run, and was not started with it.
            let buffer = unsafe { lent.give_back(&self.space, Window::ALL, described, 0) };
            return Err((buffer, error));
        }
        self.loaded = Some(Loaded {
            lent,
            bytes,
            segments,
            direction,
        });
        Ok(())
    }

    /// Starts moving the data of the buffer that is loaded.
    pub(super) fn start(&mut self) {
        let Some(loaded) = &self.loaded else { return };
        let direction = match loaded.direction {
            Direction::FromDevice => BusMasterCommand::TO_MEMORY,
            Direction::ToDevice => BusMasterCommand::empty(),
        };
        self.running = true;
        self.command(BusMasterCommand::START | direction);
    }

    /// Stops the bus master once the drive is done. Says whether it moved the
    /// data without an error.
    pub(super) fn finish(&mut self, drive_failed: bool, polls: u32) -> Result<bool, Fault> {
        let status = if drive_failed {
            // It may wait for data that will not come.
            self.command(BusMasterCommand::empty());
            self.wait(polls)?
        } else {
            let status = self.wait(polls)?;
            self.command(BusMasterCommand::empty());
            status
        };
        self.running = false;
        let failed = status.contains(BusMasterStatus::ERROR);
        if failed {
            // Errors stay until 1 is written to them.
            self.ports.write_u8(self.status_port(), status.bits());
        }
        Ok(!failed)
    }

    /// Stops the bus master, whatever it is doing.
    pub(super) fn stop(&mut self) {
        self.command(BusMasterCommand::empty());
    }

    /// Waits until a bus master that was stopped has let go.
    pub(super) fn wait_stopped(&mut self, polls: u32) -> Result<(), AtaError> {
        match self.wait(polls) {
            Ok(status) => {
                self.running = false;
                // What the last transfers left in it.
                self.ports.write_u8(self.status_port(), status.bits());
                Ok(())
            }
            Err(_) => Err(AtaError::Timeout {
                register: self.status_port(),
                value: self.status().bits(),
                polls,
            }),
        }
    }

    /// Waits until the bus master is not active.
    fn wait(&self, polls: u32) -> Result<BusMasterStatus, Fault> {
        let mut last = BusMasterStatus::ACTIVE;
        for _ in 0..polls {
            last = self.status();
            if !last.contains(BusMasterStatus::ACTIVE) {
                return Ok(last);
            }
        }
        Err(Fault::Register {
            register: self.status_port(),
            value: u32::from(last.bits()),
        })
    }
}

impl<B: DmaBuf, P, S: DmaSpace<Addr = u64>> Engine<B, P, S> {
    /// Gives the buffer back, all of which was written, or nothing. `None` if
    /// there is none, if the bus master may still have it, or if the platform
    /// cannot end the access: then it is leaked.
    pub(super) fn unload(&mut self, written: bool) -> Option<B> {
        if self.running {
            return None;
        }
        let loaded = self.loaded.take()?;
        let segments = self.room.get(..loaded.segments).unwrap_or(&[]);
        let written = if written { loaded.bytes } else { 0 };
        // SAFETY: the bus master was never started with the buffer, or has
        // been seen inactive and was stopped since: it moves nothing until it
        // is started again.
        unsafe {
            loaded
                .lent
                .give_back(&self.space, Window::ALL, segments, written)
        }
    }
}

impl<B: DmaBuf, P, S: DmaSpace<Addr = u64>> Drop for Engine<B, P, S> {
    fn drop(&mut self) {
        drop(self.unload(false));
        if !self.running {
            return;
        }
        // The bus master may still read the table and write to the buffer.
        if let Some(table) = self.table.take() {
            table.region.leak();
        }
        if let Some(loaded) = &self.loaded {
            self.space.leaked(loaded.bytes);
        }
    }
}
