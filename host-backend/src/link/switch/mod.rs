//! A switch in this process: it joins devices with each other and with code of
//! the host.
//!
//! A frame goes from its sender straight into the inbox of the port that it is
//! for: one copy in, one copy out, and no thread in between. Inboxes are of
//! bounded size, and what does not fit is dropped at that port and counted
//! there, so that neither a sender nor another port waits for a slow one.
//! Which address is behind which port is learned from the frames, within a
//! table of bounded size; frames to groups and to unknown addresses go to all
//! ports but their own.
//!
//! Nobody checks who uses which address: a port that sends from another's
//! address gets its frames from then on, as on any switch without port
//! security.
//!
//! A port is up while there is another one.
#![forbid(unsafe_code)]

mod endpoint;
mod inbox;
mod lane;
mod table;

pub use endpoint::Endpoint;

use super::state::{UpState, lane_is_open};
use super::{Link, LinkCounters, LinkError, LinkEvents, LinkLane, LinkShape};
use crate::sync::lock;
use inbox::Inbox;
use lane::SwitchLane;
use pvkit_protocol::frame::{DEFAULT_MTU, Offloads};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use table::Table;

/// How a switch is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchOptions {
    /// Largest payload of a frame, in bytes.
    pub mtu: u16,
    /// Lanes of each port; at least 1. Frames of one flow come in at one lane.
    pub lanes: u16,
    /// Bytes of frames that wait at a lane, at most, with about 24 more for
    /// each frame. Each lane that is open has two such arenas: one is filled
    /// while the other is emptied.
    pub inbox_bytes: usize,
    /// Addresses that are remembered, about.
    pub addresses: usize,
    /// For how long an address is remembered from which nothing comes.
    pub age: Duration,
}

impl Default for SwitchOptions {
    fn default() -> Self {
        Self {
            mtu: DEFAULT_MTU,
            lanes: 1,
            inbox_bytes: 4 << 20,
            addresses: 4096,
            age: Duration::from_secs(300),
        }
    }
}

/// Most ports: their numbers have 16 bits.
const MAX_PORTS: usize = 1 << 16;

/// A port, as others see it.
#[derive(Debug)]
struct Port {
    id: u16,
    inboxes: Vec<Arc<Inbox>>,
    /// Lanes that receive.
    used: AtomicU16,
    /// [`Offloads`] that it takes.
    takes: AtomicU8,
    events: UpState,
}

impl Port {
    fn takes(&self) -> Offloads {
        Offloads::from_bits_truncate(self.takes.load(Ordering::Relaxed))
    }
}

type Ports = Vec<Option<Arc<Port>>>;

#[derive(Debug)]
struct Shared {
    options: SwitchOptions,
    table: Table,
    started: Instant,
    /// Replaced as a whole by each change, and counted: lanes keep a copy.
    ports: Mutex<Arc<Ports>>,
    changes: AtomicU64,
    count: AtomicU64,
}

impl Shared {
    fn ports(&self) -> (u64, Arc<Ports>) {
        let ports = lock(&self.ports);
        (self.changes.load(Ordering::Relaxed), ports.clone())
    }

    /// Changes the list, and tells the ports that were there before and after
    /// if that makes a difference to them.
    fn change(&self, change: impl FnOnce(&mut Ports)) {
        let mut ports = lock(&self.ports);
        let mut list = Ports::clone(&ports);
        change(&mut list);
        let count = list.iter().flatten().count() as u64;
        let before = self.count.swap(count, Ordering::AcqRel);
        let list = Arc::new(list);
        *ports = list.clone();
        self.changes.fetch_add(1, Ordering::Release);
        drop(ports);
        if (count > 1) != (before > 1) {
            for port in list.iter().flatten() {
                port.events.tell();
            }
        }
    }
}

/// A switch. Copies of this are the same switch; it lives as long as one of
/// them, or one of its ports.
#[derive(Debug, Clone)]
pub struct Switch(Arc<Shared>);

impl Switch {
    /// A switch without ports.
    #[must_use]
    pub fn new(options: SwitchOptions) -> Self {
        let age = u32::try_from(options.age.as_secs()).unwrap_or(u32::MAX);
        Self(Arc::new(Shared {
            table: Table::new(options.addresses, age),
            options: SwitchOptions {
                lanes: options.lanes.max(1),
                ..options
            },
            started: Instant::now(),
            ports: Mutex::default(),
            changes: AtomicU64::new(0),
            count: AtomicU64::new(0),
        }))
    }

