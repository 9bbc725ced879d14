//! Files that are gone when the program is, however it ends.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A file without a name in any directory: a signal leaves nothing behind.
#[derive(Debug)]
pub struct Scratch {
    file: File,
    path: PathBuf,
}

impl Scratch {
    /// A file on the file system of `directory`.
    ///
    /// # Errors
    /// What the host says if it cannot be made.
    pub fn new(directory: &Path) -> io::Result<Self> {
        let file = tempfile::tempfile_in(directory)?;
        // By number, so that it is right in QEMU's process too.
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        Ok(Self {
            file,
            path: path.into(),
        })
    }

    /// A file in the directory for temporary files, with this content.
    ///
    /// # Errors
    /// What the host says if it cannot be written.
    pub fn with(content: &[u8]) -> io::Result<Self> {
        let mut scratch = Self::new(&std::env::temp_dir())?;
        scratch.file.write_all(content)?;
        Ok(scratch)
    }

    /// A path by which it can be opened as long as the value lives.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, open for reading and writing.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_opened_and_is_in_no_directory() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(directory.path()).unwrap();
        scratch.file().write_all(b"text").unwrap();
        assert_eq!(std::fs::read(scratch.path()).unwrap(), b"text");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
