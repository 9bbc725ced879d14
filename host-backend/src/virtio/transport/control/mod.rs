//! The part of every virtio transport that is not its registers: negotiation,
//! queue set-up, and the life cycle of the lanes (virtio 1.3 §2.1, §2.4, §3.1).
#![forbid(unsafe_code)]

mod queues;
mod state;

pub use queues::QueueRegister;
pub use state::ControlState;

use super::events::Events;
use crate::event::EventFd;
use crate::executor::Executor;
use crate::memory::GuestMemory;
use crate::virtio::device::{Device, Identity};
use crate::virtio::lanes::Lanes;
use crate::worker::Signal;
use pvkit_protocol::virtio::{DeviceStatus, Features};
use queues::VirtQueue;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a driver that resets the device waits for lanes to stop. After
/// that it has to poll the status.
const RESET_WAIT: Duration = Duration::from_millis(10);

/// How a transport interrupts the driver.
pub trait TransportSignals: Send + Sync + fmt::Debug {
    /// Interrupts because the configuration changed, or the device needs a
    /// reset.
    fn config(&self);
    /// The interrupt of a queue.
    fn queue(self: Arc<Self>, queue: u16) -> Arc<dyn Signal>;
    /// Forgets interrupts that the driver has not acknowledged.
    fn reset(&self);
}

/// The device as its driver controls it.
#[derive(Debug)]
pub struct Control<S> {
    lanes: Lanes,
    identity: Identity,
    events: Arc<Events<S>>,
    queues: Vec<VirtQueue>,
    kicks: Vec<Arc<EventFd>>,
    /// The queues of each lane, with the driver's features.
    lane_queues: Vec<Range<u16>>,
    driver_features: Features,
    status: DeviceStatus,
    /// The driver asked for a reset, and some lanes still run.
    resetting: bool,
    /// The monitor paused the device: no lane is to run.
    paused: bool,
}

