//! The part of every virtio transport that is not its registers: negotiation,
//! queue set-up, and the life of the lanes (virtio 1.3 §2.1, §2.4, §3.1).
#![forbid(unsafe_code)]

use super::events::Events;
use crate::event::EventFd;
use crate::executor::{Executor, Stopped};
use crate::memory::GuestMemory;
use crate::virtio::device::{Device, Identity, LaneResources, StartError};
use crate::virtio::queue::{QueueAddresses, QueueResources};
use crate::worker::Signal;
use pvkit_protocol::virtio::packed::PackedSize;
use pvkit_protocol::virtio::split::QueueSize;
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a driver that resets the device waits at the most, if the lanes do
/// not stop. After that it has to look itself.
const RESET_PATIENCE: Duration = Duration::from_millis(10);

/// How a transport interrupts the driver.
pub trait TransportSignals: Send + Sync + fmt::Debug {
    /// The configuration changed, or the device needs a reset.
    fn config(&self);
    /// The signal of a queue.
    fn queue(self: Arc<Self>, queue: u16) -> Arc<dyn Signal>;
    /// Forgets interrupts that the driver has not acknowledged.
    fn reset(&self);
}

/// One of the values that a driver sets for a queue.
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

#[derive(Debug, Clone, Copy, Default)]
struct QueueRegisters {
    size: u32,
    descriptors: u64,
    driver: u64,
    device: u64,
    ready: bool,
    /// The driver reset it alone, and may set it up again though DRIVER_OK is
    /// set (§2.6.1).
    was_reset: bool,
}

/// A device, as far as a driver controls it.
#[derive(Debug)]
pub struct Control<S> {
    device: Box<dyn Device>,
    identity: Identity,
    memory: GuestMemory,
    executor: Box<dyn Executor>,
    events: Arc<Events<S>>,
    queues: Vec<QueueRegisters>,
    kicks: Vec<Arc<EventFd>>,
    /// The queues of each lane, as the driver's features have it.
    lane_queues: Vec<Range<u16>>,
    lanes: Vec<Phase>,
    driver_features: Features,
    status: DeviceStatus,
    /// The driver asked for a reset, and some lanes still run.
    resetting: bool,
}

/// What a lane is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    /// There is no worker.
    #[default]
    Stopped,
    /// A worker was handed to the executor, and not taken back.
    Running,
    /// So it was, and its queue is being reset by itself.
    Stopping,
}

