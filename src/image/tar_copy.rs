//! Converts a tar archive to the stream with which `husk cp` copies files into a machine.

use std::io::{self, Read, Write};

use anyhow::{Context, Result, ensure};
use husk_protocol::tree::{About, Copied, Entry, NOT_COPIED, Writer};

use super::tar::{Archive, Kind, Stream, shown};
use super::tree::{Attributes, components};

/// The chunk size for file contents.
const PIECE_BYTES: usize = 256 << 10;

/// The maximum size of padding after the end of an archive: a block of tar, which may be larger than the default of 10
/// KiB.
const BLOCK_MAX_BYTES: u64 = 1 << 20;

/// Sends the contents of `archive` to a receiver that writes them to a directory. Existing directories that are only
/// parents of entries are not changed. `progress` receives the number of bytes sent.
pub fn send(archive: impl Read, out: impl Write, progress: &mut impl FnMut(u64)) -> Result<Copied> {
    let mut sender = Sender { out: Writer::new(out), open: Vec::new(), copied: Copied::default(), progress };
    let sent = sender.send_all(Archive::new(Stream(archive)));
    let last = match &sent {
        Ok(()) => Entry::End,
        Err(error) => Entry::Failed(format!("{error:#}").chars().take(1024).collect()),
    };
    let ended = sender.out.say(&last).and_then(|()| sender.out.flush());
    sent?;
    ended.context("send the archive")?;
    Ok(sender.copied)
}

struct Sender<'a, W, P> {
    out: Writer<W>,
    /// The directories currently open, below the first.
    open: Vec<Vec<u8>>,
    copied: Copied,
    progress: &'a mut P,
}

impl<W: Write, P: FnMut(u64)> Sender<'_, W, P> {
    fn send_all<R: Read>(&mut self, mut archive: Archive<Stream<R>>) -> Result<()> {
        self.out.say(&Entry::Enter(b".".to_vec()))?;
        while let Some(entry) = archive.next_entry().context("read the archive")? {
            let mut names = names(&entry.path)?;
            // The destination directory itself belongs to the user.
            let Some(name) = names.pop() else { continue };
            self.go_to(&names)?;
            let about = about(&entry.attributes);
            self.copied.entries += 1;
            let message = match &entry.kind {
                Kind::Directory => {
                    self.open.push(name.clone());
                    Entry::Directory(name, about)
                }
                Kind::Symlink(target) => Entry::Link(name, target.clone(), about),
                Kind::Hardlink(target) => Entry::Same(name, self::names(target)?),
                Kind::File => Entry::File(name, about, entry.content_bytes),
                Kind::Sparse { size_bytes, .. } => Entry::File(name, about, *size_bytes),
                Kind::Character { .. } | Kind::Block { .. } | Kind::Fifo => {
                    self.copied.entries -= 1;
                    self.copied.skipped.push(format!("{}: {NOT_COPIED}", shown(&entry.path)));
                    continue;
                }
            };
            self.out.say(&message).with_context(|| shown(&entry.path))?;
            match entry.kind {
                Kind::File => self.content(&mut archive.content(), entry.content_bytes)?,
                Kind::Sparse { size_bytes, parts } => {
                    let mut at = 0;
                    for part in parts {
                        self.content(&mut io::repeat(0), part.start.saturating_sub(at))?;
                        self.content(&mut archive.content(), part.end.saturating_sub(part.start))?;
                        at = part.end;
                    }
                    self.content(&mut io::repeat(0), size_bytes.saturating_sub(at))?;
                }
                _ => continue,
            }
            self.out.piece(&[])?;
        }
        // The padding is read as well, so that the archive's writer does not get SIGPIPE.
        io::copy(&mut archive.into_inner().take(BLOCK_MAX_BYTES), &mut io::sink()).context("read the archive")?;
        self.go_to(&[])?;
        self.out.say(&Entry::Leave)?;
        Ok(())
    }

    /// Leaves and enters directories until the position is `names`.
    fn go_to(&mut self, names: &[Vec<u8>]) -> Result<()> {
        let common = self.open.iter().zip(names).take_while(|(open, name)| open == name).count();
        for _ in self.open.drain(common..) {
            self.out.say(&Entry::Leave)?;
        }
        for name in names.iter().skip(common) {
            self.out.say(&Entry::Enter(name.clone()))?;
            self.open.push(name.clone());
        }
        Ok(())
    }

    fn content(&mut self, from: &mut impl Read, mut len_bytes: u64) -> Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        while len_bytes > 0 {
            let most = usize::try_from(len_bytes).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let count = from.read(piece.get_mut(..most).unwrap_or_default()).context("read the archive")?;
            ensure!(count > 0, "the archive ends in the middle of a file");
            self.out.piece(piece.get(..count).unwrap_or_default())?;
            len_bytes -= count as u64;
            self.copied.bytes += count as u64;
            (self.progress)(self.copied.bytes);
        }
        Ok(())
    }
}

