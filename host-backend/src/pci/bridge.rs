//! The two functions that every machine with an Intel 440FX chipset has: the
//! host bridge, and the ISA bridge beside which other functions of the PIIX3
//! chip stand.
#![forbid(unsafe_code)]

use super::{AttachError, ConfigSpace, FunctionId, PciFunction, PciRoot};
use pvkit_protocol::pci::{Bdf, INTX_LINES, class, header, i440fx};
use std::sync::{Arc, Mutex};

/// Where the host bridge stands.
pub const HOST_BRIDGE: Bdf = Bdf::new(0, 0);
/// Where the ISA bridge stands.
pub const ISA_BRIDGE: Bdf = Bdf::new(1, 0);

/// A function that is there to be found, and has nothing but its
/// configuration space.
#[derive(Debug)]
pub struct Bridge(ConfigSpace);

impl Bridge {
    /// The 82441FX host bridge.
    #[must_use]
    pub fn host() -> Self {
        Self(ConfigSpace::new(FunctionId {
            vendor: i440fx::VENDOR,
            device: i440fx::HOST_BRIDGE,
            revision: 2,
            class: class::HOST_BRIDGE,
            prog_if: 0,
        }))
    }

    /// The PIIX3 ISA bridge. Its slot has several functions. The guest can
    /// write the PIRQ route registers; where the lines really go is the
    /// monitor's choice.
    #[must_use]
    pub fn isa() -> Self {
        let mut config = ConfigSpace::new(FunctionId {
            vendor: i440fx::VENDOR,
            device: i440fx::ISA_BRIDGE,
            revision: 0,
            class: class::ISA_BRIDGE,
            prog_if: 0,
        });
        config.set(header::HEADER_TYPE, &[header::MULTI_FUNCTION]);
        config.set(
            i440fx::PIRQ_ROUTE,
            &[i440fx::PIRQ_DISABLED; INTX_LINES as usize],
        );
        // Bit 7 switches the route off; bits 3:0 are the interrupt line.
        config.allow(i440fx::PIRQ_ROUTE, &[0x8f; INTX_LINES as usize]);
        Self(config)
    }
}

impl PciFunction for Bridge {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.0
    }
    fn read_bar(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
}

/// Attaches both bridges.
///
/// # Errors
/// [`AttachError::Taken`] if something else stands in their place.
pub fn attach(root: &PciRoot) -> Result<(), AttachError> {
    root.attach(HOST_BRIDGE, Arc::new(Mutex::new(Bridge::host())))?;
    root.attach(ISA_BRIDGE, Arc::new(Mutex::new(Bridge::isa())))
}