impl<S: TransportSignals + 'static> Control<S> {
    /// A device in its state at power-on. It offers ACCESS_PLATFORM, and
    /// insists on it, if and only if `memory` is
    /// [translated](GuestMemory::is_translated).
    ///
    /// # Errors
    /// What the host says if there are no more file descriptors.
    pub fn new(
        mut device: Box<dyn Device>,
        memory: GuestMemory,
        executor: Box<dyn Executor>,
        signals: Arc<S>,
    ) -> io::Result<Self> {
        let mut identity = device.identity();
        // A lane stops as a whole, so queues that share one cannot be reset
        // alone.
        if identity.lanes.iter().any(|lane| lane.len() != 1) {
            identity.features.remove(Features::RING_RESET);
        }
        // No business of the device itself: it uses the memory that it gets.
        let translated = memory.is_translated();
        identity.features.set(Features::ACCESS_PLATFORM, translated);
        let queues = identity
            .lanes
            .iter()
            .map(|lane| lane.end)
            .max()
            .unwrap_or(0);
        let kicks = (0..queues)
            .map(|_| EventFd::new().map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let events = Arc::new(Events::new(signals));
        device.connect(events.clone());
        Ok(Self {
            lanes: vec![Phase::default(); identity.lanes.len()],
            lane_queues: identity.lanes.clone(),
            queues: vec![QueueRegisters::default(); usize::from(queues)],
            device,
            identity,
            memory,
            executor,
            events,
            kicks,
            driver_features: Features::empty(),
            status: DeviceStatus::empty(),
            resetting: false,
        })
    }

    /// What the device is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The doorbells of all queues, for ioeventfds.
    #[must_use]
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    /// Rings a doorbell with the value that was written to it: the queue, and
    /// with NOTIFICATION_DATA where it stands (§4.1.5.2, §4.2.3.3). Queues that
    /// do not exist are ignored.
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

    /// The device status. While a reset is under way it stays as it was.
    pub fn status(&mut self) -> DeviceStatus {
        self.finish_reset();
        let mut status = self.status;
        if self.events.is_broken() {
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
            log::debug!(
                "virtio: status {status:?} would clear bits of {:?}",
                self.status
            );
            return;
        }
        let new = status - self.status;
        if new.contains(DeviceStatus::FEATURES_OK) {
            if self.features_acceptable() {
                self.device.negotiated(self.driver_features);
                self.set_lanes(self.device.lanes(self.driver_features));
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
            self.start();
            self.events.started();
        }
    }

    /// Cuts the queues into lanes, none of which has a worker.
    fn set_lanes(&mut self, lanes: Vec<Range<u16>>) {
        self.lanes = vec![Phase::default(); lanes.len()];
        self.lane_queues = lanes;
    }

    fn features_acceptable(&self) -> bool {
        let unknown = self.driver_features - self.identity.features;
        if !unknown.is_empty() {
            log::debug!("virtio: the driver wants features that were not offered: {unknown:?}");
            return false;
        }
        // There is no legacy interface here (§6.1.2). A driver that does not
        // accept ACCESS_PLATFORM gives physical addresses, which would name
        // other memory here, or none; a device may fail without it (§6.2).
        let needed = Features::VERSION_1 | (self.identity.features & Features::ACCESS_PLATFORM);
        let missing = needed - self.driver_features;
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

    /// Changes whenever the configuration may have.
    #[must_use]
    pub fn config_generation(&self) -> u32 {
        self.events.config_generation()
    }

    /// The driver reads configuration space.
    pub fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.device.read_config(offset, out);
    }

    /// The driver writes configuration space.
    pub fn write_config(&mut self, offset: u32, data: &[u8]) {
        if !self.resetting {
            self.device.write_config(offset, data);
        }
    }

    /// Largest size of a queue; 0 if it does not exist.
    #[must_use]
    pub fn queue_size_max(&self, queue: u32) -> u32 {
        if (queue as usize) < self.queues.len() {
            u32::from(self.identity.queue_size_max)
        } else {
            0
        }
    }

    /// Whether the driver has enabled a queue.
    #[must_use]
    pub fn queue_ready(&mut self, queue: u32) -> bool {
        self.finish_queue_reset(queue);
        self.queues
            .get(queue as usize)
            .is_some_and(|queue| queue.ready)
    }

    /// Whether the driver may describe and enable a queue now.
    fn may_set_up(&self, queue: u32) -> bool {
        let was_reset = self
            .queues
            .get(queue as usize)
            .is_some_and(|queue| queue.was_reset);
        !self.resetting && (was_reset || !self.status.contains(DeviceStatus::DRIVER_OK))
    }

    /// Number of queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        // As many as `new` made, from a `u16`.
        self.queues.len() as u16
    }

    /// What the driver has set for a queue; 0 if it has not, or there is no
    /// such queue.
    #[must_use]
    pub fn queue(&self, queue: u32, register: QueueRegister) -> u32 {
        let Some(registers) = self.queues.get(queue as usize) else {
            return 0;
        };
        let half = |address: u64, high: bool| (if high { address >> 32 } else { address }) as u32;
        match register {
            QueueRegister::Size => registers.size,
            QueueRegister::Descriptors { high } => half(registers.descriptors, high),
            QueueRegister::Driver { high } => half(registers.driver, high),
            QueueRegister::Device { high } => half(registers.device, high),
        }
    }

    /// The driver describes a queue. Ignored once it is enabled or running.
    pub fn set_queue(&mut self, queue: u32, register: QueueRegister, value: u32) {
        if !self.may_set_up(queue) {
            log::debug!("virtio: {register:?} of queue {queue} written after DRIVER_OK");
            return;
        }
        let Some(registers) = self
            .queues
            .get_mut(queue as usize)
            .filter(|queue| !queue.ready)
        else {
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
            QueueRegister::Size => registers.size = value,
            QueueRegister::Descriptors { high } => half(&mut registers.descriptors, high),
            QueueRegister::Driver { high } => half(&mut registers.driver, high),
            QueueRegister::Device { high } => half(&mut registers.device, high),
        }
    }

    /// The driver enables a queue (or disables it again, before DRIVER_OK). A
    /// queue of an impossible size stays disabled. One that was reset alone
    /// goes to work at once.
    pub fn set_queue_ready(&mut self, queue: u32, ready: bool) {
        if !self.may_set_up(queue) {
            log::debug!("virtio: queue {queue} enabled or disabled after DRIVER_OK");
            return;
        }
        let most = u32::from(self.identity.queue_size_max);
        let packed = self.driver_features.contains(Features::RING_PACKED);
        let Some(registers) = self.queues.get_mut(queue as usize) else {
            return;
        };
        let size = registers.size;
        // Only split rings have to be powers of two.
        let of_the_kind = if packed {
            PackedSize::new(size).is_ok()
        } else {
            QueueSize::new(size).is_ok()
        };
        let possible = size <= most && of_the_kind;
        if ready && !possible {
            log::debug!("virtio: queue {queue} cannot have size {}", registers.size);
        }
        registers.ready = ready && possible;
        if registers.ready && std::mem::take(&mut registers.was_reset) {
            self.start_or_break(self.lane_of(queue));
        }
    }

    /// The lane that has a queue, if there is one.
    fn lane_of(&self, queue: u32) -> Option<u16> {
        let has = |lane: &Range<u16>| (u32::from(lane.start)..u32::from(lane.end)).contains(&queue);
        self.lane_queues.iter().position(has).map(|at| at as u16)
    }

    /// The driver resets one queue (RING_RESET, §2.6.1): everything in flight
    /// ends, and the others go on. Ignored without the feature, and for a queue
    /// that is not enabled.
    pub fn reset_queue(&mut self, queue: u32) {
        if self.driver_features.contains(Features::RING_RESET) {
            self.begin_queue_reset(queue);
        } else {
            log::debug!("virtio: queue {queue} reset without RING_RESET");
        }
    }

    /// The driver disables a queue, as virtio-mmio lets it at any time
    /// (§4.2.2.2): once it no longer [is ready](Control::queue_ready), the
    /// device has let go of it. A queue that shares its lane with others goes
    /// on.
    pub fn disable_queue(&mut self, queue: u32) {
        if self.status.contains(DeviceStatus::DRIVER_OK) {
            self.begin_queue_reset(queue);
        } else {
            self.set_queue_ready(queue, false);
        }
    }

    fn begin_queue_reset(&mut self, queue: u32) {
        let running = self.status.contains(DeviceStatus::DRIVER_OK) && !self.resetting;
        let lane = self.lane_of(queue).filter(|lane| {
            let queues = self.lane_queues.get(usize::from(*lane));
            queues.is_some_and(|queues| queues.len() == 1)
        });
        let ready = self.queue_ready(queue);
        let Some(lane) = lane.filter(|_| running && ready) else {
            log::debug!("virtio: queue {queue} cannot be stopped");
            return;
        };
        match self.phase(lane) {
            Phase::Stopped => self.forget_queue(queue),
            Phase::Running => {
                self.set_phase(lane, Phase::Stopping);
                self.executor.begin_stop(lane);
                self.finish_queue_reset(queue);
            }
            Phase::Stopping => {}
        }
    }

    /// Whether a reset of one queue is under way.
    pub fn queue_resetting(&mut self, queue: u32) -> bool {
        self.finish_queue_reset(queue);
        let lane = self.lane_of(queue);
        lane.is_some_and(|lane| self.phase(lane) == Phase::Stopping)
    }

    fn phase(&self, lane: u16) -> Phase {
        let phase = self.lanes.get(usize::from(lane)).copied();
        phase.unwrap_or_default()
    }

    fn set_phase(&mut self, lane: u16, phase: Phase) {
        if let Some(place) = self.lanes.get_mut(usize::from(lane)) {
            *place = phase;
        }
    }

    /// Completes the reset of a queue if its lane has stopped by now.
    fn finish_queue_reset(&mut self, queue: u32) {
        if let Some(lane) = self.lane_of(queue)
            && self.phase(lane) == Phase::Stopping
            && self.take_stopped(lane)
        {
            self.forget_queue(queue);
        }
    }

    /// Leaves a queue as it is after its reset.
    fn forget_queue(&mut self, queue: u32) {
        if let Some(registers) = self.queues.get_mut(queue as usize) {
            *registers = QueueRegisters {
                was_reset: true,
                ..QueueRegisters::default()
            };
        }
    }

    /// Takes back the worker of a lane that was asked to stop; `false` if it
    /// still runs.
    fn take_stopped(&mut self, lane: u16) -> bool {
        match self.executor.stopped(lane) {
            Stopped::NotYet => return false,
            Stopped::Worker(worker) => _ = self.device.stopped(lane, worker),
            Stopped::Gone => {}
        }
        self.set_phase(lane, Phase::Stopped);
        true
    }

    /// Starts every lane whose queues are all enabled.
    fn start(&mut self) {
        for index in 0..self.lane_queues.len() {
            self.start_or_break(Some(index as u16));
        }
    }

    fn start_or_break(&mut self, lane: Option<u16>) {
        let Some(lane) = lane else { return };
        if let Err(error) = self.start_lane(lane) {
            log::warn!("virtio: lane {lane} does not start: {error}");
            self.events.broke();
        }
    }

    fn start_lane(&mut self, lane: u16) -> Result<(), LaneError> {
        let index = usize::from(lane);
        let Some(range) = self.lane_queues.get(index).cloned() else {
            return Ok(());
        };
        let mut queues = Vec::new();
        for queue in range {
            let (Some(registers), Some(kick)) = (
                self.queues.get(usize::from(queue)),
                self.kicks.get(usize::from(queue)),
            ) else {
                return Ok(());
            };
            if !registers.ready {
                return Ok(());
            }
            queues.push(QueueResources {
                at: QueueAddresses {
                    // Checked when the queue was enabled.
                    size: registers.size as u16,
                    descriptors: registers.descriptors,
                    driver: registers.driver,
                    device: registers.device,
                },
                signal: self.events.signals.clone().queue(queue),
                kick: kick.clone(),
            });
        }
        let resources = LaneResources {
            memory: self.memory.clone(),
            queues,
        };
        let worker = self
            .device
            .start(lane, resources, self.driver_features, None)?;
        self.executor.start(lane, worker, self.events.clone())?;
        self.set_phase(lane, Phase::Running);
        Ok(())
    }

    /// Waits a little for a reset that the driver asked for: some drivers do
    /// not look whether it is over, and a device that is not busy needs only
    /// the time in which its threads wake up.
    pub fn wait_for_reset(&mut self) {
        let end = Instant::now() + RESET_PATIENCE;
        loop {
            self.finish_reset();
            if !self.resetting || Instant::now() >= end {
                return;
            }
            thread::sleep(Duration::from_micros(50));
        }
    }

    fn begin_reset(&mut self) {
        if !self.resetting {
            self.resetting = true;
            self.events.stopping();
            for lane in 0..self.lanes.len() as u16 {
                if self.phase(lane) != Phase::Stopped {
                    self.executor.begin_stop(lane);
                }
            }
        }
        self.finish_reset();
    }

    /// Completes a reset if every lane has stopped by now.
    fn finish_reset(&mut self) {
        if !self.resetting {
            return;
        }
        for lane in 0..self.lanes.len() as u16 {
            if self.phase(lane) != Phase::Stopped && !self.take_stopped(lane) {
                return;
            }
        }
        self.device.reset();
        self.set_lanes(self.identity.lanes.clone());
        self.events.reset();
        self.queues.fill(QueueRegisters::default());
        self.driver_features = Features::empty();
        self.status = DeviceStatus::empty();
        self.resetting = false;
    }
}

#[derive(Debug, thiserror::Error)]
enum LaneError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("no thread: {0}")]
    Thread(#[from] io::Error),
}
