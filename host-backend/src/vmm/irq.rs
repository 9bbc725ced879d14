//! Interrupt lines and doorbells, as KVM takes them.

use super::{VmError, call, host};
use crate::event::EventFd;
use crate::pci::IntxLines;
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

/// The four lines of PCI's pin interrupts, which are levels.
#[derive(Debug)]
pub(super) struct PciLines {
    fd: Arc<VmFd>,
    gsis: [u32; 4],
}

impl PciLines {
    pub(super) fn new(fd: Arc<VmFd>, gsis: [u32; 4]) -> Self {
        Self { fd, gsis }
    }
}

impl IntxLines for PciLines {
    fn set_line(&self, line: u8, asserted: bool) {
        let Some(gsi) = self.gsis.get(usize::from(line)) else {
            return;
        };
        if let Err(error) = self.fd.set_irq_line(*gsi, asserted) {
            log::error!("KVM: interrupt line {gsi}: {error}");
        }
    }
}

/// The same event counter, as the KVM crate wants it.
pub(super) fn kvm_event(event: &EventFd) -> io::Result<vmm_sys_util::eventfd::EventFd> {
    let fd = event.as_fd().try_clone_to_owned()?.into_raw_fd();
    // SAFETY: a fresh duplicate of an eventfd that nobody else owns.
    Ok(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd) })
}
