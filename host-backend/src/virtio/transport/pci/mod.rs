//! virtio over PCI (virtio 1.3 §4.1), without the legacy interface.
#![forbid(unsafe_code)]

mod common;
mod signals;

use super::control::{Control, ControlState};
use crate::event::EventFd;
use crate::executor::Executor;
use crate::memory::GuestMemory;
use crate::pci::{Bar, ConfigError, ConfigSpace, FunctionId, Messages, MsixControl, PciFunction};
use crate::state::{RestoreError, SavedState, Stateful};
use crate::virtio::device::Device;
use pvkit_protocol::pci::{capability, class, header, msix};
use pvkit_protocol::virtio::pci::{
    self as wire, Capability, NotifyCapability, WindowCapability, cfg_type,
};
use pvkit_protocol::virtio::{Features, device_id};
use serde::{Deserialize, Serialize};
use signals::{PciSignals, SignalState};
use std::fmt;
use std::io;
use std::mem::offset_of;
use std::sync::Arc;
use thiserror::Error;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

/// The kind of the saved state.
const KIND: &str = "virtio-pci";
const STATE_VERSION: u32 = 1;

/// Options of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PciOptions {
    /// Number of MSI-X vectors, at most 2,048; 0 leaves only the pin. The
    /// default is one for each queue and one for configuration changes; with
    /// fewer, the driver lets queues share.
    pub vectors: Option<u16>,
}

impl PciOptions {
    /// Sets the number of MSI-X vectors.
    #[must_use]
    pub fn with_vectors(mut self, vectors: u16) -> Self {
        self.vectors = Some(vectors);
        self
    }
}

/// Why the function could not be created.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PciError {
    /// Device types above 63 have no PCI device.
    #[error("device type {0} has no PCI device id")]
    Type(u32),
    /// There are more vectors than MSI-X can have.
    #[error("{0} MSI-X vectors exceed the maximum of {max}", max = msix::MOST)]
    Vectors(u16),
    /// The configuration space has no room.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host has no more file descriptors.
    #[error("failed to create an eventfd: {0}")]
    Event(#[source] io::Error),
}

/// Takes notifications at the addresses of the doorbells, so that they need not
/// come to the transport: a monitor registers ioeventfds.
pub trait Doorbells: Send + fmt::Debug {
    /// The doorbell of queue `n` is at `first + n × `[`PciTransport::NOTIFY_BYTES`]
    /// from now on, for a write of any width and value; `None`: nowhere. Writes
    /// that are not taken come to [`PciFunction::write_bar`]. Called with the
    /// function locked.
    fn move_to(&mut self, first: Option<u64>);
}

/// A virtio device as a PCI function.
///
/// The registers lie in base address register 0, of 64 bits; the MSI-X table
/// and its pending bits in base address register 2, of 32 bits.
///
/// It is attached to a [`PciRoot`](crate::pci::PciRoot). A monitor without
/// firmware assigns addresses by [`assign_memory`](crate::pci::assign_memory).
///
/// ```
/// use pvkit_host::disk::MemoryDisk;
/// use pvkit_host::executor::{ThreadOptions, Threads};
/// use pvkit_host::memory::GuestMemory;
/// use pvkit_host::pci::{IntxLines, MemoryPool, Message, Messages, PciRoot, assign_memory};
/// use pvkit_host::virtio::block::{Block, BlockOptions};
/// use pvkit_host::virtio::transport::{PciOptions, PciTransport};
/// use pvkit_protocol::pci::Bdf;
/// use std::sync::{Arc, Mutex};
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// /// Where interrupts go in this monitor.
/// #[derive(Debug)]
/// struct Interrupts;
/// impl IntxLines for Interrupts {
///     fn set_line(&self, _line: u8, _asserted: bool) {}
/// }
/// impl Messages for Interrupts {
///     fn route(&self, _vector: u16, _message: Option<Message>) {}
///     fn send(&self, _vector: u16, _message: Message) {}
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
/// let memory = GuestMemory::new(Arc::new(map))?;
/// let device = Block::new(Arc::new(MemoryDisk::new(64)), BlockOptions::default())?;
/// let mut function = PciTransport::new(
///     Box::new(device),
///     memory,
///     Box::new(Threads::new("disk", ThreadOptions::default())),
///     Arc::new(Interrupts),
///     PciOptions::default(),
/// )?;
/// let mut pool = MemoryPool::new(0xe000_0000, 0xf000_0000);
/// assign_memory(&mut function, &mut pool)?;
/// let root = PciRoot::new(Arc::new(Interrupts));
/// root.attach(Bdf::new(2, 0), Arc::new(Mutex::new(function)))?;
/// // The number of queues, in the common configuration.
/// let mut queues = [0; 2];
/// assert!(root.mmio_read(0xe000_0012, &mut queues));
/// assert_eq!(queues, [1, 0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct PciTransport {
    config: ConfigSpace,
    control: Control<PciSignals>,
    signals: Arc<PciSignals>,
    /// Offset of the MSI-X capability.
    msix: Option<u8>,
    /// Offset of the [`WindowCapability`].
    window: u8,
    doorbells: Option<Box<dyn Doorbells>>,
    /// Address of the first doorbell.
    doorbells_at: Option<u64>,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
}