/// Splits a path into names. Paths that leave the starting directory are rejected.
fn names(path: &[u8]) -> Result<Vec<Vec<u8>>> {
    let names = components(path).with_context(|| shown(path))?;
    Ok(names.into_iter().map(<[u8]>::to_vec).collect())
}

fn about(attributes: &Attributes) -> About {
    About {
        mode: attributes.mode.into(),
        uid: attributes.uid,
        gid: attributes.gid,
        mtime_s: attributes.mtime_seconds,
        mtime_ns: attributes.mtime_nanoseconds,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;
    use std::process::Command;

    use husk_protocol::tree::{self, Terms};

    use super::*;

    fn tar(dir: &Path, words: &[&str]) -> Vec<u8> {
        let output = Command::new("tar").arg("-C").arg(dir).args(["-c", "--format=pax"]).args(words).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    }

    fn unpack(archive: &[u8], to: &Path) -> Result<Copied> {
        let mut sent = Vec::new();
        let copied = send(archive, &mut sent, &mut |_| {})?;
        tree::receive(&mut sent.as_slice(), to, Terms { trusted: true, ..Terms::default() }, &mut |_| {})?;
        Ok(copied)
    }

    #[test]
    fn an_archive_arrives_unchanged() {
        let place = tempfile::tempdir().unwrap();
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        let long = "n".repeat(200);
        fs::create_dir_all(from.join("sub/empty")).unwrap();
        fs::create_dir_all(from.join(&long)).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("sub/file"), vec![7; 1_000_000]).unwrap();
        fs::hard_link(from.join("sub/file"), from.join(&long).join("same")).unwrap();
        symlink("sub/file", from.join("link")).unwrap();
        let sparse = fs::File::create(from.join("sparse")).unwrap();
        sparse.set_len(3 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"data", 1 << 20).unwrap();
        fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o751)).unwrap();
        assert!(Command::new("mkfifo").arg(from.join("pipe")).status().unwrap().success());
        let copied = unpack(&tar(&from, &["--sparse", "."]), &to).unwrap();
        assert_eq!(copied.skipped, ["./pipe: not a file, directory or symbolic link"]);
        assert_eq!(fs::read(to.join("sub/file")).unwrap(), vec![7; 1_000_000]);
        assert_eq!(fs::metadata(to.join(&long).join("same")).unwrap().nlink(), 2);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("sub/file"));
        assert_eq!(fs::read(to.join("sparse")).unwrap(), fs::read(from.join("sparse")).unwrap());
        assert_eq!(fs::metadata(to.join("sub")).unwrap().mode() & 0o777, 0o751);
        assert!(to.join("sub/empty").is_dir());
    }

    #[test]
    fn existing_parent_directories_are_not_changed() {
        let place = tempfile::tempdir().unwrap();
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        fs::create_dir_all(from.join("etc/new")).unwrap();
        fs::write(from.join("etc/new/hosts"), "x").unwrap();
        fs::create_dir_all(to.join("etc")).unwrap();
        for dir in [&to, &to.join("etc")] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).unwrap();
        }
        let copied = unpack(&tar(&from, &["etc/new/hosts"]), &to).unwrap();
        assert_eq!(copied.entries, 1);
        for dir in [&to, &to.join("etc")] {
            assert_eq!(fs::metadata(dir).unwrap().mode() & 0o777, 0o711);
        }
        assert!(to.join("etc/new/hosts").exists());
    }

    #[test]
    fn an_invalid_archive_or_path_is_an_error_on_both_sides() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("file"), "x").unwrap();
        let outward = tar(place.path(), &["--transform=s,file,../../file,", "-P", "file"]);
        // Within the timestamps of the first header, whose trailing zeroes tar omits.
        let (cut, noise) = (&tar(place.path(), &["file"])[..540], vec![7; 4096]);
        for (archive, why) in [(&outward[..], "leads out"), (cut, "the middle of"), (&noise, "read the archive")] {
            let mut sent = Vec::new();
            let error = send(archive, &mut sent, &mut |_| {}).unwrap_err();
            assert!(format!("{error:#}").contains(why), "{error:#}");
            let to = place.path().join("to");
            assert!(tree::receive(&mut sent.as_slice(), &to, Terms::default(), &mut |_| {}).is_err());
        }
    }
}
