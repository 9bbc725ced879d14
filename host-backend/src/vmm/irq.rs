//! Interrupt lines and doorbells, as KVM takes them.

use super::{VmError, call, host};
use crate::event::EventFd;
use crate::worker::Signal;
use kvm_ioctls::VmFd;
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

/// Makes interrupt lines of one machine.
#[derive(Debug)]
pub(super) struct Lines {
    fd: Arc<VmFd>,
}

impl Lines {
    pub(super) fn new(fd: Arc<VmFd>) -> Self {
        Self { fd }
    }

    /// A line to a pin of the I/O APIC that is triggered by edges: signalling
    /// is one write to an event counter, which KVM takes in the kernel.
    pub(super) fn edge(&self, gsi: u32) -> Result<Arc<dyn Signal>, VmError> {
        let event = EventFd::new().map_err(host("an event counter"))?;
        let kvm = kvm_event(&event).map_err(host("an event counter"))?;
        self.fd
            .register_irqfd(&kvm, gsi)
            .map_err(call("register an interrupt"))?;
        Ok(Arc::new(event))
    }
}

/// The same event counter, as the KVM crate wants it.
pub(super) fn kvm_event(event: &EventFd) -> io::Result<vmm_sys_util::eventfd::EventFd> {
    let fd = event.as_fd().try_clone_to_owned()?.into_raw_fd();
    // SAFETY: a fresh duplicate of an eventfd that nobody else owns.
    Ok(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd) })
}
