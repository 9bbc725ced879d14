//! The features and the configuration space of a block device (virtio 1.3
//! §5.2.3, §5.2.4).
#![forbid(unsafe_code)]

use super::BlockOptions;
use super::request::MAX_RANGES;
use crate::disk::{Disk, DiskShape};
use crate::state::{RestoreError, SavedState};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{
    BlockConfig, BlockFeatures, Topology, WRITEBACK, WRITETHROUGH,
};
use serde::{Deserialize, Serialize};
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;
use zerocopy::{FromZeros, IntoBytes};

/// The kind of the saved state.
const KIND: &str = "virtio-blk";
const VERSION: u32 = 1;

/// The state that a driver leaves in the configuration space.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The fields that do not change while the device exists, which a driver
    /// reads once: the device that continues must have the same.
    fixed: Vec<u8>,
    capacity: u64,
    writeback: bool,
}

/// Why a block device cannot continue from a state.
#[derive(Debug, Error)]
#[error("the device that was saved had other limits, topology or number of queues")]
struct Differs;

/// The configuration space.
#[derive(Debug)]
pub(super) struct Config {
    /// Capacity and `writeback` are filled in when it is read.
    fields: BlockConfig,
    /// The driver may write `writeback`.
    writable: bool,
    writeback: Arc<AtomicBool>,
}

/// When a write is durable (§5.2.6.2).
#[derive(Debug, Clone)]
pub(super) enum Durability {
    /// When it completes: the driver cannot flush.
    Always,
    /// After a flush.
    Flush,
    /// As the `writeback` field says.
    Switched(Arc<AtomicBool>),
}

impl Durability {
    /// Whether a write that starts now must be durable when it completes.
    pub(super) fn write_through(&self) -> bool {
        match self {
            Self::Always => true,
            Self::Flush => false,
            // The driver writes the field before it posts what depends on it,
            // and the worker pops that after it was posted.
            Self::Switched(writeback) => !writeback.load(Ordering::Relaxed),
        }
    }
}

impl Config {
    /// Features and configuration of a device on `disk`.
    pub(super) fn new(disk: &dyn Disk, options: &BlockOptions) -> (BlockFeatures, Self) {
        let shape = disk.shape();
        let mut features = BlockFeatures::SEG_MAX
            | BlockFeatures::BLK_SIZE
            | BlockFeatures::FLUSH
            | BlockFeatures::CONFIG_WCE;
        features.set(BlockFeatures::RO, shape.read_only);
        features.set(BlockFeatures::LIFETIME, disk.lifetime().is_some());
        let mut fields = BlockConfig::new_zeroed();
        fields.seg_max.set(u32::from(options.seg_max));
        fields.blk_size.set(shape.block_bytes);
        if let Some(topology) = topology(&shape) {
            features |= BlockFeatures::TOPOLOGY;
            fields.topology = topology;
        }
        if options.queues > 1 {
            features |= BlockFeatures::MQ;
            fields.num_queues.set(options.queues);
        }
        let ranges = MAX_RANGES as u32;
        // A read-only disk does none of these.
        let writable = !shape.read_only;
        if let Some(limits) = shape.discard.filter(|_| writable && options.discard) {
            features |= BlockFeatures::DISCARD;
            fields.max_discard_sectors.set(limits.max_sectors);
            fields.max_discard_seg.set(ranges);
            fields
                .discard_sector_alignment
                .set(limits.granularity_sectors);
        }
        if let Some(limits) = shape.write_zeroes.filter(|_| writable) {
            features |= BlockFeatures::WRITE_ZEROES;
            fields.max_write_zeroes_sectors.set(limits.max_sectors);
            fields.max_write_zeroes_seg.set(ranges);
            fields.write_zeroes_may_unmap = u8::from(limits.may_unmap && options.discard);
        }
        if let Some(limits) = shape.secure_erase.filter(|_| writable) {
            features |= BlockFeatures::SECURE_ERASE;
            fields.max_secure_erase_sectors.set(limits.max_sectors);
            fields.max_secure_erase_seg.set(ranges);
            fields
                .secure_erase_sector_alignment
                .set(limits.granularity_sectors);
        }
        let config = Self {
            fields,
            writable: false,
            writeback: Arc::new(AtomicBool::new(true)),
        };
        (features, config)
    }

