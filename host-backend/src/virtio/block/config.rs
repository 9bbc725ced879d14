//! What a block device offers, and its configuration space (virtio 1.3 §5.2.3,
//! §5.2.4).
#![forbid(unsafe_code)]

use super::BlockOptions;
use super::request::MAX_RANGES;
use crate::disk::{Disk, DiskShape};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::block::{
    BlockConfig, BlockFeatures, Topology, WRITEBACK, WRITETHROUGH,
};
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use zerocopy::{FromZeros, IntoBytes};

/// The configuration space.
#[derive(Debug)]
pub(super) struct Config {
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
    /// As `writeback` says at the moment.
    Switched(Arc<AtomicBool>),
}

impl Durability {
    /// Whether a write that starts now has to be durable when it completes.
    pub(super) fn write_through(&self) -> bool {
        match self {
            Self::Always => true,
            Self::Flush => false,
            // The driver's write of the field happens before it posts what
            // depends on it, and that before the worker fetches it.
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
        fields.capacity.set(shape.sectors);
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
        // A disk that is read-only does none of these.
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

    /// Back to the state at power-on.
    pub(super) fn reset(&mut self) {
        self.writable = false;
        self.writeback.store(true, Ordering::Relaxed);
    }

    pub(super) fn read(&self, offset: u32, out: &mut [u8]) {
        out.fill(0);
        let mut fields = self.fields;
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

/// The topology in logical blocks, if the disk has one that can be said so.
fn topology(shape: &DiskShape) -> Option<Topology> {
    let topology = shape.topology?;
    let block = shape.block_bytes.max(1);
    let physical = topology.physical_block_bytes / block;
    let offset = topology.alignment_offset_bytes / block;
    let min_io = topology.min_io_bytes / block;
    let mut said = Topology {
        // At most 22: blocks have at least 512 bytes.
        physical_block_exp: physical.checked_ilog2()? as u8,
        alignment_offset: u8::try_from(offset).ok()?,
        ..Topology::default()
    };
    said.min_io_size
        .set(u16::try_from(min_io).unwrap_or(u16::MAX));
    said.opt_io_size.set(topology.opt_io_bytes / block);
    Some(said)
}
