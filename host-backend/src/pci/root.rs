//! Bus 0: configuration mechanism 1, and who decodes what.
#![forbid(unsafe_code)]

use super::intx::{IntxLines, IntxPin, Wiring};
use super::{PciFunction, Space, Window};
use crate::bus::BusDevice;
use crate::sync::lock;
use pvkit_protocol::pci::{self, Bdf, header, intx_line};
use std::sync::{Arc, Mutex};
use thiserror::Error;

/// A function as the bus shares it with whoever else reaches it, such as
/// adaptors for ports of old.
type Shared = Arc<Mutex<dyn PciFunction>>;

/// A function cannot be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// There is only bus 0.
    #[error("there is no bus {0}")]
    Bus(u8),
    /// Another function stands there.
    #[error("slot {} function {} is taken", .0.slot, .0.function)]
    Taken(Bdf),
}

/// Bus 0, shared by all virtual CPUs.
#[derive(Debug)]
pub struct PciRoot {
    state: Mutex<State>,
    wiring: Arc<Wiring>,
}

#[derive(Debug)]
struct State {
    /// What was last written to [`pci::CONFIG_ADDRESS`].
    address: u32,
    functions: Vec<Attached>,
}

#[derive(Debug)]
struct Attached {
    place: Bdf,
    function: Shared,
    /// Where its base address registers decode now.
    windows: [Option<Window>; header::BARS as usize],
}

impl Attached {
    /// Notes where the function decodes, after a change of its configuration.
    fn look(&mut self, function: &dyn PciFunction) {
        for (bar, window) in (0..).zip(&mut self.windows) {
            *window = function.config().window(bar);
        }
    }
}

/// A register of a function that an access goes to.
struct Hit {
    function: Shared,
    bar: u8,
    offset: u64,
    /// Bytes from there to the end of the window.
    room: usize,
}

impl PciRoot {
    /// A bus without functions, whose interrupt pins end at `lines`.
    #[must_use]
    pub fn new(lines: Arc<dyn IntxLines>) -> Self {
        Self {
            state: Mutex::new(State {
                address: 0,
                functions: Vec::new(),
            }),
            wiring: Arc::new(Wiring::new(lines)),
        }
    }

    /// Attaches a function.
    ///
    /// # Errors
    /// [`AttachError`] if the place is taken or not on bus 0.
    pub fn attach(&self, place: Bdf, function: Shared) -> Result<(), AttachError> {
        if place.bus != 0 {
            return Err(AttachError::Bus(place.bus));
        }
        let mut state = lock(&self.state);
        if state.functions.iter().any(|other| other.place == place) {
            return Err(AttachError::Taken(place));
        }
        let mut attached = Attached {
            place,
            function: function.clone(),
            windows: [None; header::BARS as usize],
        };
        let mut function = lock(&function);
        let pin = function.config().interrupt_pin();
        if pin != 0 {
            let line = intx_line(place.slot, pin);
            function
                .config_mut()
                .connect(IntxPin::new(self.wiring.clone(), line));
        }
        attached.look(&*function);
        state.functions.push(attached);
        Ok(())
    }

    /// A port read; `false` if no function decodes the port.
    pub fn io_read(&self, port: u16, data: &mut [u8]) -> bool {
        self.read(Space::Port, u64::from(port), data)
    }

    /// A port write; `false` if no function decodes the port.
    pub fn io_write(&self, port: u16, data: &[u8]) -> bool {
        self.write(Space::Port, u64::from(port), data)
    }

    /// A string read: `data` is as many reads of `width` bytes from the same
    /// port. `false` if no function decodes it.
    pub fn io_read_string(&self, port: u16, width: usize, data: &mut [u8]) -> bool {
        let width = width.max(1);
        let Some(hit) = self.find(Space::Port, u64::from(port)) else {
            return false;
        };
        if width <= hit.room {
            lock(&hit.function).read_bar_string(hit.bar, hit.offset, width, data);
            return true;
        }
        data.chunks_mut(width)
            .fold(false, |any, element| self.io_read(port, element) | any)
    }

