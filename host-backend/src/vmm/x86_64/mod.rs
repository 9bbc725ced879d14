//! What is x86-64 only: memory layout, CPU state at start, PVH.
#![forbid(unsafe_code)]

mod boot;
pub(super) mod layout;
mod registers;

pub use boot::LoadError;
pub(super) use boot::load;
pub(super) use registers::set_up_vcpu;
