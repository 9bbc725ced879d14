//! Pausing a device, and its saved state.
#![forbid(unsafe_code)]

use super::queues::{Position, VirtQueue};
use super::{Control, TransportSignals};
use crate::state::{RestoreError, SavedState};
use crate::virtio::queue::QueueState;
use crate::virtio::transport::events::EventState;
use pvkit_protocol::virtio::{DeviceStatus, Features};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The state of a device as its driver controls it, as far as every transport
/// has it. A part of the transport's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlState {
    driver_features: u64,
    status: u8,
    queues: Vec<SavedQueue>,
    needs_reset: bool,
    config_generation: u32,
    change_pending: bool,
    device: SavedState,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedQueue {
    size: u32,
    descriptors: u64,
    driver: u64,
    device: u64,
    ready: bool,
    was_reset: bool,
    position: SavedPosition,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SavedPosition {
    New,
    At(QueueState),
    Broken,
}

impl From<&VirtQueue> for SavedQueue {
    fn from(queue: &VirtQueue) -> Self {
        let VirtQueue {
            size,
            descriptors,
            driver,
            device,
            ready,
            was_reset,
            // A paused device has finished all resets, and has no workers.
            resetting: _,
            with_worker: _,
            position,
        } = *queue;
        Self {
            size,
            descriptors,
            driver,
            device,
            ready,
            was_reset,
            position: match position {
                Position::New => SavedPosition::New,
                Position::At(state) => SavedPosition::At(state),
                Position::Broken => SavedPosition::Broken,
            },
        }
    }
}

impl From<&SavedQueue> for VirtQueue {
    fn from(saved: &SavedQueue) -> Self {
        let SavedQueue {
            size,
            descriptors,
            driver,
            device,
            ready,
            was_reset,
            position,
        } = *saved;
        Self {
            size,
            descriptors,
            driver,
            device,
            ready,
            was_reset,
            resetting: false,
            with_worker: false,
            position: match position {
                SavedPosition::New => Position::New,
                SavedPosition::At(state) => Position::At(state),
                SavedPosition::Broken => Position::Broken,
            },
        }
    }
}

/// A state that no driver can have brought about.
#[derive(Debug, Error)]
enum BadState {
    #[error("it has {found} queues, and the device has {expected}")]
    Queues { expected: usize, found: usize },
    #[error("status {0:#x} has unknown bits, or bits without those that come before")]
    Status(u8),
    #[error("the device does not offer features {0:?}")]
    Features(Features),
    #[error("queue {queue} is enabled with the impossible size {size}")]
    Size { queue: usize, size: u32 },
    #[error("queue {queue}: {source}")]
    Position {
        queue: usize,
        source: crate::virtio::queue::QueueError,
    },
    #[error("queue {queue} has a position, and is not enabled")]
    Disabled { queue: usize },
}

impl<S: TransportSignals + 'static> Control<S> {
    /// Begins to pause the device: its lanes fetch nothing more.
    pub fn begin_pause(&mut self) {
        self.paused = true;
        self.stop_lanes();
    }

    /// Whether the device is paused: every lane has stopped with nothing in
    /// flight, and a reset in progress is over.
    pub fn poll_paused(&mut self) -> bool {
        self.finish_reset();
        self.paused && self.settle_all() && !self.resetting
    }

    /// Continues after a pause or a restore.
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.paused) && self.is_driver_ok() && !self.resetting {
            self.start_lanes();
        }
    }

    /// The state of the paused device.
    #[must_use]
    pub fn save(&self) -> ControlState {
        let Self {
            lanes,
            identity: _,
            events,
            queues,
            // A lane that starts polls before it waits.
            kicks: _,
            // Follows from the features.
            lane_queues: _,
            driver_features,
            status,
            resetting: _,
            paused: _,
        } = self;
        let EventState {
            needs_reset,
            config_generation,
            change_pending,
        } = events.save();
        ControlState {
            driver_features: driver_features.bits(),
            status: status.bits(),
            queues: queues.iter().map(SavedQueue::from).collect(),
            needs_reset,
            config_generation,
            change_pending,
            device: lanes.device().save(),
        }
    }

    /// Takes over a saved state, on a device that no driver has touched; it is
    /// paused then.
    ///
    /// # Errors
    /// [`RestoreError`] if no driver can have brought the device into that
    /// state; it must not be used then.
    pub fn restore(&mut self, state: &ControlState) -> Result<(), RestoreError> {
        let invalid = |bad: BadState| RestoreError::invalid("virtio", bad);
        let ControlState {
            driver_features,
            status,
            queues,
            needs_reset,
            config_generation,
            change_pending,
            device,
        } = state;
        let features = Features::from_bits_retain(*driver_features);
        let status = DeviceStatus::from_bits(*status)
            .filter(|status| {
                let ready = status.contains(DeviceStatus::DRIVER_OK);
                !ready || status.contains(DeviceStatus::FEATURES_OK)
            })
            .ok_or(invalid(BadState::Status(*status)))?;
        let negotiated = status.contains(DeviceStatus::FEATURES_OK);
        if negotiated && !self.features_acceptable(features) {
            let missing = features - self.identity.features;
            return Err(invalid(BadState::Features(missing)));
        }
        let expected = self.queues.len();
        if queues.len() != expected {
            let found = queues.len();
            return Err(invalid(BadState::Queues { expected, found }));
        }
        for (queue, saved) in queues.iter().enumerate() {
            self.check_queue(queue, saved, features).map_err(invalid)?;
        }
        self.paused = true;
        self.driver_features = features;
        if negotiated {
            self.accept_features();
        }
        self.lanes.device_mut().restore(device)?;
        self.status = status;
        self.queues = queues.iter().map(VirtQueue::from).collect();
        let events = EventState {
            needs_reset: *needs_reset,
            config_generation: *config_generation,
            change_pending: *change_pending,
        };
        self.events.restore(events, self.is_driver_ok());
        Ok(())
    }

    fn check_queue(
        &self,
        queue: usize,
        saved: &SavedQueue,
        features: Features,
    ) -> Result<(), BadState> {
        let SavedQueue { size, ready, .. } = *saved;
        if ready && !self.is_possible_size(queue as u32, size, features) {
            return Err(BadState::Size { queue, size });
        }
        match saved.position {
            SavedPosition::New => Ok(()),
            _ if !ready => Err(BadState::Disabled { queue }),
            SavedPosition::Broken => Ok(()),
            SavedPosition::At(state) => state
                // Checked above.
                .check(size as u16, features)
                .map_err(|source| BadState::Position { queue, source }),
        }
    }
}
