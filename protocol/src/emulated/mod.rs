//! Devices that exist as chips, and that hypervisors imitate: the baseline
//! that paravirtual devices are compared with.

pub mod ata;
pub mod e1000;
