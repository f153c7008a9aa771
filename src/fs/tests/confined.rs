//! The server as a process of its own.

use std::fs;
use std::os::fd::AsRawFd;

use rustix::fs::RenameFlags;

use super::super::Options;
use super::super::process::{self, FILES_MAX, Process};
use super::super::wire::{ROOT_ID, opcode};
use super::RW;
use super::client::Client;
use crate::config::SHARED_FILE;
use crate::sandbox::folder::{self, Folder};

fn serve(dir: tempfile::TempDir, file: Option<&str>) -> (Client, Process) {
    let path = file.map_or(dir.path().to_owned(), |name| dir.path().join(name)).canonicalize().unwrap();
    let fd = folder::open_path(&path).unwrap().into();
    let folder = Folder { path, fd, file_name: file.map(|_| SHARED_FILE), readonly: false, follows_mounts: false };
    let options = Options::default();
    let (ends, process) = process::start(folder, options, FILES_MAX, true, None).unwrap().finish().unwrap();
    (Client::of(dir, ends.connect().unwrap()), process)
}

#[test]
fn a_confined_server_serves_every_kind_of_request() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, process) = serve(dir, None);
    let (file, handle) = guest.create(ROOT_ID, "f", RW, 0o600).unwrap();
    guest.write(file.id, handle, 0, b"data", 0).unwrap();
    assert_eq!(fs::read(guest.at("f")).unwrap(), b"data");
    // What is refused must be refused by an error, not by the end of the process.
    for opcode in 1..60 {
        if opcode != opcode::DESTROY {
            for node in [ROOT_ID, file.id] {
                let arguments = [&handle.to_le_bytes()[..], &[0; 16], b"user.a\0f\0g\0", &[0; 60]].concat();
                if matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) {
                    guest.tell(opcode, 77, &arguments);
                } else {
                    let _ = guest.call(opcode, node, &arguments);
                }
            }
        }
    }
    let (file, handle) = guest.create(ROOT_ID, "again", RW, 0o600).unwrap();
    guest.user = (1000, 1000);
    let of_another = guest.mkdir(ROOT_ID, "another's", 0o755).map(|_| ());
    if rustix::process::geteuid().is_root() {
        assert_eq!(of_another, Ok(()));
        use std::os::unix::fs::MetadataExt;
        assert_eq!(fs::metadata(guest.at("another's")).unwrap().uid(), 1000);
    } else {
        assert!(matches!(of_another, Ok(()) | Err(libc::EPERM)));
    }
    guest.user = (0, 0);
    guest.allocate(file.id, handle, 0, 4096, 0).unwrap();
    guest.seek(file.id, handle, 0, libc::SEEK_HOLE).unwrap();
    guest.copy((file.id, handle, 0), (file.id, handle, 8192), 10).unwrap();
    guest.call(opcode::FSYNC, file.id, &[&handle.to_le_bytes()[..], &[0; 8]].concat()).unwrap();
    guest.call(opcode::SYNCFS, ROOT_ID, &[0; 8]).unwrap();
    guest.call(opcode::STATFS, ROOT_ID, &[]).unwrap();
    guest.set_attributes(file.id, 1 | 8 | 32, 3, (7, 7), 0o644).unwrap();
    guest.rename(ROOT_ID, "again", ROOT_ID, "moved", RenameFlags::empty()).unwrap();
    let folder = guest.mkdir(ROOT_ID, "sub", 0o755).unwrap();
    guest.rename(ROOT_ID, "moved", folder.id, "moved", RenameFlags::empty()).unwrap();
    guest.call(opcode::LINK, ROOT_ID, &[&file.id.to_le_bytes()[..], b"linked\0"].concat()).unwrap();
    assert!(guest.read_folder(ROOT_ID, true).iter().any(|(name, _)| name == "linked"));
    drop(process);
}

