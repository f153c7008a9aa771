//! Tests of valid streams, and of invalid ones from malicious senders.

use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::fs::{FileType, Mode, XattrFlags};

use super::*;

/// A temporary directory of a test.
pub(super) struct Place(pub(super) PathBuf);

impl Place {
    pub(super) fn new(test: &str) -> Place {
        let path = std::env::temp_dir().join(format!("husk-tree-{}-{test}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Place(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sent(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    send(path, false, &mut bytes, &mut |_| {}).unwrap();
    bytes
}

fn received(bytes: &[u8], to: &Path) -> io::Result<Copied> {
    received_by(Terms::default(), bytes, to)
}

fn received_by(terms: Terms, mut bytes: &[u8], to: &Path) -> io::Result<Copied> {
    receive(&mut bytes, to, terms, &mut |_| {})
}

fn trusting() -> Terms {
    Terms { trusted: true, ..Terms::default() }
}

fn called(name: &str) -> Terms {
    Terms { name: Some(name.into()), ..Terms::default() }
}

fn file(name: &[u8], about: About, content: &[u8]) -> Vec<u8> {
    let len = content.len() as u32;
    let mut bytes = stream(&[Entry::File(name.to_vec(), about, len.into())]);
    if len > 0 {
        bytes.extend([stream(&[Entry::Piece(len)]), content.to_vec()].concat());
    }
    bytes.extend(stream(&[Entry::Piece(0)]));
    bytes
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn stream(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    entries.iter().for_each(|entry| frame::write(entry, &mut bytes).unwrap());
    bytes
}

const ABOUT: About = About { mode: 0o755, uid: 0, gid: 0, mtime_s: 0, mtime_ns: 0 };

#[test]
fn a_tree_arrives_unchanged() {
    let place = Place::new("arrives");
    let from = place.0.join("from");
    fs::create_dir_all(from.join("sub/empty")).unwrap();
    fs::write(from.join("sub/big"), vec![7; PIECE_BYTES + 1]).unwrap();
    fs::write(from.join("none"), "").unwrap();
    fs::set_permissions(from.join("none"), Permissions::from_mode(0o4640)).unwrap();
    symlink("sub/big", from.join("link")).unwrap();
    symlink("/nowhere", from.join("sub/dangling")).unwrap();
    let to = place.0.join("to");
    let copied = received(&sent(&from), &to).unwrap();
    assert_eq!((copied.entries, copied.bytes), (7, PIECE_BYTES as u64 + 1));
    assert_eq!(fs::read(to.join("sub/big")).unwrap(), vec![7; PIECE_BYTES + 1]);
    assert_eq!(fs::read_link(to.join("sub/dangling")).unwrap(), Path::new("/nowhere"));
    assert!(to.join("sub/empty").is_dir());
    assert_eq!(fs::metadata(to.join("none")).unwrap().mode() & 0o7777, 0o640, "it would run as its owner");
    let times = [&from, &to].map(|root| fs::metadata(root.join("sub")).unwrap().modified().unwrap());
    assert_eq!(times[0], times[1]);
    // Again, over existing files: into the directory, and then only its contents.
    received(&sent(&from), &to).unwrap();
    assert!(to.join("from/sub/big").exists());
    received(&sent(&from.join(".")), &to).unwrap();
    assert!(to.join("sub/big").exists() && !to.join("from/from").exists());
}

#[test]
fn a_file_is_copied_to_a_directory_or_a_name() {
    let place = Place::new("file");
    let (file, dir) = (place.0.join("a"), place.0.join("d"));
    fs::write(&file, "x").unwrap();
    fs::create_dir(&dir).unwrap();
    received(&sent(&file), &dir).unwrap();
    received(&sent(&file), &dir.join("b")).unwrap();
    assert_eq!((fs::read(dir.join("a")).unwrap(), fs::read(dir.join("b")).unwrap()), (b"x".to_vec(), b"x".to_vec()));
    let missing = format!("{}/none/", place.0.display());
    assert!(received(&sent(&file), Path::new(&missing)).unwrap_err().to_string().contains("no such directory"));
    assert!(received(&sent(&dir), &file).unwrap_err().to_string().contains("cannot be replaced with a directory"));
}

#[test]
fn nothing_is_written_outside_or_through_a_link() {
    let place = Place::new("escape");
    let (outside, inside) = (place.0.join("outside"), place.0.join("inside"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "precious").unwrap();
    let file = |name: &[u8]| [Entry::File(name.to_vec(), ABOUT, 0), Entry::Piece(0)];
    let dir = |name: &[u8]| Entry::Directory(name.to_vec(), ABOUT);
    let link = Entry::Link(b"link".to_vec(), outside.clone().into_os_string().into_vec(), ABOUT);
    for name in [&b"../outside/file"[..], b"..", b".", b"", b"a/b", b"/etc/x", b"a\0b"] {
        let entries = [vec![dir(b"x")], file(name).to_vec(), vec![Entry::Leave, Entry::End]].concat();
        assert!(received(&stream(&entries), &inside).unwrap_err().to_string().contains("an invalid name"));
    }
    // A directory in place of a link from the stream, and a file at its target.
    let entries = [vec![dir(b"x"), link.clone(), dir(b"link")], file(b"file").to_vec()].concat();
    assert!(received(&stream(&entries), &inside).is_err());
    let over = [vec![dir(b"x"), link], file(b"link").to_vec(), vec![Entry::Leave, Entry::End]].concat();
    assert!(received(&stream(&over), &inside).unwrap_err().to_string().contains("out of order"));
    received_by(trusting(), &stream(&over), &inside).unwrap();
    assert!(fs::symlink_metadata(inside.join("x/link")).unwrap().is_file(), "in place of the link");
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"precious");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn an_entered_directory_is_not_changed() {
    let place = Place::new("enter");
    let to = place.0.join("to");
    fs::create_dir_all(to.join("there")).unwrap();
    fs::set_permissions(to.join("there"), Permissions::from_mode(0o711)).unwrap();
    let enter = |name: &str| Entry::Enter(name.into());
    let file = |name: &str| vec![Entry::File(name.into(), ABOUT, 0), Entry::Piece(0)];
    let entries = [
        vec![enter("."), enter("there")],
        file("a"),
        vec![Entry::Leave, enter("new")],
        file("b"),
        vec![Entry::Leave, Entry::Leave, Entry::End],
    ];
    let copied = received_by(trusting(), &stream(&entries.concat()), &to).unwrap();
    assert_eq!(copied.entries, 2);
    assert_eq!(fs::metadata(to.join("there")).unwrap().mode() & 0o777, 0o711);
    assert!(to.join("there/a").exists() && to.join("new/b").exists());
}

#[test]
fn hard_links_require_trust_and_follow_no_links() {
    let place = Place::new("same");
    let (to, outside) = (place.0.join("to"), place.0.join("outside"));
    fs::create_dir_all(to.join("d")).unwrap();
    fs::write(to.join("d/a"), "x").unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "x").unwrap();
    symlink(&outside, to.join("link")).unwrap();
    let same = |names: &[&str]| {
        let names = names.iter().map(|name| name.as_bytes().to_vec()).collect();
        stream(&[Entry::Enter(b".".to_vec()), Entry::Same(b"b".to_vec(), names), Entry::Leave, Entry::End])
    };
    let trusted = |bytes: Vec<u8>| received_by(trusting(), &bytes, &to);
    assert!(received(&same(&["d", "a"]), &to).unwrap_err().to_string().contains("which it must not"));
    for names in [&["link", "secret"][..], &["..", "outside", "secret"], &["d"], &[], &["d", "none"], &["d/a"]] {
        assert!(trusted(same(names)).is_err(), "{names:?}");
    }
    assert!(!to.join("b").exists());
    trusted(same(&["d", "a"])).unwrap();
    assert_eq!(fs::metadata(to.join("b")).unwrap().nlink(), 2);
}

#[test]
fn an_invalid_or_truncated_stream_is_an_error() {
    let place = Place::new("lies");
    let to = place.0.join("to");
    let dir = || Entry::Directory(b"d".to_vec(), ABOUT);
    for entries in [
        vec![],
        vec![Entry::Leave],
        vec![dir()],
        vec![dir(), Entry::End],
        vec![dir(), Entry::Piece(1)],
        vec![dir(), Entry::Leave, Entry::Leave],
        vec![Entry::File(b"f".to_vec(), ABOUT, 0), Entry::Piece(u32::MAX)],
        vec![Entry::File(b"f".to_vec(), ABOUT, 0), Entry::Piece(100)],
        vec![Entry::Failed("it is gone".into())],
    ] {
        assert!(received(&stream(&entries), &to).is_err(), "{entries:?}");
        let _ = fs::remove_dir_all(&to);
        let _ = fs::remove_file(&to);
    }
    let deep: Vec<Entry> = (0..=DEPTH_MAX).map(|_| dir()).collect();
    assert!(received(&stream(&deep), &to).is_err());
    let mut told = Vec::new();
    assert!(send(&place.0.join("missing"), false, &mut told, &mut |_| {}).is_err());
    assert!(received(&told, &to).unwrap_err().to_string().contains("No such file"));
}

#[test]
fn the_receiver_chooses_name_and_type() {
    let place = Place::new("name");
    let to = place.0.join("to");
    fs::create_dir_all(to.join(".ssh")).unwrap();
    let end = stream(&[Entry::End]);
    for name in [&b".ssh/authorized_keys"[..], b"other", b"..", b".", b"", b"/etc/passwd", &[b'n'; 300]] {
        let sent = [file(name, ABOUT, b"x"), end.clone()].concat();
        received_by(called("app.log"), &sent, &to).unwrap();
        assert_eq!(fs::read(to.join("app.log")).unwrap(), b"x");
        fs::remove_file(to.join("app.log")).unwrap();
        let dir = [Entry::Directory(name.to_vec(), ABOUT), Entry::Leave, Entry::End];
        received_by(called("logs"), &stream(&dir), &to).unwrap();
        fs::remove_dir(to.join("logs")).unwrap();
    }
    // The contents of a path that is not a directory.
    let own = place.0.join("own");
    fs::write(&own, "mine").unwrap();
    for sent in
        [[file(b".", ABOUT, b"x"), end.clone()].concat(), stream(&[Entry::Link(b".".into(), b"/".into(), ABOUT)])]
    {
        for to in [&to, &own] {
            assert!(received_by(called("."), &sent, to).unwrap_err().to_string().contains("not send a directory"));
            let terms = Terms { must_be_dir: true, ..called("logs") };
            assert!(received_by(terms, &sent, to).unwrap_err().to_string().contains("not send a directory"));
        }
    }
    assert_eq!(fs::read(&own).unwrap(), b"mine");
    assert_eq!(fs::read_dir(&to).unwrap().count(), 1, "nothing but what was there");
    assert_eq!(fs::read_dir(to.join(".ssh")).unwrap().count(), 0);
}

#[test]
fn existing_files_keep_mode_owner_and_type() {
    let place = Place::new("stays");
    let to = place.0.join("to");
    fs::create_dir_all(to.join("sub")).unwrap();
    fs::write(to.join("sub/secret"), "old").unwrap();
    fs::set_permissions(&to, Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(to.join("sub"), Permissions::from_mode(0o750)).unwrap();
    fs::set_permissions(to.join("sub/secret"), Permissions::from_mode(0o4600)).unwrap();
    fs::hard_link(to.join("sub/secret"), place.0.join("beside")).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        std::os::unix::fs::chown(to.join("sub/secret"), Some(7), Some(8)).unwrap();
    }
    let open = About { mode: 0o7777, uid: 1234, gid: 1234, mtime_s: 1, mtime_ns: 0 };
    let sent = [
        stream(&[Entry::Directory(b".".into(), open), Entry::Directory(b"sub".into(), open)]),
        file(b"new", open, b"new"),
        file(b"secret", open, b"new"),
        stream(&[Entry::Leave, Entry::Leave, Entry::End]),
    ];
    received_by(called("."), &sent.concat(), &to).unwrap();
    assert_eq!((mode(&to), mode(&to.join("sub"))), (0o711, 0o750));
    assert_eq!((mode(&to.join("sub/secret")), mode(&to.join("sub/new"))), (0o600, 0o777));
    assert_eq!(fs::read(to.join("sub/secret")).unwrap(), b"new");
    assert_eq!(fs::read(place.0.join("beside")).unwrap(), b"old", "another name of what was there");
    if is_root {
        let secret = fs::metadata(to.join("sub/secret")).unwrap();
        assert_eq!((secret.uid(), secret.gid()), (7, 8));
        received_by(Terms { owners: true, ..called(".") }, &sent.concat(), &to).unwrap();
        assert_eq!((mode(&to), fs::metadata(&to).unwrap().uid()), (0o711, 0));
        assert_eq!(fs::metadata(to.join("sub/secret")).unwrap().uid(), 7);
    }
    // A guest's file does not replace a directory or a FIFO, and a directory does not replace a file.
    let pipe = to.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for name in ["sub", "pipe"] {
        assert!(received_by(called(name), &[file(b"x", open, b"x"), stream(&[Entry::End])].concat(), &to).is_err());
    }
    assert!(received_by(called("pipe"), &stream(&[Entry::Link(b"x".into(), b"y".into(), open)]), &to).is_err());
    assert!(received_by(called("pipe"), &stream(&[Entry::Directory(b"x".into(), open)]), &to).is_err());
    assert!(to.join("sub/secret").exists() && fs::symlink_metadata(&pipe).unwrap().mode() & 0o170000 == 0o010000);
}

#[test]
fn only_links_given_by_the_user_are_followed() {
    let place = Place::new("through");
    let at = |name: &str| place.0.join(name);
    let sent = [file(b"x", ABOUT, b"new"), stream(&[Entry::End])].concat();
    fs::write(at("real"), "old").unwrap();
    for (link, target) in [("link", "real"), ("again", "link"), ("dangling", "nope"), ("loop", "loop")] {
        symlink(target, at(link)).unwrap();
    }
    received_by(called("x"), &sent, &at("again")).unwrap();
    received_by(called("x"), &sent, &at("dangling")).unwrap();
    assert_eq!((fs::read(at("real")).unwrap(), fs::read(at("nope")).unwrap()), (b"new".to_vec(), b"new".to_vec()));
    assert!(["link", "again", "dangling"].iter().all(|link| fs::symlink_metadata(at(link)).unwrap().is_symlink()));
    assert!(received_by(called("x"), &sent, &at("loop")).is_err());
    // The directory was given by the user, while the link in it may have been created by a guest.
    fs::write(at("real"), "old").unwrap();
    received_by(called("link"), &sent, &place.0).unwrap();
    assert_eq!(fs::read(at("real")).unwrap(), b"old");
    assert!(fs::symlink_metadata(at("link")).unwrap().is_file());
    fs::create_dir(at("home")).unwrap();
    symlink("home", at("logs")).unwrap();
    let dir = [stream(&[Entry::Directory(b"x".into(), ABOUT)]), file(b"keys", ABOUT, b"x")].concat();
    assert!(received_by(called("logs"), &dir, &place.0).is_err());
    assert_eq!(fs::read_dir(at("home")).unwrap().count(), 0);
    // A link of the user to a directory is followed.
    received_by(called("x"), &sent, &at("logs")).unwrap();
    assert_eq!(fs::read(at("home/x")).unwrap(), b"new");
}

#[test]
fn links_of_others_in_shared_directories_are_not_followed() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root has links of others");
        return;
    }
    let place = Place::new("planted");
    let tmp = place.0.join("tmp");
    fs::create_dir(&tmp).unwrap();
    fs::set_permissions(&tmp, Permissions::from_mode(0o1777)).unwrap();
    fs::write(place.0.join("precious"), "old").unwrap();
    symlink("../precious", tmp.join("out")).unwrap();
    std::os::unix::fs::lchown(tmp.join("out"), Some(1234), Some(1234)).unwrap();
    let sent = [file(b"x", ABOUT, b"new"), stream(&[Entry::End])].concat();
    assert!(received_by(called("x"), &sent, &tmp.join("out")).unwrap_err().to_string().contains("denied"));
    assert_eq!(fs::read(place.0.join("precious")).unwrap(), b"old");
    std::os::unix::fs::lchown(tmp.join("out"), Some(0), Some(0)).unwrap();
    received_by(called("x"), &sent, &tmp.join("out")).unwrap();
    assert_eq!(fs::read(place.0.join("precious")).unwrap(), b"new");
}

#[test]
fn a_link_is_sent_as_itself_or_followed() {
    let place = Place::new("follow");
    fs::create_dir(place.0.join("real")).unwrap();
    fs::write(place.0.join("real/file"), "x").unwrap();
    symlink("real", place.0.join("link")).unwrap();
    let link = received(&sent(&place.0.join("link")), &place.0.join("as-link")).unwrap();
    assert_eq!(link.link, Some("real".into()));
    let mut bytes = Vec::new();
    send(&place.0.join("link"), true, &mut bytes, &mut |_| {}).unwrap();
    assert_eq!(received(&bytes, &place.0.join("as-directory")).unwrap().link, None);
    assert_eq!(fs::read(place.0.join("as-directory/file")).unwrap(), b"x");
}

#[test]
fn files_of_proc_and_sys_are_sent_with_their_actual_size() {
    let place = Place::new("proc");
    for path in ["/proc/version", "/proc/self/status", "/sys/kernel/mm/transparent_hugepage/enabled", "/proc/kallsyms"]
    {
        let Ok(content) = fs::read(path) else { continue };
        let bytes = sent(Path::new(path));
        let mut entries = Entries::new(bytes.as_slice(), false);
        let Some(Entry::File(_, _, said_bytes)) = entries.next_entry().unwrap() else { panic!("{path} is a file") };
        let mut got = Vec::new();
        let mut take = |piece: &[u8]| got.write_all(piece);
        entries.content(&mut take).unwrap();
        assert_eq!(got.len() as u64, said_bytes, "{path}");
        if path != "/proc/self/status" {
            assert_eq!(got, content, "{path}");
        }
        received(&bytes, &place.0.join("file")).unwrap();
        assert_eq!(fs::read(place.0.join("file")).unwrap(), got);
    }
}

#[test]
fn hard_links_and_attributes_of_a_whole_directory_arrive() {
    let place = Place::new("whole");
    let (from, to) = (place.0.join("from"), place.0.join("to"));
    fs::create_dir_all(from.join("dir")).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(from.join("dir/one"), "content").unwrap();
    fs::hard_link(from.join("dir/one"), from.join("two")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, from.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    // Not every file system has them.
    let set = |name: &str| rustix::fs::lsetxattr(from.join(name), "user.a", b"value", XattrFlags::empty()).is_ok();
    let has_attributes = set("dir") && set("two");
    let mut bytes = Vec::new();
    send_root(&from, &mut bytes).unwrap();
    assert!(received_by(trusting(), &bytes, &to).is_err(), "they are not asked for");
    let copied = received_by(Terms { attributes: true, ..trusting() }, &bytes, &to).unwrap();
    let inode = |name: &str| fs::metadata(to.join(name)).unwrap().ino();
    assert_eq!(inode("dir/one"), inode("two"));
    for name in ["dir", "two"] {
        let mut value = [0; 9];
        let found = rustix::fs::lgetxattr(to.join(name), "user.a", &mut value);
        assert_eq!(found.ok().map(|len| &value[..len]), has_attributes.then_some(&b"value"[..]), "{name}");
    }
    assert_eq!(copied.skipped, [format!("{}: {NOT_COPIED}", to.join("pipe").display())]);
}

#[test]
fn removed_entries_of_a_directory_are_skipped() {
    let place = Place::new("gone");
    let from = place.0.join("from");
    fs::create_dir(&from).unwrap();
    for name in ["a", "b", "z"] {
        fs::write(from.join(name), name).unwrap();
    }
    symlink("a", from.join("c")).unwrap();
    fs::create_dir(from.join("d")).unwrap();
    let mut bytes = Vec::new();
    // Another process changes it: when the first file is read, others in the listing have been removed.
    let mut work = |_| {
        let _ = (fs::remove_file(from.join("b")), fs::remove_file(from.join("c")), fs::remove_dir(from.join("d")));
    };
    let copied = send(&from, false, &mut bytes, &mut work).unwrap();
    let gone = |name| format!("{}: No such file or directory", from.join(name).display());
    assert_eq!(copied.skipped, ["b", "c", "d"].map(gone));
    let to = place.0.join("to");
    received(&bytes, &to).unwrap();
    assert_eq!(fs::read(to.join("z")).unwrap(), b"z");
    assert_eq!(fs::read_dir(&to).unwrap().count(), 2);
}

#[test]
fn the_requested_path_is_never_skipped_silently() {
    for (path, why) in
        [("/dev/null", "/dev/null: not a file, directory or symbolic link"), ("/nowhere", "read /nowhere: ")]
    {
        let error = send(Path::new(path), false, &mut Vec::new(), &mut |_| {}).unwrap_err().to_string();
        assert!(error.starts_with(why), "{error}");
    }
}
