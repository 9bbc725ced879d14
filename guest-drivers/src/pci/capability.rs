//! The list of capabilities (PCI Local Bus Specification 3.0, §6.7).
#![forbid(unsafe_code)]

use super::{ConfigAccess, PciConfig};
use pvkit_protocol::pci::{Bdf, Status, capability, header};

/// The capabilities of a function: id and offset of each. The list ends at the
/// latest when more have come than fit, so that one that goes in circles ends
/// too; offsets are always behind the header.
#[derive(Debug)]
pub struct Capabilities<'a, A> {
    config: &'a PciConfig<A>,
    place: Bdf,
    next: u8,
    left: u8,
}

impl<A: ConfigAccess> PciConfig<A> {
    /// The capabilities of a function, in its order.
    #[must_use]
    pub fn capabilities(&self, place: Bdf) -> Capabilities<'_, A> {
        let status = Status::from_bits_retain(self.read_u16(place, header::STATUS));
        let next = if status.contains(Status::CAPABILITIES) {
            self.read_u8(place, header::CAPABILITIES)
        } else {
            0
        };
        Capabilities {
            config: self,
            place,
            next,
            left: capability::MOST,
        }
    }

    /// The offset of the first capability with this id.
    #[must_use]
    pub fn capability(&self, place: Bdf, id: u8) -> Option<u8> {
        let mut all = self.capabilities(place);
        all.find(|found| found.0 == id).map(|(_, offset)| offset)
    }

    /// Reads bytes from `offset` on. What lies beyond configuration space
    /// reads as ones.
    pub fn read_bytes(&self, place: Bdf, offset: u8, out: &mut [u8]) {
        let mut word = (None, [0; 4]);
        for (index, byte) in out.iter_mut().enumerate() {
            let at = u8::try_from(usize::from(offset) + index);
            let Ok(at) = at else {
                *byte = 0xff;
                continue;
            };
            let aligned = at & !3;
            if word.0 != Some(aligned) {
                word = (Some(aligned), self.read_u32(place, aligned).to_le_bytes());
            }
            *byte = word.1.get(usize::from(at & 3)).copied().unwrap_or(0xff);
        }
    }
}

impl<A: ConfigAccess> Iterator for Capabilities<'_, A> {
    type Item = (u8, u8);

    fn next(&mut self) -> Option<Self::Item> {
        let offset = self.next & capability::NEXT_MASK;
        if offset < header::END {
            return None;
        }
        self.left = self.left.checked_sub(1)?;
        let [id, next] = self.config.read_u16(self.place, offset).to_le_bytes();
        // An absent function reads as ones.
        if id == 0xff {
            return None;
        }
        self.next = next;
        Some((id, offset))
    }
}
