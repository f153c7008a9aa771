//! Requests as a guest's kernel sends them, on a temporary folder, over the same link as the device's.

mod client;
mod confined;
mod hostile;
mod saved;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};

use client::{Client, Entry};
use rustix::fs::{IFlags, OFlags, RenameFlags, ioctl_getflags, ioctl_setflags};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::wire::{ROOT_ID, feature, opcode, set};
use super::{Cache, Options};

const RW: u32 = libc::O_RDWR as u32;

#[test]
fn what_the_guest_makes_is_on_the_host() {
    let mut guest = Client::new();
    let Entry { id: folder, .. } = guest.mkdir(ROOT_ID, "d", 0o755).unwrap();
    let (file, handle) = guest.create(folder, "f", RW, 0o640).unwrap();
    assert_eq!(guest.write(file.id, handle, 3, b"hello", 0).unwrap(), 5);
    assert_eq!(fs::read(guest.at("d/f")).unwrap(), b"\0\0\0hello");
    assert_eq!(guest.read(file.id, handle, 4, 100).unwrap(), b"ello");
    assert_eq!(fs::metadata(guest.at("d/f")).unwrap().permissions().mode() & 0o7777, 0o640);
    guest.call(opcode::SYMLINK, folder, &[b"l\0", &b"/etc/passwd\0"[..]].concat()).unwrap();
    assert_eq!(fs::read_link(guest.at("d/l")).unwrap().as_os_str().as_bytes(), b"/etc/passwd");
    let link = guest.look_up(folder, "l").unwrap();
    assert_eq!(guest.call(opcode::READLINK, link.id, &[]).unwrap(), b"/etc/passwd");
    let link_in = [&file.id.to_le_bytes()[..], b"hard\0"].concat();
    guest.call(opcode::LINK, ROOT_ID, &link_in).unwrap();
    assert_eq!(fs::metadata(guest.at("hard")).unwrap().nlink(), 2);
    assert_eq!(guest.look_up(ROOT_ID, "hard").unwrap().id, file.id, "the same inode");
    for (mode, name) in [(libc::S_IFIFO, "fifo"), (libc::S_IFSOCK, "sock")] {
        guest.mknod(name, mode | 0o600, 0).unwrap();
        let kind = fs::symlink_metadata(guest.at(name)).unwrap().file_type();
        assert_eq!((kind.is_fifo(), kind.is_socket()), (name == "fifo", name == "sock"));
    }
    guest.rename(folder, "f", ROOT_ID, "g", RenameFlags::NOREPLACE).unwrap();
    assert_eq!(guest.rename(ROOT_ID, "g", ROOT_ID, "hard", RenameFlags::NOREPLACE), Err(libc::EEXIST));
    guest.call(opcode::UNLINK, ROOT_ID, b"g\0").unwrap();
    assert_eq!(guest.read(file.id, handle, 3, 5).unwrap(), b"hello", "an open file outlives its name");
    assert_eq!(guest.call(opcode::RMDIR, ROOT_ID, b"d\0"), Err(libc::ENOTEMPTY));
    guest.call(opcode::UNLINK, folder, b"l\0").unwrap();
    guest.call(opcode::RMDIR, ROOT_ID, b"d\0").unwrap();
    assert!(!guest.at("d").exists());
}

#[test]
fn an_entry_tells_the_files_attributes() {
    let mut guest = Client::new();
    fs::write(guest.at("f"), [7; 5000]).unwrap();
    let found = fs::metadata(guest.at("f")).unwrap();
    let entry = guest.look_up(ROOT_ID, "f").unwrap();
    assert_eq!((entry.size, entry.mode, entry.inode), (5000, found.mode(), found.ino()));
    assert_eq!(guest.look_up(ROOT_ID, "none").map(|entry| entry.id), Err(libc::ENOENT));
    assert_eq!(guest.look_up(entry.id, "x").map(|entry| entry.id), Err(libc::ENOTDIR));
}

#[test]
fn only_a_guest_that_keeps_everything_remembers_what_is_absent() {
    for (cache, seconds) in [(Cache::Auto, None), (Cache::Never, None), (Cache::Always, Some(86_400_u64))] {
        let mut guest = Client::with(Options { cache, ..Options::default() }, 4096);
        let told = guest.call(opcode::LOOKUP, ROOT_ID, b"none\0");
        let absent = |seconds: u64| [client::fields64(&[0, 0, seconds]), vec![0; 104]].concat();
        assert_eq!(told, seconds.map(absent).ok_or(libc::ENOENT), "{cache:?}");
        // Nothing was looked up that the guest would have to forget.
        assert_eq!(guest.server.as_ref().unwrap().inodes.count(), 0);
        assert_eq!(guest.look_up(u64::MAX, "none").map(drop), Err(libc::ESTALE));
    }
}

