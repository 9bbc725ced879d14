//! Interrupts by message (PCI Local Bus Specification 3.0, §6.8.2).
#![forbid(unsafe_code)]

use super::{ConfigError, ConfigSpace};
use pvkit_protocol::pci::{capability, msix};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use thiserror::Error;

pub use pvkit_protocol::pci::msix::Control as MsixControl;

/// What a function writes to interrupt: where, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Message {
    /// Address; a multiple of 4.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// How messages leave a function; a monitor connects it to its interrupt
/// controllers.
pub trait Messages: Send + Sync + fmt::Debug {
    /// If vector `vector` is signalled from now on, `message` is sent; none
    /// while it is masked. Lets a monitor prepare a route, so that
    /// [`send`](Messages::send) is cheap. Called with locks held: it must not
    /// call back into the function or the bus.
    fn route(&self, vector: u16, message: Option<Message>);

    /// Sends what the vector was last routed to. The same rule about calling
    /// back holds.
    fn send(&self, vector: u16, message: Message);
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
    /// What [`Messages::route`] was last told.
    told: Option<Message>,
}

impl Entry {
    const RESET: Self = Self {
        address: 0,
        data: 0,
        masked: true,
        pending: false,
        told: None,
    };

    /// The four 32-bit words, as the guest reads them.
    fn word(&self, offset: usize) -> u32 {
        match offset {
            msix::ADDRESS_LOW => self.address as u32,
            msix::ADDRESS_HIGH => (self.address >> 32) as u32,
            msix::DATA => self.data,
            _ if self.masked => msix::MASKED,
            _ => 0,
        }
    }

    fn set_word(&mut self, offset: usize, value: u32) {
        match offset {
            msix::ADDRESS_LOW => {
                self.address = self.address & !0xffff_ffff | u64::from(value & !0b11);
            }
            msix::ADDRESS_HIGH => {
                self.address = self.address & 0xffff_ffff | u64::from(value) << 32;
            }
            msix::DATA => self.data = value,
            _ => self.masked = value & msix::MASKED != 0,
        }
    }
}

/// The saved vectors of a function. Whether MSI-X is on is in its configuration
/// space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MsixState(Vec<SavedEntry>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedEntry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

/// A saved table has another number of vectors, or an address that no guest can
/// have written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the saved MSI-X table is that of another function")]
pub struct OtherTable;

/// The vectors of a function: their table, and which of them are pending.
///
/// A vector that is signalled while it or the function is masked becomes
/// pending, and is sent as soon as it is masked no longer. While MSI-X is off,
/// signals are dropped.
#[derive(Debug)]
pub struct Msix {
    control: MsixControl,
    entries: Vec<Entry>,
    messages: Arc<dyn Messages>,
}

impl Msix {
    /// `vectors` vectors (at most [`msix::MOST`]), all masked, and MSI-X off.
    #[must_use]
    pub fn new(vectors: u16, messages: Arc<dyn Messages>) -> Self {
        let vectors = vectors.min(msix::MOST);
        Self {
            control: MsixControl::empty(),
            entries: vec![Entry::RESET; usize::from(vectors)],
            messages,
        }
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        // At most `msix::MOST`.
        self.entries.len() as u16
    }

    /// Adds the capability to `config`: the table is at `table` in base
    /// address register `bar`, and the pending bits at `pending`; both are
    /// multiples of 8. Returns the capability's offset.
    ///
    /// # Errors
    /// [`ConfigError`] if there is no room, or there are no vectors.
    pub fn add_capability(
        &self,
        config: &mut ConfigSpace,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<u8, ConfigError> {
        let Some(size) = self.vectors().checked_sub(1) else {
            return Err(ConfigError::NoVectors);
        };
        let mut body = [0; msix::BYTES as usize - 2];
        let mut mask = [0; msix::BYTES as usize - 2];
        let word = |offset: u32| offset & !msix::BAR_MASK | u32::from(bar) & msix::BAR_MASK;
        let writable = MsixControl::FUNCTION_MASK | MsixControl::ENABLE;
        let words = [table, pending].map(|offset| word(offset).to_le_bytes());
        let parts = size
            .to_le_bytes()
            .into_iter()
            .chain(words.into_iter().flatten());
        for (to, from) in body.iter_mut().zip(parts) {
            *to = from;
        }
        for (to, from) in mask.iter_mut().zip(writable.bits().to_le_bytes()) {
            *to = from;
        }
        config.add_capability(capability::MSIX, &body, &mask)
    }

    /// Whether the function interrupts by message, and not by pin.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.control.contains(MsixControl::ENABLE)
    }