/// Offsets in base address register 0.
mod place {
    pub(super) const COMMON: u64 = 0;
    pub(super) const ISR: u64 = 0x1000;
    pub(super) const DEVICE: u64 = 0x2000;
    pub(super) const NOTIFY: u64 = 0x3000;
    /// Room for each structure but the doorbells.
    pub(super) const BYTES: u64 = 0x1000;
}

/// Offset of the pending bits in base address register 2, behind the largest
/// table.
const PENDING: u32 = msix::MOST as u32 * msix::ENTRY_BYTES as u32;

impl PciTransport {
    /// Base address register of the registers.
    pub const REGISTERS_BAR: u8 = 0;
    /// Base address register of the MSI-X table and its pending bits.
    pub const MSIX_BAR: u8 = 2;
    /// Bytes between doorbells.
    pub const NOTIFY_BYTES: u64 = 4;

    /// A function in front of `device`, whose lanes `executor` drives, and
    /// which interrupts through `messages`, or by INTA# while MSI-X is off. The
    /// guest, or firmware, assigns its base address registers.
    ///
    /// # Errors
    /// [`PciError`] if there cannot be such a function, or the host has no
    /// more file descriptors.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        executor: Box<dyn Executor>,
        messages: Arc<dyn Messages>,
        options: PciOptions,
    ) -> Result<Self, PciError> {
        let identity = device.identity();
        let type_ = identity.device_id;
        let queues = identity.queues();
        let vectors = vectors_of(queues, options)?;
        let mut config = ConfigSpace::new(FunctionId {
            vendor: wire::VENDOR,
            device: wire::device(type_).ok_or(PciError::Type(type_))?,
            revision: wire::REVISION,
            class: match type_ {
                device_id::BLOCK => class::OTHER_STORAGE,
                device_id::NETWORK => class::ETHERNET,
                _ => class::OTHER,
            },
            prog_if: 0,
        });
        config.set(header::SUBSYSTEM_VENDOR, &wire::VENDOR.to_le_bytes());
        config.set(header::SUBSYSTEM, &wire::SUBSYSTEM.to_le_bytes());
        config.set_interrupt_pin(1);
        let doorbells = u64::from(queues) * Self::NOTIFY_BYTES;
        let registers = Bar::Memory64 {
            size: (place::NOTIFY + doorbells.max(1)).next_power_of_two(),
            prefetchable: false,
        };
        config.add_bar(Self::REGISTERS_BAR, registers)?;
        let device_bytes = u64::from(identity.config_bytes).min(place::BYTES);
        let window = add_structures(&mut config, device_bytes, doorbells)?;
        let signals = Arc::new(PciSignals::new(queues, vectors, messages, config.intx()));
        let mut capability = None;
        if vectors > 0 {
            let pending = msix::pending_bytes(msix::MOST) as u32;
            let table = Bar::Memory {
                size: (PENDING + pending).next_power_of_two(),
                prefetchable: false,
            };
            config.add_bar(Self::MSIX_BAR, table)?;
            let state = signals.lock();
            let added = state
                .msix
                .add_capability(&mut config, Self::MSIX_BAR, 0, PENDING)?;
            capability = Some(added);
        }
        let control = Control::new(device, memory, executor, signals.clone());
        Ok(Self {
            config,
            control: control.map_err(PciError::Event)?,
            signals,
            msix: capability,
            window,
            doorbells: None,
            doorbells_at: None,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
        })
    }

    /// How many MSI-X vectors a function in front of `device` has.
    ///
    /// # Errors
    /// [`PciError::Vectors`] if there cannot be so many.
    pub fn vectors_for(device: &dyn Device, options: PciOptions) -> Result<u16, PciError> {
        vectors_of(device.identity().queues(), options)
    }

    /// The eventfds that the driver kicks, by queue.
    #[must_use]
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        self.control.kicks()
    }

    /// The features that the driver accepted.
    #[must_use]
    pub fn driver_features(&self) -> Features {
        self.control.driver_features()
    }

    /// Number of MSI-X vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.signals.lock().msix.vectors()
    }

    /// Has `doorbells` follow the addresses of the doorbells.
    pub fn set_doorbells(&mut self, doorbells: Box<dyn Doorbells>) {
        self.doorbells = Some(doorbells);
        self.doorbells_at = None;
        self.follow_config();
    }

    /// Follows a change of configuration space.
    fn follow_config(&mut self) {
        if let Some(at) = self.msix {
            let control = self.config.u16_at(at + msix::CONTROL);
            let control = MsixControl::from_bits_truncate(control);
            self.signals.lock().set_control(control);
        }
        let window = self.config.window(Self::REGISTERS_BAR);
        let at = window.map(|window| window.start + place::NOTIFY);
        if at != self.doorbells_at {
            self.doorbells_at = at;
            if let Some(doorbells) = &mut self.doorbells {
                doorbells.move_to(at);
            }
        }
    }

    /// The target of the window capability, if it exists: base address register,
    /// offset and width.
    fn windowed(&self) -> Option<(u8, u64, usize)> {
        let at = |field: usize| self.window + field as u8;
        let bar = self.config.u8_at(at(offset_of!(Capability, bar)));
        let offset = self.config.u32_at(at(offset_of!(Capability, offset)));
        let length = self.config.u32_at(at(offset_of!(Capability, length)));
        // Only widths that accesses have, and aligned (§4.1.4.9.1).
        if !matches!(length, 1 | 2 | 4) || !offset.is_multiple_of(length) {
            return None;
        }
        let (_, found) = self.config.bars().find(|(index, _)| *index == bar)?;
        let end = u64::from(offset) + u64::from(length);
        (end <= found.size()).then_some((bar, u64::from(offset), length as usize))
    }

    /// Whether an access of configuration space reaches the data of the
    /// window.
    fn reaches_window(&self, offset: u8, len: usize) -> bool {
        let data = usize::from(self.window) + offset_of!(WindowCapability, data);
        let start = usize::from(offset);
        start < data + 4 && data < start + len
    }

    fn window_data(&self) -> u8 {
        self.window + offset_of!(WindowCapability, data) as u8
    }

    fn read_registers(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            place::COMMON..place::ISR => self.read_common(offset - place::COMMON, data),
            place::ISR => {
                data.fill(0);
                if let Some(byte) = data.first_mut() {
                    *byte = self.signals.lock().take_isr();
                }
            }
            place::DEVICE..place::NOTIFY => {
                let at = (offset - place::DEVICE) as u32;
                self.control.read_config(at, data);
            }
            _ => data.fill(0),
        }
    }

    fn write_registers(&mut self, offset: u64, data: &[u8]) {
        match offset {
            place::COMMON..place::ISR => self.write_common(offset - place::COMMON, data),
            place::DEVICE..place::NOTIFY => {
                let at = (offset - place::DEVICE) as u32;
                self.control.write_config(at, data);
            }
            place::NOTIFY.. => {
                // Each queue has its own doorbell (§4.1.4.4).
                let at = offset - place::NOTIFY;
                if at.is_multiple_of(Self::NOTIFY_BYTES) {
                    let queue = u32::try_from(at / Self::NOTIFY_BYTES);
                    self.control.kick(queue.unwrap_or(u32::MAX));
                }
            }
            _ => {}
        }
    }
}

