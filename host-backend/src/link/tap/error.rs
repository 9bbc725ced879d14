//! Why a tap cannot be used, and the way out.
#![forbid(unsafe_code)]

use std::io;
use thiserror::Error;

/// Why a tap cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TapError {
    /// The kernel has no driver for taps, or it is not to be seen here.
    #[error("/dev/net/tun: {0} (try `modprobe tun`; in a container, pass the device in)")]
    NoDriver(#[source] io::Error),
    /// This user may not use the driver.
    #[error("/dev/net/tun: {0}: this user may not open it (where all may, its mode is 0666)")]
    DriverClosed(#[source] io::Error),
    /// A name that no interface can have.
    #[error("{name:?} is no name of an interface: it takes 1 to {max} characters, no / or space")]
    BadName {
        /// The name.
        name: String,
        /// Most characters of a name.
        max: usize,
    },
    /// The host does not allow it.
    #[error(
        "{name}: not permitted: it takes CAP_NET_ADMIN, or an interface that \
         was made for this user by `ip tuntap add {name} mode tap user NAME`"
    )]
    NotPermitted {
        /// The interface.
        name: String,
    },
    /// Somebody else has it.
    #[error("{name} is taken by another process")]
    Taken {
        /// The interface.
        name: String,
    },
    /// There is such an interface, of another kind.
    #[error(
        "{name} exists and is no tap, or not one for {lanes} queues (more than one takes \
         `multi_queue` when it is made): see `ip -details link show {name}`"
    )]
    OtherKind {
        /// The interface.
        name: String,
        /// The queues that were asked for.
        lanes: u16,
    },
    /// The descriptor is not of a tap as it has to be.
    #[error(
        "the descriptor for {name} is no queue of a tap with IFF_NO_PI and IFF_VNET_HDR \
         of that name"
    )]
    NotATap {
        /// The name it should have.
        name: String,
    },
    /// The host refuses something else.
    #[error("{name}: {what}: {source}")]
    Host {
        /// The interface.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

impl TapError {
    /// What it means that the driver cannot be opened.
    pub(super) fn driver(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::DriverClosed(source),
            _ => Self::NoDriver(source),
        }
    }

    /// What it means that an interface cannot be attached to.
    pub(super) fn attach(name: &str, lanes: u16, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted { name },
            Some(libc::EBUSY | libc::E2BIG) => Self::Taken { name },
            Some(libc::EINVAL) => Self::OtherKind { name, lanes },
            _ => Self::host(&name, "attaching to it", source),
        }
    }

    pub(super) fn host(name: &str, what: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Host {
            name: name.to_owned(),
            what,
            source: source.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_becomes_what_to_do() {
        let attach = |errno| TapError::attach("tap7", 2, io::Error::from_raw_os_error(errno));
        for (errno, hint) in [
            (libc::EPERM, "ip tuntap add tap7 mode tap user"),
            (libc::EBUSY, "tap7 is taken by another process"),
            (libc::EINVAL, "not one for 2 queues"),
            (
                libc::ENOMEM,
                "tap7: attaching to it: Cannot allocate memory",
            ),
        ] {
            let text = attach(errno).to_string();
            assert!(text.contains(hint), "{text}");
        }
        for (errno, hint) in [
            (libc::ENOENT, "modprobe tun"),
            (libc::ENODEV, "modprobe tun"),
            (libc::EACCES, "this user may not open it"),
        ] {
            let text = TapError::driver(io::Error::from_raw_os_error(errno)).to_string();
            assert!(text.contains(hint), "{text}");
        }
    }
}
