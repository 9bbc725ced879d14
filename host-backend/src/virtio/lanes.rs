//! The lanes of a device, between the device and whoever controls it: the
//! registers of a transport, a vhost-user session, or a restore.
#![forbid(unsafe_code)]

use super::device::{Device, LaneResources, LaneState, StartError};
use super::queue::QueueResources;
use crate::executor::{Executor, Stopped};
use crate::memory::GuestMemory;
use crate::worker::LaneEvents;
use pvkit_protocol::virtio::Features;
use std::io;
use std::sync::Arc;
use std::task::Poll;
use thiserror::Error;

/// Why a lane does not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LaneError {
    /// The device cannot start it.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The host cannot drive it.
    #[error("failed to start the lane's thread: {0}")]
    Thread(#[from] io::Error),
}

/// What a lane does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    /// It has no worker.
    #[default]
    Stopped,
    /// The executor drives its worker.
    Running,
    /// The same, and the worker was asked to stop.
    Stopping,
}

/// A device with the workers of its lanes. It starts lanes on its executor, and
/// stops them without waiting.
#[derive(Debug)]
pub struct Lanes {
    device: Box<dyn Device>,
    memory: GuestMemory,
    executor: Box<dyn Executor>,
    events: Arc<dyn LaneEvents>,
    /// By lane number; grows as lanes start.
    phases: Vec<Phase>,
}

impl Lanes {
    /// The lanes of `device` over `memory`, none of them running. `events`
    /// receives the failures of lanes.
    #[must_use]
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        executor: Box<dyn Executor>,
        events: Arc<dyn LaneEvents>,
    ) -> Self {
        Self {
            device,
            memory,
            executor,
            events,
            phases: Vec::new(),
        }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// The device, for its configuration.
    pub fn device_mut(&mut self) -> &mut dyn Device {
        &mut *self.device
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn phase(&self, lane: u16) -> Phase {
        let phase = self.phases.get(usize::from(lane));
        phase.copied().unwrap_or_default()
    }

    fn set_phase(&mut self, lane: u16, phase: Phase) {
        let index = usize::from(lane);
        if self.phases.len() <= index {
            self.phases.resize(index + 1, Phase::Stopped);
        }
        if let Some(entry) = self.phases.get_mut(index) {
            *entry = phase;
        }
    }

    /// Whether a lane has a worker, stopping or not.
    #[must_use]
    pub fn is_running(&self, lane: u16) -> bool {
        self.phase(lane) != Phase::Stopped
    }

    /// Whether a lane has a worker that was not asked to stop.
    #[must_use]
    pub fn is_serving(&self, lane: u16) -> bool {
        self.phase(lane) == Phase::Running
    }

    /// Whether no lane has a worker.
    #[must_use]
    pub fn all_stopped(&self) -> bool {
        self.phases.iter().all(|phase| *phase == Phase::Stopped)
    }

    /// Starts a lane that is not running.
    ///
    /// # Errors
    /// [`LaneError`] if the device refuses, for instance because a ring is
    /// outside RAM, or the host has no thread.
    pub fn start(
        &mut self,
        lane: u16,
        queues: Vec<Option<QueueResources>>,
        features: Features,
        at: Option<&LaneState>,
    ) -> Result<(), LaneError> {
        let resources = LaneResources {
            memory: self.memory.clone(),
            queues,
        };
        let worker = self.device.start(lane, resources, features, at)?;
        self.executor.start(lane, worker, self.events.clone())?;
        self.set_phase(lane, Phase::Running);
        Ok(())
    }

    /// Asks a lane to stop; it fetches nothing more.
    pub fn begin_stop(&mut self, lane: u16) {
        if self.phase(lane) == Phase::Running {
            self.set_phase(lane, Phase::Stopping);
            self.executor.begin_stop(lane);
        }
    }

    /// Asks whether a lane that was asked to stop has stopped, and if so where
    /// its queues stand. `Ready(None)` if it has no worker: it was not started,
    /// or its thread died.
    pub fn poll_stopped(&mut self, lane: u16) -> Poll<Option<LaneState>> {
        if !self.is_running(lane) {
            return Poll::Ready(None);
        }
        let state = match self.executor.poll_stopped(lane) {
            Stopped::Pending => return Poll::Pending,
            Stopped::Worker(worker) => Some(self.device.stopped(lane, worker)),
            Stopped::Lost => None,
        };
        self.set_phase(lane, Phase::Stopped);
        Poll::Ready(state)
    }
}
