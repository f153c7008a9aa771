//! Builds root file systems from layers, archives or directories. Each is built once and then shared.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::bundle::Part;
use super::digest::{Digest, Hasher, Hashing};
use super::directory;
use super::erofs::{FORMAT_VERSION, Form, Writer};
use super::layer::{self, Whiteouts};
use super::outside::{Outside, RootSource};
use super::progress::{Bar, Progress};
use super::store::{Store, Work};
use super::tar::Stream;
use super::tree::{Tree, TreeLimits};
use super::{Layer, unpack};

/// A root file system, protected from removal.
pub struct Root {
    pub key: Digest,
    pub file: File,
    /// What was unpacked; nothing if it already existed.
    pub unpacked: Unpacked,
}

/// What was unpacked for a root file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpacked {
    /// The uncompressed size of its layers.
    pub bytes: u64,
    /// The size of the files in each layer, lowest first.
    pub layers: Vec<u64>,
}

/// The key of a root file system: any difference in how it is built changes the key.
pub(super) fn key(kind: &str, form: Form, parts: &[Digest]) -> Digest {
    let mut text = format!("erofs {FORMAT_VERSION} {form:?} {kind}\n");
    parts.iter().for_each(|part| text.push_str(&format!("{part}\n")));
    Digest::of(text.as_bytes())
}

/// What may be unpacked.
#[derive(Debug, Clone, Copy)]
pub struct RootLimits {
    /// The maximum uncompressed size.
    pub unpacked_bytes: u64,
}

/// Builds the root file system of these layers, unless it exists. Returns what was unpacked.
pub fn of_layers(
    layers: &[Layer],
    outside: &dyn Outside,
    form: Form,
    limits: &RootLimits,
    progress: Progress,
) -> Result<Unpacked> {
    let diff_ids = layers.iter().filter_map(|layer| layer.diff_id).collect();
    build(&RootSource::Layers(diff_ids), layers, outside, form, limits, progress)
}

/// Builds the root file system in a tar archive, unless it exists. Returns what was unpacked.
pub fn of_archive(
    archive: &Part,
    outside: &dyn Outside,
    form: Form,
    limits: &RootLimits,
    progress: Progress,
) -> Result<Unpacked> {
    let layer = Layer { part: archive.clone(), blob: None, diff_id: None };
    build(&RootSource::Archive, &[layer], outside, form, limits, progress)
}

fn build(
    source: &RootSource,
    layers: &[Layer],
    outside: &dyn Outside,
    form: Form,
    limits: &RootLimits,
    progress: Progress,
) -> Result<Unpacked> {
    let whiteouts = match source {
        RootSource::Layers(_) => Whiteouts::Apply,
        RootSource::Archive => Whiteouts::Keep,
    };
    let Some(file) = outside.begin_root(source)? else { return Ok(Unpacked::default()) };
    let mut maker = Maker::new(file, outside.new_file()?, form, limits);
    let read = maker.add_layers(layers, whiteouts, progress)?;
    maker.finish(outside.root_key(read.content)?).map(|()| read.unpacked)
}

impl Store {
    /// The key of the root file system with these uncompressed layers.
    pub(super) fn key_of_layers(&self, diff_ids: &[Digest]) -> Digest {
        key("layers", self.form, diff_ids)
    }

    /// Builds the root file system from a host directory with this fingerprint, unless it exists. Nothing in a directory is
    /// parsed but by the host's kernel, so that this happens in no process of its own.
    pub(super) fn root_of_directory(
        &self,
        path: &Path,
        state: Digest,
        total_bytes: u64,
        progress: Progress,
    ) -> Result<Root> {
        let key = key("directory", self.form, &[state]);
        if let Some(root) = self.existing_root(key, Unpacked::default())? {
            return Ok(root);
        }
        let work = self.work_file(&key.hex())?;
        // Another process may have built it while this one was waiting.
        if let Some(root) = self.existing_root(key, Unpacked::default())? {
            return Ok(root);
        }
        work.file.set_len(0)?;
        let limits = RootLimits { unpacked_bytes: self.unpack_limit()? };
        let mut maker = Maker::new(work.file.try_clone()?, self.nameless_file()?, self.form, &limits);
        let bar = progress.bar("preparing", total_bytes);
        let bytes = directory::add(path, &mut maker.tree, &mut maker.writer, &mut |done| bar.set(done))?;
        maker.finish(Some(key))?;
        self.keep_root(key, work, Unpacked { bytes, layers: Vec::new() })
    }

    /// Names a root file system that was written.
    pub(super) fn keep_root(&self, key: Digest, mut work: Work, unpacked: Unpacked) -> Result<Root> {
        work.keep_as(self, &self.root_path(key))?;
        let root = self.existing_root(key, unpacked)?;
        root.with_context(|| format!("the root filesystem {} was removed right after it was created", key.short()))
    }

    /// The root file system with this key, if it exists.
    pub(super) fn existing_root(&self, key: Digest, unpacked: Unpacked) -> Result<Option<Root>> {
        Ok(self.use_root(key)?.map(|file| Root { key, file, unpacked }))
    }
}

