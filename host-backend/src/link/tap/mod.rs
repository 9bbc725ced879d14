//! A tap: an interface of the host's kernel whose wire ends here.
//!
//! Each frame travels with virtio's header, so that what a device leaves to
//! the host is left to the host's kernel, which mostly leaves it to a network
//! card. Several lanes are several queues of the interface.
//!
//! Addresses, routes, and whether the interface is up are the business of
//! whoever runs the host. While it is down, frames are dropped and counted;
//! when it is deleted, the link is down until there is an interface of that
//! name again.

mod error;
mod lane;
#[allow(unsafe_code)]
mod sys;

pub use error::TapError;

use super::state::{UpState, lane_is_open};
use super::{Link, LinkCounters, LinkError, LinkEvents, LinkLane, LinkShape};
use crate::sync::lock;
use lane::TapLane;
use pvkit_protocol::frame::{DEFAULT_MTU, Offloads};
use pvkit_protocol::virtio::net::HEADER_BYTES;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const TUN: &str = "/dev/net/tun";

/// How soon a link that went down is looked at again; each time in vain
/// doubles it.
const FIRST_LOOK: Duration = Duration::from_millis(50);
/// The longest time between two looks.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// How a tap is to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TapOptions {
    /// Lanes: queues of the interface; at least 1. The kernel has up to 256.
    pub lanes: u16,
}

impl Default for TapOptions {
    fn default() -> Self {
        Self { lanes: 1 }
    }
}

#[derive(Debug)]
struct Queue {
    fd: OwnedFd,
    open: AtomicBool,
    counters: Arc<LinkCounters>,
}

/// What was asked for, to be asked for again if the interface comes back.
#[derive(Debug)]
struct Settings {
    lanes: u16,
    receive: Offloads,
    next_look: Instant,
    wait: Duration,
}

#[derive(Debug)]
struct Shared {
    name: String,
    /// A socket in the interface's network namespace, to ask about it.
    control: OwnedFd,
    /// It really is: the interface was found by its name and address.
    here: bool,
    queues: Vec<Queue>,
    flags: libc::c_int,
    mtu: u16,
    /// The kernel knows how to cut UDP.
    uso: bool,
    state: UpState,
    /// There is no such interface any more.
    gone: AtomicBool,
    /// [`Offloads`] that frames that come in may leave.
    takes: AtomicU8,
    settings: Mutex<Settings>,
}

/// `TUN_F_*` for what a reader takes. The kernel wants both versions of IP for
/// UDP, or none.
fn tun_flags(takes: Offloads) -> libc::c_uint {
    let both = Offloads::USO4 | Offloads::USO6;
    let mut flags = 0;
    if !takes.contains(Offloads::CHECKSUM) {
        return flags;
    }
    flags |= libc::TUN_F_CSUM;
    if takes.contains(Offloads::TSO4) {
        flags |= libc::TUN_F_TSO4;
    }
    if takes.contains(Offloads::TSO6) {
        flags |= libc::TUN_F_TSO6;
    }
    if takes.contains(Offloads::TSO_ECN) && takes.intersects(Offloads::TSO4 | Offloads::TSO6) {
        flags |= libc::TUN_F_TSO_ECN;
    }
    if takes.contains(both) {
        flags |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    flags
}

impl Shared {
    fn first(&self) -> io::Result<BorrowedFd<'_>> {
        let queue = self.queues.first().ok_or(io::ErrorKind::NotFound)?;
        Ok(queue.fd.as_fd())
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    fn set_offload(&self, takes: Offloads) -> io::Result<()> {
        let mut flags = tun_flags(takes);
        if !self.uso {
            flags &= !(libc::TUN_F_USO4 | libc::TUN_F_USO6);
        }
        sys::set_offload(self.first()?, flags)
    }

    /// Makes the first `lanes` queues receive, and only those, if `were` did.
    fn set_queues(&self, were: u16, lanes: u16) -> io::Result<()> {
        for (index, queue) in self.queues.iter().enumerate() {
            let (was, wanted) = (index < usize::from(were), index < usize::from(lanes));
            if was != wanted {
                sys::set_queue(queue.fd.as_fd(), wanted)?;
            }
        }
        Ok(())
    }

    fn went_down(&self, gone: bool) {
        let mut settings = lock(&self.settings);
        if gone && !self.gone.swap(true, Ordering::AcqRel) {
            log::warn!("{}: the interface was deleted", self.name);
        }
        settings.wait = FIRST_LOOK;
        settings.next_look = Instant::now() + FIRST_LOOK;
        drop(settings);
        self.state.set(false);
    }

    /// Looks whether the interface is there and up again, if it is time to.
    fn look(&self) {
        let mut settings = lock(&self.settings);
        let now = Instant::now();
        if now < settings.next_look {
            return;
        }
        settings.wait = (settings.wait * 2).min(LAST_LOOK);
        settings.next_look = now + settings.wait;
        let up = match (self.here, self.is_gone()) {
            (true, _) => sys::is_up(self.control.as_fd(), &self.name),
            // It cannot be asked: the next frame will tell.
            (false, false) => Ok(true),
            (false, true) => return,
        };
        let Ok(up) = up else {
            return;
        };
        if self.is_gone() {
            if let Err(error) = self.come_back(&settings) {
                log::debug!("{}: not back yet: {error}", self.name);
                return;
            }
            log::info!("{}: the interface is back", self.name);
            self.gone.store(false, Ordering::Release);
        }
        drop(settings);
        self.state.set(up);
    }

    /// When to look next, if there is a reason to.
    fn deadline(&self) -> Option<Instant> {
        (!self.is_up()).then(|| lock(&self.settings).next_look)
    }

    /// Both are asked: the state may be told by one lane that looked before
    /// another found that the interface is gone.
    fn is_up(&self) -> bool {
        self.state.is_up() && !self.is_gone()
    }

    /// Attaches to an interface that has the name again. The descriptors are
    /// still good for that, in the network namespace that they were made in.
    fn come_back(&self, settings: &Settings) -> io::Result<()> {
        for queue in &self.queues {
            match sys::attach(queue.fd.as_fd(), &self.name, self.flags) {
                // It is attached, or was detached when this was tried before.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    let _ = sys::set_queue(queue.fd.as_fd(), true);
                }
                attached => _ = attached?,
            }
        }
        sys::set_header_bytes(self.first()?, HEADER_BYTES as libc::c_int)?;
        self.set_offload(settings.receive)?;
        self.set_queues(self.queues.len() as u16, settings.lanes)
    }
}

