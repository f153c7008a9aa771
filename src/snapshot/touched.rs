//! The record of a warm image's pages that a machine has touched: read with the snapshot, and written after the first run.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::{TOUCHED, check_file};
use crate::memory::touched::RECORD_BYTES_MAX;

/// Reads a record. What is beyond the maximum is left out.
pub(super) fn read(file: File) -> Result<Vec<u8>> {
    check_file(&file)?;
    let mut record = Vec::new();
    file.take(RECORD_BYTES_MAX as u64).read_to_end(&mut record)?;
    Ok(record)
}

/// Adds a record to the snapshot in the directory `dir`, whole or not at all. Several processes may do that at once.
pub fn write(dir: &Path, record: &[u8]) -> Result<()> {
    let new = dir.join(format!("{TOUCHED}.{}", std::process::id()));
    let written = File::options().write(true).create_new(true).mode(0o600).open(&new).and_then(|mut file| {
        file.write_all(record)?;
        fs::rename(&new, dir.join(TOUCHED))
    });
    written.inspect_err(|_| drop(fs::remove_file(&new))).with_context(|| format!("write {}", new.display()))
}