impl<S: TransportSignals + 'static> Control<S> {
    /// A device in its state at power-on. It offers ACCESS_PLATFORM, and
    /// insists on it, if and only if `memory` is
    /// [translated](GuestMemory::is_translated).
    ///
    /// # Errors
    /// The host's error if there are no more file descriptors.
    pub fn new(
        mut device: Box<dyn Device>,
        memory: GuestMemory,
        executor: Box<dyn Executor>,
        signals: Arc<S>,
    ) -> io::Result<Self> {
        let mut identity = device.identity();
        // Not the device's decision: it uses the memory that it gets.
        let translated = memory.is_translated();
        identity.features.set(Features::ACCESS_PLATFORM, translated);
        let kicks = (0..identity.queues())
            .map(|_| EventFd::new().map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let events = Arc::new(Events::new(signals));
        device.connect(events.clone());
        Ok(Self {
            lanes: Lanes::new(device, memory, executor, events.clone()),
            lane_queues: identity.lanes.clone(),
            queues: vec![VirtQueue::default(); kicks.len()],
            identity,
            events,
            kicks,
            driver_features: Features::empty(),
            status: DeviceStatus::empty(),
            resetting: false,
            paused: false,
        })
    }

    /// The device's fixed properties.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The eventfds that the driver kicks, by queue, for ioeventfds.
    #[must_use]
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Kicks a queue with the value that was written to the doorbell: the
    /// queue's number, and with NOTIFICATION_DATA the driver's position
    /// (§4.1.5.2, §4.2.3.3). Queues that do not exist are ignored.
    pub fn kick(&self, value: u32) {
        let queue = if self.driver_features.contains(Features::NOTIFICATION_DATA) {
            value & 0xffff
        } else {
            value
        };
        match self.kicks.get(queue as usize) {
            Some(kick) => kick.notify(),
            None => log::debug!("virtio: notification of queue {queue}, which does not exist"),
        }
    }

    /// The device status. It does not change while a reset is in progress.
    pub fn status(&mut self) -> DeviceStatus {
        self.finish_reset();
        let mut status = self.status;
        if self.events.needs_reset() {
            status |= DeviceStatus::DEVICE_NEEDS_RESET;
        }
        status
    }

    /// The driver writes the device status; 0 resets.
    pub fn set_status(&mut self, status: DeviceStatus) {
        self.finish_reset();
        if status.is_empty() {
            self.begin_reset();
            return;
        }
        if self.resetting {
            log::debug!("virtio: status {status:?} written during a reset");
            return;
        }
        // Only a reset clears bits (§2.1.1).
        let mut status = status - DeviceStatus::DEVICE_NEEDS_RESET;
        if !status.contains(self.status) {
            let old = self.status;
            log::debug!("virtio: status {status:?} would clear bits of {old:?}");
            return;
        }
        let new = status - self.status;
        if new.contains(DeviceStatus::FEATURES_OK) {
            if self.features_acceptable(self.driver_features) {
                self.accept_features();
            } else {
                status -= DeviceStatus::FEATURES_OK;
            }
        }
        let start = new.contains(DeviceStatus::DRIVER_OK);
        if start && !status.contains(DeviceStatus::FEATURES_OK) {
            log::debug!("virtio: DRIVER_OK without FEATURES_OK");
            return;
        }
        self.status = status;
        if start {
            self.start_lanes();
            self.events.driver_ok();
        }
    }

    /// Tells the device which features were accepted, and takes over the lanes
    /// that it has with them.
    fn accept_features(&mut self) {
        let features = self.driver_features;
        let device = self.lanes.device_mut();
        device.negotiated(features);
        self.lane_queues = device.lanes(features);
    }

    fn features_acceptable(&self, features: Features) -> bool {
        let unknown = features - self.identity.features;
        if !unknown.is_empty() {
            log::debug!("virtio: the driver wants features that were not offered: {unknown:?}");
            return false;
        }
        // There is no legacy interface (§6.1.2). A driver that does not accept
        // ACCESS_PLATFORM gives physical addresses, which would name other
        // memory here, or none; a device may fail without it (§6.2).
        let needed = Features::VERSION_1 | (self.identity.features & Features::ACCESS_PLATFORM);
        let missing = needed - features;
        if !missing.is_empty() {
            log::debug!("virtio: the driver does not accept {missing:?}");
        }
        missing.is_empty()
    }

    /// The features that the driver accepted.
    #[must_use]
    pub fn driver_features(&self) -> Features {
        self.driver_features
    }

    /// The driver accepts features; not after FEATURES_OK.
    pub fn set_driver_features(&mut self, features: Features) {
        if self.status.contains(DeviceStatus::FEATURES_OK) || self.resetting {
            log::debug!("virtio: features written after FEATURES_OK");
            return;
        }
        self.driver_features = features;
    }

    /// A number that changes when the configuration may have changed.
    #[must_use]
    pub fn config_generation(&self) -> u32 {
        self.events.config_generation()
    }

    /// The driver reads configuration space.
    pub fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.lanes.device().read_config(offset, out);
    }

    /// The driver writes configuration space.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) {
        if !self.resetting {
            self.lanes.device_mut().write_config(offset, data);
        }
    }

    fn is_driver_ok(&self) -> bool {
        self.status.contains(DeviceStatus::DRIVER_OK)
    }

    /// Waits a little for a reset that the driver asked for: some drivers do
    /// not poll for its end, and an idle device needs only the time in which
    /// its threads wake up.
    pub fn wait_for_reset(&mut self) {
        self.wait(RESET_WAIT, |this| {
            this.finish_reset();
            !this.resetting
        });
    }

    /// Polls `done` until it holds or the time is over; whether it holds.
    fn wait(&mut self, bound: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let end = Instant::now() + bound;
        loop {
            if done(self) {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            thread::sleep(Duration::from_micros(50));
        }
    }

    fn begin_reset(&mut self) {
        if !self.resetting {
            self.resetting = true;
            self.events.resetting();
            self.stop_lanes();
        }
        self.finish_reset();
    }

    /// Completes a reset once every lane has stopped.
    fn finish_reset(&mut self) {
        if !self.resetting || !self.settle_all() {
            return;
        }
        let Self {
            lanes,
            identity,
            events,
            queues,
            // Only the queues' numbers of kicks: a stale one costs a poll.
            kicks: _,
            lane_queues,
            driver_features,
            status,
            resetting,
            paused: _,
        } = self;
        lanes.device_mut().reset();
        lane_queues.clone_from(&identity.lanes);
        events.reset();
        queues.fill(VirtQueue::default());
        *driver_features = Features::empty();
        *status = DeviceStatus::empty();
        *resetting = false;
    }
}
