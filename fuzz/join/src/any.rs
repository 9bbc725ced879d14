//! A driver's transport of either kind, and its memory, so that one test runs
//! on all.

use crate::arena::ArenaSpace;
use pvkit_guest::bounce::BounceSpace;
use pvkit_guest::dma::{Direction, DmaError, DmaRegion, DmaSpace, Segment, Segments, StillShared};
use pvkit_guest::doorbell::{Doorbell, Position};
use pvkit_guest::quiesce::{QueueIdentity, Quiesced};
use pvkit_guest::register::Registers;
use pvkit_guest::virtio::transport::{
    Events, MmioDoorbell, MmioTransport, PciDoorbell, PciTransport, QueueAddresses, ResetTimeout,
    Transport, VectorError,
};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::alloc::Layout;
use std::ptr::NonNull;

/// virtio-mmio, or virtio-pci.
#[derive(Debug)]
pub enum AnyTransport<R> {
    /// virtio-mmio.
    Mmio(MmioTransport<R>),
    /// virtio-pci.
    Pci {
        /// The transport.
        transport: Box<PciTransport<R>>,
        /// The vectors of configuration and queues whose driver does not ask
        /// for any, as drivers do that are written for one line.
        vectors: Option<[u16; 2]>,
    },
}

/// The doorbell of either.
#[derive(Debug)]
pub enum AnyDoorbell<R> {
    /// virtio-mmio.
    Mmio(MmioDoorbell<R>),
    /// virtio-pci.
    Pci(PciDoorbell<R>),
}

impl<R: Registers> Doorbell for AnyDoorbell<R> {
    fn ring(&mut self, at: Position) {
        match self {
            Self::Mmio(doorbell) => doorbell.ring(at),
            Self::Pci(doorbell) => doorbell.ring(at),
        }
    }
}

impl<R: Registers> AnyTransport<R> {
    /// Sets how often the status is read, at the most, before a reset counts
    /// as failed.
    #[must_use]
    pub fn with_reset_reads(self, reads: u32) -> Self {
        match self {
            Self::Mmio(transport) => Self::Mmio(transport.with_reset_reads(reads)),
            Self::Pci { transport, vectors } => Self::Pci {
                transport: Box::new(transport.with_reset_reads(reads)),
                vectors,
            },
        }
    }
}

/// Passes a call on to the transport, whichever it is.
macro_rules! pass {
    ($self:ident, $transport:ident => $call:expr) => {
        match $self {
            Self::Mmio($transport) => $call,
            Self::Pci {
                transport: $transport,
                ..
            } => $call,
        }
    };
}

// SAFETY: passes every call on, unchanged.
unsafe impl<R: Registers> Transport for AnyTransport<R> {
    type Doorbell = AnyDoorbell<R>;