fn vectors_of(queues: u16, options: PciOptions) -> Result<u16, PciError> {
    let each = queues.saturating_add(1).min(msix::MOST);
    let vectors = options.vectors.unwrap_or(each);
    if vectors > msix::MOST {
        return Err(PciError::Vectors(vectors));
    }
    Ok(vectors)
}

/// Adds virtio's capabilities; returns where the one of the window is.
fn add_structures(
    config: &mut ConfigSpace,
    device_bytes: u64,
    doorbells: u64,
) -> Result<u8, ConfigError> {
    let make = |type_: u8, bytes: usize, offset: u64, length: u64| Capability {
        len: bytes as u8,
        cfg_type: type_,
        bar: PciTransport::REGISTERS_BAR,
        offset: U32::new(offset as u32),
        length: U32::new(length as u32),
        ..Capability::default()
    };
    let bytes = size_of::<Capability>();
    // The two bytes in front are the configuration space's own.
    let mut add = |bytes: &[u8], mask: &[u8]| {
        let (body, mask) = (bytes.get(2..), mask.get(2..));
        config.add_capability(capability::VENDOR, body.unwrap_or(&[]), mask.unwrap_or(&[]))
    };
    let common = wire::common::BYTES as u64;
    add(
        make(cfg_type::COMMON, bytes, place::COMMON, common).as_bytes(),
        &[],
    )?;
    add(make(cfg_type::ISR, bytes, place::ISR, 1).as_bytes(), &[])?;
    if device_bytes > 0 {
        let device = make(cfg_type::DEVICE, bytes, place::DEVICE, device_bytes);
        add(device.as_bytes(), &[])?;
    }
    let bytes = size_of::<NotifyCapability>();
    let notify = NotifyCapability {
        capability: make(cfg_type::NOTIFY, bytes, place::NOTIFY, doorbells),
        multiplier: U32::new(PciTransport::NOTIFY_BYTES as u32),
    };
    add(notify.as_bytes(), &[])?;
    let bytes = size_of::<WindowCapability>();
    let window = WindowCapability {
        capability: make(cfg_type::PCI, bytes, 0, 0),
        data: [0; 4],
    };
    let writable = WindowCapability {
        capability: Capability {
            bar: 0xff,
            offset: U32::MAX_VALUE,
            length: U32::MAX_VALUE,
            ..Capability::default()
        },
        data: [0xff; 4],
    };
    add(window.as_bytes(), writable.as_bytes())
}

