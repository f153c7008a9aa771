//! Store management: tags, lists, removes and prunes images.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::digest::Digest;
use super::index::{Index, Record};
use super::reference::Reference;
use super::source::Source;
use super::store::{Store, is_at};
use crate::resources::lock;
use crate::sys::disk;

/// A listed image.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// Its digest.
    pub id: Digest,
    /// Its shortest names; empty if it was only run from a path.
    pub names: Vec<String>,
    /// The disk usage of its root file system.
    pub root_bytes: u64,
    /// The disk usage of its downloaded layers, which images share.
    pub layer_bytes: u64,
    /// The disk usage of the snapshots that machines start from (`husk warm`).
    pub warm_bytes: u64,
    /// Other properties.
    #[serde(flatten)]
    pub record: Record,
}

/// What to keep when pruning.
#[derive(Debug, Clone, Copy, Default)]
pub struct PruneOptions {
    /// Images with a name.
    pub keep_named: bool,
    /// Unnamed images, which were run from a path.
    pub keep_unnamed: bool,
    /// Compressed layers: the root file system exists, and only pulls of other versions could use them.
    pub keep_layers: bool,
}

/// What [`Store::remove`] has removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The names, in their shortest form.
    pub untagged: Vec<String>,
    /// The image, if that was its last name.
    pub deleted: Option<Digest>,
}

/// What pruning has removed.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Pruned {
    /// The number of images.
    pub images: usize,
    /// The number of files, including those left by killed processes.
    pub files: usize,
    /// Their disk usage.
    pub bytes: u64,
}

impl Pruned {
    /// Removes a directory with files only.
    pub fn remove_dir(&mut self, dir: &Path) -> Result<()> {
        for path in entries(dir) {
            self.files += 1;
            self.bytes += disk_bytes(&path);
        }
        fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))
    }
}

