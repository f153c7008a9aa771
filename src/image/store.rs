//! The store's directory layout, and its concurrent use by several processes, each of which may be killed at any time.
//!
//! ```text
//! index.json         names and images; replaced atomically while holding `lock`
//! roots/KEY.erofs    root file systems; complete once they have their names; locked (shared) while in use
//! blobs/HEX          compressed layers, as long as an image has them: the next version shares most of them
//! configs/HEX        the configurations of images, whose digests are the images' IDs
//! blobs.lock         locked (shared) while fetching layers that no image has yet
//! warm/KEY/          snapshots of machines on the root file system KEY, removed with it (snapshot/warm.rs)
//! suspended/ID/      snapshots of suspended machines
//! disks/NAME.ext4    persistent disks; locked while in use
//! machines/ID/       machines that stay, with their writable layers (state_dir/kept.rs)
//! volumes/NAME/      named volumes; locked (shared) while in use
//! volume-labels/NAME the labels of one, as JSON
//! tmp/NAME.part      files being written, locked by the writer; without a lock, left by a killed process
//! tmp/NAME.lock      locked by the writer of NAME.part, for others to wait
//! ```

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::bundle::{self, Part};
use super::digest::Digest;
use super::erofs::Form;
use super::index::Index;
use super::manage::entries;
use crate::resources::data_dir;
use crate::resources::lock::{self, Kind};
use crate::sys;

const ROOTS: &str = "roots";
const ROOT_SUFFIX: &str = ".erofs";
const WARM: &str = "warm";
const CONFIGS: &str = "configs";
const DIRS: [&str; 9] = [ROOTS, "blobs", CONFIGS, WARM, "suspended", "disks", "volumes", "volume-labels", "tmp"];
/// Enough for about ten thousand images.
const INDEX_MAX_BYTES: u64 = 64 << 20;

/// The directory for snapshots of machines on the root file system at `root`. `None` if it is not in a store.
pub fn warm_dir_of(root: &Path) -> Option<PathBuf> {
    let key = Digest::from_hex(root.file_name()?.to_str()?.strip_suffix(ROOT_SUFFIX)?)?;
    let roots = root.parent().filter(|dir| dir.ends_with(ROOTS))?;
    Some(roots.with_file_name(WARM).join(key.hex()))
}

/// The image store.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    /// The maximum uncompressed size of an image; by default the free disk space.
    pub unpack_limit_bytes: Option<u64>,
    /// The format of root file systems.
    pub form: Form,
    /// Whether foreign data is read by confined processes, which are copies of this one: it must have a single thread.
    pub sandbox: bool,
}

impl Store {
    /// Opens the store in a directory, creating it if necessary.
    pub fn open(dir: &Path) -> Result<Store> {
        let open = || -> Result<()> {
            for name in DIRS {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(dir.join(name))?;
            }
            Ok(())
        };
        open().with_context(|| format!("open the image store {} (set $HUSK_DATA to move it)", dir.display()))?;
        Ok(Store { dir: dir.to_owned(), unpack_limit_bytes: None, form: Form::Lz4, sandbox: false })
    }

    /// Opens the user's store: `$HUSK_DATA`, or `husk` in `$XDG_DATA_HOME` or `~/.local/share`.
    pub fn open_default() -> Result<Store> {
        Store::open(&data_dir::find().context("cannot locate the image store: neither $HUSK_DATA nor $HOME is set")?)
    }

