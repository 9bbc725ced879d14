//! Drivers of chips that hypervisors imitate.
#![forbid(unsafe_code)]