/// A tap interface of Linux.
///
/// One that was handed in from another network namespace cannot be asked about:
/// if it is deleted, it does not come back.
#[derive(Debug)]
pub struct Tap(Arc<Shared>);

const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// Those by which a descriptor that is handed in is judged.
const KIND: libc::c_int = FLAGS | libc::IFF_TUN;

impl Tap {
    /// Attaches to the tap `name`, in the calling thread's network namespace.
    /// One that does not exist is created, is down, and is gone when this is;
    /// `%d` in its name becomes a number.
    ///
    /// # Errors
    /// [`TapError`] says what is in the way.
    pub fn open(name: &str, options: &TapOptions) -> Result<Self, TapError> {
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if name.is_empty() || name.len() >= sys::NAME_BYTES || name.contains(bad) {
            return Err(TapError::BadName {
                name: name.to_owned(),
                max: sys::NAME_BYTES - 1,
            });
        }
        let lanes = options.lanes.max(1);
        let mut flags = FLAGS;
        if lanes > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let mut name = name.to_owned();
        let mut fds = Vec::new();
        for lane in 0..lanes {
            let open = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let fd = rustix::fs::open(TUN, open, Mode::empty())
                .map_err(|error| TapError::driver(error.into()))?;
            let mut result = sys::attach(fd.as_fd(), &name, flags);
            let einval = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
            if lane == 0 && lanes == 1 && result.as_ref().is_err_and(einval) {
                // It may have been made for several; one of them will do.
                flags |= libc::IFF_MULTI_QUEUE;
                result = sys::attach(fd.as_fd(), &name, flags);
            }
            name = result.map_err(|error| TapError::attach(&name, lanes, error))?;
            fds.push(fd);
        }
        Self::new(name, fds, flags)
    }

    /// Takes a descriptor that is attached to the tap `name` already, with
    /// `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`. Called in the interface's
    /// network namespace, it learns how large frames may be; elsewhere it
    /// assumes 1500 bytes of payload, and that the interface is up.
    ///
    /// # Errors
    /// [`TapError`] says what is in the way.
    pub fn from_fd(fd: OwnedFd, name: &str) -> Result<Self, TapError> {
        Self::from_fds(vec![fd], name)
    }

    /// The same for an interface with `IFF_MULTI_QUEUE`, with a descriptor for
    /// each lane, all of them attached.
    ///
    /// # Errors
    /// [`TapError`] says what is in the way.
    pub fn from_fds(fds: Vec<OwnedFd>, name: &str) -> Result<Self, TapError> {
        let not_a_tap = || TapError::NotATap {
            name: name.to_owned(),
        };
        let mut kind = None;
        for fd in &fds {
            let (own, flags) = sys::interface(fd.as_fd()).map_err(|_| not_a_tap())?;
            if own != name || flags & KIND != FLAGS {
                return Err(not_a_tap());
            }
            kind = Some(FLAGS | flags & libc::IFF_MULTI_QUEUE);
            rustix::fs::fcntl_setfl(fd, OFlags::RDWR | OFlags::NONBLOCK)
                .map_err(|error| TapError::host(name, "O_NONBLOCK", error))?;
        }
        Self::new(name.to_owned(), fds, kind.ok_or_else(not_a_tap)?)
    }

