//! From a source to a prepared image: found in the store, or made and put there.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use super::bundle::Part;
use super::config::ImageConfig;
use super::digest::Digest;
use super::index::{LayerRecord, Record};
use super::manifest::Platform;
use super::progress::Progress;
use super::root::Root;
use super::source::{self, Found, Source};
use super::store::Store;
use super::{Layer, Prepared, directory};

impl Store {
    /// The image of a source, if it is ready for a machine: it is in the store, and its file did not change.
    pub fn prepared(&self, source: &Source) -> Result<Option<Prepared>> {
        let index = self.index()?;
        match source {
            Source::Path { path, image } => self.prepared_path(path, image.as_deref()),
            Source::Id(hex) => index.by_prefix(hex).map_or(Ok(None), |id| self.stored(id)),
            Source::Name { reference, typed } => match index.names.get(&reference.to_string()) {
                Some(&id) => self.stored(id),
                None if Path::new(typed).exists() => self.prepared_path(Path::new(typed), None),
                None => Ok(None),
            },
        }
    }

    fn prepared_path(&self, path: &Path, image: Option<&str>) -> Result<Option<Prepared>> {
        let find = || self.seen(&Seen::of(path, image)?);
        find().with_context(|| format!("prepare {}", path.display()))
    }

    fn seen(&self, seen: &Seen) -> Result<Option<Prepared>> {
        self.index()?.files.get(&seen.key).map_or(Ok(None), |&id| self.stored(id))
    }

    /// The image of a source, ready for a machine; made so if need be.
    pub fn prepare(&self, source: &Source, progress: &Progress) -> Result<Prepared> {
        match source {
            Source::Path { path, image } => self.prepare_path(path, image.as_deref(), progress),
            Source::Id(hex) => {
                let id = self.index()?.by_prefix(hex).with_context(|| format!("there is no image {hex}"))?;
                let prepared = self.stored_or_made(id, progress)?;
                prepared.with_context(|| format!("image {hex} has no root and no layers any more"))
            }
            Source::Name { reference, typed } => {
                if let Some(&id) = self.index()?.names.get(&reference.to_string())
                    && let Some(prepared) = self.stored_or_made(id, progress)?
                {
                    return Ok(prepared);
                }
                if Path::new(typed).exists() {
                    return self.prepare_path(Path::new(typed), None, progress);
                }
                Ok(self.pull(reference, &Platform::default(), progress)?.prepared)
            }
        }
    }

    /// An image of the store, if its root is there.
    pub(super) fn stored(&self, id: Digest) -> Result<Option<Prepared>> {
        let index = self.index()?;
        let Some(record) = index.images.get(&id) else { return Ok(None) };
        let Some(in_use) = self.use_root(record.root)? else { return Ok(None) };
        let root = self.root_path(record.root);
        Ok(Some(Prepared { id, root, process: record.process.clone(), in_use }))
    }

    /// An image of the store, if its root is there, or can be made of the layers that are.
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
        let spool = |unpacked: &mut dyn Read| -> Result<File> {
            source::spool_to(self.nameless_file()?, unpacked, self.unpack_limit()?)
        };
        let (id, config, own_names, root) = match source::look(path, image, &Platform::default(), &spool)? {
            Found::Image(image) => {
                image.config.check_platform()?;
                let root = self.root_of_layers(&image.layers, progress)?;
                (image.id, image.config, image.names, root)
            }
            Found::RootArchive(archive) => {
                let work = Digest::of(seen.key.as_bytes());
                let root = self.root_of_archive(&archive, work, progress)?;
                (root.key, ImageConfig::of_root(), Vec::new(), root)
            }
            Found::RootDirectory(folder) => {
                let (state, bytes) = seen.state.map_or_else(|| directory::fingerprint(&folder), Ok)?;
                let root = self.root_of_directory(&folder, state, bytes, progress)?;
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
            source: Some(std::path::absolute(path)?.display().to_string()),
            own_names,
            layers: diff_ids.into_iter().map(|diff_id| LayerRecord { diff_id, blob: None }).collect(),
            unpacked_bytes: root.unpacked_bytes,
        };
        self.record(id, record, root, seen.settled.then_some(seen.key), Vec::new())
    }

    /// Puts an image into the index, and gives it names.
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
        Ok(Prepared { id, root: self.root_path(root.key), process, in_use: root.file })
    }
}

/// What tells the state of a file or a directory.
struct Seen {
    key: String,
    /// Whether the last change is long enough ago that another one would have another time.
    settled: bool,
    /// The fingerprint of a root directory, and its size.
    state: Option<(Digest, u64)>,
}

impl Seen {
    fn of(path: &Path, image: Option<&str>) -> Result<Seen> {
        const CLOCK_TICK: Duration = Duration::from_secs(1);
        let m = fs::metadata(path)?;
        if m.is_dir() && !path.join("oci-layout").exists() {
            // A file that changes from now on changes the state.
            let (state, bytes) = directory::fingerprint(path)?;
            return Ok(Seen { key: format!("directory {state}"), settled: true, state: Some((state, bytes)) });
        }
        if m.is_dir() {
            // An image that is added to a layout changes its index.
            let index = fs::metadata(path.join(super::oci_layout::INDEX))?;
            return Ok(Seen::of_file(&index, image, CLOCK_TICK));
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
