//! Which address is behind which port. Looked up by all senders at once,
//! without a lock.
#![forbid(unsafe_code)]

use pvkit_protocol::frame::MacAddress;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Addresses that share a place: one more replaces the oldest of them.
const WAYS: usize = 4;

/// An address and its port in one word, so that both are read at once: 0 if
/// there is none. That the time beside it may be that of another entry for a
/// moment does no harm: it is learned again, or a frame is flooded.
#[derive(Debug, Default)]
struct Entry {
    key: AtomicU64,
    seconds: AtomicU32,
}

/// A table of bounded size. What it does not know is flooded, so losing an
/// entry costs copies, never frames.
#[derive(Debug)]
pub(super) struct Table {
    entries: Box<[Entry]>,
    age_seconds: u32,
}

fn address_word(address: MacAddress) -> u64 {
    let [a, b, c, d, e, f] = address.0;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

impl Table {
    /// A table for about `addresses` addresses, each known for so many seconds
    /// after it was last seen.
    pub(super) fn new(addresses: usize, age_seconds: u32) -> Self {
        let sets = addresses.div_ceil(WAYS).next_power_of_two();
        Self {
            entries: (0..sets * WAYS).map(|_| Entry::default()).collect(),
            age_seconds,
        }
    }

    fn set(&self, address: u64) -> &[Entry] {
        // Fibonacci hashing: the high bits of the product depend on all bits.
        let hash = address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let sets = (self.entries.len() / WAYS).max(1);
        let start = hash as usize % sets * WAYS;
        self.entries.get(start..start + WAYS).unwrap_or_default()
    }

    fn fresh(&self, entry: &Entry, now: u32) -> bool {
        now.saturating_sub(entry.seconds.load(Ordering::Relaxed)) <= self.age_seconds
    }

    /// The port of an address, if it was seen lately.
    pub(super) fn lookup(&self, address: MacAddress, now: u32) -> Option<u16> {
        let address = address_word(address);
        for entry in self.set(address) {
            let key = entry.key.load(Ordering::Relaxed);
            if key >> 16 == address && key != 0 {
                return self.fresh(entry, now).then_some(key as u16);
            }
        }
        None
    }

    /// A frame from this address came in at this port.
    pub(super) fn learn(&self, address: MacAddress, port: u16, now: u32) {
        if !address.is_unicast() {
            return;
        }
        let address = address_word(address);
        let key = address << 16 | u64::from(port);
        let set = self.set(address);
        let mut oldest: Option<(&Entry, u32)> = None;
        for entry in set {
            let known = entry.key.load(Ordering::Relaxed);
            let seconds = entry.seconds.load(Ordering::Relaxed);
            if known >> 16 == address && known != 0 {
                // Written only when it changes: other senders read it.
                if known != key {
                    entry.key.store(key, Ordering::Relaxed);
                }
                if seconds != now {
                    entry.seconds.store(now, Ordering::Relaxed);
                }
                return;
            }
            let age = if known == 0 { 0 } else { seconds.max(1) };
            if oldest.is_none_or(|(_, other)| age < other) {
                oldest = Some((entry, age));
            }
        }
        if let Some((entry, _)) = oldest {
            entry.seconds.store(now, Ordering::Relaxed);
            entry.key.store(key, Ordering::Relaxed);
        }
    }

    /// Forgets all addresses of a port.
    pub(super) fn forget(&self, port: u16) {
        for entry in &self.entries {
            let key = entry.key.load(Ordering::Relaxed);
            if key as u16 == port {
                let _ = entry
                    .key
                    .compare_exchange(key, 0, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_move_age_and_are_forgotten() {
        let table = Table::new(64, 300);
        let (one, two) = (MacAddress::local(1), MacAddress::local(2));
        table.learn(one, 5, 10);
        table.learn(two, 6, 10);
        table.learn(MacAddress::BROADCAST, 7, 10);
        assert_eq!(table.lookup(one, 310), Some(5));
        assert_eq!(table.lookup(one, 311), None);
        assert_eq!(table.lookup(MacAddress::BROADCAST, 10), None);
        assert_eq!(table.lookup(MacAddress::default(), 10), None);
        table.learn(one, 6, 200);
        assert_eq!(table.lookup(one, 400), Some(6));
        table.forget(6);
        assert_eq!(table.lookup(one, 200), None);
        assert_eq!(table.lookup(two, 200), None);
    }

    #[test]
    fn a_flood_of_addresses_costs_no_memory_and_no_sense() {
        let table = Table::new(16, 300);
        for low in 0..100_000 {
            table.learn(MacAddress::local(low), (low % 9) as u16, low / 100);
        }
        assert_eq!(table.entries.len(), 16);
        let mut known = 0;
        for low in 0..100_000 {
            if let Some(port) = table.lookup(MacAddress::local(low), 1000) {
                assert_eq!(u32::from(port), low % 9);
                known += 1;
            }
        }
        assert!((1..=16).contains(&known));
    }
}
