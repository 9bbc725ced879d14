//! Base address registers: how large they are, where they decode, and places
//! for those that firmware left without.

use super::{ConfigAccess, PciConfig, PciError};
use pvkit_protocol::pci::{
    BAR_IO, BAR_IO_MASK, BAR_MEMORY_64, BAR_MEMORY_MASK, BAR_MEMORY_TYPE, Bdf, Command, header,
};

/// Ports that a base address register decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortBar {
    /// First port; 0 if none was assigned.
    pub base: u16,
    /// Number of ports.
    pub size: u16,
}

/// Memory that a base address register decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBar {
    /// First address; 0 if none was assigned.
    pub base: u64,
    /// Size in bytes, a power of two.
    pub size: u64,
    /// It can lie above 4 GiB, and takes the next register too.
    pub is_64_bit: bool,
}

/// Ports that nobody uses, for functions that firmware left without.
#[derive(Debug)]
pub struct PortPool {
    next: u32,
    end: u32,
}

impl PortPool {
    /// The ports from `first` to `last`.
    ///
    /// # Safety
    /// No device decodes these ports, and none gets them otherwise.
    #[must_use]
    pub const unsafe fn new(first: u16, last: u16) -> Self {
        Self {
            next: first as u32,
            end: last as u32 + 1,
        }
    }

    /// Takes `size` ports, a power of two, aligned to their number.
    fn take(&mut self, size: u16) -> Result<u16, PciError> {
        let full = PciError::NoPorts(size);
        let size = u32::from(size);
        let base = self.next.max(1).next_multiple_of(size.max(1));
        if base + size > self.end {
            return Err(full);
        }
        let port = u16::try_from(base).map_err(|_| full)?;
        self.next = base + size;
        Ok(port)
    }
}

/// Addresses that nobody uses, for functions that firmware left without.
#[derive(Debug)]
pub struct MemoryPool {
    next: u64,
    last: u64,
}

impl MemoryPool {
    /// The addresses from `first` to `last`, in bytes. A register of 32 bits
    /// needs some below 4 GiB.
    ///
    /// # Safety
    /// Neither memory nor a device is at these addresses, and no device gets
    /// them otherwise.
    #[must_use]
    pub const unsafe fn new(first: u64, last: u64) -> Self {
        Self { next: first, last }
    }

    /// Takes `size` bytes, a power of two, aligned to their number, that end
    /// at `most` or before.
    fn take(&mut self, size: u64, most: u64) -> Result<u64, PciError> {
        let full = PciError::NoMemory(size);
        let base = self.next.max(1).checked_next_multiple_of(size.max(1));
        let base = base.ok_or(full)?;
        let last = base.checked_add(size - 1).ok_or(full)?;
        if last > self.last.min(most) {
            return Err(full);
        }
        // At the very end of the address space nothing is left.
        self.next = last.saturating_add(1);
        Ok(base)
    }
}

impl<A: ConfigAccess> PciConfig<A> {
    /// Calls `probe` while the function decodes neither ports nor memory: base
    /// address registers are written with all ones meanwhile.
    fn while_quiet<R>(&self, place: Bdf, probe: impl FnOnce() -> R) -> R {
        let command = self.command(place);
        let quiet = command - Command::IO - Command::MEMORY;
        self.set_u16(place, header::COMMAND, quiet.bits());
        let result = probe();
        self.set_u16(place, header::COMMAND, command.bits());
        result
    }

    /// What a register reads as when all bits were written. It is restored.
    fn ones(&self, place: Bdf, offset: u8, value: u32) -> u32 {
        self.set_bar(place, offset, u32::MAX);
        let ones = self.read_u32(place, offset);
        self.set_bar(place, offset, value);
        ones
    }

    /// Asks a base address register where its ports are, and how many. The
    /// function decodes nothing meanwhile.
    ///
    /// # Errors
    /// [`PciError`] if the register decodes no ports, or makes no sense.
    pub fn port_bar(&self, place: Bdf, bar: u8) -> Result<PortBar, PciError> {
        if bar >= header::BARS {
            return Err(PciError::NoBar(bar));
        }
        let offset = header::bar(bar);
        let value = self.read_u32(place, offset);
        if value & BAR_IO == 0 || value == u32::MAX {
            return Err(PciError::NotPorts { bar, value });
        }
        let ones = self.while_quiet(place, || self.ones(place, offset, value));

        // The high half may be fixed to 0: there are only 64 Ki ports.
        let mask = (ones & BAR_IO_MASK) as u16;
        let size = mask.wrapping_neg();
        let base = u16::try_from(value & BAR_IO_MASK).ok();
        match base {
            Some(base) if size.is_power_of_two() && base.is_multiple_of(size) => {
                Ok(PortBar { base, size })
            }
            _ => Err(PciError::Size { bar, value, ones }),
        }
    }

    /// The ports of a base address register, taken from `free` if none were
    /// assigned. Decoding has to be [enabled](PciConfig::enable).
    ///
    /// # Errors
    /// [`PciError`] if the register decodes no ports, does not keep what is
    /// written, or there are none left.
    pub fn assign_ports(
        &self,
        place: Bdf,
        bar: u8,
        free: &mut PortPool,
    ) -> Result<PortBar, PciError> {
        let found = self.port_bar(place, bar)?;
        if found.base != 0 {
            return Ok(found);
        }
        let base = free.take(found.size)?;
        let written = u32::from(base) | BAR_IO;
        self.set_bar(place, header::bar(bar), written);
        let read = self.read_u32(place, header::bar(bar));
        if read != written {
            return Err(PciError::Stuck { bar, written, read });
        }
        Ok(PortBar { base, ..found })
    }