    /// Follows the capability's message control. Switching MSI-X off forgets
    /// what is pending.
    pub fn set_control(&mut self, control: MsixControl) {
        if control == self.control {
            return;
        }
        let was_enabled = self.is_enabled();
        self.control = control;
        if was_enabled && !self.is_enabled() {
            self.forget();
        }
        for vector in 0..self.vectors() {
            self.follow(vector);
        }
    }

    /// Forgets what is pending.
    pub fn forget(&mut self) {
        for entry in &mut self.entries {
            entry.pending = false;
        }
    }

    /// The table and the pending bits.
    #[must_use]
    pub fn save(&self) -> MsixState {
        let saved = self.entries.iter().map(|entry| {
            let Entry {
                address,
                data,
                masked,
                pending,
                // Follows from the others.
                told: _,
            } = *entry;
            SavedEntry {
                address,
                data,
                masked,
                pending,
            }
        });
        MsixState(saved.collect())
    }

    /// Takes over a saved table, on a function whose MSI-X is off;
    /// [`set_control`](Self::set_control) switches it on.
    ///
    /// # Errors
    /// [`OtherTable`]; then nothing changes.
    pub fn restore(&mut self, state: &MsixState) -> Result<(), OtherTable> {
        let MsixState(saved) = state;
        let possible = saved.iter().all(|entry| entry.address & 0b11 == 0);
        if saved.len() != self.entries.len() || !possible {
            return Err(OtherTable);
        }
        for (entry, saved) in self.entries.iter_mut().zip(saved) {
            let SavedEntry {
                address,
                data,
                masked,
                pending,
            } = *saved;
            *entry = Entry {
                address,
                data,
                masked,
                pending,
                told: None,
            };
        }
        Ok(())
    }

    /// Interrupts through a vector. Vectors that do not exist are ignored.
    pub fn signal(&mut self, vector: u16) {
        if !self.is_enabled() {
            return;
        }
        let Some(entry) = self.entries.get_mut(usize::from(vector)) else {
            return;
        };
        match entry.told {
            Some(message) => self.messages.send(vector, message),
            None => entry.pending = true,
        }
    }

    /// Tells where a vector goes now, and sends what is pending.
    fn follow(&mut self, vector: u16) {
        let open = self.is_enabled() && !self.control.contains(MsixControl::FUNCTION_MASK);
        let Some(entry) = self.entries.get_mut(usize::from(vector)) else {
            return;
        };
        let message = (open && !entry.masked).then_some(Message {
            address: entry.address,
            data: entry.data,
        });
        if message != entry.told {
            entry.told = message;
            self.messages.route(vector, message);
        }
        if let Some(message) = message.filter(|_| entry.pending) {
            entry.pending = false;
            self.messages.send(vector, message);
        }
    }

    /// Bytes of the table.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        self.entries.len() * msix::ENTRY_BYTES
    }

    /// Bytes of the pending bits.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        msix::pending_bytes(self.vectors())
    }

    /// The guest reads the table from `offset` on, with any width. What lies
    /// beyond it reads as 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = place(offset, index);
            *byte = self.entries.get(at / msix::ENTRY_BYTES).map_or(0, |entry| {
                let word = entry.word((at % msix::ENTRY_BYTES) & !3);
                word.to_le_bytes().get(at % 4).copied().unwrap_or(0)
            });
        }
    }

    /// The guest writes the table. Only aligned accesses of 32 and 64 bits
    /// count (§6.8.2); others are ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let whole = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        let Some(at) = usize::try_from(offset).ok().filter(|_| whole) else {
            log::debug!("MSI-X: odd write of {} bytes at {offset:#x}", data.len());
            return;
        };
        let vector = at / msix::ENTRY_BYTES;
        let Some(entry) = self.entries.get_mut(vector) else {
            return;
        };
        let (words, _) = data.as_chunks::<4>();
        for (index, word) in words.iter().enumerate() {
            entry.set_word(
                at % msix::ENTRY_BYTES + 4 * index,
                u32::from_le_bytes(*word),
            );
        }
        // There are at most `msix::MOST` entries.
        self.follow(vector as u16);
    }

    /// The guest reads the pending bits, with any width. What lies beyond them
    /// reads as 0; writes are for nobody.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = place(offset, index).saturating_mul(8);
            let bits = self.entries.iter().skip(first).take(8);
            *byte = (0..8)
                .zip(bits)
                .fold(0, |sum, (bit, entry)| sum | u8::from(entry.pending) << bit);
        }
    }
}

/// Byte `index` of an access at `offset`, which a guest chose.
fn place(offset: u64, index: usize) -> usize {
    usize::try_from(offset)
        .unwrap_or(usize::MAX)
        .saturating_add(index)
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
