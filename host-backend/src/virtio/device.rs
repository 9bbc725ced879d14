//! The contract of every virtio device: its control plane, whatever the
//! transport.
#![forbid(unsafe_code)]

use super::queue::{Fault, QueueError, QueueResources};
use crate::disk::DiskError;
use crate::link::LinkError;
use crate::memory::GuestMemory;
use crate::worker::{LaneState, Worker};
use pvkit_protocol::virtio::Features;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;

/// What a device is. It does not change while the device exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Device type (virtio 1.3 §5).
    pub device_id: u32,
    /// Everything that the device offers. The transport decides about
    /// ACCESS_PLATFORM, by the memory that it gives the device.
    pub features: Features,
    /// The queues of each lane. Together they are `0..n`, in order. Which of
    /// them a driver has may depend on its features ([`Device::lanes`]).
    pub lanes: Vec<Range<u16>>,
    /// Largest size of a queue.
    pub queue_size_max: u16,
    /// Bytes of configuration space.
    pub config_bytes: u32,
}

/// What a lane gets to work with.
#[derive(Debug)]
pub struct LaneResources {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// One entry for each queue of the lane.
    pub queues: Vec<QueueResources>,
}

/// What a device tells its transport.
pub trait DeviceEvents: Send + Sync + fmt::Debug {
    /// The configuration space changed.
    fn config_changed(&self);
    /// A lane broke: the driver has to reset the device.
    fn needs_reset(&self, lane: u16, fault: Fault);
}

/// Why a lane does not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is no such lane.
    #[error("the device has no lane {0}")]
    NoLane(u16),
    /// The driver chose a size that no queue can have, or placed a ring where
    /// there is no RAM.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The disk refuses.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The link refuses.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// The control plane of a device. It knows no transport, starts no threads,
/// and is called by one owner at a time.
///
/// A driver's life maps onto it: [`start`](Device::start) for each lane when
/// the driver is ready; stop each worker and hand it to
/// [`stopped`](Device::stopped); [`reset`](Device::reset) once all have
/// stopped.
pub trait Device: Send + fmt::Debug {
    /// What the device is.
    fn identity(&self) -> Identity;

    /// The queues of each lane for a driver that accepted these features: some
    /// of those of its [identity](Device::identity), in order, cut as those
    /// features have it. A lane has its number from here.
    fn lanes(&self, features: Features) -> Vec<Range<u16>> {
        let _ = features;
        self.identity().lanes
    }

    /// Where to send news. Called once, before anything else.
    fn connect(&mut self, events: Arc<dyn DeviceEvents>);

    /// The driver accepted features, all of them offered: FEATURES_OK is set.
    fn negotiated(&mut self, features: Features) {
        let _ = features;
    }

    /// Reads configuration space. Bytes beyond its end read as 0.
    fn read_config(&self, offset: u32, out: &mut [u8]);

    /// Writes configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: u32, data: &[u8]);

    /// Starts a lane, from its first entry on or from where `at` says.
    ///
    /// # Errors
    /// [`StartError`] if the rings or the backing cannot be used.
    fn start(
        &mut self,
        lane: u16,
        resources: LaneResources,
        features: Features,
        at: Option<LaneState>,
    ) -> Result<Box<dyn Worker>, StartError>;

    /// Takes back the worker of a lane that has stopped, and says where it
    /// stands.
    fn stopped(&mut self, lane: u16, worker: Box<dyn Worker>) -> LaneState {
        let _ = lane;
        worker.state()
    }

    /// Back to the state at power-on. Every lane has stopped.
    fn reset(&mut self);
}
