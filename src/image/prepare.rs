//! Prepares images: finds them in the store, or adds them.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};

use super::bundle::{self, Part};
use super::config::ImageConfig;
use super::digest::Digest;
use super::import::{Imported, Input, Scope};
use super::index::{LayerRecord, Record};
use super::manifest::Platform;
use super::progress::Progress;
use super::root::Root;
use super::source::{self, Source};
use super::store::Store;
use super::{Layer, Prepared, directory};

impl Store {
    /// The image of a source, if it is in the store and the source has not changed.
    pub fn prepared(&self, source: &Source) -> Result<Option<Prepared>> {
        let index = self.index()?;
        match source {
            Source::Path { path, image } => self.prepared_path(path, image.as_deref()),
            Source::Id(hex) => index.by_prefix(hex).map_or(Ok(None), |id| self.stored(id)),
            Source::Name { reference, .. } => match (index.names.get(&reference.to_string()), self.path_of(source)?) {
                (Some(&id), _) => self.stored(id),
                (None, Some(path)) => self.prepared_path(path, None),
                (None, None) => Ok(None),
            },
        }
    }

    /// The path of a source, if it is a path and not a name or ID.
    pub fn path_of<'a>(&self, source: &'a Source) -> Result<Option<&'a Path>> {
        Ok(match source {
            Source::Path { path, .. } => Some(path),
            Source::Name { reference, path: Some(path) } => {
                let is_stored = self.index()?.names.contains_key(&reference.to_string());
                (!is_stored && path.exists()).then_some(path)
            }
            Source::Name { path: None, .. } | Source::Id(_) => None,
        })
    }

    fn prepared_path(&self, path: &Path, image: Option<&str>) -> Result<Option<Prepared>> {
        let find = || self.seen(&Seen::of(path, image)?);
        find().with_context(|| format!("prepare {}", path.display()))
    }

    fn seen(&self, seen: &Seen) -> Result<Option<Prepared>> {
        self.index()?.files.get(&seen.key).map_or(Ok(None), |&id| self.stored(id))
    }

    /// The image of a source, prepared if necessary.
    pub fn prepare(&self, source: &Source, progress: Progress) -> Result<Prepared> {
        match source {
            Source::Path { path, image } => self.prepare_path(path, image.as_deref(), progress),
            Source::Id(hex) => {
                let id = self.index()?.by_prefix(hex).with_context(|| format!("no such image: {hex}"))?;
                let prepared = self.stored_or_made(id, progress)?;
                prepared.with_context(|| format!("image {hex} has no root filesystem and no layers anymore"))
            }
            Source::Name { reference, .. } => {
                if let Some(&id) = self.index()?.names.get(&reference.to_string())
                    && let Some(prepared) = self.stored_or_made(id, progress)?
                {
                    return Ok(prepared);
                }
                match self.path_of(source)? {
                    Some(path) => self.prepare_path(path, None, progress),
                    None => Ok(self.pull(reference, &Platform::default(), progress)?.prepared),
                }
            }
        }
    }

    /// An image of the store, if its root file system exists.
    pub(super) fn stored(&self, id: Digest) -> Result<Option<Prepared>> {
        let index = self.index()?;
        let Some(record) = index.images.get(&id) else { return Ok(None) };
        let Some(in_use) = self.use_root(record.root)? else { return Ok(None) };
        let root = self.root_path(record.root);
        Ok(Some(Prepared { id, root, process: record.process.clone(), is_bare_root: id == record.root, in_use }))
    }

    /// An image of the store, if its root file system exists or can be made from stored layers.
    fn stored_or_made(&self, id: Digest, progress: Progress) -> Result<Option<Prepared>> {
        if let Some(prepared) = self.stored(id)? {
            return Ok(Some(prepared));
        }
        let index = self.index()?;
        let Some(record) = index.images.get(&id) else { return Ok(None) };
        let layers = record.layers.iter().map(|layer| self.stored_layer(layer.blob?, layer.diff_id).ok());
        let Some(layers) = layers.collect::<Option<Vec<_>>>().filter(|layers| !layers.is_empty()) else {
            return Ok(None);
        };
        let root = self.root_of_layers(layers, progress)?;
        self.record(id, Record { root: root.key, ..record.clone() }, root, None, Vec::new()).map(Some)
    }

    /// A layer whose blob is in the store.
    pub(super) fn stored_layer(&self, blob: Digest, diff_id: Digest) -> Result<Layer> {
        let path = self.blob_path(blob);
        let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Layer { part: Part::whole(file)?, blob: Some(blob), diff_id: Some(diff_id) })
    }

    /// Prepares the image at a path with its layers, and returns also the number of images there. Reads it even if it is prepared,
    /// unless it is a root file system: another source of the same image may have had other names.
    pub(super) fn load_path(&self, path: &Path, scope: Scope<'_>, progress: Progress) -> Result<(Prepared, usize)> {
        let load = || -> Result<(Prepared, usize)> {
            let name = if let Scope::Named(name) = scope { Some(name) } else { None };
            let seen = Seen::of(path, name)?;
            if let Some(prepared) = self.seen(&seen)?.filter(|prepared| prepared.is_bare_root) {
                return Ok((prepared, 1));
            }
            // Not every image has the path to itself.
            let seen = Seen { settled: seen.settled && !matches!(scope, Scope::Nth(1..)), ..seen };
            self.import(path, scope, seen, true, progress)
        };
        load().with_context(|| format!("prepare {}", path.display()))
    }

    /// The same for a file, which no path leads to later.
    pub(super) fn load_file(&self, file: File, scope: Scope<'_>, progress: Progress) -> Result<(Prepared, usize)> {
        let seen = Seen { settled: false, ..Seen::of_file(&file.metadata()?, None, Duration::ZERO) };
        self.import_input(&Input::Archive(file, seen.identity()), scope, None, seen, true, progress)
    }

    /// `input`, or a copy of its data if it cannot be read at any place.
    pub(super) fn seekable(&self, input: File) -> Result<File> {
        source::seekable(input, self.unpack_limit()?, &|| self.nameless_file())
    }

    /// Prepares the image at a path, unless it is prepared.
    fn prepare_path(&self, path: &Path, image: Option<&str>, progress: Progress) -> Result<Prepared> {
        let prepare = || -> Result<Prepared> {
            let seen = Seen::of(path, image)?;
            if let Some(prepared) = self.seen(&seen)? {
                return Ok(prepared);
            }
            self.import(path, Scope::of(image), seen, false, progress).map(|(prepared, _)| prepared)
        };
        prepare().with_context(|| format!("prepare {}", path.display()))
    }

    fn import(
        &self,
        path: &Path,
        image: Scope<'_>,
        seen: Seen,
        keeps_layers: bool,
        progress: Progress,
    ) -> Result<(Prepared, usize)> {
        let source = Some(std::path::absolute(path)?.display().to_string());
        // Otherwise a FIFO without a writer would block.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let kind = file.metadata()?.file_type();
        if kind.is_dir() {
            let input = Input::Directory(path.to_owned());
            return self.import_input(&input, image, source, seen, keeps_layers, progress);
        }
        ensure!(kind.is_file(), "it is neither a file nor a directory");
        self.import_input(&Input::Archive(file, seen.identity()), image, source, seen, keeps_layers, progress)
    }

    fn import_input(
        &self,
        input: &Input,
        image: Scope<'_>,
        source: Option<String>,
        seen: Seen,
        keeps_layers: bool,
        progress: Progress,
    ) -> Result<(Prepared, usize)> {
        let (image, root) = match (self.read(input, image, keeps_layers, progress)?, input, &seen.state) {
            ((image, Some(root)), ..) => (image, root),
            ((image, None), Input::Directory(dir), Some((state, bytes))) => {
                (image, self.root_of_directory(&fs::canonicalize(dir)?, *state, *bytes, progress)?)
            }
            _ => bail!("it has no root filesystem"),
        };
        let mut count = 1;
        let (id, config, own_names, blobs) = match image {
            Some(Imported { id, config, config_json, names, count: found, blobs }) => {
                self.keep_config(config_json.as_bytes())?;
                count = found;
                (id, config, names, blobs)
            }
            None => (root.key, ImageConfig::of_root(), Vec::new(), Vec::new()),
        };
        let mut blobs = blobs.into_iter();
        let ImageConfig { process, architecture, created, diff_ids, .. } = config;
        let record = Record {
            root: root.key,
            process,
            architecture,
            created,
            added_seconds: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
            source,
            own_names,
            layers: diff_ids.into_iter().map(|diff_id| LayerRecord::new(diff_id, blobs.next())).collect(),
            unpacked_bytes: root.unpacked.bytes,
        };
        let prepared = self.record(id, record, root, seen.settled.then_some(seen.key), Vec::new())?;
        Ok((prepared, count))
    }

    /// Adds an image to the index, with names.
    pub(super) fn record(
        &self,
        id: Digest,
        mut record: Record,
        root: Root,
        file: Option<String>,
        names: Vec<String>,
    ) -> Result<Prepared> {
        let process = record.process.clone();
        for (layer, bytes) in record.layers.iter_mut().zip(&root.unpacked.layers) {
            layer.files_bytes = Some(*bytes);
        }
        self.update(|index| {
            index.add(id, record, file, &|id| !self.machines_with(id).is_empty());
            index.names.extend(names.into_iter().map(|name| (name, id)));
            Ok(())
        })?;
        // A bare root file system is identified only by its key.
        let is_bare_root = id == root.key;
        Ok(Prepared { id, root: self.root_path(root.key), process, is_bare_root, in_use: root.file })
    }
}

