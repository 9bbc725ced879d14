//! What can go wrong with a machine, and what would help.
#![forbid(unsafe_code)]

use super::x86_64::LoadError;
use crate::emulated::ata::IdeError;
use crate::emulated::e1000::E1000Error;
use crate::pci::{AttachError, NoRoom};
use crate::virtio::transport::PciError;
use std::io;
use thiserror::Error;

/// Why a virtual machine cannot be made or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VmError {
    /// KVM is not there, or not for this user.
    #[error("/dev/kvm: {source}{hint}")]
    Kvm {
        /// What the kernel says.
        source: io::Error,
        /// What could help.
        hint: &'static str,
    },
    /// KVM lacks something that cannot be done without.
    #[error("this KVM lacks {0}")]
    Capability(&'static str),
    /// A call to KVM failed.
    #[error("KVM: {what}: {source}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// The machine would have less memory than it needs, or more than fits.
    #[error(
        "{bytes} bytes of memory: give the machine between {least} and {most} bytes, \
         in whole pages of 4096 bytes (--memory 256MiB)"
    )]
    MemorySize {
        /// What was asked for.
        bytes: u64,
        /// The least that works.
        least: u64,
        /// The most that works.
        most: u64,
    },
    /// The host has no memory for the guest.
    #[error("no memory for a guest of {bytes} bytes: {reason}")]
    Memory {
        /// What was asked for.
        bytes: u64,
        /// What the host says.
        reason: String,
    },
    /// There are too many devices, or too many vCPUs.
    #[error("too many {what}: {most} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        most: usize,
    },
    /// The image cannot be started.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The host refuses a file descriptor, a thread or the like.
    #[error("the host refuses {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// The IDE controller cannot be made.
    #[error("IDE: {0}")]
    Ide(#[from] IdeError),
    /// The network card cannot be made.
    #[error("e1000: {0}")]
    E1000(#[from] E1000Error),
    /// A PCI function cannot be attached.
    #[error("PCI: {0}")]
    Pci(#[from] AttachError),
    /// A virtio device cannot be on PCI.
    #[error("virtio on PCI: {0}")]
    VirtioPci(#[from] PciError),
    /// There is no room for a function's registers.
    #[error("PCI: {0}")]
    NoRoom(#[from] NoRoom),
    /// [`Vm::run`](super::Vm::run) without [`Vm::load`](super::Vm::load).
    #[error("no image was loaded")]
    NotLoaded,
}

/// What a call to KVM tried, for its error.
pub(super) fn call(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |error| VmError::Call {
        what,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// What was asked of the host, for its error.
pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { what, source }
}