    /// The store's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn root_path(&self, key: Digest) -> PathBuf {
        self.dir.join(ROOTS).join(format!("{}{ROOT_SUFFIX}", key.hex()))
    }

    pub(super) fn warm_dir(&self, root: Digest) -> PathBuf {
        self.dir.join(WARM).join(root.hex())
    }

    /// The directories for snapshots, as far as they exist.
    pub fn warm_paths(&self) -> Vec<PathBuf> {
        let roots = entries(&self.dir.join(WARM));
        roots.flat_map(|root| entries(&root)).filter(|path| path.is_dir()).collect()
    }

    /// The directory for the snapshot of a machine that is suspended.
    pub fn suspended_dir(&self, machine: &str) -> PathBuf {
        self.dir.join("suspended").join(machine)
    }

    pub(super) fn blob_path(&self, blob: Digest) -> PathBuf {
        self.dir.join("blobs").join(blob.hex())
    }

    pub(super) fn config_path(&self, id: Digest) -> PathBuf {
        self.dir.join(CONFIGS).join(id.hex())
    }

    /// The configuration of an image as it was read. `None` if the image has none, or comes from an earlier husk.
    pub fn config_of(&self, id: Digest) -> Result<Option<Vec<u8>>> {
        let path = self.config_path(id);
        match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            file => {
                let read = || bundle::read_json(Part::whole(file?)?);
                read().map(Some).with_context(|| format!("read {}", path.display()))
            }
        }
    }

    /// Keeps the configuration of an image.
    pub(super) fn keep_config(&self, json: &[u8]) -> Result<()> {
        let id = Digest::of(json);
        if self.config_path(id).exists() {
            return Ok(());
        }
        let mut work = self.work_file(&format!("config-{}", id.hex()))?;
        work.file.set_len(0)?;
        work.file.write_all(json).context("write the image's configuration")?;
        work.keep_as(self, &self.config_path(id))
    }

    /// Begins to write a layer, unless the store has it.
    pub(super) fn begin_blob(&self, blob: Digest) -> Result<Option<Work>> {
        if self.blob_path(blob).exists() {
            return Ok(None);
        }
        let work = self.work_file(&format!("blob-{}", blob.hex()))?;
        // Another process may have written it while this one was waiting.
        Ok((!self.blob_path(blob).exists()).then_some(work))
    }

    /// Keeps a layer that was written, if it has this digest.
    pub(super) fn keep_blob(&self, blob: Digest, mut work: Work) -> Result<()> {
        let found = bundle::digest_of(&work.file).context("read the layer")?;
        if found != blob {
            work.remove();
            bail!("its data has the digest {found}, not {blob}");
        }
        work.keep_as(self, &self.blob_path(blob))
    }

    /// Whether a layer is in the store. It was verified before it was named.
    pub(super) fn has_blob(&self, blob: Digest, size_bytes: u64) -> bool {
        fs::metadata(self.blob_path(blob)).is_ok_and(|found| found.is_file() && found.len() == size_bytes)
    }

    /// Protects layers that no image has yet, as long as the file is open.
    pub(super) fn use_blobs(&self) -> Result<File> {
        let path = self.dir.join("blobs.lock");
        let file = lock::file().open(&path).with_context(|| format!("open {}", path.display()))?;
        lock::wait(&file, &path, Kind::Shared, lock::SHORT_TIMEOUT)?;
        Ok(file)
    }

    /// Opens a root file system and protects it from removal; `None` if it does not exist.
    pub(super) fn use_root(&self, key: Digest) -> Result<Option<File>> {
        let path = self.root_path(key);
        loop {
            let file = match File::open(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                file => file.with_context(|| format!("open {}", path.display()))?,
            };
            lock::wait(&file, &path, Kind::Shared, lock::LONG_TIMEOUT)?;
            // It may have been removed in between.
            if is_at(&file, &path) {
                return Ok(Some(file));
            }
        }
    }

    /// The current index.
    pub fn index(&self) -> Result<Index> {
        let path = self.dir.join("index.json");
        let read = || -> Result<Index> {
            let size_bytes = match fs::metadata(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Index::default()),
                metadata => metadata?.len(),
            };
            ensure!(size_bytes <= INDEX_MAX_BYTES, "it is too large: {size_bytes} bytes");
            Index::parse(&fs::read(&path)?)
        };
        read().with_context(|| format!("read {}", path.display()))
    }

    /// Changes the index. No other process changes the store's files during `change`.
    pub fn update<T>(&self, change: impl FnOnce(&mut Index) -> Result<T>) -> Result<T> {
        let lock = self.dir.join("lock");
        let _locked = lock::alone(&lock)?;
        let old = self.index()?;
        let mut index = old.clone();
        let result = change(&mut index)?;
        if index != old {
            self.replace_index(&index).with_context(|| format!("write the index of {}", self.dir.display()))?;
        }
        Ok(result)
    }

    fn replace_index(&self, index: &Index) -> Result<()> {
        let json = index.to_json()?;
        ensure!(
            json.len() as u64 <= INDEX_MAX_BYTES,
            "it would have {} MiB, and the maximum is {}: remove images with `husk rmi` or `husk prune`",
            json.len() >> 20,
            INDEX_MAX_BYTES >> 20
        );
        // Only the holder of the lock writes it, so a fixed name is sufficient.
        let part = self.dir.join("index.part");
        let replace = || -> Result<()> {
            let mut file = File::create(&part)?;
            file.write_all(&json)?;
            file.sync_all()?;
            Ok(fs::rename(&part, self.dir.join("index.json"))?)
        };
        if let Err(error) = replace() {
            let _ = fs::remove_file(&part);
            return Err(error);
        }
        self.sync("")
    }

    /// Makes the names in a directory durable.
    pub(super) fn sync(&self, dir: &str) -> Result<()> {
        Ok(File::open(self.dir.join(dir))?.sync_all()?)
    }

    /// Opens a file that will become `name`, after waiting for other processes that write the same file.
    pub(super) fn work_file(&self, name: &str) -> Result<Work> {
        let path = self.dir.join("tmp").join(format!("{name}.part"));
        let lock_path = path.with_extension("lock");
        let lock = lock_alone(&lock_path).with_context(|| format!("lock {}", lock_path.display()))?;
        // Only the holder of the lock writes it. Its own lock is for cleanup, which may hold it briefly.
        let file = lock_alone(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Work { file, path, kept: false, lock_path, _lock: lock })
    }

    /// An unnamed temporary file.
    pub fn nameless_file(&self) -> Result<File> {
        let tmp = self.dir.join("tmp");
        let mut options = File::options();
        options.read(true).write(true).mode(0o600);
        match options.clone().custom_flags(libc::O_TMPFILE).open(&tmp) {
            Ok(file) => Ok(file),
            Err(_) => {
                // The file system does not support O_TMPFILE.
                let path = tmp.join(format!("{}.nameless", std::process::id()));
                let file = options.create(true).truncate(true).open(&path);
                let file = file.with_context(|| format!("create {}", path.display()))?;
                fs::remove_file(&path)?;
                Ok(file)
            }
        }
    }

    /// The maximum uncompressed size of an image.
    pub(super) fn unpack_limit(&self) -> Result<u64> {
        let free = || -> Result<u64> { Ok(sys::disk::free_bytes(&File::open(&self.dir)?)?) };
        match self.unpack_limit_bytes {
            Some(limit) => Ok(limit),
            None => free().with_context(|| format!("get the free disk space in {}", self.dir.display())),
        }
    }
}

