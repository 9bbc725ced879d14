//! A Unix stream socket, as QEMU's `-netdev stream,addr.type=unix` speaks it,
//! and the older `-netdev socket`: each frame behind its length in 32 bits,
//! most significant byte first, and nothing that accompanies it. So all
//! offloads are done in software.
//!
//! A connection that ends takes the link down. A stream that connects tries
//! again each second; one that listens takes the next that comes. Only a lane
//! that is open does so: without one, nobody looks at the socket.
#![forbid(unsafe_code)]

mod buffer;
mod error;
mod lane;

pub use error::StreamError;

use super::state::{UpState, lane_is_open};
use super::{Link, LinkCounters, LinkError, LinkEvents, LinkLane, LinkShape};
use crate::sync::lock;
use lane::{StreamLane, Work};
use pvkit_protocol::frame::{DEFAULT_MTU, Offloads};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Longest path of a socket, without the zero that ends it (`unix(7)`).
const MAX_PATH_BYTES: usize = 107;

/// How a stream is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamOptions {
    /// Largest payload of a frame, in bytes.
    pub mtu: u16,
    /// Bytes that wait to be written, at most. A frame that needs more, cut
    /// into its segments, is dropped.
    pub send_bytes: usize,
    /// Somebody must listen when a stream that connects is made. Without this
    /// it may be down at first.
    pub must_connect: bool,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            mtu: DEFAULT_MTU,
            send_bytes: 1 << 20,
            must_connect: true,
        }
    }
}

/// Where connections come from.
#[derive(Debug)]
enum Origin {
    Connect(PathBuf),
    Listen(Listener),
    /// One was handed in, and there will be no other.
    Given,
}

#[derive(Debug)]
struct Listener {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode of the socket's name.
    file: Option<(u64, u64)>,
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody else may have made another socket of that name.
        if self.file.is_some() && identity(&self.path) == self.file {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[derive(Debug)]
struct Shared {
    options: StreamOptions,
    origin: Origin,
    state: UpState,
    counters: Arc<LinkCounters>,
    /// The connection and what is on its way, while no lane has it.
    parked: Mutex<Option<Box<Work>>>,
}

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        FLAGS,
        None,
    )?)
}

fn dial(path: &Path) -> io::Result<OwnedFd> {
    let fd = socket()?;
    // On a Unix socket this ends at once, one way or the other.
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}

fn check_path(path: &Path) -> Result<(), StreamError> {
    let bytes = path.as_os_str().as_bytes().len();
    if bytes > MAX_PATH_BYTES {
        return Err(StreamError::LongPath {
            path: path.to_owned(),
            bytes,
            max: MAX_PATH_BYTES,
        });
    }
    Ok(())
}

/// Why nothing could be connected to.
fn refused(path: &Path, source: io::Error) -> StreamError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => StreamError::Nobody { path, source },
        io::ErrorKind::ConnectionRefused => {
            let file = fs::metadata(&path);
            if file.is_ok_and(|file| !file.file_type().is_socket()) {
                StreamError::NotASocket { path }
            } else {
                StreamError::Nobody { path, source }
            }
        }
        _ => StreamError::Host { path, source },
    }
}

/// A link over a Unix stream socket.
#[derive(Debug)]
pub struct Stream(Arc<Shared>);

impl Stream {
    /// Connects to the socket at `path`, and again when the connection ends.
    ///
    /// # Errors
    /// [`StreamError`] says what is in the way.
    pub fn connect(path: &Path, options: &StreamOptions) -> Result<Self, StreamError> {
        check_path(path)?;
        let connection = match dial(path) {
            Ok(fd) => Some(fd),
            Err(error) => {
                let error = refused(path, error);
                if options.must_connect || !matches!(error, StreamError::Nobody { .. }) {
                    return Err(error);
                }
                None
            }
        };
        let origin = Origin::Connect(path.to_owned());
        Ok(Self::new(origin, connection, options))
    }

    /// Listens at `path`, for one connection at a time. A socket that nobody
    /// listens at any more is replaced; the socket is removed at the end.
    ///
    /// # Errors
    /// [`StreamError`] says what is in the way.
    pub fn listen(path: &Path, options: &StreamOptions) -> Result<Self, StreamError> {
        check_path(path)?;
        let host = |source: io::Error| StreamError::Host {
            path: path.to_owned(),
            source,
        };
        let fd = socket().map_err(host)?;
        let address = SocketAddrUnix::new(path).map_err(|error| host(error.into()))?;
        match rustix::net::bind(&fd, &address) {
            Err(Errno::ADDRINUSE) => {
                Self::remove_stale(path)?;
                rustix::net::bind(&fd, &address)
            }
            bound => bound,
        }
        .and_then(|()| rustix::net::listen(&fd, 1))
        .map_err(|error| host(error.into()))?;
        let listener = Listener {
            fd,
            path: path.to_owned(),
            file: identity(path),
        };
        Ok(Self::new(Origin::Listen(listener), None, options))
    }

    fn remove_stale(path: &Path) -> Result<(), StreamError> {
        let taken = || StreamError::Taken {
            path: path.to_owned(),
        };
        match dial(path).map_err(|error| refused(path, error)) {
            Ok(_) => Err(taken()),
            Err(StreamError::Nobody { .. }) => {
                fs::remove_file(path).map_err(|source| StreamError::Host {
                    path: path.to_owned(),
                    source,
                })
            }
            // Too many wait there already.
            Err(StreamError::Host { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                Err(taken())
            }
            Err(error) => Err(error),
        }
    }

    /// Uses a connection that is there already. When it ends, the link is down
    /// for good.
    ///
    /// # Errors
    /// What the host says to making it non-blocking.
    pub fn from_fd(fd: OwnedFd, options: &StreamOptions) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
        rustix::fs::fcntl_setfl(fd.as_fd(), flags | OFlags::NONBLOCK)?;
        Ok(Self::new(Origin::Given, Some(fd), options))
    }

    fn new(origin: Origin, connection: Option<OwnedFd>, options: &StreamOptions) -> Self {
        Self(Arc::new(Shared {
            options: options.clone(),
            origin,
            state: UpState::new(connection.is_some()),
            counters: Arc::default(),
            parked: Mutex::new(Some(Box::new(Work::new(connection, options.send_bytes)))),
        }))
    }

    /// What its lane has done, all in all: it may be opened several times.
    #[must_use]
    pub fn counters(&self) -> Arc<LinkCounters> {
        self.0.counters.clone()
    }
}

impl Link for Stream {
    fn shape(&self) -> LinkShape {
        LinkShape {
            mtu: self.0.options.mtu,
            lanes: 1,
            cheap: Offloads::empty(),
            speed_mbps: None,
        }
    }

    fn is_up(&self) -> bool {
        self.0.state.is_up()
    }

    fn connect(&self, events: Arc<dyn LinkEvents>) {
        self.0.state.connect(events);
    }

    fn lane(&self, index: u16) -> Result<Box<dyn LinkLane>, LinkError> {
        if index != 0 {
            return Err(LinkError::NoLane { index, lanes: 1 });
        }
        let work = lock(&self.0.parked).take().ok_or_else(lane_is_open)?;
        Ok(Box::new(StreamLane::new(self.0.clone(), work)))
    }

    fn set_receive(&self, _: Offloads) -> Result<(), LinkError> {
        // Nothing is ever left to do in a frame that comes in.
        Ok(())
    }

    fn use_lanes(&self, count: u16) -> Result<(), LinkError> {
        match count {
            0 | 1 => Ok(()),
            more => Err(LinkError::NoLane {
                index: more - 1,
                lanes: 1,
            }),
        }
    }
}
