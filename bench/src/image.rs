//! The guest image, built by this crate's build script.

use std::io::{self, Write};
use tempfile::NamedTempFile;

/// The ELF file.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-image"));

/// The image in a file, which is removed when the value is dropped.
///
/// # Errors
/// What the host says if it cannot be written.
pub fn write() -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::with_prefix("pvkit-guest-")?;
    file.write_all(IMAGE)?;
    file.flush()?;
    Ok(file)
}
