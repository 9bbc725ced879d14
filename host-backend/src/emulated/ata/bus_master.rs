//! The bus-master half of a channel: its registers, and the table of regions
//! that the guest prepares ("Programming Interface for Bus Master IDE
//! Controller", revision 1.0).
#![forbid(unsafe_code)]

use crate::memory::{Access, IoBufs, MemoryError, Snapshot};
use pvkit_protocol::emulated::ata::{BusMasterCommand, BusMasterStatus, Prd, bus_master};
use std::sync::Arc;
use thiserror::Error;

/// Most entries of a table, and most pieces of host memory that they may come
/// to: as many as a system call takes. The table of a stock driver has 128
/// entries.
const MAX_PIECES: usize = 1024;

/// A table that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum TableError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("the table has more than {MAX_PIECES} entries")]
    Long,
}

/// What a table comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    /// It has room for all that was wanted.
    Enough {
        /// It ends exactly there.
        exhausted: bool,
    },
    /// It ends before.
    Short,
}

/// A transfer that runs.
#[derive(Debug, Clone, Copy)]
struct Running {
    /// The table ends with it.
    exhausted: bool,
}

/// The bus-master registers of a channel.
#[derive(Debug, Default)]
pub(super) struct BusMaster {
    command: BusMasterCommand,
    status: BusMasterStatus,
    table: u32,
    running: Option<Running>,
}

impl BusMaster {
    /// A read of the byte at `offset`, from 0 to 7.
    pub(super) fn read(&self, offset: u16) -> u8 {
        let at = |first| usize::from(offset.wrapping_sub(first));
        match offset {
            bus_master::COMMAND => self.command.bits(),
            bus_master::STATUS => self.status.bits(),
            bus_master::PRDT_ADDRESS.. => {
                let bytes = self.table.to_le_bytes();
                bytes
                    .get(at(bus_master::PRDT_ADDRESS))
                    .copied()
                    .unwrap_or(0xff)
            }
            // Reserved.
            _ => 0,
        }
    }

    /// A write of the byte at `offset`, from 0 to 7.
    pub(super) fn write(&mut self, offset: u16, value: u8) {
        match offset {
            bus_master::COMMAND => self.write_command(BusMasterCommand::from_bits_truncate(value)),
            bus_master::STATUS => {
                let value = BusMasterStatus::from_bits_truncate(value);
                let kept = BusMasterStatus::DRIVE0_DMA | BusMasterStatus::DRIVE1_DMA;
                let cleared = BusMasterStatus::ERROR | BusMasterStatus::INTERRUPT;
                self.status = (self.status - kept - (value & cleared)) | (value & kept);
            }
            bus_master::PRDT_ADDRESS.. => {
                let mut bytes = self.table.to_le_bytes();
                let at = usize::from(offset - bus_master::PRDT_ADDRESS);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
                // Tables are aligned to 4 bytes.
                self.table = u32::from_le_bytes(bytes) & !0b11;
            }
            _ => {}
        }
    }

    fn write_command(&mut self, value: BusMasterCommand) {
        let was_started = self.command.contains(BusMasterCommand::START);
        let is_started = value.contains(BusMasterCommand::START);
        self.command = value;
        if is_started && !was_started {
            self.status.insert(BusMasterStatus::ACTIVE);
        } else if !is_started && self.running.is_none() {
            // What the disk already has cannot be stopped: until it is done,
            // the bus master stays active.
            self.status.remove(BusMasterStatus::ACTIVE);
        }
    }

    /// Whether it was started and not stopped, so that it serves the next
    /// command that wants it.
    pub(super) fn is_active(&self) -> bool {
        self.status.contains(BusMasterStatus::ACTIVE)
    }

    /// Whether a transfer runs.
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Whether transfers go to the disk.
    pub(super) fn is_writing(&self) -> bool {
        !self.command.contains(BusMasterCommand::TO_MEMORY)
    }

    /// Makes `bufs` the first `bytes` of what the table describes.
    ///
    /// The table is read once, entry by entry: what the guest changes meanwhile
    /// counts or does not, but nothing is used that was not checked.
    pub(super) fn gather(
        &self,
        memory: &Arc<Snapshot>,
        bytes: u64,
        bufs: &mut IoBufs,
    ) -> Result<Table, TableError> {
        bufs.start(memory);
        let access = if self.is_writing() {
            Access::Read
        } else {
            Access::Write
        };
        let mut at = u64::from(self.table);
        for _ in 0..MAX_PIECES {
            let entry: Prd = memory.read_value(at)?;
            at += size_of::<Prd>() as u64;
            let wanted = bytes - bufs.bytes();
            let now = wanted.min(u64::from(entry.len()));
            // Regions are aligned to words: bit 0 of the address does not count.
            bufs.push(u64::from(entry.addr.get() & !1), now, access)?;
            if bufs.as_iovecs().len() > MAX_PIECES {
                return Err(TableError::Long);
            }
            if now == wanted {
                let exhausted = entry.is_last() && now == u64::from(entry.len());
                return Ok(Table::Enough { exhausted });
            }
            if entry.is_last() {
                return Ok(Table::Short);
            }
        }
        Err(TableError::Long)
    }

    /// A transfer runs from now on.
    pub(super) fn begin(&mut self, exhausted: bool) {
        self.running = Some(Running { exhausted });
    }

    /// The transfer is over.
    pub(super) fn end(&mut self, succeeded: bool) {
        let exhausted = self.running.take().is_some_and(|running| running.exhausted);
        let is_started = self.command.contains(BusMasterCommand::START);
        if (exhausted && succeeded) || !is_started {
            self.status.remove(BusMasterStatus::ACTIVE);
        }
    }

    /// The table ended too early: inactive, with no error and no interrupt.
    pub(super) fn run_out(&mut self) {
        self.status.remove(BusMasterStatus::ACTIVE);
    }

    /// The memory cannot be reached.
    pub(super) fn fail(&mut self) {
        self.status.remove(BusMasterStatus::ACTIVE);
        self.status.insert(BusMasterStatus::ERROR);
    }

    /// The drive interrupts.
    pub(super) fn interrupt(&mut self) {
        self.status.insert(BusMasterStatus::INTERRUPT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use zerocopy::IntoBytes;
    use zerocopy::little_endian::{U16, U32};

    #[test]
    fn pieces_are_counted_and_not_only_entries() {
        // Each region crosses from one piece of host memory to the next.
        const START: u64 = 0x1_0000;
        let ranges = [
            (GuestAddress(0), START as usize),
            (GuestAddress(START), 4096),
        ];
        let map = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let memory = GuestMemory::new(Arc::new(map)).unwrap().snapshot();
        let entry = Prd {
            addr: U32::new(START as u32 - 2),
            byte_count: U16::new(4),
            flags: U16::ZERO,
        };
        memory.write(0, [entry; 1024].as_bytes()).unwrap();
        let master = BusMaster::default();
        let mut bufs = IoBufs::new();
        let enough = Ok(Table::Enough { exhausted: false });
        assert_eq!(master.gather(&memory, 4 * 512, &mut bufs), enough);
        assert_eq!(bufs.as_iovecs().len(), 1024);
        let long = Err(TableError::Long);
        assert_eq!(master.gather(&memory, 4 * 513, &mut bufs), long);
    }
}
