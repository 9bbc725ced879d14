//! A pass without a virtual machine: driver and device in one process.
