//! The guest image, built by this crate's build script.

use crate::scratch::Scratch;
use std::io;

/// The ELF file.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-image"));

/// The image in a file, which ends with the value.
///
/// # Errors
/// What the host says if it cannot be written.
pub fn write() -> io::Result<Scratch> {
    Scratch::with(IMAGE)
}
