//! A machine with a virtio device on a PCI bus.
#![forbid(unsafe_code)]

use crate::port::PortWire;
use crate::unchecked::{memory_pool, message};
use crate::wire::{Window, Wire};
use pvkit_guest::pci::{Function, MemoryBar, MemoryPool, Msix, PciConfig};
use pvkit_guest::virtio::transport::PciTransport as GuestTransport;
use pvkit_host::bus::BusDevice;
use pvkit_host::emulated::ata::LegacyPorts;
use pvkit_host::executor::Executor;
use pvkit_host::memory::GuestMemory;
use pvkit_host::pci::{ConfigPorts, IntxLines, Message, Messages, PciFunction, PciRoot, bridge};
use pvkit_host::virtio::device::Device;
use pvkit_host::virtio::transport::{PciOptions, PciTransport as HostTransport};
use pvkit_host::worker::{Signal, SignalCounter};
use pvkit_protocol::pci::Bdf;
use pvkit_protocol::virtio::pci::VENDOR;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Addresses for windows that firmware would have assigned.
pub const FREE_MEMORY: MemoryPool = memory_pool(0xe000_0000, 0xefff_ffff);
/// Where the device stands.
pub const PLACE: Bdf = Bdf::new(4, 0);
/// The address that [`data`] is sent to.
pub const MESSAGE_ADDRESS: u64 = 0xfee0_0000;

/// What a vector sends in a join.
#[must_use]
pub fn data(vector: u16) -> u32 {
    0x40 + u32::from(vector)
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where messages and pin interrupts of a machine end, and are counted.
#[derive(Debug, Default)]
pub struct Interrupts {
    /// All of them: messages, and rising edges of pins.
    pub all: Arc<SignalCounter>,
    messages: Mutex<BTreeMap<Message, u64>>,
    lines: Mutex<[bool; 4]>,
}

impl Interrupts {
    /// How often a message was sent.
    #[must_use]
    pub fn messages(&self, address: u64, data: u32) -> u64 {
        let message = Message { address, data };
        lock(&self.messages).get(&message).copied().unwrap_or(0)
    }

    /// How often a vector of [`VirtioPci::transport`] interrupted.
    #[must_use]
    pub fn vector(&self, vector: u16) -> u64 {
        self.messages(MESSAGE_ADDRESS, data(vector))
    }

    /// Which of the four lines are asserted.
    #[must_use]
    pub fn lines(&self) -> [bool; 4] {
        *lock(&self.lines)
    }
}

impl Messages for Interrupts {
    fn route(&self, _vector: u16, _message: Option<Message>) {}

    fn send(&self, _vector: u16, message: Message) {
        *lock(&self.messages).entry(message).or_default() += 1;
        self.all.signal();
    }
}

impl IntxLines for Interrupts {
    fn set_line(&self, line: u8, asserted: bool) {
        if let Some(place) = lock(&self.lines).get_mut(usize::from(line)) {
            *place = asserted;
        }
        if asserted {
            self.all.signal();
        }
    }
}

/// What a base address register decodes, at the address where it did.
#[derive(Debug)]
pub struct BarWindow {
    root: Arc<PciRoot>,
    bar: MemoryBar,
    doorbells: Range<usize>,
}

impl BarWindow {
    /// What a register of a function on `root` decodes; writes to `doorbells`
    /// count as such.
    #[must_use]
    pub fn new(root: Arc<PciRoot>, bar: MemoryBar, doorbells: Range<usize>) -> Self {
        Self {
            root,
            bar,
            doorbells,
        }
    }
}

impl BusDevice for BarWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.root
            .mmio_read(self.bar.base.wrapping_add(offset), data);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.root
            .mmio_write(self.bar.base.wrapping_add(offset), data);
    }
}

impl Window for BarWindow {
    fn window_bytes(&self) -> usize {
        self.bar.size as usize
    }
    fn is_doorbell(&self, offset: usize) -> bool {
        self.doorbells.contains(&offset)
    }
}

/// A window of either transport.
pub type AnyWire = Wire<Box<dyn Window>>;

/// A window onto nothing, for wires to hang on.
#[derive(Debug)]
pub(crate) struct Nothing;

impl BusDevice for Nothing {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&mut self, _offset: u64, _data: &[u8]) {}
}

