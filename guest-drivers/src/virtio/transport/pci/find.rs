//! Where a function's structures lie (virtio 1.3 §4.1.4). Nothing of what its
//! capabilities say is trusted.
#![forbid(unsafe_code)]

use super::{PciTransport, RESET_READS};
use crate::pci::{ConfigAccess, Function, MemoryBar, MemoryPool, PciConfig, PciError};
use crate::quiesce::ResetEpoch;
use crate::register::{OwnedRegisters, Registers};
use pvkit_protocol::pci::{Command, capability, header};
use pvkit_protocol::virtio::pci::{self as wire, Capability, NotifyCapability, cfg_type, common};
use thiserror::Error;
use zerocopy::{FromZeros, IntoBytes};

/// Why a function is no usable device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PciTransportError {
    /// It is not a virtio device, or one with nothing but the interface of
    /// old.
    #[error("{vendor:04x}:{device:04x} is no virtio device of version 1")]
    Function {
        /// Vendor.
        vendor: u16,
        /// Device.
        device: u16,
    },
    /// It has no capability for a structure that every device has.
    #[error("the function has no structure of type {0}")]
    Missing(u8),
    /// A structure's capability is shorter than such capabilities are, or
    /// reaches beyond configuration space.
    #[error("the capability at {at:#x} of a structure of type {cfg_type} has {len} bytes")]
    Capability {
        /// Type of the structure.
        cfg_type: u8,
        /// Offset of the capability.
        at: u8,
        /// Its length.
        len: u8,
    },
    /// The base address register of a structure cannot be used.
    #[error(transparent)]
    Bar(#[from] PciError),
    /// The kernel does not map the window of a structure.
    #[error("the window at {base:#x} cannot be mapped")]
    Map {
        /// Its address.
        base: u64,
    },
    /// A structure is too short, badly aligned, or does not lie in what its
    /// base address register decodes.
    #[error(
        "{length} bytes at {offset:#x} of a window of {size:#x}: \
         no place for a structure of type {cfg_type}"
    )]
    Place {
        /// Type of the structure.
        cfg_type: u8,
        /// Its offset.
        offset: u32,
        /// Its length.
        length: u32,
        /// Size of the window.
        size: u64,
    },
    /// The distance of doorbells is neither 0 nor a power of two from 2 on.
    #[error("doorbells are {0} bytes apart")]
    Multiplier(u32),
}

/// A structure in a window: accesses beyond it read as all ones, or do
/// nothing.
#[derive(Debug)]
pub(super) struct Structure<R> {
    registers: OwnedRegisters<R>,
    offset: usize,
    len: usize,
}

impl<R: Registers> Structure<R> {
    /// Where in the window a field of the structure is, if all of it is there.
    pub(super) fn place(&self, offset: usize, bytes: usize) -> Option<usize> {
        let end = offset.checked_add(bytes)?;
        (end <= self.len).then_some(self.offset + offset)
    }

    /// The window.
    pub(super) fn registers(&self) -> OwnedRegisters<R> {
        self.registers.clone()
    }

    pub(super) fn read_u8(&self, offset: usize) -> u8 {
        let place = self.place(offset, 1);
        place.map_or(!0, |place| self.registers.read_u8(place))
    }

    pub(super) fn read_u16(&self, offset: usize) -> u16 {
        let place = self.place(offset, 2);
        place.map_or(!0, |place| self.registers.read_u16(place))
    }

    pub(super) fn read_u32(&self, offset: usize) -> u32 {
        let place = self.place(offset, 4);
        place.map_or(!0, |place| self.registers.read_u32(place))
    }

    pub(super) fn write_u8(&self, offset: usize, value: u8) {
        if let Some(place) = self.place(offset, 1) {
            self.registers.write_u8(place, value);
        }
    }

    pub(super) fn write_u16(&self, offset: usize, value: u16) {
        if let Some(place) = self.place(offset, 2) {
            self.registers.write_u16(place, value);
        }
    }

    pub(super) fn write_u32(&self, offset: usize, value: u32) {
        if let Some(place) = self.place(offset, 4) {
            self.registers.write_u32(place, value);
        }
    }
}

/// What a base address register decodes.
type Window<R> = (MemoryBar, OwnedRegisters<R>);

/// The windows of a function, each looked at once.
struct Windows<R> {
    found: [Option<Result<Window<R>, PciTransportError>>; header::BARS as usize],
}

impl<R: Registers> Windows<R> {
    fn get(
        &mut self,
        bar: u8,
        look: impl FnOnce() -> Result<Window<R>, PciTransportError>,
    ) -> Result<Window<R>, PciTransportError> {
        let place = self.found.get_mut(usize::from(bar));
        let place = place.ok_or(PciError::NoBar(bar))?;
        place.get_or_insert_with(look).clone()
    }
}

/// What a structure of a type needs: least length, and alignment.
fn needs(cfg_type: u8) -> (u32, u32) {
    match cfg_type {
        cfg_type::COMMON => (common::LEAST_BYTES as u32, 4),
        cfg_type::NOTIFY => (2, 2),
        cfg_type::DEVICE => (1, 4),
        _ => (1, 1),
    }
}

