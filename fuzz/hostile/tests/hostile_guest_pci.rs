//! The hostile guest over virtio-pci.

#[path = "hostile_guest/main.rs"]
mod over_pci;
