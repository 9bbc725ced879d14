//! What a machine costs its host in memory, besides the guest's RAM.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::sync::{Arc, OnceLock};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// A view of the monitor's own memory, which outlives the machine.
#[derive(Debug, Clone)]
pub struct Footprint {
    /// Where guest RAM lies in this process: first address, and the one behind
    /// the last.
    ram: Arc<[(u64, u64)]>,
    at_stop: Arc<OnceLock<u64>>,
}

impl Footprint {
    pub(super) fn new(map: &GuestMemoryMmap<()>) -> Self {
        let ram = map.iter().filter_map(|region| {
            let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
            let start = host as usize as u64;
            Some((start, start + region.len()))
        });
        Self {
            ram: ram.collect(),
            at_stop: Arc::default(),
        }
    }

    /// Resident memory of this process less guest RAM, in bytes, now. Program
    /// text that other processes share counts, too.
    ///
    /// # Errors
    /// If the process cannot read its own map.
    pub fn now(&self) -> io::Result<u64> {
        let smaps = fs::read_to_string("/proc/self/smaps")?;
        Ok(resident_outside(&smaps, &self.ram))
    }

    /// What it was when the guest stopped, with all devices still there. `None`
    /// as long as the machine runs, or if that could not be read.
    #[must_use]
    pub fn at_stop(&self) -> Option<u64> {
        self.at_stop.get().copied()
    }

    pub(super) fn record(&self) {
        if let Ok(bytes) = self.now() {
            let _ = self.at_stop.set(bytes);
        }
    }
}

/// Adds up `Rss` of all mappings in the text of `smaps` (proc(5)) that lie in
/// none of `ranges`.
fn resident_outside(smaps: &str, ranges: &[(u64, u64)]) -> u64 {
    let mut counts = true;
    let mut sum = 0;
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib: u64 = kib.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            if counts {
                sum += kib * 1024;
            }
        } else if let Some(start) = mapping_start(line) {
            counts = !ranges
                .iter()
                .any(|(first, end)| (*first..*end).contains(&start));
        }
    }
    sum
}

/// The first address of a mapping, if the line is the head of one.
fn mapping_start(line: &str) -> Option<u64> {
    let (range, _) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    u64::from_str_radix(end, 16).ok()?;
    u64::from_str_radix(start, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_does_not_count() {
        let smaps = "\
00400000-00500000 r-xp 00000000 08:01 1 /bin/pvkit
Size:               1024 kB
Rss:                 100 kB
Pss:                  50 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Rss:              200000 kB
7f0010000000-7f0010001000 rw-p 00000000 00:00 0 [stack]
Rss:                   4 kB
VmFlags: rd wr mr mw me ac
";
        let ram = [(0x7f00_0000_0000, 0x7f00_1000_0000)];
        assert_eq!(resident_outside(smaps, &ram), 104 * 1024);
        assert_eq!(resident_outside(smaps, &[]), 200_104 * 1024);
        assert_eq!(resident_outside("", &ram), 0);
    }
}