#[test]
fn a_confined_server_has_no_more_than_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (_guest, process) = serve(dir, None);
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!((field("Seccomp:"), field("NoNewPrivs:")), ("2".into(), "1".into()));
    let link = |name: &str| fs::read_link(format!("/proc/{}/ns/{name}", process.id())).unwrap();
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    for name in ["user", "mnt", "net", "ipc"] {
        assert_ne!(link(name), own(name), "{name}");
    }
    let allowed = u64::from_str_radix(&field("CapPrm:"), 16).unwrap();
    assert_eq!(allowed, super::super::CAPABILITIES.bits());
    // Descriptors: the streams, the link, the orders, the folder and that of descriptors.
    let open = fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap();
    let targets: Vec<String> =
        open.map(|entry| fs::read_link(entry.unwrap().path()).unwrap().display().to_string()).collect();
    assert!(targets.len() <= 10, "{targets:?}");
    let root = fs::read_link(format!("/proc/{}/root", process.id())).unwrap();
    assert_ne!(root, std::path::Path::new("/usr"), "{root:?}");
}

#[test]
fn a_single_file_has_a_folder_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("shared.txt"), b"shared").unwrap();
    fs::write(dir.path().join("secret.txt"), b"secret").unwrap();
    let (mut guest, _process) = serve(dir, Some("shared.txt"));
    let mut names: Vec<_> = guest.read_folder(ROOT_ID, false).into_iter().map(|(name, _)| name).collect();
    names.sort();
    assert_eq!(names, [".", "..", SHARED_FILE]);
    let file = guest.look_up(ROOT_ID, SHARED_FILE).unwrap();
    let handle = guest.open(file.id, RW).unwrap();
    guest.write(file.id, handle, 0, b"S", 0).unwrap();
    assert_eq!(fs::read(guest.at("shared.txt")).unwrap(), b"Shared");
    assert!(guest.create(ROOT_ID, "other", RW, 0o600).is_err());
}

#[test]
fn a_server_ends_with_its_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, process) = serve(dir, None);
    let socket = guest.link.as_ref().unwrap().socket().as_raw_fd();
    assert!(socket > 2);
    drop(guest);
    let state = || fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap();
    let begin = std::time::Instant::now();
    while !state().contains(") Z") {
        assert!(begin.elapsed().as_secs() < 10, "{}", state());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_readonly_folder_is_readonly_to_the_process_itself() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), b"data").unwrap();
    let fd = folder::open_path(dir.path()).unwrap().into();
    let folder =
        Folder { path: dir.path().canonicalize().unwrap(), fd, file_name: None, readonly: true, follows_mounts: false };
    // As if a guest had made the server forget about it.
    let options = Options::default();
    let (ends, _process) = process::start(folder, options, FILES_MAX, true, None).unwrap().finish().unwrap();
    let mut guest = Client::of(dir, ends.connect().unwrap());
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    assert_eq!(guest.set_attributes(file.id, 1, 0, (0, 0), 0o777), Err(libc::EROFS), "mode");
    assert_eq!(guest.set_attributes(file.id, 32, 0, (7, 7), 0), Err(libc::EROFS), "time");
    assert_eq!(guest.set_owner(file.id, [0, 0]), Err(libc::EROFS), "owner");
    assert_eq!(guest.set_xattr(file.id, "user.a", b"x"), Err(libc::EROFS), "attribute");
    assert!(guest.open(file.id, RW).is_err());
    let handle = guest.open(file.id, 0).unwrap();
    assert_eq!(guest.read(file.id, handle, 0, 10).unwrap(), b"data");
}

#[test]
fn a_server_has_no_more_descriptors_than_its_part_of_the_machines() {
    let dir = tempfile::tempdir().unwrap();
    let fd = folder::open_path(dir.path()).unwrap().into();
    let folder = Folder {
        path: dir.path().canonicalize().unwrap(),
        fd,
        file_name: None,
        readonly: false,
        follows_mounts: false,
    };
    let options = Options::default();
    let (ends, process) = process::start(folder, options, 264, true, None).unwrap().finish().unwrap();
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["264", "264"]);
    let mut guest = Client::of(dir, ends.connect().unwrap());
    (0..300).for_each(|at| fs::write(guest.at(&at.to_string()), b"").unwrap());
    let entries: Vec<_> = (0..300).filter_map(|at| guest.look_up(ROOT_ID, &at.to_string()).ok()).collect();
    let opened = (0..300).filter_map(|_| guest.open(entries[0].id, 0).ok()).count();
    assert_eq!((entries.len(), opened), (150, 50));
    let files = || fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap().count();
    assert!(files() < 264, "{}", files());
    // Full, it still does what needs a descriptor for a moment.
    assert_eq!(guest.look_up(ROOT_ID, "none").map(|entry| entry.id), Err(libc::ENOENT));
}