    /// Asks a base address register where its memory is, and how much. The
    /// function decodes nothing meanwhile.
    ///
    /// # Errors
    /// [`PciError`] if the register decodes no memory, or makes no sense.
    pub fn memory_bar(&self, place: Bdf, bar: u8) -> Result<MemoryBar, PciError> {
        if bar >= header::BARS {
            return Err(PciError::NoBar(bar));
        }
        let offset = header::bar(bar);
        let value = self.read_u32(place, offset);
        if value & BAR_IO != 0 {
            return Err(PciError::NotMemory { bar, value });
        }
        let is_64_bit = value & BAR_MEMORY_TYPE == BAR_MEMORY_64;
        if is_64_bit && bar + 1 >= header::BARS {
            return Err(PciError::NoBar(bar + 1));
        }
        let upper = offset + 4;
        let high = if is_64_bit {
            self.read_u32(place, upper)
        } else {
            0
        };
        let (ones, high_ones) = self.while_quiet(place, || {
            let ones = self.ones(place, offset, value);
            let high_ones = if is_64_bit {
                self.ones(place, upper, high)
            } else {
                u32::MAX
            };
            (ones, high_ones)
        });
        if ones & BAR_MEMORY_MASK == 0 && (high_ones == 0 || !is_64_bit) {
            // A register that nothing can be written to is none.
            return Err(PciError::NotMemory { bar, value });
        }
        let mask = u64::from(high_ones) << 32 | u64::from(ones & BAR_MEMORY_MASK);
        let size = mask.wrapping_neg();
        let base = u64::from(high) << 32 | u64::from(value & BAR_MEMORY_MASK);
        if !size.is_power_of_two() || !base.is_multiple_of(size) {
            return Err(PciError::Size { bar, value, ones });
        }
        Ok(MemoryBar {
            base,
            size,
            is_64_bit,
        })
    }

    /// The memory of a base address register, taken from `free` if none was
    /// assigned. Decoding has to be [enabled](PciConfig::enable).
    ///
    /// # Errors
    /// [`PciError`] if the register decodes no memory, does not keep what is
    /// written, or there is none left.
    pub fn assign_memory(
        &self,
        place: Bdf,
        bar: u8,
        free: &mut MemoryPool,
    ) -> Result<MemoryBar, PciError> {
        let found = self.memory_bar(place, bar)?;
        if found.base != 0 {
            return Ok(found);
        }
        let most = if found.is_64_bit {
            u64::MAX
        } else {
            u64::from(u32::MAX)
        };
        let base = free.take(found.size, most)?;
        let halves = [(0, base as u32), (4, (base >> 32) as u32)];
        let count = if found.is_64_bit { 2 } else { 1 };
        for (half, written) in halves.into_iter().take(count) {
            let offset = header::bar(bar) + half;
            self.set_bar(place, offset, written);
            let fixed = if half == 0 { !BAR_MEMORY_MASK } else { 0 };
            let read = self.read_u32(place, offset) & !fixed;
            if read != written {
                return Err(PciError::Stuck { bar, written, read });
            }
        }
        Ok(MemoryBar { base, ..found })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // No device gets what these hand out.
    fn ports(first: u16, last: u16) -> PortPool {
        PortPool {
            next: first.into(),
            end: u32::from(last) + 1,
        }
    }

    fn memory(next: u64, last: u64) -> MemoryPool {
        MemoryPool { next, last }
    }

    #[test]
    fn pools_hand_out_aligned_ports_until_they_are_empty() {
        let mut pool = ports(0xc004, 0xc01f);
        assert_eq!(pool.take(16), Ok(0xc010));
        assert_eq!(pool.take(4), Err(PciError::NoPorts(4)));
        let mut pool = ports(0, 0xffff);
        assert_eq!(pool.take(4), Ok(4), "port 0 means unassigned");
        assert_eq!(pool.take(0x8000), Ok(0x8000));
        assert_eq!(pool.take(4), Err(PciError::NoPorts(4)));
        let mut pool = ports(10, 5);
        assert_eq!(pool.take(4), Err(PciError::NoPorts(4)));
    }

    #[test]
    fn pools_hand_out_aligned_memory_until_they_are_empty() {
        const LOW: u64 = u32::MAX as u64;
        let mut pool = memory(0xe000_0010, 0xe000_3fff);
        assert_eq!(pool.take(0x1000, LOW), Ok(0xe000_1000));
        assert_eq!(pool.take(0x1000, LOW), Ok(0xe000_2000));
        assert_eq!(pool.take(0x2000, LOW), Err(PciError::NoMemory(0x2000)));
        assert_eq!(pool.take(0x1000, LOW), Ok(0xe000_3000));
        assert_eq!(pool.take(16, LOW), Err(PciError::NoMemory(16)));
        let mut pool = memory(LOW - 0xfff, u64::MAX);
        assert_eq!(pool.take(1 << 33, LOW), Err(PciError::NoMemory(1 << 33)));
        assert_eq!(pool.take(0x1000, LOW), Ok(0xffff_f000));
        assert_eq!(pool.take(0x1000, LOW), Err(PciError::NoMemory(0x1000)));
        assert_eq!(pool.take(1 << 63, u64::MAX), Ok(1 << 63));
        assert_eq!(pool.take(16, u64::MAX), Err(PciError::NoMemory(16)));
        let mut pool = memory(0, 0xff);
        assert_eq!(pool.take(0x80, LOW), Ok(0x80), "address 0 means unassigned");
        let mut pool = memory(10, 5);
        assert_eq!(pool.take(4, LOW), Err(PciError::NoMemory(4)));
    }
}
