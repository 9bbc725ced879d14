//! The contract of every virtio device: its control plane, whatever the
//! transport.
#![forbid(unsafe_code)]

use super::queue::{QueueError, QueueResources, QueueState};
use crate::memory::GuestMemory;
use crate::state::{RestoreError, SavedState};
use crate::worker::Worker;
use pvkit_protocol::virtio::Features;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;

/// The fixed properties of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Device type (virtio 1.3 §5).
    pub device_id: u32,
    /// Everything that the device offers. The transport decides about
    /// ACCESS_PLATFORM, by the memory that it gives the device.
    pub features: Features,
    /// The largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// The queues of each lane. Together they are all queues, in order. Which of
    /// them a driver has may depend on its features ([`Device::lanes`]).
    pub lanes: Vec<Range<u16>>,
    /// Bytes of configuration space.
    pub config_bytes: u32,
}

impl Identity {
    /// Number of queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        // Queue numbers have 16 bits.
        self.queue_sizes.len() as u16
    }
}

/// The resources of a lane.
#[derive(Debug)]
pub struct LaneResources {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// One entry for each queue of the lane; `None` for one that the driver has
    /// not enabled. At least one is there.
    pub queues: Vec<Option<QueueResources>>,
}

/// The state of a stopped lane.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneState {
    /// One entry for each queue of the lane; `None` for one that was not
    /// enabled, or that its driver broke: it cannot continue.
    pub queues: Vec<Option<QueueState>>,
}

impl LaneState {
    /// The state of queue `index` of the lane.
    #[must_use]
    pub fn queue(&self, index: usize) -> Option<QueueState> {
        self.queues.get(index).copied().flatten()
    }
}

/// Receives the changes of a device's configuration.
pub trait ConfigEvents: Send + Sync + fmt::Debug {
    /// The configuration space changed.
    fn config_changed(&self);
}

/// Why a lane does not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartError {
    /// The device has no such lane, or it has other queues.
    #[error("the device has no lane {0} with these queues")]
    NoLane(u16),
    /// The driver chose an impossible size, or placed a ring outside RAM.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The back end fails.
    #[error(transparent)]
    Backend(Box<dyn Error + Send + Sync>),
}

impl StartError {
    /// The back end fails with an error of its own.
    #[must_use]
    pub fn backend(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Backend(Box::new(error))
    }
}

/// The control plane of a device. It knows no transport, starts no threads,
/// and is called by one owner at a time.
///
/// The driver's side of it: [`negotiated`](Device::negotiated), then
/// [`start`](Device::start) for each lane when the driver is ready; stop each
/// worker and return it through [`stopped`](Device::stopped);
/// [`reset`](Device::reset) once all have stopped.
/// [`Lanes`](super::lanes::Lanes) does the part about workers.
pub trait Device: Send + fmt::Debug {
    /// The device's fixed properties.
    fn identity(&self) -> Identity;

    /// The lanes in use with these features; their indices are lane numbers.
    /// Each is one of the [identity's](Device::identity) or a part of one.
    fn lanes(&self, features: Features) -> Vec<Range<u16>> {
        let _ = features;
        self.identity().lanes
    }

    /// Connects the receiver of configuration changes. Called once, before
    /// anything else.
    fn connect(&mut self, events: Arc<dyn ConfigEvents>);

    /// The driver accepted features, all of them offered: FEATURES_OK is set.
    fn negotiated(&mut self, features: Features) {
        let _ = features;
    }

    /// Reads configuration space. Bytes beyond its end read as 0.
    fn read_config(&self, offset: u32, out: &mut [u8]);

    /// Writes configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: u32, data: &[u8]);

    /// Starts a lane, its queues new or continuing from `at`.
    ///
    /// # Errors
    /// [`StartError`] if the rings or the back end cannot be used.
    fn start(
        &mut self,
        lane: u16,
        resources: LaneResources,
        features: Features,
        at: Option<&LaneState>,
    ) -> Result<Box<dyn Worker>, StartError>;

    /// Takes back the worker of a lane that has stopped, and returns where its
    /// queues stand.
    fn stopped(&mut self, lane: u16, worker: Box<dyn Worker>) -> LaneState;

    /// The device's own state, while no lane runs: what its driver set besides
    /// features and queues.
    fn save(&self) -> SavedState;

    /// Takes over a saved state, after [`negotiated`](Device::negotiated) with
    /// the features of then and before any lane starts.
    ///
    /// # Errors
    /// [`RestoreError`] if this device cannot have that state.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError>;

    /// Returns to the state at power-on. Every lane has stopped.
    fn reset(&mut self);
}
