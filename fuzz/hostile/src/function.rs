//! A function that lies: configuration space with whatever bytes a test likes,
//! and registers that fail the test if they are accessed where they are not.

use pvkit_guest::pci::{ConfigAccess, Function, Msix, MsixError, PciConfig};
use pvkit_guest::register::Registers;
use pvkit_guest::virtio::transport::{PciTransport, PciTransportError};
use pvkit_protocol::pci::{Bdf, Status, capability, header};
use pvkit_protocol::virtio::pci::{VENDOR, cfg_type};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where the function stands.
pub const PLACE: Bdf = Bdf::new(3, 0);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Configuration space as a device of ill will has it: bytes, which of their
/// bits can be written, and how often it was accessed.
#[derive(Debug, Clone)]
struct Space {
    bytes: [u8; 256],
    writable: [u8; 256],
    accesses: u32,
}

/// A function of ill will. It is told nothing that it has to keep.
#[derive(Debug, Clone)]
pub struct LyingFunction(Arc<Mutex<Space>>);

impl LyingFunction {
    /// A virtio block device with a window of 16 KiB in register 0, without
    /// capabilities.
    #[must_use]
    pub fn bare() -> Self {
        let liar = Self(Arc::new(Mutex::new(Space {
            bytes: [0; 256],
            writable: [0; 256],
            accesses: 0,
        })));
        liar.put(header::VENDOR, &VENDOR.to_le_bytes())
            .put(header::DEVICE, &0x1042u16.to_le_bytes())
            .put(header::STATUS, &Status::CAPABILITIES.bits().to_le_bytes())
            .allow(header::COMMAND, &[0xff, 0xff])
            .allow(header::BAR0, &[0, 0xc0, 0xff, 0xff]);
        liar
    }
    /// Puts bytes into configuration space.
    pub fn put(&self, at: u8, bytes: &[u8]) -> &Self {
        let at = usize::from(at);
        lock(&self.0).bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }
    /// Lets the driver write the bits of `mask`.
    pub fn allow(&self, at: u8, mask: &[u8]) -> &Self {
        let at = usize::from(at);
        lock(&self.0).writable[at..at + mask.len()].copy_from_slice(mask);
        self
    }
    /// A capability of virtio's at `at`, linked to `next`.
    pub fn structure(
        &self,
        at: u8,
        next: u8,
        type_: u8,
        bar: u8,
        offset: u32,
        length: u32,
    ) -> &Self {
        self.put(at, &[capability::VENDOR, next, 20, type_, bar, 0, 0, 0]);
        self.put(at + 8, &offset.to_le_bytes());
        self.put(at + 12, &length.to_le_bytes());
        self.put(at + 16, &4u32.to_le_bytes())
    }
    /// All four structures, as they should be.
    #[must_use]
    pub fn honest() -> Self {
        let liar = Self::bare();
        liar.put(header::CAPABILITIES, &[0x40])
            .structure(0x40, 0x54, cfg_type::COMMON, 0, 0, 60)
            .structure(0x54, 0x68, cfg_type::NOTIFY, 0, 0x3000, 4)
            .structure(0x68, 0x7c, cfg_type::ISR, 0, 0x1000, 1)
            .structure(0x7c, 0, cfg_type::DEVICE, 0, 0x2000, 64);
        liar
    }
    /// Configuration space, as a driver sees it.
    #[must_use]
    pub fn config(&self) -> PciConfig<Self> {
        PciConfig::new(self.clone())
    }
    /// The function, as a driver finds it.
    ///
    /// # Panics
    /// If the vendor says that there is none.
    #[must_use]
    pub fn function(&self) -> Function {
        self.config().function(PLACE).expect("a function")
    }
    /// The driver's transport, with registers that read as 0.
    ///
    /// # Errors
    /// What the driver says about the lies.
    pub fn transport(&self) -> Result<PciTransport<Wall>, PciTransportError> {
        let mut free = pvkit_join::pci::FREE_MEMORY;
        PciTransport::new(&self.config(), &self.function(), &mut free, |bar| {
            Some(Wall::new(bar.size as usize))
        })
    }
    /// The driver's vectors.
    ///
    /// # Errors
    /// What the driver says about the lies.
    pub fn msix(&self) -> Result<Msix<Wall>, MsixError> {
        let mut free = pvkit_join::pci::FREE_MEMORY;
        Msix::enable(&self.config(), PLACE, &mut free, |bar| {
            Some(Wall::new(bar.size as usize))
        })
    }
    /// How often configuration space was accessed, in bytes.
    #[must_use]
    pub fn accesses(&self) -> u32 {
        lock(&self.0).accesses
    }
}

