//! Why a stream cannot be made, and the way out.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why a stream cannot be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// A socket's path has to be short (`unix(7)`).
    #[error("{path}: a socket's path has at most {max} bytes, and this {bytes}")]
    LongPath {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
        /// The longest.
        max: usize,
    },
    /// There is no socket, or nobody at the other end of it.
    #[error("{path}: nobody listens there ({source}): start the other end first")]
    Nobody {
        /// The path.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// There is something else than a socket.
    #[error("{path} exists, and is no socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else listens there.
    #[error("{path}: another process listens there")]
    Taken {
        /// The path.
        path: PathBuf,
    },
    /// The host refuses something else.
    #[error("{path}: {source}")]
    Host {
        /// The path.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}
