//! The hostile guest with a network device over virtio-pci.

#[path = "hostile_net_guest/main.rs"]
mod over_pci;
