//! An IDE controller on a PCI bus, ready for a driver.
#![forbid(unsafe_code)]

use crate::arena::Arena;
use crate::pci::{bus, config_ports};
use crate::port::PortWire;
use pvkit_guest::emulated::ata::{Channel, find_controller};
use pvkit_guest::pci::{PciConfig, PortPool};
use pvkit_host::emulated::ata::{AtaCounters, DriveOptions, Ide, IdeWorker, Which, legacy_ports};
use pvkit_host::pci::{IntxLines, PciRoot};
use pvkit_host::worker::{Progress, SignalCounter, Worker};
use std::sync::{Arc, Mutex, PoisonError};

/// Ports for functions that firmware would have assigned.
pub const FREE_PORTS: PortPool = crate::unchecked::port_pool(0xc000, 0xcfff);

/// Pin interrupts end nowhere: no function here has a pin.
#[derive(Debug)]
struct NoLines;

impl IntxLines for NoLines {
    fn set_line(&self, _line: u8, _asserted: bool) {}
}

/// A machine with an IDE controller.
#[derive(Debug)]
pub struct IdeJoin {
    /// The guest's memory.
    pub arena: Arena,
    /// Its ports.
    pub wire: PortWire,
    /// Its PCI bus.
    pub root: Arc<PciRoot>,
    /// The controller.
    pub ide: Arc<Mutex<Ide>>,
    /// What finishes requests that the disks could not serve at once.
    pub worker: IdeWorker,
    /// Interrupts of each channel.
    pub interrupts: [Arc<SignalCounter>; 2],
}

impl IdeJoin {
    /// A machine with a drive on each channel for which there is one, and
    /// `bytes` of memory.
    ///
    /// # Panics
    /// If the drives cannot be, or the host has no memory: this is for tests.
    #[must_use]
    pub fn new(drives: [Option<DriveOptions>; 2], bytes: usize) -> Self {
        let arena = Arena::new(bytes);
        let interrupts: [Arc<SignalCounter>; 2] = Default::default();
        let [irq14, irq15] = interrupts.clone();
        let memory = arena.guest_memory().clone();
        let ide = Ide::new(memory, drives, [irq14, irq15]).expect("drives");
        let root = bus(Arc::new(NoLines), Ide::PLACE, ide.clone());
        let mut devices = legacy_ports(&ide);
        devices.push(config_ports(&root));
        Self {
            worker: IdeWorker::new(ide.clone()).expect("file descriptors"),
            wire: PortWire::new(devices, root.clone()),
            arena,
            root,
            ide,
            interrupts,
        }
    }

    /// Configuration space, as a driver sees it.
    #[must_use]
    pub fn pci(&self) -> PciConfig<PortWire> {
        PciConfig::new(self.wire.clone())
    }

    /// The channels, found as a driver finds them.
    ///
    /// # Panics
    /// If they are not found.
    #[must_use]
    pub fn channels(&self) -> [Channel; 2] {
        find_controller(&self.pci(), &mut { FREE_PORTS })
            .expect("a usable controller")
            .expect("a controller")
    }

    /// What a channel has done.
    #[must_use]
    pub fn counters(&self, which: Which) -> Arc<AtaCounters> {
        self.ide
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .counters(which)
    }

    /// Lets the worker do what it has to do now; returns how often it found
    /// something.
    pub fn run(&mut self) -> usize {
        let mut busy = 0;
        while self.worker.poll(u32::MAX) == Progress::More {
            busy += 1;
        }
        busy
    }
}
