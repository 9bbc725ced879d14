//! Registers and ports in the hands of a driver of this crate.
//!
//! Writing to a device is `unsafe` for everybody else, because a device that is
//! told an address writes there. Drivers here tell it only where the queues
//! and buffers lie that they own, and keep those until the device has let go
//! of them, so each write is justified once, in this file.
#![allow(unsafe_code)]

use super::{PortIo, Registers};

/// A window that one driver owns. Its parts (doorbell, interrupt status, rings)
/// share it; each part uses other registers.
#[derive(Debug)]
pub(crate) struct OwnedRegisters<R>(R);

impl<R: Registers> Clone for OwnedRegisters<R> {
    fn clone(&self) -> Self {
        // SAFETY: both are used by the parts of one driver of this crate, which
        // access different registers, or the same one by single reads and
        // writes whose order does not matter (doorbells).
        Self(unsafe { self.0.alias() })
    }
}

impl<R: Registers> OwnedRegisters<R> {
    /// Takes the window over: whoever has `registers` was promised to be the
    /// only one (see [`MmioRegisters::new`](super::MmioRegisters::new)).
    pub(crate) fn new(registers: R) -> Self {
        Self(registers)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    #[inline]
    pub(crate) fn read_u8(&self, offset: usize) -> u8 {
        self.0.read_u8(offset)
    }

    #[inline]
    pub(crate) fn read_u16(&self, offset: usize) -> u16 {
        self.0.read_u16(offset)
    }

    #[inline]
    pub(crate) fn read_u32(&self, offset: usize) -> u32 {
        self.0.read_u32(offset)
    }

    #[inline]
    pub(crate) fn write_u8(&self, offset: usize, value: u8) {
        // SAFETY: a driver here writes only addresses of memory that it owns.
        unsafe { self.0.write_u8(offset, value) };
    }

    #[inline]
    pub(crate) fn write_u16(&self, offset: usize, value: u16) {
        // SAFETY: as for `write_u8`.
        unsafe { self.0.write_u16(offset, value) };
    }

    #[inline]
    pub(crate) fn write_u32(&self, offset: usize, value: u32) {
        // SAFETY: as for `write_u8`.
        unsafe { self.0.write_u32(offset, value) };
    }
}

/// Ports that one driver owns.
#[derive(Debug)]
pub(crate) struct OwnedPorts<P>(P);

impl<P: PortIo> Clone for OwnedPorts<P> {
    fn clone(&self) -> Self {
        // SAFETY: both are used by the parts of one driver of this crate, which
        // access different ports.
        Self(unsafe { self.0.alias() })
    }
}

impl<P: PortIo> OwnedPorts<P> {
    /// Takes the ports over: whoever has them was promised to be the only one.
    pub(crate) fn new(ports: P) -> Self {
        Self(ports)
    }

    /// The ports, for string instructions.
    pub(crate) fn ports(&self) -> &P {
        &self.0
    }

    #[inline]
    pub(crate) fn read_u8(&self, port: u16) -> u8 {
        self.0.read_u8(port)
    }

    #[inline]
    pub(crate) fn write_u8(&self, port: u16, value: u8) {
        // SAFETY: a driver here writes only addresses of memory that it owns.
        unsafe { self.0.write_u8(port, value) };
    }

    #[inline]
    pub(crate) fn write_u32(&self, port: u16, value: u32) {
        // SAFETY: as for `write_u8`.
        unsafe { self.0.write_u32(port, value) };
    }
}
