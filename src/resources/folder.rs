//! A running machine's own folder: where its sockets and its log are, for its owner alone, as long as it runs.
//!
//! It is locked by who runs the machine, so that one that a killed husk left behind is known, and removed by the next.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::sys;

/// A name that is taken already is a matter of chance, as small as can be.
const ATTEMPTS: usize = 8;

/// The folder. It goes when this is dropped.
#[derive(Debug)]
pub struct MachineFolder {
    path: PathBuf,
    _lock: File,
}

impl MachineFolder {
    /// Makes one, in `$XDG_RUNTIME_DIR/husk` or else in `/tmp/husk-UID`, and removes those that nobody uses any more.
    pub fn create() -> Result<MachineFolder> {
        let base = base()?;
        let create = || {
            own(&base)?;
            remove_abandoned(&base)?;
            create_in(&base)
        };
        create().with_context(|| format!("make a folder for the machine in {}", base.display()))
    }

    /// Its own name: random, and no other machine's.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The path of a file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for MachineFolder {
    fn drop(&mut self) {
        // What cannot be removed now, the next machine tries to.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn base() -> Result<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    if let Some(runtime) = runtime.filter(|path| path.is_absolute() && path.is_dir()) {
        return Ok(runtime.join("husk"));
    }
    let user = fs::metadata("/proc/self").context("look at /proc/self")?.uid();
    Ok(PathBuf::from(format!("/tmp/husk-{user}")))
}

/// Makes the folder of all machines, if it is not there. It may be that somebody else made it first, to see what is in it.
fn own(base: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(base) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    let found = fs::symlink_metadata(base)?;
    let user = fs::metadata("/proc/self")?.uid();
    let private = found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0;
    ensure!(private, "it is there already and not private to this user: remove it");
    Ok(())
}

fn create_in(base: &Path) -> Result<MachineFolder> {
    for _ in 0..ATTEMPTS {
        let mut random = [0; 6];
        sys::getrandom(&mut random).context("choose a name")?;
        let path = base.join(random.map(|byte| format!("{byte:02x}")).concat());
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            created => created?,
        }
        // In between another husk may have taken it for abandoned.
        let Ok(lock) = open(&path) else { continue };
        if lock.try_lock().is_ok() && path.exists() {
            return Ok(MachineFolder { path, _lock: lock });
        }
    }
    bail!("every name is taken")
}

fn open(folder: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(folder)
}

fn remove_abandoned(base: &Path) -> Result<()> {
    for entry in fs::read_dir(base)? {
        let path = entry?.path();
        let Ok(folder) = open(&path) else { continue };
        // Held until it is gone: whoever has just made it and locks it later sees that.
        if folder.try_lock().is_ok() {
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_goes_with_its_machine() {
        let base = tempfile::tempdir().unwrap();
        let folder = create_in(base.path()).unwrap();
        fs::write(folder.file("log"), "x").unwrap();
        assert_eq!(fs::metadata(&folder.path).unwrap().permissions().mode() & 0o777, 0o700);
        let path = folder.path.clone();
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn only_what_nobody_holds_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let (held, left) = (create_in(base.path()).unwrap(), base.path().join("left"));
        fs::create_dir(&left).unwrap();
        fs::write(left.join("vsock"), "").unwrap();
        remove_abandoned(base.path()).unwrap();
        assert!(held.path.exists() && !left.exists());
    }

    #[test]
    fn machines_that_start_at_once_leave_each_other_alone() {
        let base = tempfile::tempdir().unwrap();
        let start = || {
            for _ in 0..500 {
                remove_abandoned(base.path()).unwrap();
                let folder = create_in(base.path()).unwrap();
                std::thread::yield_now();
                fs::write(folder.file("vsock"), "").unwrap();
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(start))));
    }

    #[test]
    fn a_folder_that_others_may_enter_is_not_used() {
        let base = tempfile::tempdir().unwrap();
        let husk = base.path().join("husk");
        own(&husk).unwrap();
        own(&husk).unwrap();
        fs::set_permissions(&husk, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(own(&husk).unwrap_err().to_string().contains("not private"));
    }
}
