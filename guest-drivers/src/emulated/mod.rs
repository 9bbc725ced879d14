//! Drivers of chips that hypervisors imitate.

pub mod ata;