/// The observed state of a file or a directory.
struct Seen {
    key: String,
    /// Whether the last change was long enough ago for another change to have a different timestamp.
    settled: bool,
    /// The fingerprint of a directory, and its size.
    state: Option<(Digest, u64)>,
}

impl Seen {
    fn of(path: &Path, image: Option<&str>) -> Result<Seen> {
        const CLOCK_TICK: Duration = Duration::from_secs(1);
        let m = fs::metadata(path)?;
        if m.is_dir() {
            // Any later change of a file changes the fingerprint.
            let (state, bytes) = directory::fingerprint(path)?;
            let mut key = format!("directory {state} {}", image.unwrap_or_default());
            // The list of an image may be a link.
            let lists = bundle::LISTS.iter().filter_map(|list| fs::metadata(path.join(list)).ok());
            lists.for_each(|list| key.push_str(&Seen::of_file(&list, None, CLOCK_TICK).key));
            return Ok(Seen { key, settled: true, state: Some((state, bytes)) });
        }
        Ok(Seen::of_file(&m, image, CLOCK_TICK))
    }

    /// Identifies the file while its content is not known.
    fn identity(&self) -> Digest {
        Digest::of(self.key.as_bytes())
    }

    fn of_file(m: &fs::Metadata, image: Option<&str>, clock_tick: Duration) -> Seen {
        let (seconds, nanoseconds) = (m.ctime(), m.ctime_nsec());
        let changed = Duration::new(seconds.try_into().unwrap_or(0), nanoseconds.try_into().unwrap_or(0));
        let settled = SystemTime::UNIX_EPOCH.elapsed().is_ok_and(|now| now > changed + clock_tick);
        let image = image.unwrap_or_default();
        let key = format!("{:x}-{}-{}-{seconds}.{nanoseconds:09} {image}", m.dev(), m.ino(), m.size());
        Seen { key, settled, state: None }
    }
}
