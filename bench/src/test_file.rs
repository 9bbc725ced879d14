//! The file behind all disks.
//!
//! Its first half is only read, and keeps the content that it is made with.
//! Its second half is written to, and checked when all is over.

use crate::scratch::Scratch;
use anyhow::{Context, Result};
use pvkit_workload::pattern::{self, FIRST, Round, SECTOR_BYTES};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Sectors of each half: 64 MiB.
pub const HALF_SECTORS: u64 = (64 << 20) / SECTOR_BYTES as u64;
/// First sector of the half that is written to.
pub const WRITE_SECTOR: u64 = HALF_SECTORS;

const CHUNK: usize = 1 << 20;

/// What is on the disk at the start.
#[must_use]
pub fn content() -> Vec<u8> {
    let mut content = vec![0; 2 * HALF_SECTORS as usize * SECTOR_BYTES];
    for (number, chunk) in content.chunks_exact_mut(CHUNK).enumerate() {
        let first = (number * CHUNK / SECTOR_BYTES) as u64;
        pattern::fill(chunk, first, FIRST, number as u32);
    }
    content
}

/// The file, which has no name and ends with the value.
#[derive(Debug)]
pub struct TestFile(Scratch);

impl TestFile {
    /// Makes the file in `directory`, and leaves it in the page cache, with
    /// nothing left to write back.
    ///
    /// # Errors
    /// If the directory cannot be written to, or is full.
    pub fn new(directory: &Path) -> Result<Self> {
        let context = || format!("a test file of 128 MiB in {}", directory.display());
        let file = Scratch::new(directory).with_context(context)?;
        file.file().write_all(&content()).with_context(context)?;
        file.file().sync_all().with_context(context)?;
        Ok(Self(file))
    }

    /// A path by which it can be opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Checks every byte: the first half is as it was made, and each sector of
    /// the second half is as some round up to `last` wrote it. Returns the
    /// number of sectors that were written.
    ///
    /// # Errors
    /// The first wrong sector.
    pub fn verify(&self, last: Round) -> Result<u64> {
        let mut file = File::open(self.path())?;
        let mut chunk = vec![0; CHUNK];
        let mut written = 0;
        let sectors_each = (CHUNK / SECTOR_BYTES) as u64;
        for number in 0..2 * HALF_SECTORS / sectors_each {
            let first = number * sectors_each;
            file.seek(SeekFrom::Start(first * SECTOR_BYTES as u64))?;
            file.read_exact(&mut chunk)?;
            let rounds = if first < WRITE_SECTOR {
                FIRST..=FIRST
            } else {
                FIRST..=last
            };
            pattern::check(&chunk, first, rounds)
                .context("the file behind the disks is damaged")?;
            if first >= WRITE_SECTOR {
                written += chunk
                    .chunks_exact(SECTOR_BYTES)
                    .filter(|sector| sector.get(8..12).is_some_and(|round| round != [0; 4]))
                    .count() as u64;
            }
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_file_verifies_and_damage_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let file = TestFile::new(directory.path()).unwrap();
        assert_eq!(file.verify(Round(3)).unwrap(), 0);

        let mut sector = [0; SECTOR_BYTES];
        let place = (WRITE_SECTOR + 5) * SECTOR_BYTES as u64;
        pattern::fill(&mut sector, WRITE_SECTOR + 5, Round(2), 9);
        let mut handle = File::options().write(true).open(file.path()).unwrap();
        handle.seek(SeekFrom::Start(place)).unwrap();
        handle.write_all(&sector).unwrap();
        assert_eq!(file.verify(Round(3)).unwrap(), 1);
        assert!(file.verify(Round(1)).is_err(), "a round that was not run");

        handle.seek(SeekFrom::Start(place + 300)).unwrap();
        handle.write_all(&[0x55]).unwrap();
        assert!(file.verify(Round(3)).is_err(), "one byte in 128 MiB");
    }
}
