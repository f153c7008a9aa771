//! A guest that speaks FUSE by itself, and breaks every rule.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::RenameFlags;

use super::super::Options;
use super::super::wire::{ROOT_ID, opcode};
use super::RW;
use super::client::{Client, c_string, fields32, fields64};

#[test]
fn names_that_climb_are_refused() {
    let mut guest = Client::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"").unwrap();
    let path = outside.path().join("secret");
    let climbing = format!("../{}", path.display());
    for name in ["..", ".", "", "/", "/etc/passwd", "a/../..", path.to_str().unwrap(), &climbing] {
        assert_eq!(guest.look_up(ROOT_ID, name).map(|entry| entry.id), Err(libc::EINVAL), "{name}");
        assert_eq!(guest.mkdir(ROOT_ID, name, 0o755).map(|entry| entry.id), Err(libc::EINVAL), "{name}");
        assert_eq!(guest.create(ROOT_ID, name, RW, 0o600).map(|_| ()), Err(libc::EINVAL), "{name}");
        assert_eq!(guest.call(opcode::UNLINK, ROOT_ID, &c_string(name)), Err(libc::EINVAL), "{name}");
        assert_eq!(guest.rename(ROOT_ID, "x", ROOT_ID, name, RenameFlags::empty()), Err(libc::EINVAL), "{name}");
    }
    assert!(path.exists());
}

#[test]
fn a_link_is_never_followed_by_the_host() {
    let mut guest = Client::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"secret").unwrap();
    symlink(outside.path(), guest.at("folder")).unwrap();
    symlink(outside.path().join("secret"), guest.at("file")).unwrap();
    let [folder, file] = ["folder", "file"].map(|name| guest.look_up(ROOT_ID, name).unwrap());
    assert_eq!(folder.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(guest.look_up(folder.id, "secret").map(|entry| entry.id), Err(libc::ENOTDIR));
    assert_eq!(guest.create(folder.id, "new", RW, 0o600).map(|_| ()), Err(libc::ENOTDIR));
    assert_eq!(guest.mkdir(folder.id, "new", 0o700).map(|entry| entry.id), Err(libc::ENOTDIR));
    assert_eq!(guest.call(opcode::OPENDIR, folder.id, &[0; 8]), Err(libc::ENOTDIR));
    assert_eq!(guest.open(file.id, 0), Err(libc::ENXIO));
    assert_eq!(guest.create(ROOT_ID, "file", RW, 0o600).map(|_| ()), Err(libc::ENXIO), "it exists, and is a link");
    assert!(guest.set_attributes(file.id, 8, 0, (0, 0), 0).is_err(), "truncated through a link");
    assert!(guest.set_attributes(file.id, 1, 0, (0, 0), 0o777).is_err(), "a mode through a link");
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn a_folder_that_the_host_replaces_by_a_link_does_not_lead_outside() {
    let mut guest = Client::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("f"), b"outside").unwrap();
    let (inside, held) = (guest.at("d"), guest.at("held"));
    fs::create_dir(&inside).unwrap();
    fs::write(inside.join("f"), b"inside!").unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let swapper = std::thread::spawn({
        let (done, target) = (done.clone(), outside.path().to_owned());
        move || {
            while !done.load(Ordering::Relaxed) {
                fs::rename(&inside, &held).unwrap();
                symlink(&target, &inside).unwrap();
                fs::remove_file(&inside).unwrap();
                fs::rename(&held, &inside).unwrap();
            }
        }
    });
    let mut found = 0;
    for round in 0..3000 {
        let Ok(folder) = guest.look_up(ROOT_ID, "d") else { continue };
        let _ = guest.create(folder.id, &format!("made{}", round % 10), RW, 0o600);
        let Ok(file) = guest.look_up(folder.id, "f") else { continue };
        let handle = guest.open(file.id, RW).unwrap();
        assert_eq!(guest.read(file.id, handle, 0, 10).unwrap(), b"inside!");
        guest.call(opcode::RELEASE, file.id, &[&handle.to_le_bytes()[..], &[0; 16]].concat()).unwrap();
        found += 1;
    }
    done.store(true, Ordering::Relaxed);
    swapper.join().unwrap();
    assert!(found > 0);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "made outside");
}

#[test]
fn forged_numbers_name_nothing() {
    let mut guest = Client::new();
    fs::write(guest.at("f"), b"data").unwrap();
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    let handle = guest.open(file.id, 0).unwrap();
    for id in [0, file.id + 1, 1 << 32, u64::MAX] {
        assert_eq!(guest.open(id, 0), Err(libc::ESTALE));
        assert_eq!(guest.look_up(id, "f").map(|entry| entry.id), Err(libc::ESTALE));
        assert_eq!(guest.rename(ROOT_ID, "f", id, "f", RenameFlags::empty()), Err(libc::ESTALE));
    }
    for forged in [0, handle + 1, u64::MAX, u64::from(u32::MAX)] {
        assert_eq!(guest.read(file.id, forged, 0, 10), Err(libc::EBADF));
        assert_eq!(guest.write(file.id, forged, 0, b"x", 0), Err(libc::EBADF));
        let release = [&forged.to_le_bytes()[..], &[0; 16]].concat();
        assert_eq!(guest.call(opcode::RELEASE, file.id, &release), Err(libc::EBADF));
    }
    assert_eq!(guest.write(file.id, handle, 0, b"x", 0), Err(libc::EBADF), "opened for reading");
    // The root is never forgotten, and a file not twice.
    guest.tell(opcode::FORGET, ROOT_ID, &u64::MAX.to_le_bytes());
    guest.tell(opcode::FORGET, file.id, &u64::MAX.to_le_bytes());
    guest.tell(opcode::FORGET, file.id, &1_u64.to_le_bytes());
    guest.tell(opcode::BATCH_FORGET, 0, &fields32(&[u32::MAX, 0]));
    assert_eq!(guest.open(file.id, 0), Err(libc::ESTALE));
    assert_ne!(guest.look_up(ROOT_ID, "f").unwrap().id, file.id, "numbers are not used again");
}

