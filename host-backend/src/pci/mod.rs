//! A small PCI host bridge.
#![forbid(unsafe_code)]