#[test]
fn attributes_are_set_one_by_one() {
    let mut guest = Client::new();
    fs::write(guest.at("f"), b"12345678").unwrap();
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    let before = fs::metadata(guest.at("f")).unwrap();
    guest.set_attributes(file.id, set::SIZE, 3, (0, 0), 0).unwrap();
    assert_eq!(fs::read(guest.at("f")).unwrap(), b"123");
    guest.set_attributes(file.id, set::MODE, 0, (0, 0), 0o4711).unwrap();
    assert_eq!(fs::metadata(guest.at("f")).unwrap().mode() & 0o7777, 0o4711);
    guest.set_attributes(file.id, set::MTIME, 0, (77, 5), 0).unwrap();
    let after = fs::metadata(guest.at("f")).unwrap();
    assert_eq!((after.mtime(), after.mtime_nsec(), after.atime()), (77, 5, before.atime()));
}

#[test]
fn a_handle_that_appends_writes_at_the_end_but_cached_pages_have_their_places() {
    let mut guest = Client::new();
    let (file, handle) = guest.create(ROOT_ID, "log", RW | libc::O_APPEND as u32, 0o600).unwrap();
    guest.write(file.id, handle, 0, b"one,", 0).unwrap();
    // The host, or another guest, has written meanwhile.
    let other = fs::OpenOptions::new().append(true).open(guest.at("log")).unwrap();
    std::io::Write::write_all(&mut &other, b"two,").unwrap();
    guest.write(file.id, handle, 4, b"three", 0).unwrap();
    assert_eq!(fs::read(guest.at("log")).unwrap(), b"one,two,three");
    guest.write(file.id, handle, 0, b"ONE", super::wire::WRITE_CACHE).unwrap();
    assert_eq!(fs::read(guest.at("log")).unwrap(), b"ONE,two,three");
}

#[test]
fn a_whole_request_of_data_is_read_and_written() {
    let mut guest = Client::new();
    let (file, handle) = guest.create(ROOT_ID, "big", RW, 0o600).unwrap();
    let data: Vec<u8> = (0..super::DATA_BYTES_MAX).map(|at| (at / 7) as u8).collect();
    assert_eq!(guest.write(file.id, handle, 1 << 32, &data, 0).unwrap() as usize, data.len());
    assert!(guest.read(file.id, handle, 1 << 32, data.len() as u32).unwrap() == data);
    assert_eq!(guest.seek(file.id, handle, 0, libc::SEEK_DATA).unwrap(), 1 << 32);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    guest.allocate(file.id, handle, 1 << 32, 1 << 20, punch as u32).unwrap();
    assert_eq!(guest.seek(file.id, handle, 0, libc::SEEK_DATA), Err(libc::ENXIO));
    let (copy, to) = guest.create(ROOT_ID, "copy", RW, 0o600).unwrap();
    guest.write(file.id, handle, 0, b"copied", 0).unwrap();
    assert_eq!(guest.copy((file.id, handle, 0), (copy.id, to, 2), 6).unwrap(), 6);
    assert_eq!(fs::read(guest.at("copy")).unwrap(), b"\0\0copied");
}

#[test]
fn folders_are_read_in_parts_without_loss_or_repetition() {
    let mut guest = Client::with(Options::default(), 20_000);
    let mut wanted: Vec<String> = (0..3000).map(|at| format!("a file with a name of some length {at}")).collect();
    wanted.iter().for_each(|name| fs::write(guest.at(name), b"").unwrap());
    wanted.extend([".".into(), "..".into()]);
    wanted.sort();
    for with_attributes in [false, true] {
        let mut names: Vec<String> =
            guest.read_folder(ROOT_ID, with_attributes).into_iter().map(|(name, _)| name).collect();
        names.sort();
        assert!(names == wanted, "{} of {}", names.len(), wanted.len());
    }
    // What is told with attributes was looked up.
    let first = guest.read_folder(ROOT_ID, true).into_iter().find(|(name, _)| !name.starts_with('.')).unwrap();
    assert_eq!(guest.look_up(ROOT_ID, &first.0).unwrap().id, first.1);
}