    /// A new port, for a device. It is there until it and its lanes are
    /// dropped.
    ///
    /// # Errors
    /// What the kernel says, for instance that too many files are open; or
    /// that there are 65,536 ports.
    pub fn port(&self) -> io::Result<Arc<SwitchPort>> {
        let mut inboxes = Vec::new();
        for _ in 0..self.0.options.lanes {
            inboxes.push(Arc::new(Inbox::new()?));
        }
        let mut added = None;
        self.0.change(|ports| {
            let id = match ports.iter().position(Option::is_none) {
                Some(id) => id,
                None if ports.len() < MAX_PORTS => {
                    ports.push(None);
                    ports.len() - 1
                }
                None => return,
            };
            let port = Arc::new(Port {
                id: id as u16,
                inboxes,
                used: AtomicU16::new(1),
                takes: AtomicU8::new(0),
                events: UpState::default(),
            });
            if let Some(place) = ports.get_mut(id) {
                *place = Some(port.clone());
                added = Some(port);
            }
        });
        let port = added.ok_or(io::ErrorKind::QuotaExceeded)?;
        Ok(Arc::new(SwitchPort(Arc::new(Registered {
            shared: self.0.clone(),
            port,
        }))))
    }

    /// A new port, for code of the host. It takes no offloads at first.
    ///
    /// # Errors
    /// As for [`port`](Self::port).
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        Endpoint::new(self.port()?)
    }
}

/// Keeps a port in the list.
#[derive(Debug)]
struct Registered {
    shared: Arc<Shared>,
    port: Arc<Port>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let id = self.port.id;
        self.shared.change(|ports| {
            // Before another port gets the number.
            self.shared.table.forget(id);
            if let Some(place) = ports.get_mut(usize::from(id)) {
                *place = None;
            }
        });
    }
}

/// A port of a [`Switch`].
#[derive(Debug)]
pub struct SwitchPort(Arc<Registered>);

impl SwitchPort {
    fn open(&self, index: u16) -> Result<SwitchLane, LinkError> {
        let inboxes = &self.0.port.inboxes;
        let Some(inbox) = inboxes.get(usize::from(index)) else {
            return Err(LinkError::NoLane {
                index,
                lanes: inboxes.len() as u16,
            });
        };
        let reading = inbox
            .open(self.0.shared.options.inbox_bytes)
            .ok_or_else(lane_is_open)?;
        Ok(SwitchLane::new(self.0.clone(), inbox.clone(), reading))
    }

    /// What a lane has done, all in all: it may be opened several times.
    /// Frames that came in while it was not open count as dropped.
    #[must_use]
    pub fn counters(&self, lane: u16) -> Option<Arc<LinkCounters>> {
        let inbox = self.0.port.inboxes.get(usize::from(lane))?;
        Some(inbox.counters().clone())
    }
}

impl Link for SwitchPort {
    fn shape(&self) -> LinkShape {
        let options = &self.0.shared.options;
        LinkShape {
            mtu: options.mtu,
            lanes: options.lanes,
            cheap: Offloads::all(),
            speed_mbps: None,
        }
    }

    fn is_up(&self) -> bool {
        self.0.shared.count.load(Ordering::Acquire) > 1
    }

    fn connect(&self, events: Arc<dyn LinkEvents>) {
        self.0.port.events.connect(events);
    }

    fn lane(&self, index: u16) -> Result<Box<dyn LinkLane>, LinkError> {
        Ok(Box::new(self.open(index)?))
    }

    fn set_receive(&self, offloads: Offloads) -> Result<(), LinkError> {
        let takes = &self.0.port.takes;
        takes.store(offloads.bits(), Ordering::Relaxed);
        Ok(())
    }

    fn use_lanes(&self, count: u16) -> Result<(), LinkError> {
        let lanes = self.0.shared.options.lanes;
        if count > lanes {
            return Err(LinkError::NoLane {
                index: count - 1,
                lanes,
            });
        }
        self.0.port.used.store(count.max(1), Ordering::Relaxed);
        Ok(())
    }
}