impl Store {
    /// All images, most recently added first.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let index = self.index()?;
        let mut images: Vec<Listed> = index.images.keys().filter_map(|&id| self.listed(&index, id)).collect();
        images.sort_by_key(|image| (std::cmp::Reverse(image.record.added_seconds), image.names.clone()));
        Ok(images)
    }

    /// Finds an image by name, digest, or the path it was made from.
    pub fn find(&self, source: &Source) -> Result<Listed> {
        let index = self.index()?;
        let id = find(&index, source)?;
        self.listed(&index, id).context("no such image")
    }

    fn listed(&self, index: &Index, id: Digest) -> Option<Listed> {
        let record = index.images.get(&id)?.clone();
        let names = index.names_of(id).into_iter().map(familiar).collect();
        let blobs: BTreeSet<Digest> = record.layers.iter().filter_map(|layer| layer.blob).collect();
        let layer_bytes = blobs.iter().map(|&blob| disk_bytes(&self.blob_path(blob))).sum();
        let root_bytes = disk_bytes(&self.root_path(record.root));
        let snapshots = entries(&self.warm_dir(record.root));
        let warm_bytes = snapshots.flat_map(|snapshot| entries(&snapshot)).map(|path| disk_bytes(&path)).sum();
        Some(Listed { id, names, root_bytes, layer_bytes, warm_bytes, record })
    }

    /// The root file system of an image.
    pub fn root_of(&self, image: &Listed) -> PathBuf {
        self.root_path(image.record.root)
    }

    /// Adds names to an image.
    pub fn tag(&self, id: Digest, names: &[Reference]) -> Result<()> {
        self.update(|index| {
            ensure!(index.images.contains_key(&id), "no such image: {}", id.short());
            index.names.extend(names.iter().map(|name| (name.to_string(), id)));
            Ok(())
        })
    }

    /// Removes a name, and the image with its last name. An image that is given by its ID is removed if it has no more than one
    /// name, or with `force`. Images of running machines are not removed.
    pub fn remove(&self, source: &Source, force: bool) -> Result<Removed> {
        let removed = self.update(|index| {
            let id = find(index, source)?;
            let names: Vec<String> = index.names_of(id).into_iter().map(str::to_owned).collect();
            let given = match source {
                Source::Name { reference, .. } => names.iter().find(|name| **name == reference.to_string()),
                Source::Id(_) | Source::Path { .. } => None,
            };
            if let Some(name) = given.filter(|_| names.len() > 1) {
                index.names.remove(name);
                return Ok(Removed { untagged: vec![familiar(name)], deleted: None });
            }
            ensure!(
                force || given.is_some() || names.len() <= 1,
                "image {} has several names, which `husk rmi -f` removes: {}",
                id.short(),
                names.iter().map(|name| familiar(name)).collect::<Vec<_>>().join(", ")
            );
            let root = index.images.get(&id).map(|record| record.root).context("no such image")?;
            if let Some(machine) = self.machines_with(id).first() {
                bail!(
                    "image {} is in use by machine {machine}: remove that first, with `husk rm {machine}`",
                    id.short()
                );
            }
            let is_shared = index.images.iter().any(|(&other, record)| other != id && record.root == root);
            ensure!(is_shared || !self.is_in_use(root)?, "image {} is in use by a running machine", id.short());
            index.remove(id);
            if !is_shared {
                self.remove_root(root, &mut Pruned::default())?;
            }
            Ok(Removed { untagged: names.iter().map(|name| familiar(name)).collect(), deleted: Some(id) })
        })?;
        if removed.deleted.is_some() {
            self.prune(PruneOptions { keep_named: true, keep_unnamed: true, keep_layers: true })?;
        }
        Ok(removed)
    }

    /// Removes images as selected by `options`, and data that no image uses. Images of machines, running or not, are kept.
    pub fn prune(&self, options: PruneOptions) -> Result<Pruned> {
        let mut pruned = Pruned::default();
        if !options.keep_named || !options.keep_unnamed {
            let images = self.update(|index| {
                let is_kept = |id| match index.names_of(id).is_empty() {
                    true => options.keep_unnamed,
                    false => options.keep_named,
                };
                let unwanted = index.images.iter().filter(|&(&id, _)| !is_kept(id));
                let unwanted: Vec<(Digest, Digest)> = unwanted.map(|(&id, record)| (id, record.root)).collect();
                let mut count = 0;
                for (id, root) in unwanted {
                    if !self.is_in_use(root)? && self.machines_with(id).is_empty() {
                        index.remove(id);
                        count += 1;
                        if index.images.values().all(|record| record.root != root) {
                            self.remove_root(root, &mut pruned)?;
                        }
                    }
                }
                Ok(count)
            })?;
            pruned.images = images;
        }
        // Uses the index on disk, so that nothing it refers to is lost if a previous process was killed.
        self.update(|index| {
            self.prune_files(index, options, &mut pruned).with_context(|| format!("clean up {}", self.dir().display()))
        })?;
        Ok(pruned)
    }

    fn prune_files(&self, index: &Index, options: PruneOptions, pruned: &mut Pruned) -> Result<()> {
        let roots: BTreeSet<Digest> = index.images.values().map(|record| record.root).collect();
        let root_of = |name: &str| Digest::from_hex(name.strip_suffix(".erofs")?);
        self.remove_unlocked("roots", &|name| root_of(name).is_none_or(|key| !roots.contains(&key)), pruned)?;
        for entry in fs::read_dir(self.dir().join("warm"))? {
            let name = entry?.file_name();
            let key = Digest::from_hex(&name.to_string_lossy());
            key.filter(|key| !roots.contains(key)).map_or(Ok(()), |key| self.remove_warm(key, pruned))?;
        }
        self.remove_unlocked("tmp", &|_| true, pruned)?;
        let is_image = |name: &str| Digest::from_hex(name).is_some_and(|id| index.images.contains_key(&id));
        self.remove_unlocked("configs", &|name| !is_image(name), pruned)?;
        let blobs = lock::file().open(self.dir().join("blobs.lock"))?;
        // Another process may be about to use them.
        if blobs.try_lock().is_ok() {
            let layers = index.images.values().flat_map(|record| &record.layers);
            let kept: BTreeSet<Digest> =
                layers.filter_map(|layer| layer.blob.filter(|_| options.keep_layers)).collect();
            let is_kept = |name: &str| Digest::from_hex(name).is_some_and(|blob| kept.contains(&blob));
            self.remove_unlocked("blobs", &|name| !is_kept(name), pruned)?;
        }
        Ok(())
    }

    /// Removes a root file system that is about to leave the index. This comes first, because there may be no space for a new index
    /// before.
    fn remove_root(&self, key: Digest, pruned: &mut Pruned) -> Result<()> {
        self.remove_warm(key, pruned)?;
        let name = format!("{}.erofs", key.hex());
        self.remove_unlocked("roots", &|found| found == name, pruned)
    }

    /// Removes the snapshots of a root file system. Machines that were started from them keep the files open.
    fn remove_warm(&self, key: Digest, pruned: &mut Pruned) -> Result<()> {
        let dir = self.warm_dir(key);
        entries(&dir).filter(|path| path.is_dir()).try_for_each(|snapshot| pruned.remove_dir(&snapshot))?;
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Removes the files in a directory that are not locked.
    fn remove_unlocked(&self, dir: &str, is_unwanted: &dyn Fn(&str) -> bool, pruned: &mut Pruned) -> Result<()> {
        for entry in fs::read_dir(self.dir().join(dir))? {
            let entry = entry?;
            let path = entry.path();
            if !entry.file_type()?.is_file() || !is_unwanted(&entry.file_name().to_string_lossy()) {
                continue;
            }
            // NFS requires write access for an exclusive lock.
            let Ok(file) = lock::file().create(false).open(&path) else { continue };
            if file.try_lock().is_ok() && is_at(&file, &path) {
                let bytes = disk_bytes(&path);
                fs::remove_file(&path)?;
                pruned.files += 1;
                pruned.bytes += bytes;
            }
        }
        Ok(())
    }

    fn is_in_use(&self, root: Digest) -> Result<bool> {
        match lock::file().create(false).open(self.root_path(root)) {
            Ok(file) => Ok(file.try_lock().is_err()),
            Err(_) => Ok(false),
        }
    }
}