#[test]
fn a_file_without_a_name_gets_one_later() {
    let mut guest = Client::new();
    let Ok((file, handle)) = guest.create_with(opcode::TMPFILE, ROOT_ID, "/", RW, 0o600) else {
        return eprintln!("skipped: the file system of {} has no O_TMPFILE", guest.at("").display());
    };
    guest.write(file.id, handle, 0, b"secret", 0).unwrap();
    assert_eq!(guest.read_folder(ROOT_ID, false).len(), 2);
    guest.call(opcode::LINK, ROOT_ID, &[&file.id.to_le_bytes()[..], b"now\0"].concat()).unwrap();
    assert_eq!(fs::read(guest.at("now")).unwrap(), b"secret");
}

#[test]
fn extended_attributes_of_users_are_kept_and_those_of_the_host_are_hidden() {
    let mut guest = Client::new();
    fs::write(guest.at("f"), b"").unwrap();
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    if guest.set_xattr(file.id, "user.a", b"value") == Err(libc::EOPNOTSUPP) {
        return eprintln!("skipped: the file system has no extended attributes");
    }
    assert_eq!(guest.get_xattr(file.id, "user.a", 100).unwrap(), b"value");
    assert_eq!(guest.get_xattr(file.id, "user.a", 0).unwrap()[..4], [5, 0, 0, 0]);
    assert_eq!(guest.get_xattr(file.id, "user.a", 4), Err(libc::ERANGE));
    assert_eq!(guest.call(opcode::LISTXATTR, file.id, &[100, 0, 0, 0, 0, 0, 0, 0]).unwrap(), b"user.a\0");
    guest.call(opcode::REMOVEXATTR, file.id, b"user.a\0").unwrap();
    assert_eq!(guest.get_xattr(file.id, "user.a", 100), Err(libc::ENODATA));
    for name in ["trusted.overlay.opaque", "security.selinux", "user.", "x"] {
        assert_eq!(guest.set_xattr(file.id, name, b"v"), Err(libc::EOPNOTSUPP), "{name}");
    }
}

#[test]
fn a_readonly_folder_is_not_changed() {
    let mut guest = Client::with(Options { readonly: true, ..Options::default() }, 4096);
    fs::write(guest.at("f"), b"data").unwrap();
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC] {
        assert_eq!(guest.open(file.id, flags as u32), Err(libc::EROFS));
    }
    let handle = guest.open(file.id, 0).unwrap();
    assert_eq!(guest.read(file.id, handle, 0, 10).unwrap(), b"data");
    assert_eq!(guest.write(file.id, handle, 0, b"x", 0), Err(libc::EROFS));
    assert_eq!(guest.mkdir(ROOT_ID, "d", 0o755).map(|entry| entry.id), Err(libc::EROFS));
    assert_eq!(guest.create(ROOT_ID, "g", RW, 0o600).map(|_| ()), Err(libc::EROFS));
    assert_eq!(guest.call(opcode::UNLINK, ROOT_ID, b"f\0"), Err(libc::EROFS));
    assert_eq!(guest.rename(ROOT_ID, "f", ROOT_ID, "g", RenameFlags::empty()), Err(libc::EROFS));
    assert_eq!(guest.set_attributes(file.id, set::SIZE, 0, (0, 0), 0), Err(libc::EROFS));
    assert_eq!(guest.set_xattr(file.id, "user.a", b"v"), Err(libc::EROFS));
}

#[test]
fn a_readonly_folder_that_is_to_be_filled_is_changed_until_it_is_mounted_again() {
    let filled = Options { readonly: true, fills: true, ..Options::default() };
    let starts: [fn(&mut Client); 3] = [
        |guest| drop(guest.init(feature::INIT_EXT).unwrap()),
        |guest| drop(guest.call(opcode::DESTROY, 0, &[]).unwrap()),
        |guest| guest.server.as_ref().unwrap().seal(),
    ];
    for end in starts {
        let mut guest = Client::with(filled, 4096);
        guest.init(feature::INIT_EXT).unwrap();
        let (file, handle) = guest.create(ROOT_ID, "f", RW, 0o600).unwrap();
        assert_eq!(guest.write(file.id, handle, 0, b"data", 0), Ok(4));
        end(&mut guest);
        assert_eq!(guest.write(file.id, handle, 0, b"DATA", 0), Err(libc::EROFS), "a handle from before");
        let file = guest.look_up(ROOT_ID, "f").unwrap();
        assert_eq!(guest.open(file.id, RW), Err(libc::EROFS));
        assert_eq!(guest.call(opcode::UNLINK, ROOT_ID, b"f\0"), Err(libc::EROFS));
        assert_eq!(fs::read(guest.at("f")).unwrap(), b"data");
    }
    // A folder that the guest may change stays so.
    let mut guest = Client::new();
    (0..2).for_each(|_| drop(guest.init(feature::INIT_EXT).unwrap()));
    guest.server.as_ref().unwrap().seal();
    guest.create(ROOT_ID, "f", RW, 0o600).unwrap();
}