/// Opens the file with this name, creating it if necessary, with an exclusive lock. Logs a warning if that takes long.
fn lock_alone(path: &Path) -> Result<File> {
    loop {
        let file = lock::file().open(path)?;
        lock::wait(&file, path, Kind::Exclusive, lock::LONG_TIMEOUT)?;
        // The previous holder may have removed it.
        if is_at(&file, path) {
            return Ok(file);
        }
    }
}

/// Whether the file is the one that currently has this name.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(own), Ok(found)) => own.ino() == found.ino() && own.dev() == found.dev(),
        _ => false,
    }
}

/// A locked file that is being written. It is removed when dropped, unless it was named. Waiting processes use a
/// separate lock, because the file itself stays locked as long as machines use it.
pub(super) struct Work {
    pub file: File,
    path: PathBuf,
    kept: bool,
    lock_path: PathBuf,
    _lock: File,
}

impl Work {
    /// Keeps the incomplete file so that it can be resumed.
    pub fn keep_unfinished(&mut self) {
        self.kept = true;
    }

    /// Reverts [`Work::keep_unfinished`].
    pub fn remove(&mut self) {
        self.kept = false;
    }

    /// Names the file, after making its content durable. It is in use as long as this value exists.
    pub fn keep_as(&mut self, store: &Store, path: &Path) -> Result<()> {
        let keep = || -> Result<()> {
            // Replaces the exclusive lock, so that others may use it too.
            self.file.lock_shared()?;
            self.file.sync_all()?;
            fs::rename(&self.path, path)?;
            let dir = path.parent().context("no directory")?;
            ensure!(dir.starts_with(store.dir()), "it is outside the store");
            Ok(File::open(dir)?.sync_all()?)
        };
        keep().with_context(|| format!("write {}", path.display()))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
        // Locked until it is removed, so that no other process's lock file is removed.
        let _ = fs::remove_file(&self.lock_path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox;

    #[test]
    fn a_newer_index_is_not_modified() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        fs::write(dir.path().join("index.json"), r#"{"version": 2, "pictures": []}"#).unwrap();
        let error = format!("{:#}", store.update(|_| Ok(())).unwrap_err());
        assert!(error.ends_with("it has format version 2, and this husk supports version 1"), "{error}");
        assert!(fs::read_to_string(dir.path().join("index.json")).unwrap().contains("pictures"));
    }

    #[test]
    fn concurrent_updates_are_all_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let store = store.clone();
                let update = move || {
                    for i in 0..10 {
                        let name = format!("{thread}-{i}");
                        store.update(|index| Ok(index.names.insert(name, Digest::of(b"")))).unwrap();
                    }
                };
                sandbox::spawn("test", update).unwrap()
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(store.index().unwrap().names.len(), 40);
    }

    #[test]
    fn files_in_use_by_machines_do_not_block_others() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut work = store.work_file("x").unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = store.clone();
        let waits = sandbox::spawn("test", move || sender.send(other.work_file("x").map(drop))).unwrap();
        assert!(
            receiver.recv_timeout(std::time::Duration::from_millis(200)).is_err(),
            "it waits for the process that creates it"
        );
        let key = Digest::of(b"x");
        work.keep_as(&store, &store.root_path(key)).unwrap();
        let _machine = store.use_root(key).unwrap().unwrap();
        drop(work);
        receiver.recv_timeout(std::time::Duration::from_secs(60)).unwrap().unwrap();
        waits.join().unwrap().unwrap();
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn an_unreadable_index_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let grow = |name: String| store.update(|index| Ok(index.names.insert(name, Digest::of(b""))));
        grow("small".into()).unwrap();
        let error = format!("{:#}", grow("x".repeat(INDEX_MAX_BYTES as usize)).unwrap_err());
        assert!(error.contains("it would have 64 MiB, and the maximum is 64"), "{error}");
        assert_eq!(store.index().unwrap().names.keys().collect::<Vec<_>>(), ["small"]);
    }

    #[test]
    fn incomplete_files_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        drop(store.work_file("x").unwrap());
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn a_root_leads_to_its_snapshots() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let key = Digest::of(b"root");
        assert_eq!(warm_dir_of(&store.root_path(key)), Some(store.warm_dir(key)));
        for path in ["root.erofs", "/x/roots/root.erofs", "", "/"] {
            assert_eq!(warm_dir_of(Path::new(path)), None, "{path}");
        }
        assert_eq!(warm_dir_of(&dir.path().join(format!("{}.erofs", key.hex()))), None, "in another directory");
    }
}
