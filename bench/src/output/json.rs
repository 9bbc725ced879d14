//! The JSON file, schema `pvkit-bench/1`.

use crate::machine::Machine;
use crate::measure::{Pair, RowResult};
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;
use std::io::Write;
use std::path::Path;

/// The whole file.
#[derive(Debug, Serialize)]
pub struct Document<'a> {
    /// `pvkit-bench/1`.
    pub schema: &'static str,
    /// The machine that was measured on.
    pub machine: &'a Machine,
    /// One entry a row.
    pub results: &'a [RowResult],
    /// Comparisons.
    pub pairs: &'a [Pair],
    /// What was left out, and why.
    pub skipped: &'a [String],
}

/// The name of the schema.
pub const SCHEMA: &str = "pvkit-bench/1";

/// Writes the file, whole or not at all.
///
/// # Errors
/// If it cannot be written; a file that was there before is then unchanged.
pub fn write(path: &Path, document: &Document<'_>) -> Result<()> {
    let context = || format!("writing {}", path.display());
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(directory).with_context(context)?;
    serde_json::to_writer_pretty(&mut file, document).with_context(context)?;
    writeln!(file).with_context(context)?;
    // As any new file of this user, not private to it.
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::Permissions::from_mode(0o644);
    file.as_file().set_permissions(mode).with_context(context)?;
    file.persist(path).with_context(context)?;
    Ok(())
}

/// Checks early that the file can be written, before minutes are spent.
///
/// # Errors
/// If its directory cannot be written to.
pub fn check(path: &Path) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if path.is_dir() {
        anyhow::bail!(
            "--json {}: this is a directory; name a file",
            path.display()
        );
    }
    tempfile::NamedTempFile::new_in(directory).with_context(|| {
        format!(
            "--json {}: the directory cannot be written to",
            path.display()
        )
    })?;
    Ok(())
}