#[test]
fn a_file_that_is_as_it_was_when_it_was_last_opened_keeps_its_pages() {
    let mut guest = Client::new();
    let keeps = |guest: &mut Client, id, flags: i32| {
        let body = guest.call(opcode::OPEN, id, &client::fields32(&[flags as u32, 0])).unwrap();
        u32::from_le_bytes(body[8..12].try_into().unwrap()) & super::wire::open_flag::KEEP_CACHE != 0
    };
    let settle = || std::thread::sleep(std::time::Duration::from_millis(200));
    fs::write(guest.at("f"), b"old").unwrap();
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    // What was only just changed may change again at the same time.
    assert!(!keeps(&mut guest, file.id, 0) && !keeps(&mut guest, file.id, 0));
    settle();
    assert!(
        !keeps(&mut guest, file.id, 0) && keeps(&mut guest, file.id, libc::O_RDWR) && keeps(&mut guest, file.id, 0)
    );
    let times = fs::metadata(guest.at("f")).unwrap().modified().unwrap();
    fs::write(guest.at("f"), b"new").unwrap();
    fs::File::options().write(true).open(guest.at("f")).unwrap().set_modified(times).unwrap();
    settle();
    assert!(!keeps(&mut guest, file.id, 0), "another content with the same size and time");
    assert!(keeps(&mut guest, file.id, 0));
}

#[test]
fn a_kernel_that_writes_later_reads_what_is_around_a_change() {
    let mut guest = Client::with(Options { cache: Cache::Writeback, ..Options::default() }, 4096);
    let reply = guest.init(feature::INIT_EXT | feature::WRITEBACK_CACHE).unwrap();
    assert_eq!(
        u32::from_le_bytes(reply[12..16].try_into().unwrap()) as u64 & feature::WRITEBACK_CACHE,
        feature::WRITEBACK_CACHE
    );
    let (file, made) = guest.create(ROOT_ID, "f", libc::O_WRONLY as u32, 0o600).unwrap();
    guest.write(file.id, made, 0, b"data", super::wire::WRITE_CACHE).unwrap();
    let opened = guest.open(file.id, libc::O_WRONLY as u32 | libc::O_APPEND as u32).unwrap();
    assert_eq!(
        [made, opened].map(|handle| guest.read(file.id, handle, 0, 4)),
        [Ok(b"data".to_vec()), Ok(b"data".to_vec())]
    );
    // Otherwise a handle can do what it was opened for.
    let mut guest = Client::new();
    let (file, handle) = guest.create(ROOT_ID, "f", libc::O_WRONLY as u32, 0o600).unwrap();
    assert_eq!(guest.read(file.id, handle, 0, 4), Err(libc::EBADF));
}

#[test]
fn times_of_what_is_written_late_are_the_hosts_where_nobody_may_set_them() {
    let mut guest = Client::new();
    fs::write(guest.at("f"), b"data").unwrap();
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    // As for a file of another user, a server with all privileges may not set them.
    let opened = fs::File::open(guest.at("f")).unwrap();
    let Ok(flags) = ioctl_getflags(&opened) else { return eprintln!("skipped: no flags of files") };
    if ioctl_setflags(&opened, flags | IFlags::IMMUTABLE).is_err() {
        return eprintln!("skipped: not root");
    }
    let set = [set::MTIME, set::MTIME | set::FH].map(|valid| guest.set_attributes(file.id, valid, 0, (77, 5), 0));
    ioctl_setflags(&opened, flags).unwrap();
    assert_eq!(set, [Err(libc::EPERM), Ok(())]);
}

