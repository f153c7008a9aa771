//! The log of a husk process in the background. Standard error is redirected to a file that is replaced when it is
//! full, so that it stays small whatever a guest provokes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::console::stream_log;
use crate::sys::private_file;

/// At this size the file becomes the old log and a new one is started.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// The path of the log, if standard error is redirected to one.
static PATH: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Redirects standard error to the end of the file at `path`.
pub fn begin(path: PathBuf) -> io::Result<()> {
    let mut place = PATH.lock().unwrap_or_else(PoisonError::into_inner);
    let file = private_file().append(true).create(true).open(&path)?;
    rustix::stdio::dup2_stderr(&file)?;
    *place = Some(path);
    Ok(())
}

/// Rotates the file if it is full. Call this after writing to it. On a full disk the file stays as it is.
pub fn keep_small() {
    let place = PATH.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(path) = &*place else { return };
    if let Some(file) = anew(path, FILE_MAX_BYTES) {
        // If this fails, messages go to the old log. There is no transient reason for that.
        let _ = rustix::stdio::dup2_stderr(&file);
    }
}

/// Creates a new file at `path` if the existing one has reached `max_bytes` and can be renamed.
fn anew(path: &Path, max_bytes: u64) -> Option<File> {
    let is_full = path.metadata().is_ok_and(|file| file.len() >= max_bytes);
    if is_full { stream_log::rotate(path).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn a_flood_leaves_two_small_files_and_its_last_lines() {
        const MAX_BYTES: u64 = 10_000;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("husk.log");
        let mut file = File::create(&path).unwrap();
        for n in 0..100_000 {
            writeln!(file, "line {n}").unwrap();
            file = anew(&path, MAX_BYTES).unwrap_or(file);
        }
        let texts = ["husk.old", "husk.log"].map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
        assert!(texts.iter().all(|text| text.len() < MAX_BYTES as usize + 20), "{:?}", texts.map(|text| text.len()));
        assert!(texts.concat().ends_with("line 99998\nline 99999\n"));
    }
}
