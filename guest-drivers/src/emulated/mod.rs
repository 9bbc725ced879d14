//! Drivers of chips that hypervisors imitate.

pub mod ata;
pub mod e1000;