/// The types that are looked for.
const TYPES: [u8; 4] = [
    cfg_type::COMMON,
    cfg_type::NOTIFY,
    cfg_type::ISR,
    cfg_type::DEVICE,
];

impl<R: Registers> PciTransport<R> {
    /// The device behind a function of `config`. Windows without an address
    /// get one out of `free`; `map` makes each reachable, once. Memory
    /// decoding and bus mastering are switched on. The device itself is not
    /// touched.
    ///
    /// Of several structures of a type, the first that can be used is
    /// (§4.1.4).
    ///
    /// # Errors
    /// [`PciTransportError`] says what is there instead of a device.
    pub fn new<A: ConfigAccess>(
        config: &PciConfig<A>,
        function: &Function,
        free: &mut MemoryPool,
        mut map: impl FnMut(MemoryBar) -> Option<R>,
    ) -> Result<Self, PciTransportError> {
        let Function {
            place,
            vendor,
            device,
            ..
        } = *function;
        let device_id = Some(device)
            .filter(|_| vendor == wire::VENDOR)
            .and_then(wire::device_id)
            .filter(|id| *id != 0)
            .ok_or(PciTransportError::Function { vendor, device })?;
        let mut windows = Windows {
            found: [const { None }; header::BARS as usize],
        };
        let mut structures = TYPES.map(|type_| Err(PciTransportError::Missing(type_)));
        let mut multiplier = 0;
        for (id, at) in config.capabilities(place) {
            if id != capability::VENDOR {
                continue;
            }
            let mut found = NotifyCapability::new_zeroed();
            config.read_bytes(place, at, found.as_mut_bytes());
            let Capability { cfg_type, bar, .. } = found.capability;
            // Reserved registers are none of ours (§4.1.4).
            if bar > wire::BAR_LAST {
                continue;
            }
            let slot = TYPES.iter().position(|type_| *type_ == cfg_type);
            let Some(slot) = slot.and_then(|slot| structures.get_mut(slot)) else {
                continue;
            };
            if slot.is_ok() {
                continue;
            }
            let look = || {
                let window = config.assign_memory(place, bar, free)?;
                let base = window.base;
                let registers = map(window).ok_or(PciTransportError::Map { base })?;
                Ok((window, OwnedRegisters::new(registers)))
            };
            let usable = check_length(at, &found.capability)
                .and_then(|()| check_multiplier(&found))
                .and_then(|()| windows.get(bar, look))
                .and_then(|window| locate(&found.capability, window));
            if usable.is_ok() && cfg_type == cfg_type::NOTIFY {
                multiplier = found.multiplier.get();
            }
            // The first error says most.
            if usable.is_ok() || matches!(slot, Err(PciTransportError::Missing(_))) {
                *slot = usable;
            }
        }
        let [common, notify, isr, device] = structures;
        let device = match device {
            Ok(device) => Some(device),
            // Not every type of device has configuration.
            Err(PciTransportError::Missing(_)) => None,
            Err(error) => return Err(error),
        };
        let transport = Self {
            common: common?,
            notify: notify?,
            multiplier,
            isr: isr?,
            device,
            device_id,
            epoch: ResetEpoch::new(),
            reset_reads: RESET_READS,
            messages: None,
            notification_data: false,
        };
        config.enable(place, Command::MEMORY | Command::BUS_MASTER);
        Ok(transport)
    }
}

/// Whether a capability is as long as its type has to be, and lies in
/// configuration space.
fn check_length(at: u8, capability: &Capability) -> Result<(), PciTransportError> {
    let Capability { cfg_type, len, .. } = *capability;
    let least = if cfg_type == cfg_type::NOTIFY {
        size_of::<NotifyCapability>()
    } else {
        size_of::<Capability>()
    };
    let end = usize::from(at) + usize::from(len);
    if usize::from(len) < least || end > pvkit_protocol::pci::CONFIG_BYTES {
        return Err(PciTransportError::Capability { cfg_type, at, len });
    }
    Ok(())
}

fn check_multiplier(found: &NotifyCapability) -> Result<(), PciTransportError> {
    let multiplier = found.multiplier.get();
    let possible = multiplier == 0 || multiplier.is_power_of_two() && multiplier >= 2;
    if found.capability.cfg_type == cfg_type::NOTIFY && !possible {
        return Err(PciTransportError::Multiplier(multiplier));
    }
    Ok(())
}

/// The structure that a capability means, in its window.
fn locate<R: Registers>(
    capability: &Capability,
    (window, registers): Window<R>,
) -> Result<Structure<R>, PciTransportError> {
    let Capability {
        cfg_type,
        offset,
        length,
        ..
    } = *capability;
    let (offset, length) = (offset.get(), length.get());
    let bad = PciTransportError::Place {
        cfg_type,
        offset,
        length,
        size: window.size,
    };
    let (least, align) = needs(cfg_type);
    // No sum of two 32-bit numbers overflows 64 bits.
    let end = u64::from(offset) + u64::from(length);
    if length < least || !offset.is_multiple_of(align) || end > window.size {
        return Err(bad);
    }
    let end = usize::try_from(end).map_err(|_| bad)?;
    if end > registers.len() {
        return Err(bad);
    }
    // Both are at most `end`.
    Ok(Structure {
        registers,
        offset: offset as usize,
        len: length as usize,
    })
}
