//! The wire between the driver's port accesses and the devices on a port bus.

use pvkit_guest::register::PortIo;
use pvkit_host::bus::BusDevice;
use pvkit_host::emulated::ata::LegacyPorts;
use pvkit_host::pci::PciRoot;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of string I/O that KVM hands over in one exit.
pub const STRING_BYTES: usize = 1024;

/// A port bus, as a driver sees it. Ports that nothing claims belong to the
/// PCI functions, and those that nothing decodes read as all ones.
#[derive(Clone)]
pub struct PortWire {
    bus: Arc<Bus>,
}

/// Ports that a device has claimed.
struct Claim {
    ports: Range<u16>,
    device: Mutex<Box<dyn BusDevice>>,
}

struct Bus {
    claims: Vec<Claim>,
    root: Arc<PciRoot>,
    accesses: Mutex<BTreeMap<Access, u64>>,
}

/// A port, and whether it was read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// A read of a port.
    Read(u16),
    /// A write of a port.
    Write(u16),
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for PortWire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortWire")
            .field("accesses", &self.accesses())
            .finish_non_exhaustive()
    }
}

impl PortWire {
    /// A bus with `devices` in front of the functions of `root`.
    #[must_use]
    pub fn new(devices: Vec<LegacyPorts>, root: Arc<PciRoot>) -> Self {
        let claims = devices
            .into_iter()
            .map(|claim| Claim {
                ports: claim.base..claim.base + claim.count,
                device: Mutex::new(claim.device),
            })
            .collect();
        Self {
            bus: Arc::new(Bus {
                claims,
                root,
                accesses: Mutex::default(),
            }),
        }
    }

    /// What passed the wire since the last call. In a virtual machine, each
    /// access leaves the guest, and a string one for each [`STRING_BYTES`].
    #[must_use]
    pub fn take_accesses(&self) -> BTreeMap<Access, u64> {
        std::mem::take(&mut *lock(&self.bus.accesses))
    }

    /// What passed the wire since accesses were last taken.
    #[must_use]
    pub fn all_accesses(&self) -> BTreeMap<Access, u64> {
        lock(&self.bus.accesses).clone()
    }

    /// How many accesses there were since they were last taken.
    #[must_use]
    pub fn accesses(&self) -> u64 {
        lock(&self.bus.accesses).values().sum()
    }

    fn count(&self, access: Access) {
        *lock(&self.bus.accesses).entry(access).or_default() += 1;
    }

    /// Calls `access` with the device at a port, and with the port's offset.
    fn device<R>(&self, port: u16, access: impl FnOnce(&mut dyn BusDevice, u64) -> R) -> Option<R> {
        let mut claims = self.bus.claims.iter();
        let claim = claims.find(|claim| claim.ports.contains(&port))?;
        let offset = u64::from(port - claim.ports.start);
        Some(access(&mut **lock(&claim.device), offset))
    }

    /// A read of any width.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        self.count(Access::Read(port));
        data.fill(0xff);
        let found = self.device(port, |device, offset| device.read(offset, data));
        if found.is_none() {
            self.bus.root.io_read(port, data);
        }
    }

    /// A write of any width.
    pub fn write(&self, port: u16, data: &[u8]) {
        self.count(Access::Write(port));
        let found = self.device(port, |device, offset| device.write(offset, data));
        if found.is_none() {
            self.bus.root.io_write(port, data);
        }
    }

    /// A string read, in the portions that KVM makes of it.
    pub fn read_string(&self, port: u16, width: usize, data: &mut [u8]) {
        data.fill(0xff);
        for data in data.chunks_mut(STRING_BYTES) {
            self.count(Access::Read(port));
            let found = self.device(port, |device, offset| {
                device.read_string(offset, width, data);
            });
            if found.is_none() {
                self.bus.root.io_read_string(port, width, data);
            }
        }
    }

    /// A string write, in the portions that KVM makes of it.
    pub fn write_string(&self, port: u16, width: usize, data: &[u8]) {
        for data in data.chunks(STRING_BYTES) {
            self.count(Access::Write(port));
            let found = self.device(port, |device, offset| {
                device.write_string(offset, width, data);
            });
            if found.is_none() {
                self.bus.root.io_write_string(port, width, data);
            }
        }
    }

    /// Writes 8 bits, as nobody but a test would: the devices reach the
    /// memory of the test only.
    pub fn write_u8(&self, port: u16, value: u8) {
        self.write(port, &value.to_le_bytes());
    }
    /// Writes 16 bits, as nobody but a test would: the devices reach the
    /// memory of the test only.
    pub fn write_u16(&self, port: u16, value: u16) {
        self.write(port, &value.to_le_bytes());
    }
    /// Writes 32 bits, as nobody but a test would: the devices reach the
    /// memory of the test only.
    pub fn write_u32(&self, port: u16, value: u32) {
        self.write(port, &value.to_le_bytes());
    }
}

// SAFETY: each call is the accesses that its name says, one after the other;
// the locks of bus and devices order them with everything before.
unsafe impl PortIo for PortWire {
    fn read_u8(&self, port: u16) -> u8 {
        let mut data = [0; 1];
        self.read(port, &mut data);
        u8::from_le_bytes(data)
    }
    fn read_u16(&self, port: u16) -> u16 {
        let mut data = [0; 2];
        self.read(port, &mut data);
        u16::from_le_bytes(data)
    }
    fn read_u32(&self, port: u16) -> u32 {
        let mut data = [0; 4];
        self.read(port, &mut data);
        u32::from_le_bytes(data)
    }
    unsafe fn write_u8(&self, port: u16, value: u8) {
        Self::write_u8(self, port, value);
    }
    unsafe fn write_u16(&self, port: u16, value: u16) {
        Self::write_u16(self, port, value);
    }
    unsafe fn write_u32(&self, port: u16, value: u32) {
        Self::write_u32(self, port, value);
    }
    unsafe fn alias(&self) -> Self {
        self.clone()
    }
    unsafe fn read_words(&self, port: u16, words: NonNull<[u16]>) {
        let mut data = vec![0; 2 * words.len()];
        self.read_string(port, 2, &mut data);
        let from = NonNull::from(&data[..]).cast::<u8>();
        // SAFETY: the words may be written (contract), and are as long as the
        // copy.
        unsafe {
            words
                .cast::<u8>()
                .copy_from_nonoverlapping(from, data.len());
        };
    }
    unsafe fn write_words(&self, port: u16, words: NonNull<[u16]>) {
        let mut data = vec![0; 2 * words.len()];
        let to = NonNull::from(&mut data[..]).cast::<u8>();
        // SAFETY: the words may be read (contract), and are as long as the
        // copy.
        unsafe { to.copy_from_nonoverlapping(words.cast(), data.len()) };
        self.write_string(port, 2, &data);
    }
}
