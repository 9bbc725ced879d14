//! How a drive's data moves between the disk and the guest: through the data
//! register a block at a time, or through the bus master.
#![forbid(unsafe_code)]

use super::device::Device;
use super::drive::MAX_MULTIPLE;
use crate::disk::{DiskError, DiskOp, DiskRequest, SECTOR_BYTES, Submit};
use crate::memory::{Access, GuestMemory, IoBufs, MapError, Snapshot};
use pvkit_protocol::emulated::ata::Error;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Tag of the drive's only request.
const TAG: u16 = 0;

/// What the drive is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It takes commands.
    Idle,
    /// The disk has a request, or had no room for it.
    Busy(Work),
    /// The guest is to read a block of data.
    DataIn(Block),
    /// The guest is to write a block of data.
    DataOut(Block),
    /// A DMA command waits for the bus master.
    Dma,
}

/// What the disk's request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    ReadBlock,
    WriteBlock,
    Dma,
    Flush,
}

/// How far the guest is in a block of PIO data. `at` is less than `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    at: usize,
    end: usize,
}

/// What is left of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Transfer {
    pub(super) sector: u64,
    /// Sectors.
    pub(super) left: u32,
    /// Sectors of a PIO block.
    pub(super) block: u32,
    pub(super) write: bool,
    pub(super) ext: bool,
}

impl Transfer {
    /// Sectors of the next PIO block.
    fn now(&self) -> u32 {
        self.block.min(self.left)
    }

    fn advance(&mut self) {
        let now = self.now();
        self.sector += u64::from(now);
        self.left -= now;
    }
}

/// Room for one block of PIO data, in the form that the disk takes.
#[derive(Debug)]
pub(super) struct Buffer(Arc<Snapshot>);

impl Buffer {
    const BYTES: usize = MAX_MULTIPLE as usize * SECTOR_BYTES as usize;

    /// A buffer of its own.
    pub(super) fn new() -> Result<Self, BufferError> {
        let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), Self::BYTES)])?;
        Ok(Self(GuestMemory::new(Arc::new(map))?.snapshot()))
    }

    /// Fills the start of the buffer.
    pub(super) fn put(&self, data: &[u8]) -> bool {
        self.0.write(0, data).is_ok()
    }

    /// Makes `bufs` the first `bytes` of the buffer.
    fn lend(&self, bytes: u64, bufs: &mut IoBufs) -> bool {
        bufs.start(&self.0);
        bufs.push(0, bytes, Access::Write).is_ok()
    }
}

