//! An e1000 on a PCI bus, ready for a driver.
#![forbid(unsafe_code)]

use crate::arena::Arena;
use crate::pci::{AnyWire, BarWindow, FREE_MEMORY, Interrupts, Nothing, bus, config_ports};
use crate::port::PortWire;
use crate::stepped::{Steps, stepped};
use crate::wire::Wire;
use pvkit_guest::emulated::e1000::{attach, find};
use pvkit_guest::pci::{MemoryBar, PciConfig};
use pvkit_host::emulated::e1000::{E1000, E1000Counters, E1000Options};
use pvkit_host::executor::Executor;
use pvkit_host::link::Link;
use pvkit_host::pci::PciRoot;
use pvkit_host::worker::{Failure, LaneEvents};
use pvkit_protocol::emulated::e1000::register;
use pvkit_protocol::frame::MacAddress;
use pvkit_protocol::pci::Bdf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where the card stands.
pub const PLACE: Bdf = Bdf::new(3, 0);

/// A card tells its driver by registers what there is to tell.
#[derive(Debug)]
struct NoEvents;

impl LaneEvents for NoEvents {
    fn failed(&self, lane: u16, why: &Failure) {
        panic!("lane {lane} of a card has no rings that could break: {why}");
    }
}

/// A machine with an e1000 on its PCI bus. No firmware has run: no base address
/// register has an address.
#[derive(Debug)]
pub struct E1000Join {
    /// The guest's memory.
    pub arena: Arena,
    /// The card.
    pub card: Arc<Mutex<E1000>>,
    /// Its bus.
    pub root: Arc<PciRoot>,
    /// The ports of configuration space, and the card's own.
    pub ports: PortWire,
    /// Where its interrupts end: the pin.
    pub interrupts: Arc<Interrupts>,
    /// Counts accesses to its registers. Writes of TDT, which send, are
    /// [`kicks`](Wire::kicks).
    pub wire: AnyWire,
    /// What the card has done.
    pub counters: Arc<E1000Counters>,
}

impl E1000Join {
    /// A card at the end of `link`, driven by `executor`, and a guest with
    /// `bytes` of memory.
    ///
    /// # Panics
    /// If the link has no free lane, or the host has no memory: this is for
    /// tests.
    #[must_use]
    pub fn new(
        link: Arc<dyn Link>,
        mac: MacAddress,
        executor: Box<dyn Executor>,
        bytes: usize,
    ) -> Self {
        Self::over(Arena::new(bytes), link, mac, executor)
    }

    /// The same in the guest that `arena` is the memory of.
    ///
    /// # Panics
    /// See [`new`](Self::new).
    #[must_use]
    pub fn over(
        arena: Arena,
        link: Arc<dyn Link>,
        mac: MacAddress,
        mut executor: Box<dyn Executor>,
    ) -> Self {
        let interrupts = Arc::new(Interrupts::default());
        let memory = arena.guest_memory().clone();
        let mut card = E1000::new(memory, link, &E1000Options::new(mac)).expect("a card");
        let counters = card.counters();
        let worker = card.worker().expect("its worker");
        executor
            .start(0, Box::new(worker), Arc::new(NoEvents))
            .expect("a place for the worker");
        let card = Arc::new(Mutex::new(card));
        let root = bus(interrupts.clone(), PLACE, card.clone());
        Self {
            ports: PortWire::new(vec![config_ports(&root)], root.clone()),
            wire: Wire::new(Box::new(Nothing)),
            arena,
            card,
            root,
            interrupts,
            counters,
        }
    }

    /// The same as [`new`](Self::new), driven by hand.
    #[must_use]
    pub fn stepped(link: Arc<dyn Link>, mac: MacAddress, bytes: usize) -> (Self, Steps) {
        let (executor, steps) = stepped();
        (Self::new(link, mac, Box::new(executor), bytes), steps)
    }

    /// The card, for anything that a driver would not do.
    pub fn card(&self) -> MutexGuard<'_, E1000> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Configuration space, as a driver sees it.
    #[must_use]
    pub fn config(&self) -> PciConfig<PortWire> {
        PciConfig::new(self.ports.clone())
    }

    /// What a base address register decodes.
    #[must_use]
    pub fn window(&self, bar: MemoryBar) -> BarWindow {
        let tail = register::TDT as usize;
        BarWindow::new(self.root.clone(), bar, tail..tail + 4)
    }

    /// The registers, as a driver finds them.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn registers(&self) -> AnyWire {
        self.attach(|bar| self.wire.beside(Box::new(self.window(bar))))
    }

    /// The same, reached through what `map` makes.
    ///
    /// # Panics
    /// If a driver does not find them.
    #[must_use]
    pub fn attach<R>(&self, map: impl FnOnce(MemoryBar) -> R) -> R {
        let config = self.config();
        let function = find(&config).expect("a card");
        let registers = attach(&config, &function, &mut { FREE_MEMORY }, |bar| {
            Some(map(bar))
        });
        registers.expect("a card that can be used")
    }
}