fn find(index: &Index, source: &Source) -> Result<Digest> {
    match source {
        Source::Name { reference, path } => match (index.names.get(&reference.to_string()), path) {
            (Some(&id), _) => Ok(id),
            (None, Some(path)) => by_path(index, path),
            (None, None) => by_short_id(index, reference)
                .with_context(|| format!("no such image: {} (see `husk images`)", reference.familiar())),
        },
        Source::Id(hex) => index.by_prefix(hex).with_context(|| format!("no such image: {hex}")),
        Source::Path { path, .. } => by_path(index, path),
    }
}

/// The only image whose ID starts with a word that could also be a name.
fn by_short_id(index: &Index, word: &Reference) -> Option<Digest> {
    let familiar = word.familiar();
    let hex = familiar.strip_suffix(":latest").filter(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    index.by_prefix(hex)
}

fn by_path(index: &Index, path: &Path) -> Result<Digest> {
    let full = std::path::absolute(path)?.display().to_string();
    let mut found = index.images.iter().filter(|(_, record)| record.source.as_ref() == Some(&full));
    match (found.next(), found.next()) {
        (Some((&id, _)), None) => Ok(id),
        (Some(_), Some(_)) => bail!("several images were made from {}: use an image ID", path.display()),
        _ => bail!("no such image: {} (see `husk images`)", path.display()),
    }
}

fn familiar(name: &str) -> String {
    name.parse::<Reference>().map_or_else(|_| name.to_owned(), |reference| reference.familiar())
}

/// The paths in a directory; none if it does not exist.
pub(super) fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// The disk usage of a file.
fn disk_bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| disk::allocated_bytes(&found))
}
