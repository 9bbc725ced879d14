//! What a handler does when the chip interrupts.
#![forbid(unsafe_code)]

use super::{Masking, receive};
use crate::fault::Fault;
use crate::register::{OwnedRegisters, Registers};
use core::fmt;
use pvkit_protocol::emulated::e1000::{Cause, register};

/// What the handler has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct InterruptCounters {
    /// Looks at the cause, each one register read.
    pub reads: u64,
    /// Those that found one.
    pub claimed: u64,
    /// Register writes that masked causes.
    pub mask_writes: u64,
}

/// The handler's part of an [`E1000`](super::E1000). One at a time is used.
pub struct E1000Interrupts<R> {
    registers: OwnedRegisters<R>,
    masking: Masking,
    counters: InterruptCounters,
}

impl<R> fmt::Debug for E1000Interrupts<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("E1000Interrupts")
            .field("masking", &self.masking)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl<R: Registers> E1000Interrupts<R> {
    pub(super) fn new(registers: OwnedRegisters<R>, masking: Masking) -> Self {
        Self {
            registers,
            masking,
            counters: InterruptCounters::default(),
        }
    }

    /// What it has done so far.
    #[must_use]
    pub fn counters(&self) -> InterruptCounters {
        self.counters
    }

    /// Asks the chip why it interrupts, which also ends the interrupt: one
    /// register read. `None` if it does not: on a line that several share, it
    /// was another device. With [`Masking::Claimed`], one write follows that
    /// keeps the cause from interrupting until a half is armed again.
    ///
    /// # Errors
    /// [`Fault::Register`]: there is no device any more.
    pub fn claim(&mut self) -> Result<Option<Cause>, Fault> {
        self.counters.reads += 1;
        let value = self.registers.read_u32(register::ICR as usize);
        if value == u32::MAX {
            return Err(Fault::Register {
                register: register::ICR as u16,
                value,
            });
        }
        let cause = Cause::from_bits_retain(value) - Cause::INT_ASSERTED;
        if cause.is_empty() {
            return Ok(None);
        }
        self.counters.claimed += 1;
        if self.masking == Masking::Claimed {
            let mut mask = cause & Cause::TXDW;
            if cause.intersects(receive::CAUSES) {
                mask |= receive::CAUSES;
            }
            if !mask.is_empty() {
                self.counters.mask_writes += 1;
                self.registers
                    .write_u32(register::IMC as usize, mask.bits());
            }
        }
        Ok(Some(cause))
    }
}
