//! Reads and writes small text files for the user. The content never comes from a guest.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The maximum size of a configuration.
const MAX_BYTES: u64 = 1 << 20;

/// Reads a text file or a pipe of at most 1 MiB.
pub fn read(path: &Path) -> Result<String> {
    read_at_most(MAX_BYTES, path)
}

/// Reads a text file or a pipe of at most `max_bytes`, which must be whole MiB.
pub fn read_at_most(max_bytes: u64, path: &Path) -> Result<String> {
    let read = || -> Result<String> {
        let mut text = String::new();
        let read_bytes = File::open(path)?.take(max_bytes + 1).read_to_string(&mut text)?;
        ensure!(read_bytes as u64 <= max_bytes, "longer than {} MiB", max_bytes >> 20);
        Ok(text)
    };
    read().with_context(|| format!("read {}", path.display()))
}

/// Fails, as [`read`] does, if the file does not exist.
pub fn check_exists(path: &Path) -> Result<()> {
    fs::metadata(path).map(drop).with_context(|| format!("read {}", path.display()))
}

/// Writes a text file, replacing an existing one.
pub fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endless_file_is_rejected() {
        let error = format!("{:#}", read(Path::new("/dev/zero")).unwrap_err());
        assert_eq!(error, "read /dev/zero: longer than 1 MiB");
        let error = format!("{:#}", read_at_most(3 << 20, Path::new("/dev/zero")).unwrap_err());
        assert_eq!(error, "read /dev/zero: longer than 3 MiB");
    }

    #[test]
    fn written_text_is_read_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write(file.path(), "text\n").unwrap();
        assert_eq!(read(file.path()).unwrap(), "text\n");
    }
}