    fn new(name: String, fds: Vec<OwnedFd>, flags: libc::c_int) -> Result<Self, TapError> {
        let host = |what| {
            let name = name.clone();
            move |source: io::Error| TapError::host(&name, what, source)
        };
        let none = || io::Error::from(io::ErrorKind::NotFound);
        let first = fds.first().ok_or_else(none).map_err(host("no queue"))?;
        let control = rustix::net::socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| host("a socket")(error.into()))?;
        sys::set_header_bytes(first.as_fd(), HEADER_BYTES as libc::c_int)
            .map_err(host("TUNSETVNETHDRSZ"))?;
        // Kernels before 6.2 do not know about UDP.
        let uso = sys::set_offload(first.as_fd(), tun_flags(Offloads::all())).is_ok();
        sys::set_offload(first.as_fd(), 0).map_err(host("TUNSETOFFLOAD"))?;
        // An interface of that name, in this thread's namespace, need not be
        // the one that a descriptor is of.
        let own = sys::address(first.as_fd(), &name).ok();
        let here = own.is_some() && own == sys::address(control.as_fd(), &name).ok();
        let (mtu, up) = if here {
            let mtu = sys::mtu(control.as_fd(), &name).map_err(host("SIOCGIFMTU"))?;
            let up = sys::is_up(control.as_fd(), &name).map_err(host("SIOCGIFFLAGS"))?;
            (u16::try_from(mtu).unwrap_or(u16::MAX), up)
        } else {
            (DEFAULT_MTU, true)
        };
        let queue = |fd| Queue {
            fd,
            open: AtomicBool::new(false),
            counters: Arc::default(),
        };
        let shared = Shared {
            control,
            here,
            queues: fds.into_iter().map(queue).collect(),
            flags,
            mtu,
            uso,
            state: UpState::new(up),
            gone: AtomicBool::new(false),
            takes: AtomicU8::new(0),
            settings: Mutex::new(Settings {
                lanes: 1,
                receive: Offloads::empty(),
                next_look: Instant::now(),
                wait: FIRST_LOOK,
            }),
            name,
        };
        let lanes = shared.queues.len() as u16;
        shared
            .set_queues(lanes, 1)
            .map_err(|error| TapError::host(&shared.name, "TUNSETQUEUE", error))?;
        Ok(Self(Arc::new(shared)))
    }

    /// The name of the interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.0.name
    }

    /// What a lane has done, all in all: it may be opened several times.
    #[must_use]
    pub fn counters(&self, lane: u16) -> Option<Arc<LinkCounters>> {
        let queue = self.0.queues.get(usize::from(lane))?;
        Some(queue.counters.clone())
    }
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> LinkError {
    move |source| LinkError::Host { what, source }
}

impl Link for Tap {
    fn shape(&self) -> LinkShape {
        let mut cheap = Offloads::all();
        cheap.set(Offloads::USO4 | Offloads::USO6, self.0.uso);
        LinkShape {
            mtu: self.0.mtu,
            lanes: self.0.queues.len() as u16,
            cheap,
            speed_mbps: None,
        }
    }

    fn is_up(&self) -> bool {
        self.0.is_up()
    }

    fn connect(&self, events: Arc<dyn LinkEvents>) {
        self.0.state.connect(events);
    }

    fn lane(&self, index: u16) -> Result<Box<dyn LinkLane>, LinkError> {
        let queues = &self.0.queues;
        let queue = queues.get(usize::from(index)).ok_or(LinkError::NoLane {
            index,
            lanes: queues.len() as u16,
        })?;
        if queue.open.swap(true, Ordering::AcqRel) {
            return Err(lane_is_open());
        }
        Ok(Box::new(TapLane::new(self.0.clone(), usize::from(index))))
    }

    fn set_receive(&self, offloads: Offloads) -> Result<(), LinkError> {
        let mut settings = lock(&self.0.settings);
        if !self.0.is_gone() {
            let set = self.0.set_offload(offloads);
            set.map_err(refused("TUNSETOFFLOAD"))?;
        }
        settings.receive = offloads;
        self.0.takes.store(offloads.bits(), Ordering::Relaxed);
        Ok(())
    }

    fn use_lanes(&self, count: u16) -> Result<(), LinkError> {
        let lanes = self.0.queues.len() as u16;
        if count > lanes {
            return Err(LinkError::NoLane {
                index: count - 1,
                lanes,
            });
        }
        let count = count.max(1);
        let mut settings = lock(&self.0.settings);
        if !self.0.is_gone() {
            let set = self.0.set_queues(settings.lanes, count);
            set.map_err(refused("TUNSETQUEUE"))?;
        }
        settings.lanes = count;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
