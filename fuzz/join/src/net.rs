//! A virtio network device, ready for a driver, and what comes out at the other
//! end of its link.
#![forbid(unsafe_code)]

use crate::machine::{Kind, Machine};
use crate::stepped::{Steps, stepped};
use pvkit_host::executor::Executor;
use pvkit_host::link::{Delivered, FrameSink, Link};
use pvkit_host::virtio::device::Device;
use pvkit_host::virtio::net::{Net, NetControlCounters, NetCounters, NetOptions};
use pvkit_protocol::frame::FrameMeta;
use std::ops::Deref;
use std::sync::Arc;

/// A virtio network device, ready for a driver.
#[derive(Debug)]
pub struct NetJoin {
    /// The machine that has it.
    pub machine: Machine,
    /// What each pair of queues has done.
    pub counters: Vec<Arc<NetCounters>>,
    /// What the control queue has done.
    pub control: Arc<NetControlCounters>,
}

impl Deref for NetJoin {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl NetJoin {
    /// A device at the end of `link`, driven by `executor`, and a guest with
    /// `bytes` of memory.
    ///
    /// # Panics
    /// If the options make no sense, or the host has no memory: this is for
    /// tests.
    #[must_use]
    pub fn new(
        kind: Kind,
        link: Arc<dyn Link>,
        options: NetOptions,
        executor: Box<dyn Executor>,
        bytes: usize,
    ) -> Self {
        Self::with(link, options, |device| {
            Machine::new(kind, device, executor, bytes)
        })
    }

    /// A device at the end of `link`, in the machine that `machine` makes.
    ///
    /// # Panics
    /// See [`new`](NetJoin::new).
    #[must_use]
    pub fn with(
        link: Arc<dyn Link>,
        options: NetOptions,
        machine: impl FnOnce(Box<dyn Device>) -> Machine,
    ) -> Self {
        let device = Net::new(link, options).expect("net options");
        Self {
            counters: device.counters(),
            control: device.control_counters(),
            machine: machine(Box::new(device)),
        }
    }

    /// The same, driven by hand.
    #[must_use]
    pub fn stepped(
        kind: Kind,
        link: Arc<dyn Link>,
        options: NetOptions,
        bytes: usize,
    ) -> (Self, Steps) {
        let (executor, steps) = stepped();
        let join = Self::new(kind, link, options, Box::new(executor), bytes);
        (join, steps)
    }
}

/// Frames that came in at an end of a link, and what was said of them. There is
/// always room for more.
#[derive(Debug, Default)]
pub struct Received(pub Vec<(Vec<u8>, FrameMeta)>);

impl FrameSink for Received {
    fn deliver(&mut self, frame: &[u8], meta: &FrameMeta) -> Delivered {
        self.0.push((frame.to_vec(), *meta));
        Delivered::Taken
    }
}