#[test]
fn a_file_of_another_user_is_truncated_with_the_hosts_time() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: not root");
    }
    // The server has what this thread has: it may write to all files, and not set their times.
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::FOWNER);
    set_capabilities(None, sets).unwrap();
    let mut guest = Client::new();
    fs::write(guest.at("f"), b"data").unwrap();
    std::os::unix::fs::chown(guest.at("f"), Some(12345), None).unwrap();
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    let set = [set::MTIME, set::MTIME | set::SIZE].map(|valid| guest.set_attributes(file.id, valid, 2, (77, 5), 0));
    assert_eq!(set, [Err(libc::EPERM), Ok(())]);
    assert_eq!(fs::read(guest.at("f")).unwrap(), b"da");
    assert_ne!(fs::metadata(guest.at("f")).unwrap().mtime(), 77);
}

#[test]
fn what_the_guests_users_make_is_theirs() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: not root");
    }
    let mut guest = Client::new();
    fs::set_permissions(guest.at(""), fs::Permissions::from_mode(0o755)).unwrap();
    guest.user = (1234, 2345);
    let (file, handle) = guest.create(ROOT_ID, "f", RW, 0o666).unwrap();
    guest.mkdir(ROOT_ID, "d", 0o777).unwrap();
    guest.mknod("p", libc::S_IFIFO | 0o666, 0o022).unwrap();
    guest.call(opcode::SYMLINK, ROOT_ID, b"l\0x\0").unwrap();
    guest.user = (0, 0);
    guest.mkdir(ROOT_ID, "roots", 0o755).unwrap();
    let owner = |name: &str| {
        let found = fs::symlink_metadata(guest.at(name)).unwrap();
        (found.uid(), found.gid())
    };
    assert_eq!(["f", "d", "p", "l"].map(owner), [(1234, 2345); 4]);
    assert_eq!(owner("roots"), (0, 0));
    let mode = |name: &str| fs::symlink_metadata(guest.at(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("f"), mode("p")), (0o666, 0o644), "each with its own mask");
    let owners = [77_u32, 88];
    guest.set_owner(file.id, owners).unwrap();
    let found = fs::metadata(guest.at("f")).unwrap();
    assert_eq!([found.uid(), found.gid()], owners);
    // A write by a user takes the set-user-ID bit away, one by root does not.
    for (flags, wanted) in [(0, 0o4755), (super::wire::WRITE_KILL_SUIDGID, 0o755)] {
        fs::set_permissions(guest.at("f"), fs::Permissions::from_mode(0o4755)).unwrap();
        guest.write(file.id, handle, 0, b"x", flags).unwrap();
        assert_eq!(fs::metadata(guest.at("f")).unwrap().mode() & 0o7777, wanted);
    }
}

#[test]
fn a_kernel_that_mounts_the_folder_again_starts_anew() {
    let mut guest = Client::new();
    let (file, handle) = guest.create(ROOT_ID, "f", RW, 0o600).unwrap();
    let reply = guest.init(feature::ASYNC_READ | feature::INIT_EXT | feature::MAX_PAGES).unwrap();
    assert_eq!((reply.len(), reply[0], reply[4]), (64, 7, 38));
    assert_eq!(guest.read(file.id, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.open(file.id, 0), Err(libc::ESTALE));
    assert_eq!(guest.call(opcode::GETATTR, ROOT_ID, &[0; 16]).unwrap().len(), 104);
    let mut old = guest.init_fields(0);
    old[4] = 20;
    assert_eq!(guest.call(opcode::INIT, 0, &old), Err(libc::EPROTO));
}

#[test]
fn a_file_that_the_host_changes_is_read_as_it_is() {
    let mut guest = Client::new();
    fs::write(guest.at("f"), b"old").unwrap();
    let file = guest.look_up(ROOT_ID, "f").unwrap();
    let handle = guest.open(file.id, OFlags::RDONLY.bits()).unwrap();
    fs::File::options().write(true).open(guest.at("f")).unwrap().write_all_at(b"NEW!", 0).unwrap();
    assert_eq!(guest.read(file.id, handle, 0, 10).unwrap(), b"NEW!");
    assert_eq!(guest.look_up(ROOT_ID, "f").unwrap().size, 4);
    // Replaced by another file of the same name: both exist.
    fs::write(guest.at("g"), b"other").unwrap();
    fs::rename(guest.at("g"), guest.at("f")).unwrap();
    assert_ne!(guest.look_up(ROOT_ID, "f").unwrap().id, file.id);
    assert_eq!(guest.read(file.id, handle, 0, 10).unwrap(), b"NEW!");
}