/// What was read of layers.
struct LayersRead {
    unpacked: Unpacked,
    /// Identifies their uncompressed content.
    content: Digest,
}

/// A root file system being built.
struct Maker {
    tree: Tree,
    writer: Writer,
    limit_bytes: u64,
}

impl Maker {
    fn new(file: File, spill: File, form: Form, limits: &RootLimits) -> Maker {
        let tree = Tree::new(TreeLimits::default());
        Maker { tree, writer: Writer::new(file, spill, form), limit_bytes: limits.unpacked_bytes }
    }

    /// Completes the file, which gets this key; without one it is not needed.
    fn finish(self, key: Option<Digest>) -> Result<()> {
        let Some(key) = key else { return Ok(()) };
        self.writer.finish(&self.tree, key.first_half()).map(drop)
    }

    fn add_layers(&mut self, layers: &[Layer], whiteouts: Whiteouts, progress: Progress) -> Result<LayersRead> {
        let packed_bytes = layers.iter().map(|layer| layer.part.size_bytes).sum();
        let bar = progress.bar("preparing", packed_bytes);
        let (mut unpacked, mut done_bytes, mut content) = (Unpacked::default(), 0, Hasher::default());
        for (number, layer) in (1..).zip(layers) {
            let what = || match layer.diff_id {
                Some(_) => format!("layer {number} of {}", layers.len()),
                None => "the archive".to_owned(),
            };
            let added = self.add_layer(layer, whiteouts, unpacked.bytes, &bar, done_bytes);
            let (hasher, files_bytes) = added.with_context(what)?;
            unpacked.bytes += hasher.len_bytes();
            unpacked.layers.push(files_bytes);
            done_bytes += layer.part.size_bytes;
            content.update(hasher.digest().hex().as_bytes());
        }
        Ok(LayersRead { unpacked, content: content.digest() })
    }

    /// Applies and verifies a layer. Also takes the uncompressed size before it, and the number of bytes of layers read
    /// so far. Returns its digest, and the size of its files.
    fn add_layer(
        &mut self,
        layer: &Layer,
        whiteouts: Whiteouts,
        before: u64,
        bar: &Bar,
        done: u64,
    ) -> Result<(Hasher, u64)> {
        let verified = Arc::new(AtomicBool::new(layer.blob.is_none()));
        let read_bytes = Arc::new(AtomicU64::new(done));
        let part = Counted { reader: layer.part.clone(), read_bytes: read_bytes.clone() };
        let blob: Box<dyn Read + Send> = match layer.blob {
            Some(digest) => {
                Box::new(Verifying { reader: Some(Hashing::new(part)), digest, verified: verified.clone() })
            }
            None => Box::new(part),
        };
        let unpacked = unpack::ReadAhead::start(move || unpack::unpacked(blob))?;
        let limited = Limited { reader: unpacked, left_bytes: self.limit_bytes.saturating_sub(before) };
        let hashing = Hashing::new(Shown { reader: limited, bar, read_bytes });
        let (mut rest, files_bytes) = layer::apply(Stream(hashing), whiteouts, &mut self.tree, &mut self.writer)?;
        // Archives are padded with zeroes, which are part of the digest.
        io::copy(&mut rest.0, &mut io::sink())?;
        ensure!(verified.load(Ordering::Relaxed), "it has data after its end");
        let hasher = rest.0.into_hasher();
        if let Some(diff_id) = layer.diff_id {
            let found = hasher.clone().digest();
            ensure!(found == diff_id, "it unpacks to {found}, but the expected digest is {diff_id}");
        }
        Ok((hasher, files_bytes))
    }
}

/// Verifies a blob's digest when its end is reached.
struct Verifying<R> {
    reader: Option<Hashing<R>>,
    digest: Digest,
    verified: Arc<AtomicBool>,
}

impl<R: Read> Read for Verifying<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(reader) = self.reader.as_mut().filter(|_| !buffer.is_empty()) else { return Ok(0) };
        let len = reader.read(buffer)?;
        if len == 0
            && let Some(reader) = self.reader.take()
        {
            reader.verify(self.digest).map_err(io::Error::other)?;
            self.verified.store(true, Ordering::Relaxed);
        }
        Ok(len)
    }
}

/// Counts the bytes read from a stream.
struct Counted<R> {
    reader: R,
    read_bytes: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.reader.read(buffer)?;
        self.read_bytes.fetch_add(len as u64, Ordering::Relaxed);
        Ok(len)
    }
}

/// Limits the number of bytes of a stream.
struct Limited<R> {
    reader: R,
    left_bytes: u64,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.reader.read(buffer)?;
        match self.left_bytes.checked_sub(len as u64) {
            Some(left_bytes) => self.left_bytes = left_bytes,
            None => return Err(io::Error::other("the image unpacks to more than the free or allowed disk space")),
        }
        Ok(len)
    }
}

/// Shows progress by the number of compressed bytes read.
struct Shown<'a, R> {
    reader: R,
    bar: &'a Bar,
    read_bytes: Arc<AtomicU64>,
}

impl<R: Read> Read for Shown<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bar.set(self.read_bytes.load(Ordering::Relaxed));
        self.reader.read(buffer)
    }
}