impl ConfigAccess for LyingFunction {
    fn load_u8(&self, place: Bdf, offset: u8) -> u8 {
        let mut space = lock(&self.0);
        space.accesses += 1;
        if place == PLACE {
            space.bytes[usize::from(offset)]
        } else {
            0xff
        }
    }
    fn load_u16(&self, place: Bdf, offset: u8) -> u16 {
        assert_eq!(offset % 2, 0, "aligned");
        u16::from_le_bytes([0, 1].map(|i| self.load_u8(place, offset + i)))
    }
    fn load_u32(&self, place: Bdf, offset: u8) -> u32 {
        assert_eq!(offset % 4, 0, "aligned");
        u32::from_le_bytes([0, 1, 2, 3].map(|i| self.load_u8(place, offset + i)))
    }
    unsafe fn store_u8(&self, place: Bdf, offset: u8, value: u8) {
        let mut space = lock(&self.0);
        space.accesses += 1;
        let at = usize::from(offset);
        if place == PLACE {
            let mask = space.writable[at];
            space.bytes[at] = space.bytes[at] & !mask | value & mask;
        }
    }
    unsafe fn store_u16(&self, place: Bdf, offset: u8, value: u16) {
        assert_eq!(offset % 2, 0, "aligned");
        for (byte, at) in value.to_le_bytes().into_iter().zip(offset..) {
            // SAFETY: passed on.
            unsafe { self.store_u8(place, at, byte) };
        }
    }
    unsafe fn store_u32(&self, place: Bdf, offset: u8, value: u32) {
        assert_eq!(offset % 4, 0, "aligned");
        for (byte, at) in value.to_le_bytes().into_iter().zip(usize::from(offset)..) {
            // SAFETY: passed on.
            unsafe { self.store_u8(place, at as u8, byte) };
        }
    }
}

/// Registers that read as a test says, and fail it if they are accessed where
/// they are not.
#[derive(Debug, Clone)]
pub struct Wall {
    len: usize,
    /// What registers read as; others take the next bytes of
    /// [`noise`](Wall::noise), or are 0.
    pub values: Arc<Mutex<BTreeMap<usize, u32>>>,
    /// What registers read as that nobody has decided on, once.
    pub noise: Arc<Mutex<VecDeque<u8>>>,
    /// Every write: offset and value.
    pub written: Arc<Mutex<Vec<(usize, u32)>>>,
}

impl Wall {
    /// `len` bytes of registers.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self {
            len,
            values: Arc::default(),
            noise: Arc::default(),
            written: Arc::default(),
        }
    }
    fn check(&self, offset: usize, width: usize) {
        let end = offset.checked_add(width);
        assert!(end.is_some_and(|end| end <= self.len), "{offset:#x}");
        assert_eq!(offset % width, 0, "aligned");
    }
    fn read(&self, offset: usize, width: usize) -> u32 {
        self.check(offset, width);
        if let Some(value) = lock(&self.values).get(&offset) {
            return *value;
        }
        let mut noise = lock(&self.noise);
        let bytes = [0; 4].map(|zero: u8| noise.pop_front().unwrap_or(zero));
        u32::from_le_bytes(bytes)
    }
    fn write(&self, offset: usize, width: usize, value: u32) {
        self.check(offset, width);
        lock(&self.written).push((offset, value));
    }
}

// SAFETY: touches no memory of the program but its own lists.
unsafe impl Registers for Wall {
    fn len(&self) -> usize {
        self.len
    }
    fn read_u8(&self, offset: usize) -> u8 {
        self.read(offset, 1) as u8
    }
    fn read_u16(&self, offset: usize) -> u16 {
        self.read(offset, 2) as u16
    }
    fn read_u32(&self, offset: usize) -> u32 {
        self.read(offset, 4)
    }
    unsafe fn write_u8(&self, offset: usize, value: u8) {
        self.write(offset, 1, value.into());
    }
    unsafe fn write_u16(&self, offset: usize, value: u16) {
        // A doorbell that lies nowhere does nothing.
        if offset != usize::MAX {
            self.write(offset, 2, value.into());
        }
    }
    unsafe fn write_u32(&self, offset: usize, value: u32) {
        self.write(offset, 4, value);
    }
    unsafe fn alias(&self) -> Self {
        self.clone()
    }
}
