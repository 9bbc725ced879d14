//! Device addresses that are not the guest's physical ones (virtio 1.3 §6,
//! ACCESS_PLATFORM).
//!
//! A translation is data: each change makes a new [`Snapshot`] whose regions
//! lie where the device sees them. Devices pick it up as they pick up guest
//! memory that was replaced, and an access costs what it costs without
//! translation.
#![forbid(unsafe_code)]

use super::{Access, GuestMemory, MemoryError, Shared, Snapshot};
use crate::sync::lock;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Mutex;
use thiserror::Error;

/// A range of device addresses (IOVA), and the guest memory that it stands
/// for. Any multiple of a byte will do; real IOMMUs map pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IovaWindow {
    /// First address for the device.
    pub iova: u64,
    /// First guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether the device may write.
    pub writable: bool,
}

impl IovaWindow {
    /// Its last IOVA. Only for windows that were checked.
    fn last(&self) -> u64 {
        self.iova + (self.len - 1)
    }

    fn check(&self, base: &Snapshot) -> Result<(), IommuError> {
        let Self {
            iova,
            addr,
            len,
            writable,
        } = *self;
        let Some(more) = len.checked_sub(1) else {
            return Err(IommuError::Empty { iova });
        };
        if iova.checked_add(more).is_none() {
            return Err(IommuError::Wraps { iova, len });
        }
        let access = if writable {
            Access::Write
        } else {
            Access::Read
        };
        Ok(base.check(addr, len, access)?)
    }
}

/// Windows cannot be changed as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IommuError {
    /// A range has no bytes.
    #[error("the range at IOVA {iova:#x} is empty")]
    Empty {
        /// Where it would start.
        iova: u64,
    },
    /// A range goes beyond the last address.
    #[error("IOVA range {iova:#x}+{len:#x} wraps around")]
    Wraps {
        /// First address for the device.
        iova: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A window stands for what is not guest memory; or is writable, and the
    /// memory is not.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A window would share addresses with another.
    #[error("IOVA range {iova:#x}+{len:#x} overlaps the window at {other:#x}")]
    Overlap {
        /// First address of the new window.
        iova: u64,
        /// Its length in bytes.
        len: u64,
        /// First address of the other one.
        other: u64,
    },
    /// There would be too many windows.
    #[error("there are at most {most} windows")]
    TooMany {
        /// The limit.
        most: usize,
    },
    /// The range to unmap has only a part of a window.
    #[error("IOVA range {iova:#x}+{len:#x} cuts the window at {window:#x}")]
    Cuts {
        /// First address of the range.
        iova: u64,
        /// Its length in bytes.
        len: u64,
        /// First address of the window.
        window: u64,
    },
}

/// How translated memory comes to be.
#[derive(Debug)]
pub(super) struct Translation {
    base: GuestMemory,
    /// By IOVA; not overlapping.
    windows: Mutex<BTreeMap<u64, IovaWindow>>,
    most: usize,
}

impl Shared {
    /// Makes the map again that `windows` show of the base memory of now.
    fn rebuild(&self, translation: &Translation, windows: &BTreeMap<u64, IovaWindow>) {
        let base = translation.base.snapshot();
        let Ok(()) = self.install(|epoch| {
            let map = Snapshot::translated(&base, windows.values(), epoch);
            Ok::<_, Infallible>(map)
        });
    }

    /// The base memory has changed.
    pub(super) fn follow(&self) {
        if let Some(translation) = &self.translation {
            // Under the lock, so that no older base is installed after a newer.
            let windows = lock(&translation.windows);
            self.rebuild(translation, &windows);
        }
    }
}

/// An IOMMU domain: what devices see through windows of guest memory, and
/// nothing else.
///
/// Give [`memory`](Iommu::memory) to the transport of a virtio device: the
/// device then offers ACCESS_PLATFORM and refuses drivers that do not accept
/// it, and every address that the driver gives it, of rings and of buffers, is
/// an IOVA. Outside the windows there is no RAM; in windows that are not
/// writable the device can only read.
///
/// It is a handle: clones are the same domain. It follows the memory behind it
/// when that is [replaced](GuestMemory::replace); parts of windows that are no
/// longer RAM can then not be reached until they are again.
///
/// ```
/// use pvkit_host::memory::{Access, GuestMemory, Iommu, IovaWindow};
/// use std::sync::Arc;
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let memory = GuestMemory::new(Arc::new(map))?;
/// let iommu = Iommu::new(&memory);
/// iommu.map(IovaWindow { iova: 0x8000_0000, addr: 0x4000, len: 0x1000, writable: true })?;
///
/// let seen = iommu.memory().snapshot();
/// seen.write(0x8000_0010, b"here")?;
/// assert!(seen.check(0x4010, 4, Access::Read).is_err());
/// assert_eq!(memory.snapshot().read_value::<[u8; 4]>(0x4010)?, *b"here");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Iommu {
    view: GuestMemory,
}

