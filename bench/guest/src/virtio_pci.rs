//! virtio devices on the PCI bus.

use crate::counting::{CountingPorts, CountingRegisters};
use crate::interrupts::{Interrupts, Line};
use alloc::format;
use alloc::string::{String, ToString};
use core::ptr::NonNull;
use pvkit_guest::pci::{MemoryBar, MemoryPool, MsiMessage, Msix, MsixError, PciConfig};
use pvkit_guest::virtio::transport::PciTransport;
use pvkit_protocol::pci::{Bdf, Command, header, i440fx};
use pvkit_protocol::virtio::pci;

/// Addresses for windows that firmware left without: mapped uncached by
/// `boot.s`, behind virtio-mmio, and before what firmware takes.
// SAFETY: neither memory nor devices are there.
pub(crate) const FREE: MemoryPool = unsafe { MemoryPool::new(0xd800_0000, 0xdfff_ffff) };
/// Where the uncached part of the address space begins.
const DEVICES_START: u64 = 0xc000_0000;
/// Where it ends.
const DEVICES_END: u64 = 1 << 32;
/// The interrupt line of functions for which firmware has chosen none: one that
/// PCs keep for PCI.
const PCI_LINE: u8 = 11;
/// The queues' vector.
const QUEUE_VECTOR: u16 = 0;

/// A virtio device, and how it interrupts.
pub(crate) struct Found {
    pub(crate) transport: PciTransport<CountingRegisters>,
    pub(crate) line: Line,
    /// The queues' vector, if the device interrupts by message.
    pub(crate) vector: Option<u16>,
}

/// What a base address register decodes, if it lies where devices are.
pub(crate) fn map(bar: MemoryBar) -> Option<CountingRegisters> {
    let end = bar.base.checked_add(bar.size)?;
    if bar.base < DEVICES_START || end > DEVICES_END {
        return None;
    }
    let base = core::ptr::with_exposed_provenance_mut(bar.base as usize);
    // SAFETY: mapped uncached by `boot.s`; the function decodes it, and one
    // driver uses it at a time.
    Some(unsafe { CountingRegisters::new(NonNull::new(base)?, bar.size as usize, None) })
}

/// The line that a function's pin ends at. Firmware says which, but not always
/// what the board does (qboot on QEMU's 440FX), so a PIIX3 routes all pins to
/// that line; where the monitor has fixed routes, that changes nothing.
pub(crate) fn pin_of(config: &PciConfig<CountingPorts>, place: Bdf) -> u8 {
    let line = match config.read_u8(place, header::INTERRUPT_LINE) {
        0 | 0xff => PCI_LINE,
        line => line,
    };
    if let Some(bridge) = config.find(i440fx::VENDOR, i440fx::ISA_BRIDGE) {
        let routes = u32::from_le_bytes([line & 0xf; 4]);
        // SAFETY: routes pins to a line that has a handler.
        unsafe { config.write_u32(bridge.place, i440fx::PIRQ_ROUTE, routes) };
    }
    line
}

/// The device number `index` of a kind on bus 0, by slot.
pub(crate) fn open(
    ports: &CountingPorts,
    interrupts: &Interrupts,
    free: &mut MemoryPool,
    kind: u32,
    index: usize,
    by_interrupt: bool,
) -> Result<Found, String> {
    let config = PciConfig::new(ports.clone());
    let wanted = pci::device(kind);
    let function = config
        .functions()
        .filter(|found| found.vendor == pci::VENDOR && Some(found.device) == wanted)
        .nth(index)
        .ok_or_else(|| format!("no virtio-pci device {index} of kind {kind}"))?;
    let place = function.place;
    let transport =
        PciTransport::new(&config, &function, free, map).map_err(|error| error.to_string())?;
    let (line, message) = interrupts.message(0);
    if !by_interrupt {
        Msix::<CountingRegisters>::disable(&config, place);
        config.enable(place, Command::INTX_DISABLE);
        return Ok(Found {
            transport,
            line,
            vector: None,
        });
    }
    match Msix::enable(&config, place, free, map) {
        Ok(mut msix) => {
            // SAFETY: an interrupt of this CPU, which has a handler.
            let message = unsafe { MsiMessage::new(message.address, message.data) };
            msix.set(QUEUE_VECTOR, message)
                .map_err(|error| error.to_string())?;
            Ok(Found {
                transport: transport.with_msix(&msix),
                line,
                vector: Some(QUEUE_VECTOR),
            })
        }
        Err(MsixError::Absent) => {
            let pin = pin_of(&config, place);
            let line = interrupts.line(u32::from(pin));
            let line = line.ok_or_else(|| format!("no interrupt pin {pin}"))?;
            config.disable(place, Command::INTX_DISABLE);
            Ok(Found {
                transport,
                line,
                vector: None,
            })
        }
        Err(error) => Err(error.to_string()),
    }
}
