//! What firmware does before a guest starts: base address registers get
//! addresses.
#![forbid(unsafe_code)]

use super::{Bar, PciFunction, Space};
use pvkit_protocol::pci::{Command, header};
use thiserror::Error;

/// There is no room for a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("there is no room for {bytes} bytes of registers")]
pub struct NoRoom {
    /// Size of the window.
    pub bytes: u64,
}

/// Addresses that nobody uses.
#[derive(Debug, Clone)]
pub struct MemoryPool {
    next: u64,
    end: u64,
}

impl MemoryPool {
    /// The addresses from `start` to before `end`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { next: start, end }
    }

    /// Takes `bytes`, a power of two, aligned to their number.
    fn take(&mut self, bytes: u64) -> Result<u64, NoRoom> {
        let place = self.next.checked_next_multiple_of(bytes);
        let end = place.and_then(|place| place.checked_add(bytes));
        match (place, end) {
            (Some(place), Some(end)) if end <= self.end => {
                self.next = end;
                Ok(place)
            }
            _ => Err(NoRoom { bytes }),
        }
    }
}

/// Gives every base address register of memory an address out of `pool`, and
/// switches their decoding on.
///
/// # Errors
/// [`NoRoom`] if the pool is too small; registers may have been assigned by
/// then, and decode nothing.
pub fn assign_memory(function: &mut dyn PciFunction, pool: &mut MemoryPool) -> Result<(), NoRoom> {
    assign(function, pool, Space::Memory, Command::MEMORY)
}

/// The same for base address registers of ports; the pool is one of ports.
///
/// # Errors
/// As for [`assign_memory`].
pub fn assign_ports(function: &mut dyn PciFunction, pool: &mut MemoryPool) -> Result<(), NoRoom> {
    assign(function, pool, Space::Port, Command::IO)
}

fn assign(
    function: &mut dyn PciFunction,
    pool: &mut MemoryPool,
    space: Space,
    decode: Command,
) -> Result<(), NoRoom> {
    let bars: Vec<(u8, Bar)> = function.config().bars().collect();
    for (index, bar) in bars {
        if bar.space() != space {
            continue;
        }
        let address = pool.take(bar.size())?.to_le_bytes();
        let bytes = match bar {
            Bar::Memory64 { .. } => 8,
            _ => 4,
        };
        function.write_config(header::bar(index), address.get(..bytes).unwrap_or(&address));
    }
    let command = function.config().command() | decode;
    function.write_config(header::COMMAND, &command.bits().to_le_bytes());
    Ok(())
}
