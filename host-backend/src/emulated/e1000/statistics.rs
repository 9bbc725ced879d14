//! Statistics registers: counted a batch at a time, cleared by reading, stuck
//! at their largest value.
#![forbid(unsafe_code)]

use pvkit_protocol::emulated::e1000::register::statistic::{self, size_class};
use pvkit_protocol::frame::MacAddress;

/// Bytes of the check sequence, which frames here do not carry and statistics
/// count.
const CHECK_BYTES: u64 = 4;

/// What happened in a batch, in one direction.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) frames: u32,
    /// Without check sequences.
    pub(super) bytes: u64,
    pub(super) broadcast: u32,
    pub(super) multicast: u32,
    classes: [u32; 6],
}

impl Tally {
    /// Counts `frames` frames to a station, of `bytes` bytes together.
    #[inline]
    pub(super) fn count(&mut self, to: MacAddress, frames: u32, bytes: u64) {
        self.frames = self.frames.saturating_add(frames);
        self.bytes += bytes;
        if to == MacAddress::BROADCAST {
            self.broadcast += frames;
        } else if to.is_multicast() {
            self.multicast += frames;
        }
        let each = (bytes / u64::from(frames.max(1)) + CHECK_BYTES) as u32;
        if let Some(class) = self.classes.get_mut(size_class(each) as usize) {
            *class += frames;
        }
    }

    /// Bytes with check sequences.
    fn octets(&self) -> u64 {
        self.bytes + CHECK_BYTES * u64::from(self.frames)
    }
}

/// The registers.
#[derive(Debug)]
pub(super) struct Statistics([u32; statistic::COUNT]);

impl Default for Statistics {
    fn default() -> Self {
        Self([0; statistic::COUNT])
    }
}

impl Statistics {
    fn place(&mut self, offset: u32) -> Option<&mut u32> {
        let index = offset.checked_sub(statistic::FIRST)? / 4;
        self.0.get_mut(index as usize)
    }

    /// Whether a register is one of these.
    pub(super) fn has(offset: u32) -> bool {
        (statistic::FIRST..=statistic::LAST).contains(&offset)
    }

    pub(super) fn add(&mut self, offset: u32, count: u32) {
        if let Some(place) = self.place(offset) {
            *place = place.saturating_add(count);
        }
    }

    /// Adds to a register of 64 bits, whose high half follows.
    fn add_wide(&mut self, low: u32, count: u64) {
        let half = |value: Option<&mut u32>| value.map_or(0, |value| u64::from(*value));
        let value = half(self.place(low)) | half(self.place(low + 4)) << 32;
        let value = value.saturating_add(count);
        for (offset, half) in [(low, value as u32), (low + 4, (value >> 32) as u32)] {
            if let Some(place) = self.place(offset) {
                *place = half;
            }
        }
    }

    /// Reads a register, which clears it; of 64 bits, the high half clears
    /// both.
    pub(super) fn take(&mut self, offset: u32) -> u32 {
        match offset {
            statistic::GORCL | statistic::GOTCL | statistic::TORL | statistic::TOTL => {
                self.place(offset).map_or(0, |value| *value)
            }
            statistic::GORCH | statistic::GOTCH | statistic::TORH | statistic::TOTH => {
                if let Some(low) = self.place(offset - 4) {
                    *low = 0;
                }
                self.place(offset).map_or(0, std::mem::take)
            }
            _ => self.place(offset).map_or(0, std::mem::take),
        }
    }

    fn classes(&mut self, first: u32, tally: &Tally) {
        for (class, count) in (0..).zip(tally.classes) {
            self.add(first + 4 * class, count);
        }
    }

    pub(super) fn sent(&mut self, tally: &Tally) {
        for (offset, count) in [
            (statistic::GPTC, tally.frames),
            (statistic::TPT, tally.frames),
            (statistic::BPTC, tally.broadcast),
            (statistic::MPTC, tally.multicast),
        ] {
            self.add(offset, count);
        }
        self.add_wide(statistic::GOTCL, tally.octets());
        self.add_wide(statistic::TOTL, tally.octets());
        self.classes(statistic::PTC64, tally);
    }

    pub(super) fn received(&mut self, tally: &Tally) {
        for (offset, count) in [
            (statistic::GPRC, tally.frames),
            (statistic::TPR, tally.frames),
            (statistic::BPRC, tally.broadcast),
            (statistic::MPRC, tally.multicast),
        ] {
            self.add(offset, count);
        }
        self.add_wide(statistic::GORCL, tally.octets());
        self.add_wide(statistic::TORL, tally.octets());
        self.classes(statistic::PRC64, tally);
    }
}
