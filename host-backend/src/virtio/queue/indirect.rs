//! Indirect tables, copied out of guest memory before they are walked.
#![forbid(unsafe_code)]

use super::Fault;
use crate::memory::Snapshot;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Room for the longest table of descriptors `D`, reused for every chain.
#[derive(Debug)]
pub(super) struct IndirectTable<D>(Vec<D>);

impl<D: FromBytes + IntoBytes + Immutable + Clone> IndirectTable<D> {
    pub(super) fn new(max_chain: u16) -> Self {
        Self(vec![D::new_zeroed(); usize::from(max_chain)])
    }

    /// Copies the table of `bytes` bytes at `addr`; `head` is the chain's, for
    /// faults. The table has at least one entry, and at most as many as there
    /// is room for.
    pub(super) fn copy(
        &mut self,
        snapshot: &Snapshot,
        head: u16,
        addr: u64,
        bytes: u32,
    ) -> Result<&[D], Fault> {
        let entries = bytes as usize / size_of::<D>();
        let whole = (bytes as usize).is_multiple_of(size_of::<D>());
        let table = self.0.get_mut(..entries);
        let table = table
            .filter(|table| whole && !table.is_empty())
            .ok_or(Fault::IndirectLen { head, bytes })?;
        snapshot
            .read(addr, table.as_mut_bytes())
            .map_err(|_| Fault::IndirectAddr { head, addr })?;
        Ok(table)
    }
}
