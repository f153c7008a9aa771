//! What a guest knows, saved by a confined server and restored by another one.

use std::fs;
use std::path::Path;

use super::super::Options;
use super::super::process::{self, FILES_MAX, Process};
use super::super::wire::{ROOT_ID, opcode};
use super::RW;
use super::client::{Client, fields64};
use crate::config::SHARED_FILE;
use crate::sandbox::folder::{self, Folder};

fn try_serve(path: &Path, known: Option<&[u8]>) -> anyhow::Result<(Client, Process)> {
    let path = path.canonicalize().unwrap();
    let fd = folder::open_path(&path).unwrap().into();
    let file_name = path.is_file().then_some(SHARED_FILE);
    let options = Options::default();
    let (ends, process) = process::start(
        Folder { path, fd, file_name, readonly: false, follows_mounts: false },
        options,
        FILES_MAX,
        true,
        known,
    )?
    .finish()?;
    Ok((Client::of(tempfile::tempdir().unwrap(), ends.connect().unwrap()), process))
}

#[track_caller]
fn serve(path: &Path, known: Option<&[u8]>) -> (Client, Process) {
    try_serve(path, known).unwrap()
}

#[test]
fn a_guest_goes_on_with_another_server() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (mut guest, process) = serve(dir.path(), None);
    let folder = guest.mkdir(ROOT_ID, "deep\n é", 0o755).unwrap();
    let (file, handle) = guest.create(folder.id, "f", RW | libc::O_APPEND as u32, 0o600).unwrap();
    guest.write(file.id, handle, 0, b"one", 0).unwrap();
    guest.call(opcode::SYMLINK, folder.id, b"link\0/etc/passwd\0").unwrap();
    let link = guest.look_up(folder.id, "link").unwrap();
    let fifo = guest.mknod("fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    let reads = guest.open(file.id, 0).unwrap();
    let known = process.save().unwrap();
    drop((guest, process));

    let (mut guest, process) = serve(dir.path(), Some(&known));
    assert_eq!(guest.read(file.id, handle, 0, 10).unwrap(), b"one");
    guest.write(file.id, handle, 0, b"two", 0).unwrap();
    assert_eq!(fs::read(at("deep\n é/f")).unwrap(), b"onetwo", "it appends");
    assert_eq!(guest.write(file.id, reads, 0, b"x", 0), Err(libc::EBADF));
    assert_eq!(guest.call(opcode::READLINK, link.id, &[]).unwrap(), b"/etc/passwd");
    assert_eq!(guest.look_up(folder.id, "f").unwrap().id, file.id, "the same inode");
    assert_eq!(guest.look_up(ROOT_ID, "fifo").unwrap().id, fifo.id);
    let new = guest.mkdir(ROOT_ID, "new", 0o755).unwrap();
    assert!(new.id > fifo.id.max(link.id), "no ID is used twice");
    assert!(guest.open(file.id, 0).unwrap() > reads);
    // Again, from a server that was restored itself.
    let known = process.save().unwrap();
    drop((guest, process));
    let (mut guest, _process) = serve(dir.path(), Some(&known));
    assert_eq!(guest.read(file.id, handle, 3, 10).unwrap(), b"two");
    assert_eq!(guest.look_up(ROOT_ID, "new").unwrap().id, new.id);
}

#[test]
fn what_is_another_file_now_is_stale() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (mut guest, process) = serve(dir.path(), None);
    let names = ["removed", "replaced", "moved", "linked", "open", "kept"];
    let files = names.map(|name| guest.create(ROOT_ID, name, RW, 0o600).unwrap());
    guest.call(opcode::UNLINK, ROOT_ID, b"open\0").unwrap();
    let known = process.save().unwrap();
    drop((guest, process));
    fs::remove_file(at("removed")).unwrap();
    fs::rename(at("replaced"), at("elsewhere")).unwrap();
    fs::write(at("replaced"), "").unwrap();
    fs::rename(at("moved"), at("to")).unwrap();
    fs::remove_file(at("linked")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", at("linked")).unwrap();

    let (mut guest, _process) = serve(dir.path(), Some(&known));
    for (name, (file, handle)) in names.iter().zip(&files) {
        let wanted = if *name == "kept" { Ok(()) } else { Err(libc::ESTALE) };
        assert_eq!(guest.open(file.id, 0).map(drop), wanted, "{name}");
        assert_eq!(guest.read(file.id, *handle, 0, 1).map(drop), wanted, "{name}");
    }
    assert_ne!(guest.look_up(ROOT_ID, "replaced").unwrap().id, files[1].0.id);
    assert_eq!(guest.read(files[5].0.id, 99, 0, 1), Err(libc::EBADF), "a handle that never was");
}

#[test]
fn a_single_file_is_found_again_and_another_folder_is_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = dir.path().join("conf");
    fs::write(&path, b"setting").unwrap();
    let (mut guest, process) = serve(&path, None);
    let file = guest.look_up(ROOT_ID, SHARED_FILE).unwrap();
    let handle = guest.open(file.id, RW).unwrap();
    let known = process.save().unwrap();
    let (mut guest, _process) = serve(&path, Some(&known));
    assert_eq!(guest.read(file.id, handle, 0, 10).unwrap(), b"setting");
    for another in [other.path(), dir.path()] {
        let error = format!("{:#}", try_serve(another, Some(&known)).map(drop).unwrap_err());
        assert!(error.ends_with("another one has taken its place") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn malformed_bytes_are_refused_and_lead_nowhere() {
    let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(outside.path().join("secret"), b"secret").unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.path().join("out")).unwrap();
    let (mut guest, process) = serve(dir.path(), None);
    let (file, handle) = guest.create(ROOT_ID, "file", RW, 0o600).unwrap();
    let known = process.save().unwrap();
    for len in (1..known.len()).step_by(7) {
        assert!(try_serve(dir.path(), Some(&known[..len])).is_err(), "{len}");
    }
    assert!(try_serve(dir.path(), Some(&[&known[..], &[0]].concat())).is_err());
    // The IDs of the next inode and the last handle, and the length of a path.
    for (at, value) in
        [(40, 0), (40, u64::MAX), (48, u64::MAX), (56, 1), (56, u64::MAX), (64, u64::MAX), (104, u64::MAX)]
    {
        let mut wrong = known.clone();
        wrong[at..at + 8].copy_from_slice(&fields64(&[value]));
        assert!(try_serve(dir.path(), Some(&wrong)).is_err(), "{at}: {value}");
    }
    // A path that leads out of the folder, to a file with the right identity.
    let at = known.windows(4).position(|bytes| bytes == b"file").unwrap();
    let identity = super::super::saved::Identity::of(fs::File::open(outside.path().join("secret")).unwrap()).unwrap();
    let mut bytes = super::super::wire::Body::default();
    identity.write(&mut bytes);
    for path in ["out/secret", "../secret", "/etc/passwd"] {
        let path = path.replace("..", &format!("../{}", outside.path().file_name().unwrap().to_str().unwrap()));
        let mut wrong = [&known[..at - 36], &bytes.0, &(path.len() as u32).to_le_bytes(), path.as_bytes()].concat();
        wrong.extend(&known[at + 4..]);
        let (mut guest, _process) = serve(dir.path(), Some(&wrong));
        assert_eq!(guest.open(file.id, 0), Err(libc::ESTALE), "{path}");
        assert_eq!(guest.read(file.id, handle, 0, 1).unwrap(), b"", "the handle has another path");
    }
}
