//! Helpers: husk with a separate store, external tools, and comparison of trees.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// A temporary store and directory.
pub struct House {
    pub dir: TempDir,
}

impl House {
    pub fn new() -> House {
        House { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A husk command that uses the store.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.args(arguments);
        self.surround(&mut command);
        command
    }

    /// Replaces the user's directories in a command's environment.
    pub fn surround(&self, command: &mut Command) {
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("HUSK_DATA", self.path("data")).env("DOCKER_CONFIG", self.path("docker"));
        command.env("HOME", self.path("home")).env("XDG_RUNTIME_DIR", self.path("no-session"));
        for variable in ["REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR"] {
            command.env_remove(variable);
        }
    }

    pub fn husk(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Loads the image at a path, and returns the path of its root file system.
    pub fn load(&self, path: &str) -> PathBuf {
        let output = self.husk(&["load", path, "--name", "loaded"]);
        assert!(output.status.success(), "load {path}: {output:?}");
        self.root("loaded")
    }

    /// The root file system of an image in the store.
    pub fn root(&self, name: &str) -> PathBuf {
        let image = self.inspect(name);
        let key = image["Husk"]["Root"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
        self.path("data/roots").join(key + ".erofs")
    }

    pub fn inspect(&self, name: &str) -> serde_json::Value {
        let output = self.husk(&["inspect", name]);
        assert!(output.status.success(), "inspect {name}: {output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()[0].clone()
    }

    /// Asserts that husk fails with one line that contains `words`, and leaves nothing in the store.
    pub fn refused(&self, arguments: &[&str], words: &str) {
        let output = self.husk(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert!(stderr.lines().count() == 1 && stderr.contains(words), "{arguments:?}: {stderr}");
        assert_eq!(self.files("roots") + self.files("tmp"), 0, "{arguments:?} left something");
    }

    /// The number of files in a directory of the store.
    pub fn files(&self, dir: &str) -> usize {
        fs::read_dir(self.path("data").join(dir)).map_or(0, Iterator::count)
    }

    /// Runs a shell command in the directory.
    pub fn sh(&self, line: &str) {
        let output = Command::new("bash").args(["-euc", line]).current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
    }
}

/// Owners, devices and extraction require root; otherwise a test is skipped with a message.
pub fn is_root() -> bool {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if !root {
        println!("SKIPPED: this test takes root");
    }
    root
}

/// The metadata of files, as text.
type Tree = BTreeMap<PathBuf, String>;

/// Asserts that two images have the same content: all but their superblocks, which have their identifiers.
#[track_caller]
pub fn assert_same_content(one: &Path, other: &Path) {
    const SUPERBLOCK_END: usize = 2048;
    let [one, other] = [one, other].map(|path| fs::read(path).unwrap());
    assert!(one.len() > SUPERBLOCK_END && one[SUPERBLOCK_END..] == other[SUPERBLOCK_END..], "they differ");
}

/// Asserts that an image has exactly the files of a directory.
pub fn assert_same(expected: &Path, root: &Path) {
    let check = Command::new("fsck.erofs").arg(root).output().unwrap();
    assert!(check.status.success() && check.stderr.is_empty(), "{check:?}");
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("root");
    fs::create_dir(&target).unwrap();
    let mount = Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(root).arg(&target).output().unwrap();
    let (found, wanted) = if mount.status.success() {
        let found = tree(&target, true);
        assert!(Command::new("umount").arg(&target).status().unwrap().success());
        (found, tree(expected, true))
    } else {
        // Without a kernel mount, the tool supports neither extended attributes nor hard links.
        let extract = format!("--extract={}", target.display());
        let output = Command::new("fsck.erofs").arg(extract).arg("--overwrite").arg(root).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        (tree(&target, false), tree(expected, false))
    };
    let differs = |(path, words): &(&PathBuf, &String)| found.get(*path) != Some(*words);
    let different: Vec<String> = wanted
        .iter()
        .filter(differs)
        .map(|(path, words)| format!("{}: {words}, found: {:?}", path.display(), found.get(path)))
        .take(10)
        .collect();
    assert!(different.is_empty(), "{different:#?}");
    let extra: Vec<&PathBuf> = found.keys().filter(|path| !wanted.contains_key(*path)).take(10).collect();
    assert!(extra.is_empty(), "not expected: {extra:?}");
}

fn tree(root: &Path, is_full: bool) -> Tree {
    let mut tree = Tree::new();
    let mut first_names = BTreeMap::new();
    let mut paths = vec![PathBuf::new()];
    while let Some(path) = paths.pop() {
        let here = root.join(&path);
        let metadata = fs::symlink_metadata(&here).unwrap();
        let m = &metadata;
        let mut words = format!("{:o} {}:{}", m.mode(), m.uid(), m.gid());
        if is_full {
            words += &format!(" {}.{:09} links {}", m.mtime(), m.mtime_nsec(), m.nlink());
            words += &format!(" {:?}", attributes(&here));
            if !m.is_dir() {
                let first = first_names.entry(m.ino()).or_insert_with(|| path.clone());
                words += &format!(" same as {}", first.display());
            }
        }
        if m.is_file() {
            let content = fs::read(&here).unwrap();
            let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |word, &byte| word << 8 | u64::from(byte));
            let sum = content.chunks(8).fold(7u64, |sum, bytes| {
                let word = bytes.try_into().map_or_else(|_| word(bytes), u64::from_le_bytes);
                sum.rotate_left(5).wrapping_mul(0x0100_0000_01b3) ^ word
            });
            words += &format!(" {} bytes {sum:x}", content.len());
        } else if m.is_symlink() {
            words += &format!(" to {:?}", fs::read_link(&here).unwrap());
        } else if m.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&here).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort_by(|a, b| b.cmp(a));
            paths.extend(names.into_iter().map(|name| path.join(name)));
        } else {
            words += &format!(" device {:x}", m.rdev());
        }
        tree.insert(path, words);
    }
    tree
}

/// The names and values of extended attributes.
fn attributes(path: &Path) -> Vec<(String, Vec<u8>)> {
    let names = husk::sys::xattr::list(path).unwrap();
    let mut all: Vec<_> = names
        .into_iter()
        .map(|name| (name.to_string_lossy().into_owned(), husk::sys::xattr::get(path, &name).unwrap()))
        .collect();
    all.sort();
    all
}

/// A directory tree with all kinds of files that an image can contain.
pub fn odd_tree(house: &House, name: &str) -> PathBuf {
    house.sh(&format!("mkdir {name}; cd {name}; {}", include_str!("odd_tree.sh")));
    let path = house.path(name);
    let odd = OsStr::from_bytes(b"bytes-\xff\xfe");
    fs::write(path.join(odd), "a name that is no text").unwrap();
    path
}