impl Iommu {
    /// Most windows of a domain that is made by [`new`](Iommu::new).
    pub const MOST_WINDOWS: usize = 4096;

    /// A domain over `base` without windows: devices reach nothing. `base` may
    /// be what another domain shows.
    #[must_use]
    pub fn new(base: &GuestMemory) -> Self {
        Self::with_limit(base, Self::MOST_WINDOWS)
    }

    /// The same with another limit for the number of windows. Each change
    /// costs time by their number, each window some 100 bytes.
    #[must_use]
    pub fn with_limit(base: &GuestMemory, most: usize) -> Self {
        let translation = Translation {
            base: base.clone(),
            windows: Mutex::default(),
            most,
        };
        let empty = Snapshot::translated(&base.snapshot(), std::iter::empty(), 0);
        let shared = Shared::new(empty, Some(translation));
        base.shared.add_follower(&shared);
        Self {
            view: GuestMemory { shared },
        }
    }

    /// The memory as devices of this domain see it.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.view
    }

    fn translation(&self) -> Option<&Translation> {
        self.view.shared.translation.as_ref()
    }

    /// Adds a window. Windows may show the same memory twice.
    ///
    /// # Errors
    /// [`IommuError`]; then nothing changes.
    pub fn map(&self, window: IovaWindow) -> Result<(), IommuError> {
        self.map_all(&[window])
    }

    /// Adds several windows at once, for the price of one.
    ///
    /// # Errors
    /// [`IommuError`] for the first that cannot be added; then none is.
    pub fn map_all(&self, windows: &[IovaWindow]) -> Result<(), IommuError> {
        let Some(translation) = self.translation() else {
            return Ok(());
        };
        let mut own = lock(&translation.windows);
        let most = translation.most;
        // Before anything is copied: the number may be the guest's.
        if windows.len() > most.saturating_sub(own.len()) {
            return Err(IommuError::TooMany { most });
        }
        let base = translation.base.snapshot();
        let mut all = own.clone();
        for window in windows {
            window.check(&base)?;
            // Only the last that starts before its end can overlap it.
            let before = all.range(..=window.last()).next_back();
            if let Some((&other, _)) = before.filter(|(_, other)| other.last() >= window.iova) {
                let IovaWindow { iova, len, .. } = *window;
                return Err(IommuError::Overlap { iova, len, other });
            }
            all.insert(window.iova, *window);
        }
        self.view.shared.rebuild(translation, &all);
        *own = all;
        Ok(())
    }

    /// Takes all windows away that lie in a range; returns how many.
    ///
    /// Devices do not look there any more from their next poll on. Requests
    /// that a disk already has go on in the memory that they started with: to
    /// be sure that none is left, reset the queue or the device, as a driver
    /// does before it gives memory to somebody else.
    ///
    /// # Errors
    /// [`IommuError`] if the range makes no sense, or has only a part of a
    /// window; then nothing changes.
    pub fn unmap(&self, iova: u64, len: u64) -> Result<usize, IommuError> {
        let Some(translation) = self.translation() else {
            return Ok(0);
        };
        let more = len.checked_sub(1).ok_or(IommuError::Empty { iova })?;
        let last = iova
            .checked_add(more)
            .ok_or(IommuError::Wraps { iova, len })?;
        let mut own = lock(&translation.windows);
        // Those at the two ends of the range are the only ones it can cut.
        let outer = own.range(..iova).next_back();
        let cut_first = outer.filter(|(_, window)| window.last() >= iova);
        let inner = own.range(iova..=last).next_back();
        let cut_last = inner.filter(|(_, window)| window.last() > last);
        if let Some((&window, _)) = cut_first.or(cut_last) {
            return Err(IommuError::Cuts { iova, len, window });
        }
        let before = own.len();
        own.retain(|start, _| !(iova..=last).contains(start));
        let gone = before - own.len();
        if gone > 0 {
            self.view.shared.rebuild(translation, &own);
        }
        Ok(gone)
    }

    /// The windows, by IOVA.
    #[must_use]
    pub fn windows(&self) -> Vec<IovaWindow> {
        self.translation()
            .map(|translation| lock(&translation.windows).values().copied().collect())
            .unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "iommu_tests.rs"]
mod tests;
