//! Queues as the driver sets them up and resets them, and the lanes that serve
//! them.
#![forbid(unsafe_code)]

use super::{Control, TransportSignals};
use crate::virtio::device::LaneState;
use crate::virtio::queue::{QueueAddresses, QueueResources, QueueState};
use pvkit_protocol::virtio::Features;
use pvkit_protocol::virtio::packed::PackedSize;
use pvkit_protocol::virtio::split::QueueSize;
use std::ops::Range;
use std::task::Poll;
use std::time::Duration;

/// How long to wait for a lane to stop that another queue is to join. Its
/// worker needs one poll for that; one that takes longer is stuck.
const JOIN_WAIT: Duration = Duration::from_secs(1);

/// A register of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueRegister {
    /// Number of descriptors.
    Size,
    /// Low or high half of the descriptor area's address.
    Descriptors {
        /// Bits 63 to 32.
        high: bool,
    },
    /// Low or high half of the driver area's address.
    Driver {
        /// Bits 63 to 32.
        high: bool,
    },
    /// Low or high half of the device area's address.
    Device {
        /// Bits 63 to 32.
        high: bool,
    },
}

/// Where a queue whose lane does not run continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Position {
    /// At its start.
    #[default]
    New,
    /// Where its lane stopped.
    At(QueueState),
    /// Nowhere: its driver broke it.
    Broken,
}

/// A queue as the driver describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct VirtQueue {
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) ready: bool,
    /// The driver reset this queue, and may set it up again though DRIVER_OK is
    /// set (§2.6.1).
    pub(super) was_reset: bool,
    /// The driver resets this queue, and its lane still runs.
    pub(super) resetting: bool,
    /// The worker of its lane has it. One that was enabled since the lane
    /// started has to wait for the next start.
    pub(super) with_worker: bool,
    pub(super) position: Position,
}

impl VirtQueue {
    fn addresses(&self) -> QueueAddresses {
        QueueAddresses {
            // Checked when the queue was enabled.
            size: self.size as u16,
            descriptors: self.descriptors,
            driver: self.driver,
            device: self.device,
        }
    }

    /// Whether its lane serves it when it starts.
    fn is_served(&self) -> bool {
        self.ready && !self.resetting && self.position != Position::Broken
    }
}