#[test]
fn lookups_and_handles_without_end_end_at_the_limits() {
    let mut guest = Client::with(Options::default(), 264);
    (0..300).for_each(|at| fs::write(guest.at(&at.to_string()), b"").unwrap());
    let mut entries: Vec<_> = (0..300).filter_map(|at| guest.look_up(ROOT_ID, &at.to_string()).ok()).collect();
    assert_eq!(entries.len(), 150);
    assert_eq!(guest.look_up(ROOT_ID, "299").map(|entry| entry.id), Err(libc::ENFILE));
    assert_eq!(guest.read_folder(ROOT_ID, true).len(), 302, "but a folder is read");
    let first = entries.remove(0);
    for _ in 0..1000 {
        guest.look_up(ROOT_ID, "0").unwrap();
    }
    guest.tell(opcode::FORGET, first.id, &1001_u64.to_le_bytes());
    guest.look_up(ROOT_ID, "299").unwrap();
    let opened = (0..300).filter_map(|_| guest.open(entries[0].id, 0).ok()).count();
    assert_eq!(opened, 50);
    assert_eq!(guest.open(entries[0].id, 0), Err(libc::ENFILE));
    guest.init(0).unwrap();
    assert_eq!(guest.server.as_ref().unwrap().inodes.count(), 0);
}

#[test]
fn sizes_of_a_gibibyte_take_no_memory() {
    let mut guest = Client::new();
    let (file, handle) = guest.create(ROOT_ID, "f", RW, 0o600).unwrap();
    guest.set_attributes(file.id, 8, 1 << 40, (0, 0), 0).unwrap();
    assert!(guest.read(file.id, handle, 0, 1 << 30).unwrap().len() <= 1 << 20);
    assert!(guest.read(file.id, handle, u64::MAX - 5, u32::MAX).is_err());
    let mut write = fields64(&[handle, 0]);
    write.extend(fields32(&[1 << 30, 0, 0, 0, 0, 0]));
    assert_eq!(guest.call(opcode::WRITE, file.id, &write), Err(libc::EINVAL), "less data than it says");
    assert_eq!(
        guest.call(opcode::SETXATTR, file.id, &[fields32(&[1 << 30, 0]), c_string("user.a")].concat()),
        Err(libc::EINVAL)
    );
    assert!(guest.get_xattr(file.id, "user.a", 1 << 30).is_err());
    let folder = guest.call(opcode::OPENDIR, ROOT_ID, &[0; 8]).unwrap();
    let read = [&folder[..8], &[0; 8], &fields32(&[u32::MAX, 0, 0, 0, 0, 0])].concat();
    assert!(guest.call(opcode::READDIR, ROOT_ID, &read).unwrap().len() < 1000);
}

#[test]
fn devices_of_the_host_are_not_made() {
    let mut guest = Client::new();
    for mode in [libc::S_IFBLK, libc::S_IFCHR, libc::S_IFDIR, libc::S_IFLNK, 0o170_000] {
        let arguments = [fields32(&[mode | 0o666, 0x0801, 0, 0]), c_string("dev")].concat();
        assert_eq!(guest.call(opcode::MKNOD, ROOT_ID, &arguments), Err(libc::EPERM), "{mode:o}");
    }
    assert!(!guest.at("dev").exists());
}

#[test]
fn garbage_gets_errors() {
    let mut guest = Client::new();
    fs::create_dir(guest.at("d")).unwrap();
    let mut random = fastrand::Rng::with_seed(5);
    for round in 0..20_000_u32 {
        let len = random.usize(..200);
        let mut request: Vec<u8> = (0..len).map(|_| if random.bool() { 0 } else { random.u8(..) }).collect();
        if len >= 24 {
            request[..4].copy_from_slice(&(len as u32).to_le_bytes());
            request[4..8].copy_from_slice(&random.u32(..60).to_le_bytes());
            request[16..24].copy_from_slice(&random.u64(..4).to_le_bytes());
        }
        if random.u8(..8) == 0 {
            request.extend(b"user.x\0d\0");
        }
        let room = [0, 10, 16, 20, 200, 1 << 20][random.usize(..6)];
        let reply = guest.send(&request, room);
        assert!(reply.is_empty() || reply.len() >= 16, "{round}");
    }
    guest.init(0).unwrap();
    assert_eq!(guest.call(opcode::GETATTR, ROOT_ID, &[0; 16]).unwrap().len(), 104);
}
