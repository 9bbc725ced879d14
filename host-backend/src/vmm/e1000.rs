//! Network cards of old in a machine.
#![forbid(unsafe_code)]

use super::error::host;
use super::{LogFailure, Vm, VmError, set_interrupt_line};
use crate::emulated::e1000::{E1000, E1000Counters, E1000Options};
use crate::executor::{Executor, ThreadOptions, Threads};
use crate::link::Link;
use crate::pci::{assign_memory, assign_ports};
use pvkit_protocol::pci::Bdf;
use std::sync::{Arc, Mutex};

impl Vm {
    /// Adds an 82540EM that is plugged into `link`, in the next free slot of
    /// the PCI bus, and does what firmware would: its registers have addresses
    /// and ports and decode them, and its pin's interrupt line is in
    /// configuration space. Its data plane runs on a thread.
    ///
    /// # Errors
    /// [`VmError`] if there are too many devices, or the link, KVM or the host
    /// refuses.
    pub fn add_e1000(
        &mut self,
        link: Arc<dyn Link>,
        options: &E1000Options,
        threads: ThreadOptions,
    ) -> Result<(Bdf, Arc<E1000Counters>), VmError> {
        let root = self.pci()?;
        let place = self.free_slot()?;
        let mut card = E1000::new(self.memory.clone(), link, options)?;
        let counters = card.counters();
        let worker = card.worker();
        assign_memory(&mut card, &mut self.pci_memory)?;
        assign_ports(&mut card, &mut self.pci_ports)?;
        set_interrupt_line(place, &mut card);
        root.attach(place, Arc::new(Mutex::new(card)))?;
        let mut executor = Threads::new(&format!("pvkit-e1000-{}", place.slot), threads);
        self.threads.lanes.push(executor.running());
        if let Some(worker) = worker {
            executor
                .start(0, Box::new(worker), Arc::new(LogFailure("e1000")))
                .map_err(host("a thread for the network"))?;
        }
        self.executors.push(executor);
        self.pci_slot += 1;
        Ok((place, counters))
    }
}
