//! # pvkit-scripts
//!
//! The shipped drivers and the shipped devices, joined by memory and registers
//! that change under both of them: what the fuzz targets run, and the tests of
//! this crate over their seeds.
//!
//! The input of a target decodes into a set-up and a list of actions, some of
//! which [meddle](Meddling) with what lies between driver and device. As long
//! as nobody has meddled, everything has to work; from then on nothing need
//! work, but nobody panics, every call returns, and no memory is lost that was
//! not counted as leaked.
//!
//! - [`block_join`] is a driver and a device of virtio-blk;
//! - [`net_join`] is the same of virtio-net, over a switch;
//! - [`e1000()`] is the same of an e1000, or a guest without a driver;
//! - [`pci_config`] is how driver and device find each other on PCI, from both
//!   sides;
//! - [`frame_offload`] is no script: any frame, and what is said of it.

mod block;
mod buffer;
mod e1000;
mod far_end;
mod forge;
mod meddler;
mod meddling;
mod net;
mod offload;
mod pci;

pub use block::block_join;
pub use e1000::e1000;
pub use meddling::{Area, Meddling};
pub use net::net_join;
pub use offload::frame_offload;
pub use pci::pci_config;

use arbitrary::{Arbitrary, Unstructured};
use pvkit_join::arena::{Arena, BASE};
use std::cell::RefCell;

thread_local! {
    /// Mapping memory costs more than most scripts.
    static ARENAS: RefCell<Vec<Arena>> = const { RefCell::new(Vec::new()) };
}

/// Guest memory of so many bytes, all of them 0.
fn clean_arena(bytes: usize) -> Arena {
    let kept = ARENAS.with_borrow_mut(|arenas| {
        let fits = arenas.iter().position(|arena| arena.bytes() == bytes);
        fits.map(|index| arenas.swap_remove(index))
    });
    let arena = kept.unwrap_or_else(|| Arena::new(bytes));
    let zeros = vec![0; bytes];
    arena.snapshot().write(BASE, &zeros).expect("RAM");
    arena
}

/// Keeps memory that nobody uses any more for the next script.
fn keep_arena(arena: Arena) {
    assert_eq!((arena.in_use(), arena.leaked()), (0, 0), "memory is free");
    ARENAS.with_borrow_mut(|arenas| arenas.push(arena));
}

/// Plays a script of up to `most` actions.
fn play<'a, A: Arbitrary<'a>>(bytes: &mut Unstructured<'a>, most: usize, mut act: impl FnMut(A)) {
    for _ in 0..most {
        if bytes.is_empty() {
            break;
        }
        let Ok(action) = A::arbitrary(bytes) else {
            break;
        };
        act(action);
    }
}