    /// A string write: `data` is as many writes of `width` bytes to the same
    /// port. `false` if no function decodes it.
    pub fn io_write_string(&self, port: u16, width: usize, data: &[u8]) -> bool {
        let width = width.max(1);
        let Some(hit) = self.find(Space::Port, u64::from(port)) else {
            return false;
        };
        if width <= hit.room {
            lock(&hit.function).write_bar_string(hit.bar, hit.offset, width, data);
            return true;
        }
        data.chunks(width)
            .fold(false, |any, element| self.io_write(port, element) | any)
    }

    /// A memory read; `false` if no function decodes the address.
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        self.read(Space::Memory, addr, data)
    }

    /// A memory write; `false` if no function decodes the address.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        self.write(Space::Memory, addr, data)
    }

    /// What decodes an address. Where windows overlap, the function that was
    /// attached first answers.
    fn find(&self, space: Space, addr: u64) -> Option<Hit> {
        lock(&self.state).functions.iter().find_map(|attached| {
            (0..).zip(&attached.windows).find_map(|(bar, window)| {
                let window = (*window)?;
                let offset = addr.checked_sub(window.start)?;
                let room = window.len.checked_sub(offset).filter(|room| *room > 0)?;
                (window.space == space).then(|| Hit {
                    function: attached.function.clone(),
                    bar,
                    offset,
                    room: usize::try_from(room).unwrap_or(usize::MAX),
                })
            })
        })
    }

    fn read(&self, space: Space, addr: u64, data: &mut [u8]) -> bool {
        let Some(hit) = self.find(space, addr) else {
            return false;
        };
        // What reaches beyond the window belongs to nobody.
        let (own, rest) = data.split_at_mut(data.len().min(hit.room));
        rest.fill(0xff);
        lock(&hit.function).read_bar(hit.bar, hit.offset, own);
        true
    }

    fn write(&self, space: Space, addr: u64, data: &[u8]) -> bool {
        let Some(hit) = self.find(space, addr) else {
            return false;
        };
        let (own, _) = data.split_at(data.len().min(hit.room));
        lock(&hit.function).write_bar(hit.bar, hit.offset, own);
        true
    }

    /// Calls `access` with the function and the register that the
    /// configuration address names, and with how many bytes of an access to
    /// data port `lane` (0 to 3) belong to it. Nothing if there is none.
    fn configure(
        &self,
        lane: u8,
        len: usize,
        access: impl FnOnce(&mut dyn PciFunction, u8, usize),
    ) {
        let mut state = lock(&self.state);
        let Some((place, register)) = Bdf::from_config_address(state.address) else {
            return;
        };
        let found = state
            .functions
            .iter_mut()
            .find(|attached| attached.place == place);
        if let Some(attached) = found {
            let function = attached.function.clone();
            let mut function = lock(&function);
            // An access reaches to the end of the 32-bit register.
            access(
                &mut *function,
                register + lane,
                len.min(4 - usize::from(lane)),
            );
            attached.look(&*function);
        }
    }
}

/// The eight ports of configuration mechanism 1 (PCI Local Bus Specification
/// 3.0, §3.2.2.3.2).
#[derive(Debug)]
pub struct ConfigPorts(Arc<PciRoot>);

impl ConfigPorts {
    /// First port.
    pub const BASE: u16 = pci::CONFIG_ADDRESS;
    /// Number of ports.
    pub const COUNT: u16 = 8;
    /// Offset of the data ports.
    const DATA: u64 = (pci::CONFIG_DATA - pci::CONFIG_ADDRESS) as u64;
    /// Bits of the address that are kept.
    const ADDRESS_BITS: u32 = 0x80ff_fffc;

    /// The ports of `root`.
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self(root)
    }

    /// Which of the four data ports an access starts at.
    fn lane(offset: u64) -> Option<u8> {
        let lane = u8::try_from(offset.checked_sub(Self::DATA)?).ok()?;
        (lane < 4).then_some(lane)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(lane) = Self::lane(offset) {
            self.0
                .configure(lane, data.len(), |function, register, len| {
                    let (own, _) = data.split_at_mut(len);
                    function.read_config(register, own);
                });
        } else if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            // Only accesses of 32 bits reach the address register.
            *data = lock(&self.0.state).address.to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(lane) = Self::lane(offset) {
            self.0
                .configure(lane, data.len(), |function, register, len| {
                    let (own, _) = data.split_at(len);
                    function.write_config(register, own);
                });
        } else if let (0, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            lock(&self.0.state).address = u32::from_le_bytes(data) & Self::ADDRESS_BITS;
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