impl<S: TransportSignals + 'static> Control<S> {
    /// Largest size of a queue; 0 if it does not exist.
    #[must_use]
    pub fn queue_size_max(&self, queue: u32) -> u32 {
        let size = self.identity.queue_sizes.get(queue as usize);
        size.copied().map_or(0, u32::from)
    }

    /// Whether the driver has enabled a queue.
    #[must_use]
    pub fn queue_ready(&mut self, queue: u32) -> bool {
        self.settle_queue(queue);
        self.queue_at(queue).is_some_and(|queue| queue.ready)
    }

    fn queue_at(&self, queue: u32) -> Option<&VirtQueue> {
        self.queues.get(queue as usize)
    }

    /// Whether the driver may describe and enable a queue now.
    fn may_set_up(&self, queue: u32) -> bool {
        let was_reset = self.queue_at(queue).is_some_and(|queue| queue.was_reset);
        !self.resetting && (was_reset || !self.is_driver_ok())
    }

    /// Number of queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.identity.queues()
    }

    /// The value of a queue's register; 0 if the driver has not set it, or
    /// there is no such queue.
    #[must_use]
    pub fn queue(&self, queue: u32, register: QueueRegister) -> u32 {
        let Some(queue) = self.queue_at(queue) else {
            return 0;
        };
        let half = |address: u64, high: bool| (if high { address >> 32 } else { address }) as u32;
        match register {
            QueueRegister::Size => queue.size,
            QueueRegister::Descriptors { high } => half(queue.descriptors, high),
            QueueRegister::Driver { high } => half(queue.driver, high),
            QueueRegister::Device { high } => half(queue.device, high),
        }
    }

    /// The driver describes a queue. Ignored once it is enabled or running.
    pub fn set_queue(&mut self, queue: u32, register: QueueRegister, value: u32) {
        if !self.may_set_up(queue) {
            log::debug!("virtio: {register:?} of queue {queue} written after DRIVER_OK");
            return;
        }
        let found = self.queues.get_mut(queue as usize);
        let Some(found) = found.filter(|queue| !queue.ready) else {
            log::debug!("virtio: {register:?} of queue {queue} written, but it is ready or absent");
            return;
        };
        let half = |address: &mut u64, high: bool| {
            *address = if high {
                (*address & 0xffff_ffff) | (u64::from(value) << 32)
            } else {
                (*address & !0xffff_ffff) | u64::from(value)
            };
        };
        match register {
            QueueRegister::Size => found.size = value,
            QueueRegister::Descriptors { high } => half(&mut found.descriptors, high),
            QueueRegister::Driver { high } => half(&mut found.driver, high),
            QueueRegister::Device { high } => half(&mut found.device, high),
        }
    }

    /// Whether a queue can have a size, with these features.
    pub(super) fn is_possible_size(&self, queue: u32, size: u32, features: Features) -> bool {
        // Only split rings have to be powers of two.
        let is_of_format = if features.contains(Features::RING_PACKED) {
            PackedSize::new(size).is_ok()
        } else {
            QueueSize::new(size).is_ok()
        };
        is_of_format && size <= self.queue_size_max(queue)
    }

    /// The driver enables a queue (or disables it again, before DRIVER_OK). A
    /// queue of an impossible size stays disabled. One that was reset is served
    /// at once.
    pub fn set_queue_ready(&mut self, queue: u32, ready: bool) {
        if !self.may_set_up(queue) {
            log::debug!("virtio: queue {queue} enabled or disabled after DRIVER_OK");
            return;
        }
        let Some(&VirtQueue { size, .. }) = self.queue_at(queue) else {
            return;
        };
        let possible = self.is_possible_size(queue, size, self.driver_features);
        if ready && !possible {
            log::debug!("virtio: queue {queue} cannot have size {size}");
        }
        let ready = ready && possible;
        let Some(found) = self.queues.get_mut(queue as usize) else {
            return;
        };
        found.ready = ready;
        if ready
            && std::mem::take(&mut found.was_reset)
            && let Some(lane) = self.lane_of(queue)
        {
            self.join_lane(lane);
        }
    }

    /// Has a lane serve a queue that was enabled just now. A lane that serves
    /// others stops for that, and continues with all of them.
    fn join_lane(&mut self, lane: u16) {
        if !self.lanes.is_running(lane) {
            self.start_lane(lane);
            return;
        }
        self.lanes.begin_stop(lane);
        if !self.wait(JOIN_WAIT, |this| this.settle(lane)) {
            self.events.break_lane(lane, &"it does not stop");
        }
    }

    /// The lane that serves a queue, if there is one.
    fn lane_of(&self, queue: u32) -> Option<u16> {
        let serves =
            |lane: &Range<u16>| (u32::from(lane.start)..u32::from(lane.end)).contains(&queue);
        // Lane numbers have 16 bits, as there are no more than queues.
        self.lane_queues.iter().position(serves).map(|at| at as u16)
    }

    fn queues_of(&self, lane: u16) -> Range<u16> {
        let queues = self.lane_queues.get(usize::from(lane));
        queues.cloned().unwrap_or_default()
    }

    /// The driver resets one queue (RING_RESET, §2.6.1): what is in flight in
    /// it ends, and the others go on. Ignored without the feature, and for a
    /// queue that is not enabled.
    pub fn reset_queue(&mut self, queue: u32) {
        if self.driver_features.contains(Features::RING_RESET) {
            self.begin_queue_reset(queue);
        } else {
            log::debug!("virtio: queue {queue} reset without RING_RESET");
        }
    }

    /// The driver disables a queue, as virtio-mmio lets it at any time
    /// (§4.2.2.2): once it no longer [is ready](Control::queue_ready), the
    /// device has let go of it.
    pub fn disable_queue(&mut self, queue: u32) {
        if self.is_driver_ok() {
            self.begin_queue_reset(queue);
        } else {
            self.set_queue_ready(queue, false);
        }
    }

    fn begin_queue_reset(&mut self, queue: u32) {
        let running = self.is_driver_ok() && !self.resetting;
        let ready = self.queue_ready(queue);
        let lane = self.lane_of(queue).filter(|_| running && ready);
        let (Some(lane), Some(found)) = (lane, self.queues.get_mut(queue as usize)) else {
            log::debug!("virtio: queue {queue} cannot be reset");
            return;
        };
        found.resetting = true;
        self.lanes.begin_stop(lane);
        self.settle(lane);
    }

    /// Whether the reset of one queue is in progress.
    pub fn queue_resetting(&mut self, queue: u32) -> bool {
        self.settle_queue(queue);
        self.queue_at(queue).is_some_and(|queue| queue.resetting)
    }

    fn settle_queue(&mut self, queue: u32) {
        if let Some(lane) = self.lane_of(queue) {
            self.settle(lane);
        }
    }

    /// Does what a lane was stopped for, once it has stopped: resets of its
    /// queues take effect, and it continues with the others. `false` while it
    /// is stopping.
    pub(super) fn settle(&mut self, lane: u16) -> bool {
        if self.lanes.is_serving(lane) {
            return true;
        }
        let was_running = self.lanes.is_running(lane);
        let Poll::Ready(state) = self.lanes.poll_stopped(lane) else {
            return false;
        };
        let range = self.queues_of(lane);
        let mut queue_was_reset = false;
        for (index, queue) in range.enumerate() {
            let Some(queue) = self.queues.get_mut(usize::from(queue)) else {
                continue;
            };
            if std::mem::take(&mut queue.with_worker) {
                let stands = state.as_ref().and_then(|state| state.queue(index));
                queue.position = stands.map_or(Position::Broken, Position::At);
            }
            if queue.resetting {
                *queue = VirtQueue {
                    was_reset: true,
                    ..VirtQueue::default()
                };
                queue_was_reset = true;
            }
        }
        if (was_running || queue_was_reset) && !self.resetting && !self.paused {
            self.start_lane(lane);
        }
        true
    }

    /// Settles every lane; whether all have.
    pub(super) fn settle_all(&mut self) -> bool {
        let lanes = 0..self.lane_queues.len() as u16;
        lanes.fold(true, |settled, lane| self.settle(lane) & settled)
    }

    pub(super) fn stop_lanes(&mut self) {
        for lane in 0..self.lane_queues.len() as u16 {
            self.lanes.begin_stop(lane);
        }
    }

    pub(super) fn start_lanes(&mut self) {
        for lane in 0..self.lane_queues.len() as u16 {
            self.start_lane(lane);
        }
    }

    /// Starts a lane with those of its queues that are enabled, if there are
    /// any; raises DEVICE_NEEDS_RESET if it cannot be.
    fn start_lane(&mut self, lane: u16) {
        let mut resources = Vec::new();
        let mut positions = Vec::new();
        for number in self.queues_of(lane) {
            let (queue, kick) = (
                self.queues.get(usize::from(number)),
                self.kicks.get(usize::from(number)),
            );
            let served = queue.zip(kick).filter(|(queue, _)| queue.is_served());
            resources.push(served.map(|(queue, kick)| QueueResources {
                at: queue.addresses(),
                signal: self.events.signals.clone().queue(number),
                kick: kick.clone(),
            }));
            positions.push(served.and_then(|(queue, _)| match queue.position {
                Position::At(state) => Some(state),
                Position::New | Position::Broken => None,
            }));
        }
        if resources.iter().all(Option::is_none) {
            return;
        }
        let at = LaneState { queues: positions };
        let features = self.driver_features;
        if let Err(error) = self.lanes.start(lane, resources, features, Some(&at)) {
            self.events.break_lane(lane, &error);
            return;
        }
        for number in self.queues_of(lane) {
            if let Some(queue) = self.queues.get_mut(usize::from(number)) {
                queue.with_worker = queue.is_served();
            }
        }
    }
}