impl Window for Nothing {
    fn window_bytes(&self) -> usize {
        0
    }
}

/// A bus with a host bridge, and a function at `place`.
pub(crate) fn bus(
    lines: Arc<dyn IntxLines>,
    place: Bdf,
    function: Arc<Mutex<dyn PciFunction>>,
) -> Arc<PciRoot> {
    let root = Arc::new(PciRoot::new(lines));
    bridge::attach(&root).expect("free places");
    root.attach(place, function).expect("a free place");
    root
}

/// The ports of configuration space.
pub(crate) fn config_ports(root: &Arc<PciRoot>) -> LegacyPorts {
    LegacyPorts {
        base: ConfigPorts::BASE,
        count: ConfigPorts::COUNT,
        device: Box::new(ConfigPorts::new(root.clone())),
    }
}

/// A machine with one virtio device on its PCI bus. No firmware has run: no
/// base address register has an address.
#[derive(Debug, Clone)]
pub struct VirtioPci {
    /// The device.
    pub function: Arc<Mutex<HostTransport>>,
    /// Its bus.
    pub root: Arc<PciRoot>,
    /// The ports of configuration space.
    pub ports: PortWire,
    /// Where its interrupts end.
    pub interrupts: Arc<Interrupts>,
    /// Counts accesses to all its windows.
    pub wire: AnyWire,
}

impl VirtioPci {
    /// A machine with `device`, driven by `executor`.
    ///
    /// # Panics
    /// If there cannot be such a function: this is for tests.
    #[must_use]
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        executor: Box<dyn Executor>,
        options: PciOptions,
    ) -> Self {
        let interrupts = Arc::new(Interrupts::default());
        let function = HostTransport::new(device, memory, executor, interrupts.clone(), options);
        let function = Arc::new(Mutex::new(function.expect("a function")));
        let root = bus(interrupts.clone(), PLACE, function.clone());
        Self {
            ports: PortWire::new(vec![config_ports(&root)], root.clone()),
            function,
            root,
            interrupts,
            wire: Wire::new(Box::new(Nothing)),
        }
    }

    /// The device, for anything that a driver would not do.
    pub fn device(&self) -> MutexGuard<'_, HostTransport> {
        lock(&self.function)
    }

    /// Configuration space, as a driver sees it.
    #[must_use]
    pub fn config(&self) -> PciConfig<PortWire> {
        PciConfig::new(self.ports.clone())
    }

    /// The function, as a driver finds it.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn found(&self) -> Function {
        let config = self.config();
        let mut functions = config.functions();
        functions
            .find(|function| function.vendor == VENDOR)
            .expect("a virtio device")
    }

    /// Makes what a base address register decodes reachable.
    #[must_use]
    pub fn map(&self, bar: MemoryBar) -> AnyWire {
        // The registers are the device's only window of 64 bits.
        let doorbells = if bar.is_64_bit {
            0x3000..0x1_0000
        } else {
            0..0
        };
        let window = BarWindow::new(self.root.clone(), bar, doorbells);
        self.wire.beside(Box::new(window))
    }

    /// Addresses that are left for windows.
    #[must_use]
    pub fn free(&self) -> MemoryPool {
        FREE_MEMORY
    }

    /// The driver's view of the device, which interrupts by its pin, or is
    /// polled.
    ///
    /// # Panics
    /// If the device is not what it should be.
    #[must_use]
    pub fn transport(&self, free: &mut MemoryPool) -> GuestTransport<AnyWire> {
        GuestTransport::new(&self.config(), &self.found(), free, |bar| {
            Some(self.map(bar))
        })
        .expect("a virtio device")
    }

    /// The device's vectors, each sending [`data`] to [`MESSAGE_ADDRESS`].
    ///
    /// # Panics
    /// If it has none.
    #[must_use]
    pub fn msix(&self, free: &mut MemoryPool) -> Msix<AnyWire> {
        let place = self.found().place;
        let msix = Msix::enable(&self.config(), place, free, |bar| Some(self.map(bar)));
        let mut msix = msix.expect("vectors");
        for vector in 0..msix.vectors() {
            msix.set(vector, message(MESSAGE_ADDRESS, data(vector)))
                .expect("a vector");
        }
        msix
    }
}