/// The saved state of a function.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PciState {
    config: Vec<u8>,
    control: ControlState,
    signals: SignalState,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
}

impl Stateful for PciTransport {
    fn begin_pause(&mut self) {
        self.control.begin_pause();
    }

    fn poll_paused(&mut self) -> bool {
        self.control.poll_paused()
    }

    fn resume(&mut self) {
        self.control.resume();
    }

    fn save(&self) -> SavedState {
        let Self {
            config,
            control,
            signals,
            // The same in every function with this device.
            msix: _,
            window: _,
            // The monitor's, and where configuration space says.
            doorbells: _,
            doorbells_at: _,
            device_feature_select,
            driver_feature_select,
            queue_select,
        } = self;
        let state = PciState {
            config: config.save(),
            control: control.save(),
            signals: signals.lock().save(),
            device_feature_select: *device_feature_select,
            driver_feature_select: *driver_feature_select,
            queue_select: *queue_select,
        };
        SavedState::new(KIND, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        let PciState {
            config,
            control,
            signals,
            device_feature_select,
            driver_feature_select,
            queue_select,
        } = state.open(KIND, STATE_VERSION)?;
        let invalid = |error: &'static str| RestoreError::invalid(KIND, error);
        // In this order: what configuration space switches on sends what is
        // pending, and restoring the device may raise more.
        let restored = self.signals.lock().restore(&signals);
        restored.ok_or(invalid("its vectors are not those of this function"))?;
        self.config
            .restore(&config)
            .map_err(|error| RestoreError::invalid(KIND, error))?;
        self.follow_config();
        self.control.restore(&control)?;
        self.device_feature_select = device_feature_select;
        self.driver_feature_select = driver_feature_select;
        self.queue_select = queue_select;
        Ok(())
    }
}

impl PciFunction for PciTransport {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: u8, data: &mut [u8]) {
        if self.reaches_window(offset, data.len())
            && let Some((bar, at, width)) = self.windowed()
        {
            let mut bytes = [0; 4];
            let (bytes, _) = bytes.split_at_mut(width);
            self.read_bar(bar, at, bytes);
            let place = self.window_data();
            self.config.set(place, bytes);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config.write(offset, data);
        if self.reaches_window(offset, data.len())
            && let Some((bar, at, width)) = self.windowed()
        {
            let mut bytes = [0; 4];
            let (bytes, _) = bytes.split_at_mut(width);
            self.config.read(self.window_data(), bytes);
            self.write_bar(bar, at, bytes);
        }
        self.follow_config();
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        match bar {
            Self::REGISTERS_BAR => self.read_registers(offset, data),
            Self::MSIX_BAR => {
                let state = self.signals.lock();
                match offset.checked_sub(u64::from(PENDING)) {
                    None => state.msix.read_table(offset, data),
                    Some(offset) => state.msix.read_pending(offset, data),
                }
            }
            _ => data.fill(0xff),
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        match bar {
            Self::REGISTERS_BAR => self.write_registers(offset, data),
            Self::MSIX_BAR => self.signals.lock().msix.write_table(offset, data),
            _ => {}
        }
    }
}
