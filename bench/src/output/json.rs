//! The JSON file, schema `pvkit-bench/1`.

use crate::instructions::Instructions;
use crate::machine::Machine;
use crate::measure::{Pair, RowResult};
use crate::net::result::{NetPair, NetResult};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The whole file.
#[derive(Debug, Serialize)]
pub struct Document<'a> {
    /// `pvkit-bench/1`.
    pub schema: &'static str,
    /// The machine that was measured on.
    pub machine: &'a Machine,
    /// One entry a row: those of disks, then those of network cards.
    pub results: Vec<Entry<'a, RowResult, NetResult>>,
    /// Comparisons, the same way.
    pub pairs: Vec<Entry<'a, Pair, NetPair>>,
    /// Instructions that drivers take; empty unless they were counted.
    pub instructions: &'a [Instructions],
    /// What was left out, and why.
    pub skipped: &'a [String],
}

/// Something about a disk, or about a network card.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Entry<'a, D, N> {
    /// About a disk.
    Disk(&'a D),
    /// About a network card.
    Net(&'a N),
}

/// Both lists in one.
pub fn entries<'a, D, N>(disks: &'a [D], nets: &'a [N]) -> Vec<Entry<'a, D, N>> {
    let disks = disks.iter().map(Entry::Disk);
    disks.chain(nets.iter().map(Entry::Net)).collect()
}

/// The name of the schema.
pub const SCHEMA: &str = "pvkit-bench/1";

/// Writes the file, whole or not at all.
///
/// # Errors
/// If it cannot be written; a file that was there before is then unchanged.
pub fn write(path: &Path, document: &Document<'_>) -> Result<()> {
    let path = target(path)?;
    let context = || format!("writing {}", path.display());
    let mut file = tempfile::NamedTempFile::new_in(directory(&path)).with_context(context)?;
    serde_json::to_writer_pretty(&mut file, document).with_context(context)?;
    writeln!(file).with_context(context)?;
    // As any new file of this user, not private to it.
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::Permissions::from_mode(0o644);
    file.as_file().set_permissions(mode).with_context(context)?;
    file.persist(&path).with_context(context)?;
    Ok(())
}

/// Checks early that the file can be written, before minutes are spent.
///
/// # Errors
/// If it is no file, or its directory cannot be written to.
pub fn check(path: &Path) -> Result<()> {
    tempfile::NamedTempFile::new_in(directory(&target(path)?)).with_context(|| {
        format!(
            "--json {}: the directory cannot be written to",
            path.display()
        )
    })?;
    Ok(())
}

/// The file that `path` names, behind symbolic links. What is written there
/// takes its place, so it must be a file: a device would be gone.
fn target(path: &Path) -> Result<PathBuf> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(path.canonicalize()?),
        Ok(_) => bail!(
            "--json {}: this is a directory or a device; name a file",
            path.display()
        ),
        Err(_) => Ok(path.to_owned()),
    }
}

fn directory(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    #[test]
    fn only_files_are_replaced_and_links_stay() {
        let directory = tempfile::tempdir().unwrap();
        let machine = Machine::look(directory.path(), 0);
        let document = Document {
            schema: SCHEMA,
            machine: &machine,
            results: Vec::new(),
            pairs: Vec::new(),
            instructions: &[],
            skipped: &[],
        };
        let at = |name: &str| directory.path().join(name);
        fs::write(at("old"), "old").unwrap();
        symlink("old", at("link")).unwrap();
        // Neither file nor directory, as a device is.
        let _listener = UnixListener::bind(at("socket")).unwrap();
        symlink("socket", at("link-to-socket")).unwrap();
        for name in ["new", "link"] {
            check(&at(name)).unwrap();
            write(&at(name), &document).unwrap();
        }
        for name in ["new", "old"] {
            assert!(fs::read_to_string(at(name)).unwrap().contains(SCHEMA));
        }
        assert!(at("link").is_symlink());
        for name in ["socket", "link-to-socket", "."] {
            for error in [check(&at(name)), write(&at(name), &document)] {
                let error = format!("{:#}", error.unwrap_err());
                assert!(error.contains("name a file"), "{error}");
            }
        }
        assert!(at("socket").exists() && !at("socket").is_file());
        let error = check(&at("missing/file")).unwrap_err().to_string();
        assert!(error.contains("missing/file"), "{error}");
    }
}
