//! A disk whose pace the test decides.
#![forbid(unsafe_code)]

use pvkit_host::disk::{
    Disk, DiskError, DiskLane, DiskOp, DiskRequest, DiskShape, MemoryDisk, Submit,
};
use pvkit_host::memory::IoBufs;
use pvkit_host::worker::Interest;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes that differ from sector to sector.
#[must_use]
pub fn pattern(first_sector: u64, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|i| {
            let sector = first_sector.wrapping_add((i / 512) as u64);
            let mix = sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            (mix as u8).wrapping_add(i as u8)
        })
        .collect()
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk in memory that notes every operation, and can hold requests back
/// until it is told to do them.
#[derive(Debug, Clone)]
pub struct RecordingDisk {
    /// The content.
    pub disk: MemoryDisk,
    /// Every operation, in the order of submission.
    pub ops: Arc<Mutex<Vec<DiskOp>>>,
    /// How many more requests may be finished; `None` for all, at once.
    pub allowed: Arc<Mutex<Option<usize>>>,
    /// Requests that fit the lane.
    pub depth: usize,
    /// Which of the requests that it holds it finishes first.
    pub order: Order,
}

/// The order in which held requests are finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The last submitted first.
    NewestFirst,
    /// In the order of submission.
    OldestFirst,
}

impl RecordingDisk {
    /// A disk that holds the [`pattern`] of each sector, and nothing back.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        Self {
            disk: MemoryDisk::from_bytes(pattern(0, sectors as usize * 512)),
            ops: Arc::default(),
            allowed: Arc::default(),
            depth: usize::MAX,
            order: Order::NewestFirst,
        }
    }

    /// From now on, requests are held; `count` of them may be finished.
    pub fn allow(&self, count: usize) {
        *lock(&self.allowed) = Some(count);
    }
}

impl Disk for RecordingDisk {
    fn shape(&self) -> DiskShape {
        self.disk.shape()
    }
    fn lane(&self, depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        let lane = self.disk.lane(depth)?;
        Ok(Box::new(RecordingLane {
            lane,
            disk: self.clone(),
            held: Vec::new(),
        }))
    }
}

#[derive(Debug)]
struct RecordingLane {
    lane: Box<dyn DiskLane>,
    disk: RecordingDisk,
    held: Vec<(DiskOp, u64, IoBufs, u16)>,
}

impl DiskLane for RecordingLane {
    fn submit(&mut self, request: DiskRequest<'_>, tag: u16) -> Submit {
        if self.held.len() >= self.disk.depth {
            return Submit::Full;
        }
        lock(&self.disk.ops).push(request.op);
        if lock(&self.disk.allowed).is_none() {
            return self.lane.submit(request, tag);
        }
        let mut data = IoBufs::new();
        data.copy_from(request.data);
        self.held.push((request.op, request.sector, data, tag));
        Submit::Queued
    }
    fn commit(&mut self) -> bool {
        true
    }
    fn reap(&mut self, each: &mut dyn FnMut(u16, Result<(), DiskError>)) -> usize {
        let mut allowed = lock(&self.disk.allowed);
        let count = allowed.unwrap_or(usize::MAX).min(self.held.len());
        if let Some(allowed) = &mut *allowed {
            *allowed -= count;
        }
        let mut finish = |(op, sector, data, tag): (DiskOp, u64, IoBufs, u16)| {
            let data = &data;
            match self.lane.submit(DiskRequest { op, sector, data }, tag) {
                Submit::Done(result) => each(tag, result),
                other => panic!("memory disks are done at once: {other:?}"),
            }
        };
        match self.disk.order {
            Order::NewestFirst => {
                let first = self.held.len() - count;
                self.held.drain(first..).rev().for_each(&mut finish);
            }
            Order::OldestFirst => self.held.drain(..count).for_each(&mut finish),
        }
        count
    }
    fn in_flight(&self) -> usize {
        self.held.len()
    }
    fn sources<'a>(&'a self, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}
}