/// There is no memory for a buffer.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) enum BufferError {
    Memory(#[from] vm_memory::mmap::FromRangesError),
    Map(#[from] MapError),
}

impl Device {
    /// The bytes that the command that waits for the bus master wants to move,
    /// and whether they go to the disk.
    pub(super) fn wants_dma(&self) -> Option<(u64, bool)> {
        let bytes = u64::from(self.transfer.left) * SECTOR_BYTES;
        (self.phase == Phase::Dma).then_some((bytes, self.transfer.write))
    }

    /// Moves the data of the command that waits for the bus master to or from
    /// `bufs`.
    pub(super) fn start_dma(&mut self) {
        let op = self.op();
        self.submit(Work::Dma, op, self.transfer.sector);
    }

    /// Ends the command that waits for the bus master.
    pub(super) fn fail_dma(&mut self) {
        self.fail(Error::ABRT);
    }

    pub(super) fn is_doing_dma(&self) -> bool {
        self.phase == Phase::Busy(Work::Dma)
    }

    fn op(&self) -> DiskOp {
        if self.transfer.write {
            DiskOp::Write {
                fua: self.drive.write_through(),
            }
        } else {
            DiskOp::Read
        }
    }

    /// Reads the next block from the disk.
    pub(super) fn read_block(&mut self) {
        self.move_block(Work::ReadBlock);
    }

    fn move_block(&mut self, work: Work) {
        let bytes = u64::from(self.transfer.now()) * SECTOR_BYTES;
        if !self.buffer.lend(bytes, &mut self.bufs) {
            // Blocks have at most MAX_MULTIPLE sectors.
            return self.fail(Error::ABRT);
        }
        let op = self.op();
        self.submit(work, op, self.transfer.sector);
    }

    /// The block that is next, from its start on. `None` if there is none.
    fn next_block(&self) -> Option<Block> {
        let end = self.transfer.now() as usize * SECTOR_BYTES as usize;
        (end > 0).then_some(Block { at: 0, end })
    }

    /// Lets the guest read the block in the buffer.
    pub(super) fn offer_block(&mut self) {
        match self.next_block() {
            Some(block) => {
                self.phase = Phase::DataIn(block);
                self.raise();
            }
            None => self.succeed(),
        }
    }

    /// Lets the guest write a block to the buffer.
    pub(super) fn ask_for_block(&mut self) {
        match self.next_block() {
            Some(block) => self.phase = Phase::DataOut(block),
            None => self.succeed(),
        }
    }

    /// Reads of the data register, of any width; what is not there stays as it
    /// is in `data`.
    pub(super) fn read_data(&mut self, data: &mut [u8]) {
        let mut rest = data;
        while !rest.is_empty() && !self.other_is_selected() {
            let Phase::DataIn(mut block) = self.phase else {
                break;
            };
            let count = rest.len().min(block.end - block.at);
            let (now, later) = rest.split_at_mut(count);
            // The block lies in the buffer.
            let _ = self.buffer.0.read(block.at as u64, now);
            rest = later;
            block.at += count;
            self.phase = Phase::DataIn(block);
            if block.at == block.end {
                self.transfer.advance();
                if self.transfer.left == 0 {
                    // The guest has all of it, and is not interrupted again.
                    self.phase = Phase::Idle;
                } else {
                    self.read_block();
                }
            }
        }
    }

    /// Writes of the data register, of any width; what nobody asked for is
    /// dropped.
    pub(super) fn write_data(&mut self, data: &[u8]) {
        let mut rest = data;
        while !rest.is_empty() && !self.other_is_selected() {
            let Phase::DataOut(mut block) = self.phase else {
                break;
            };
            let (now, later) = rest.split_at(rest.len().min(block.end - block.at));
            // The block lies in the buffer.
            let _ = self.buffer.0.write(block.at as u64, now);
            rest = later;
            block.at += now.len();
            self.phase = Phase::DataOut(block);
            if block.at == block.end {
                self.move_block(Work::WriteBlock);
            }
        }
    }

    /// Hands the disk a request with the data in `bufs`.
    pub(super) fn submit(&mut self, work: Work, op: DiskOp, sector: u64) {
        self.phase = Phase::Busy(work);
        self.hand_over(op, sector);
        if self.is_stalled() {
            // The worker tries again.
            self.kick.notify();
        }
    }

    fn hand_over(&mut self, op: DiskOp, sector: u64) {
        let request = DiskRequest {
            op,
            sector,
            data: &self.bufs,
        };
        match self.lane.submit(request, TAG) {
            Submit::Done(result) => self.returned(result),
            Submit::Queued => {
                self.counters.queued.add(1);
                self.commit();
            }
            Submit::Full => self.stalled = Some((op, sector)),
        }
    }

    /// Tells the host of the request that the lane has.
    fn commit(&mut self) {
        self.uncommitted = !self.lane.commit();
    }

    /// Whether the host did not take a request, which is to be tried again.
    pub(super) fn is_stalled(&self) -> bool {
        self.uncommitted || self.stalled.is_some()
    }

    /// Takes back what the disk has done, and tries again what it had no room
    /// for. Returns whether anything happened.
    pub(super) fn reap(&mut self) -> bool {
        let mut returned = None;
        if self.lane.in_flight() > 0 {
            if self.uncommitted {
                self.commit();
            }
            self.lane.reap(&mut |_, result| returned = Some(result));
        }
        if let Some(result) = returned {
            if self.discard {
                self.finish_reset();
            } else {
                self.returned(result);
            }
            return true;
        }
        if let Some((op, sector)) = self.stalled.take() {
            self.hand_over(op, sector);
            return self.stalled.is_none();
        }
        false
    }

    /// Whether the disk has a request, or had no room for it.
    pub(super) fn waits_for_disk(&self) -> bool {
        matches!(self.phase, Phase::Busy(_))
    }

    /// The disk is done.
    fn returned(&mut self, result: Result<(), DiskError>) {
        let Phase::Busy(work) = self.phase else {
            return;
        };
        if let Err(error) = result {
            log::debug!("ata: {work:?} failed: {error}");
            return self.disk_failed(work, error);
        }
        let bytes = self.bufs.bytes();
        if self.transfer.write {
            self.counters.bytes_written.add(bytes);
        } else {
            self.counters.bytes_read.add(bytes);
        }
        match work {
            Work::ReadBlock => self.offer_block(),
            Work::WriteBlock => {
                self.transfer.advance();
                self.ask_for_block();
                // Either the next block is wanted, or this was the last.
                self.raise();
            }
            Work::Dma | Work::Flush => self.succeed(),
        }
    }

    fn disk_failed(&mut self, work: Work, error: DiskError) {
        let bits = match error {
            DiskError::OutOfRange { .. } => Error::IDNF,
            _ if work == Work::Flush || self.transfer.write => Error::ABRT,
            _ => Error::UNC,
        };
        if work != Work::Flush {
            self.show_sector(self.transfer.sector, self.transfer.left);
        }
        self.fail(bits);
    }
}
