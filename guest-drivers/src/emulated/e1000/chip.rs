//! Registers of the chip, and waiting for them: for what is not done for each
//! frame.
#![forbid(unsafe_code)]

use super::E1000Error;
use crate::register::{OwnedRegisters, Registers};
use core::cell::Cell;
use core::fmt;

/// Register accesses, each an exit of the virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ControlCounters {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// The registers.
pub(super) struct Chip<R> {
    registers: OwnedRegisters<R>,
    polls: u32,
    counters: Cell<ControlCounters>,
}

impl<R> fmt::Debug for Chip<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chip")
            .field("polls", &self.polls)
            .field("counters", &self.counters.get())
            .finish_non_exhaustive()
    }
}

impl<R: Registers> Chip<R> {
    /// Waits read a register so often at most.
    pub(super) fn new(registers: OwnedRegisters<R>, polls: u32) -> Self {
        Self {
            registers,
            polls: polls.max(1),
            counters: Cell::default(),
        }
    }

    /// The window.
    pub(super) fn registers(&self) -> OwnedRegisters<R> {
        self.registers.clone()
    }

    pub(super) fn counters(&self) -> ControlCounters {
        self.counters.get()
    }

    pub(super) fn read(&self, register: u32) -> u32 {
        let mut counters = self.counters.get();
        counters.reads += 1;
        self.counters.set(counters);
        self.registers.read_u32(register as usize)
    }

    pub(super) fn write(&self, register: u32, value: u32) {
        let mut counters = self.counters.get();
        counters.writes += 1;
        self.counters.set(counters);
        self.registers.write_u32(register as usize, value);
    }

    /// Reads a register until its value is as wanted. All ones, as nothing at
    /// all reads, are not.
    pub(super) fn wait(
        &self,
        register: u32,
        wanted: impl Fn(u32) -> bool,
    ) -> Result<u32, E1000Error> {
        let mut value = u32::MAX;
        for _ in 0..self.polls {
            value = self.read(register);
            if value != u32::MAX && wanted(value) {
                return Ok(value);
            }
        }
        Err(E1000Error::Timeout {
            register,
            value,
            polls: self.polls,
        })
    }
}
