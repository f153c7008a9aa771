//! From what husk itself has to say in the background to a file that stays small, whatever a guest provokes: standard
//! error is the file, and begins anew when it is full.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::console::stream_log;
use crate::sys::private_file;

/// When the file is this long it becomes the old one, and a new one starts.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// Where standard error goes, if that is such a file.
static PATH: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Has standard error go to the file at `path`, behind what is there, from now on.
pub fn begin(path: PathBuf) -> io::Result<()> {
    let mut place = PATH.lock().unwrap_or_else(PoisonError::into_inner);
    let file = private_file().append(true).create(true).open(&path)?;
    rustix::stdio::dup2_stderr(&file)?;
    *place = Some(path);
    Ok(())
}

/// Begins the file anew if it is full. To be called when something was said; on a full disk it stays as it is.
pub fn keep_small() {
    let place = PATH.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(path) = &*place else { return };
    if let Some(file) = anew(path, FILE_MAX_BYTES) {
        // What is said goes to the old one if this fails, which it does for nothing that passes.
        let _ = rustix::stdio::dup2_stderr(&file);
    }
}

/// A new file at `path`, if the one there has reached `max_bytes` and can be put aside.
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
