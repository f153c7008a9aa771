//! Prepares images: finds them in the store, or adds them.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use super::bundle::{Bundle, Part};
use super::config::ImageConfig;
use super::digest::Digest;
use super::index::{LayerRecord, Record};
use super::manifest::Platform;
use super::progress::Progress;
use super::root::Root;
use super::source::{self, Found, Source};
use super::store::Store;
use super::{Layer, Prepared, directory};

/// All of an image's names are stored in the index.
const NAMES_MAX_BYTES: usize = 64 << 10;

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
    pub fn prepare(&self, source: &Source, progress: &Progress) -> Result<Prepared> {
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
    fn stored_or_made(&self, id: Digest, progress: &Progress) -> Result<Option<Prepared>> {
        if let Some(prepared) = self.stored(id)? {
            return Ok(Some(prepared));
        }
        let index = self.index()?;
        let Some(record) = index.images.get(&id) else { return Ok(None) };
        let layers = record.layers.iter().map(|layer| {
            let part = Part::whole(File::open(self.blob_path(layer.blob?)).ok()?).ok()?;
            Some(Layer { part, blob: layer.blob, diff_id: Some(layer.diff_id) })
        });
        let Some(layers) = layers.collect::<Option<Vec<_>>>().filter(|layers| !layers.is_empty()) else {
            return Ok(None);
        };
        let root = self.root_of_layers(&layers, progress)?;
        self.record(id, Record { root: root.key, ..record.clone() }, root, None, Vec::new()).map(Some)
    }

    fn prepare_path(&self, path: &Path, image: Option<&str>, progress: &Progress) -> Result<Prepared> {
        let prepare = || -> Result<Prepared> {
            let seen = Seen::of(path, image)?;
            if let Some(prepared) = self.seen(&seen)? {
                return Ok(prepared);
            }
            self.import(path, image, seen, progress)
        };
        prepare().with_context(|| format!("prepare {}", path.display()))
    }

    fn import(&self, path: &Path, image: Option<&str>, seen: Seen, progress: &Progress) -> Result<Prepared> {
        let max_bytes = self.unpack_limit()?;
        let found = source::look(path, image, &Platform::default(), max_bytes, &|| self.nameless_file())?;
        self.import_found(found, Some(std::path::absolute(path)?.display().to_string()), seen, progress)
    }

    /// The image of an archive read from `input`, such as standard input.
    pub(super) fn prepare_stream(&self, input: File, progress: &Progress) -> Result<Prepared> {
        let max_bytes = self.unpack_limit()?;
        let new_file = || self.nameless_file();
        let file = source::seekable(input, max_bytes, &new_file)?;
        // There is no path by which the archive could be recognized later.
        let seen = Seen { settled: false, ..Seen::of_file(&file.metadata()?, None, Duration::ZERO) };
        let found = source::look_into(file, None, &Platform::default(), max_bytes, &new_file)?;
        self.import_found(found, None, seen, progress)
    }

    fn import_found(&self, found: Found, source: Option<String>, seen: Seen, progress: &Progress) -> Result<Prepared> {
        let (id, config, own_names, root) = match found {
            Found::Image(image) => {
                image.config.check_platform()?;
                let names_bytes: usize = image.names.iter().map(String::len).sum();
                ensure!(names_bytes <= NAMES_MAX_BYTES, "the image has too many names ({} KiB)", names_bytes >> 10);
                let root = self.root_of_layers(&image.layers, progress)?;
                (image.id, image.config, image.names, root)
            }
            Found::RootArchive(archive) => {
                let work = Digest::of(seen.key.as_bytes());
                let root = self.root_of_archive(&archive, work, progress)?;
                (root.key, ImageConfig::of_root(), Vec::new(), root)
            }
            Found::RootDirectory(dir) => {
                let (state, bytes) = seen.state.map_or_else(|| directory::fingerprint(&dir), Ok)?;
                let root = self.root_of_directory(&dir, state, bytes, progress)?;
                (root.key, ImageConfig::of_root(), Vec::new(), root)
            }
        };
        let ImageConfig { process, architecture, created, diff_ids, .. } = config;
        let record = Record {
            root: root.key,
            process,
            architecture,
            created,
            added_seconds: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
            source,
            own_names,
            layers: diff_ids.into_iter().map(|diff_id| LayerRecord { diff_id, blob: None }).collect(),
            unpacked_bytes: root.unpacked_bytes,
        };
        self.record(id, record, root, seen.settled.then_some(seen.key), Vec::new())
    }

    /// Adds an image to the index, with names.
    pub(super) fn record(
        &self,
        id: Digest,
        record: Record,
        root: Root,
        file: Option<String>,
        names: Vec<String>,
    ) -> Result<Prepared> {
        let process = record.process.clone();
        self.update(|index| {
            index.add(id, record, file);
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
    /// The fingerprint of a root directory, and its size.
    state: Option<(Digest, u64)>,
}

impl Seen {
    fn of(path: &Path, image: Option<&str>) -> Result<Seen> {
        const CLOCK_TICK: Duration = Duration::from_secs(1);
        let m = fs::metadata(path)?;
        if m.is_dir() {
            let Some(list) = Bundle::Directory(path.to_owned()).list() else {
                // Any later change of a file changes the fingerprint.
                let (state, bytes) = directory::fingerprint(path)?;
                return Ok(Seen { key: format!("directory {state}"), settled: true, state: Some((state, bytes)) });
            };
            // Adding an image to the directory changes its list.
            return Ok(Seen::of_file(&fs::metadata(path.join(list.name()))?, image, CLOCK_TICK));
        }
        Ok(Seen::of_file(&m, image, CLOCK_TICK))
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