    fn device_id(&self) -> u32 {
        pass!(self, transport => transport.device_id())
    }
    fn status(&self) -> DeviceStatus {
        pass!(self, transport => transport.status())
    }
    fn set_status(&mut self, status: DeviceStatus) {
        pass!(self, transport => transport.set_status(status));
    }
    fn reset(&mut self) -> Result<Quiesced, ResetTimeout> {
        pass!(self, transport => transport.reset())
    }
    fn reset_queue(&mut self, queue: u16) -> Result<Quiesced, ResetTimeout> {
        pass!(self, transport => transport.reset_queue(queue))
    }
    fn identity(&self, queue: u16) -> QueueIdentity {
        pass!(self, transport => transport.identity(queue))
    }
    fn device_features(&mut self) -> Features {
        pass!(self, transport => transport.device_features())
    }
    fn set_driver_features(&mut self, features: Features) {
        pass!(self, transport => transport.set_driver_features(features));
    }
    fn config_generation(&self) -> u32 {
        pass!(self, transport => transport.config_generation())
    }
    fn read_config(&self, offset: usize, out: &mut [u8]) {
        pass!(self, transport => transport.read_config(offset, out));
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        pass!(self, transport => transport.write_config(offset, data));
    }
    fn queue_max_size(&mut self, queue: u16) -> u32 {
        pass!(self, transport => transport.queue_max_size(queue))
    }
    unsafe fn set_up_queue(&mut self, queue: u16, at: QueueAddresses) {
        // SAFETY: what the caller promises, passed on.
        pass!(self, transport => unsafe { transport.set_up_queue(queue, at) });
    }
    fn set_config_vector(&mut self, vector: Option<u16>) -> Result<(), VectorError> {
        match self {
            Self::Mmio(transport) => transport.set_config_vector(vector),
            Self::Pci { transport, vectors } => {
                transport.set_config_vector(vector.or(vectors.map(|[config, _]| config)))
            }
        }
    }
    fn set_queue_vector(&mut self, queue: u16, vector: Option<u16>) -> Result<(), VectorError> {
        match self {
            Self::Mmio(transport) => transport.set_queue_vector(queue, vector),
            Self::Pci { transport, vectors } => {
                transport.set_queue_vector(queue, vector.or(vectors.map(|[_, queue]| queue)))
            }
        }
    }
    fn doorbell(&mut self, queue: u16) -> AnyDoorbell<R> {
        match self {
            Self::Mmio(transport) => AnyDoorbell::Mmio(transport.doorbell(queue)),
            Self::Pci { transport, .. } => AnyDoorbell::Pci(transport.doorbell(queue)),
        }
    }
    fn claim_events(&self) -> Events {
        pass!(self, transport => transport.claim_events())
    }
    fn claim_config_events(&self) -> Events {
        pass!(self, transport => transport.claim_config_events())
    }
}

/// How a driver shares memory: all of it, or by bounce buffers.
#[derive(Debug, Clone)]
pub enum AnySpace {
    /// All of an arena.
    Arena(ArenaSpace),
    /// A piece of an arena.
    Bounce(BounceSpace),
}

/// Passes a call on to the space, whichever it is.
macro_rules! either {
    ($self:ident, $space:ident => $call:expr) => {
        match $self {
            Self::Arena($space) => $call,
            Self::Bounce($space) => $call,
        }
    };
}

impl AnySpace {
    /// The space of a region from one of the two.
    fn wrap<S: DmaSpace<Addr = u64>>(
        region: DmaRegion<S>,
        wrap: impl FnOnce(S) -> Self,
    ) -> DmaRegion<Self> {
        let (space, ptr, addr, layout) = region.into_parts();
        // SAFETY: the parts of a region, which `dealloc` frees in the space
        // that it is from.
        unsafe { DmaRegion::from_parts(wrap(space), ptr, addr, layout) }
    }
}

// SAFETY: passes every call on, unchanged.
unsafe impl DmaSpace for AnySpace {
    type Addr = u64;

    fn alloc(&self, layout: Layout) -> Result<DmaRegion<Self>, DmaError> {
        Ok(match self {
            Self::Arena(space) => Self::wrap(space.alloc(layout)?, Self::Arena),
            Self::Bounce(space) => Self::wrap(space.alloc(layout)?, Self::Bounce),
        })
    }
    unsafe fn dealloc(&self, ptr: NonNull<u8>, addr: u64, layout: Layout) {
        // SAFETY: what the caller promises, passed on.
        either!(self, space => unsafe { space.dealloc(ptr, addr, layout) });
    }
    unsafe fn map(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        out: &mut Segments<'_, u64>,
    ) -> Result<(), DmaError> {
        // SAFETY: what the caller promises, passed on.
        either!(self, space => unsafe { space.map(buffer, direction, out) })
    }
    unsafe fn unmap(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        segments: &[Segment<u64>],
        written: usize,
    ) -> Result<(), StillShared> {
        // SAFETY: what the caller promises, passed on.
        either!(self, space => unsafe { space.unmap(buffer, direction, segments, written) })
    }
    fn leaked(&self, bytes: usize) {
        either!(self, space => space.leaked(bytes));
    }
}
