//! What is in a volume when it is mounted: what the image has in its place, and whose it is.

use std::fs::{self, Permissions};
use std::io::{self, BufReader, BufWriter};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown};
use std::path::{Path, PathBuf};
use std::thread;

use husk_protocol::tree::{self, Terms};

use crate::errors::{Context, Failure};
use crate::identity;
use crate::report;

/// A user that no volume belongs to by itself.
const ANOTHER: u32 = 1;

/// Copies the directory `from` of the image, if there is one, to the directory `to`, with modes, times, hard links and the
/// attributes that a volume can have, and with owners if the host has users for them. Devices and the like are left out. Does nothing unless
/// `to` is empty: the machine may have been started again by its restart policy, or another one have filled it meanwhile.
pub fn fill(to: &Path, from: &Path) -> Result<(), Failure> {
    let what = || format!("copy {} of the image to its volume", from.display());
    if fs::read_dir(to).context(what())?.next().is_some() {
        return Ok(());
    }
    let Ok(found) = fs::metadata(from) else { return Ok(()) };
    let Some(first) = fs::read_dir(from).context(what())?.next() else { return take_after(to, &found).context(what()) };
    first.context(what())?;
    let owners = can_have_owners(to);
    let (read, write) = io::pipe().context(what())?;
    let received = thread::scope(|scope| {
        let send = move || tree::send_root(from, &mut BufWriter::new(write));
        thread::Builder::new().spawn_scoped(scope, send)?;
        let terms = Terms { owners, trusted: true, attributes: true, ..Terms::default() };
        tree::receive(&mut BufReader::new(read), to, terms, &mut |_| {})
    });
    let skipped = received.context(what())?.skipped;
    if let Some(first) = skipped.first() {
        report::say(&format!("left out of a volume: {first}, and {} more", skipped.len() - 1));
    }
    if !owners {
        report::say(&format!("{}: its files have no owners, since the host has no users for them", from.display()));
    }
    take_after(to, &found).context(what())
}

/// A host without subordinate IDs for husk's user has one user for all.
fn can_have_owners(dir: &Path) -> bool {
    chown(dir, Some(ANOTHER), Some(ANOTHER)).is_ok()
}

fn take_after(dir: &Path, other: &fs::Metadata) -> io::Result<()> {
    let _ = chown(dir, Some(other.uid()), Some(other.gid()));
    fs::set_permissions(dir, Permissions::from_mode(other.mode() & 0o7777))
}

/// Gives `path`, and all that is in it, to the user `user` of the image (`USER[:GROUP]`). Links are not followed.
pub fn give(path: &Path, user: &str) -> Result<(), Failure> {
    let [passwd, group] = ["/etc/passwd", "/etc/group"].map(|file| fs::read(file).unwrap_or_default());
    let owner = identity::find(user, &passwd, &group).map_err(Failure::new)?;
    let mut left: Vec<PathBuf> = vec![path.to_owned()];
    while let Some(next) = left.pop() {
        let what = || format!("change the owner of {}", next.display());
        let found = fs::symlink_metadata(&next).context(what())?;
        if (found.uid(), found.gid()) != (owner.uid, owner.gid) {
            lchown(&next, Some(owner.uid), Some(owner.gid)).context(what())?;
        }
        if found.is_dir() {
            for entry in fs::read_dir(&next).context(what())? {
                left.push(entry.context(what())?.path());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_begins_with_the_modes_and_files_of_the_image() {
        let dir = std::env::temp_dir().join(format!("husk-init-content-{}", std::process::id()));
        let (from, to, bare) = (dir.join("from"), dir.join("to"), dir.join("bare"));
        for made in [&from.join("deep/er"), &to, &bare] {
            fs::create_dir_all(made).unwrap();
        }
        fs::write(from.join("deep/er/f"), "content").unwrap();
        fs::hard_link(from.join("deep/er/f"), from.join("same")).unwrap();
        std::os::unix::fs::symlink("deep", from.join("link")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        for (path, bits) in [(from.clone(), 0o1770), (from.join("deep"), 0o711), (from.join("deep/er/f"), 0o600)] {
            fs::set_permissions(path, Permissions::from_mode(bits)).unwrap();
        }
        fill(&to, &from).unwrap();
        assert_eq!(fs::read_to_string(to.join("link/er/f")).unwrap(), "content");
        assert_eq!([mode(&to), mode(&to.join("deep")), mode(&to.join("deep/er/f"))], [0o1770, 0o711, 0o600]);
        let inode = |path: &str| fs::metadata(to.join(path)).unwrap().ino();
        assert_eq!(inode("same"), inode("deep/er/f"));
        let owner = |path: &Path| fs::metadata(path).unwrap().uid();
        assert_eq!(owner(&to), owner(&from), "the one that was tried is not left");
        // What has changed since stays.
        fs::write(to.join("same"), "changed").unwrap();
        fill(&to, &from).unwrap();
        assert_eq!(fs::read_to_string(to.join("same")).unwrap(), "changed");
        fs::remove_dir_all(from.join("deep")).unwrap();
        fs::remove_file(from.join("link")).unwrap();
        fs::remove_file(from.join("same")).unwrap();
        fill(&bare, &from).unwrap();
        assert_eq!((mode(&bare), fs::read_dir(&bare).unwrap().count()), (0o1770, 0));
        fill(&bare, &dir.join("missing")).unwrap();
        give(&to, &owner(&to).to_string()).unwrap();
        assert!(give(&to, "nobody-has-this-name").unwrap_err().message.contains("no user"));
        fs::remove_dir_all(dir).unwrap();
    }
}