    /// The driver accepted features. Without FLUSH nothing but writing through
    /// makes its writes durable, so that is how the field starts (§5.2.5.2).
    pub(super) fn negotiated(&mut self, features: Features) {
        let features = BlockFeatures::from(features);
        let writable = features.contains(BlockFeatures::CONFIG_WCE);
        if writable && !self.writable && !features.contains(BlockFeatures::FLUSH) {
            self.writeback.store(false, Ordering::Relaxed);
        }
        self.writable = writable;
    }

    pub(super) fn durability(&self, features: Features) -> Durability {
        let features = BlockFeatures::from(features);
        if features.contains(BlockFeatures::CONFIG_WCE) {
            Durability::Switched(self.writeback.clone())
        } else if features.contains(BlockFeatures::FLUSH) {
            Durability::Flush
        } else {
            Durability::Always
        }
    }

    pub(super) fn save(&self, disk: &dyn Disk) -> SavedState {
        let Self {
            fields,
            // Follows from the features.
            writable: _,
            writeback,
        } = self;
        let state = State {
            fixed: fields.as_bytes().to_vec(),
            capacity: disk.shape().sectors,
            writeback: writeback.load(Ordering::Relaxed),
        };
        SavedState::new(KIND, VERSION, &state)
    }

    /// Takes over a saved state; whether the capacity has changed since.
    pub(super) fn restore(
        &mut self,
        disk: &dyn Disk,
        state: &SavedState,
    ) -> Result<bool, RestoreError> {
        let State {
            fixed,
            capacity,
            writeback,
        } = state.open(KIND, VERSION)?;
        if fixed != self.fields.as_bytes() {
            return Err(RestoreError::invalid(KIND, Differs));
        }
        self.writeback.store(writeback, Ordering::Relaxed);
        Ok(capacity != disk.shape().sectors)
    }

    /// Returns to the state at power-on.
    pub(super) fn reset(&mut self) {
        self.writable = false;
        self.writeback.store(true, Ordering::Relaxed);
    }

    pub(super) fn read(&self, disk: &dyn Disk, offset: u32, out: &mut [u8]) {
        out.fill(0);
        let mut fields = self.fields;
        fields.capacity.set(disk.shape().sectors);
        fields.writeback = if self.writeback.load(Ordering::Relaxed) {
            WRITEBACK
        } else {
            WRITETHROUGH
        };
        let rest = fields.as_bytes().get(offset as usize..).unwrap_or(&[]);
        for (to, from) in out.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    /// `writeback` is the only writable field, with accesses as wide as it is.
    pub(super) fn write(&mut self, offset: u32, data: &[u8]) {
        match *data {
            [value] if self.writable && offset as usize == offset_of!(BlockConfig, writeback) => {
                self.writeback
                    .store(value != WRITETHROUGH, Ordering::Relaxed);
            }
            _ => log::debug!(
                "virtio-blk: ignored a write of {} bytes to config offset {offset:#x}",
                data.len()
            ),
        }
    }
}

/// The topology in logical blocks, if the disk has one that fits the fields.
fn topology(shape: &DiskShape) -> Option<Topology> {
    let topology = shape.topology?;
    let block = shape.block_bytes.max(1);
    let physical = topology.physical_block_bytes / block;
    let offset = topology.alignment_offset_bytes / block;
    let min_io = topology.min_io_bytes / block;
    let mut fields = Topology {
        // At most 22: blocks have at least 512 bytes.
        physical_block_exp: physical.checked_ilog2()? as u8,
        alignment_offset: u8::try_from(offset).ok()?,
        ..Topology::default()
    };
    fields
        .min_io_size
        .set(u16::try_from(min_io).unwrap_or(u16::MAX));
    fields.opt_io_size.set(topology.opt_io_bytes / block);
    Some(fields)
}
