//! Imports an image or a root file system: a confined process reads the archive, and this one gives it files and names
//! what it has written.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use super::bundle;
use super::config::{ImageConfig, MAX_LAYERS};
use super::digest::{Digest, Hasher};
use super::erofs::Form;
use super::manifest::Platform;
use super::outside::{self, Outside, Remote, RootSource};
use super::progress::{Follower, Progress};
use super::root::{self, Root, RootLimits, Unpacked};
use super::source::{self, Found};
use super::store::{Store, Work};
use super::{Image, Layer, unpack};
use crate::sandbox::task::{self, Confined};
use crate::sandbox::{self, ThreadRole};

/// All of an image's names are stored in the index.
const NAMES_MAX_BYTES: usize = 64 << 10;
/// The maximum number of images in an archive that is loaded.
const IMAGES_MAX: usize = 1024;
/// What a root file system may take beside the content of its files.
const NAMES_IN_ROOT_MAX_BYTES: u64 = 2 << 30;
/// A compressed archive that is unpacked to be read, and what a root file system's writer puts aside.
const NEW_FILES_MAX: u32 = 2;

/// What is imported.
pub enum Input {
    /// An archive, with what identifies it while its content is not known.
    Archive(File, Digest),
    /// A directory with an image.
    Directory(PathBuf),
    /// The layers of an image of the store.
    Layers(Vec<Layer>),
}

/// Which image of an archive is imported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope<'a> {
    /// The only one.
    Only,
    /// The one with this name.
    Named(&'a str),
    /// One after the other, from 0.
    Nth(usize),
}

impl<'a> Scope<'a> {
    /// The one named, or the only one.
    pub fn of(name: Option<&'a str>) -> Scope<'a> {
        name.map_or(Scope::Only, Scope::Named)
    }
}

/// An image as the process that has read it describes it.
#[derive(Debug, Serialize, Deserialize)]
struct ImageDescription {
    /// The configuration, whose digest identifies the image: whoever has read it cannot claim to have read another one.
    config_json: String,
    /// The names in its archive.
    names: Vec<String>,
    /// The number of images in the archive.
    count: usize,
    /// The digests of its layers as they are in the archive, if they were kept.
    blobs: Vec<Digest>,
}

/// An imported image, verified as far as it can be.
pub struct Imported {
    /// The digest of its configuration.
    pub id: Digest,
    /// The configuration.
    pub config: ImageConfig,
    /// The configuration as it was read.
    pub config_json: String,
    /// The names in its archive.
    pub names: Vec<String>,
    /// The number of images in the archive.
    pub count: usize,
    /// The layers that were kept, lowest first; none, or all.
    pub blobs: Vec<Digest>,
}

impl Imported {
    fn verify(image: ImageDescription) -> Result<Imported> {
        let ImageDescription { config_json, names, count, blobs } = image;
        ensure!(count <= IMAGES_MAX, "it has {count} images, the maximum is {IMAGES_MAX}");
        let names_bytes: usize = names.iter().map(String::len).sum();
        ensure!(names_bytes <= NAMES_MAX_BYTES, "the image has too many names ({} KiB)", names_bytes >> 10);
        let (id, config) = (Digest::of(config_json.as_bytes()), ImageConfig::parse(config_json.as_bytes())?);
        Ok(Imported { id, config, config_json, names, count, blobs })
    }
}

/// The result of reading.
#[derive(Debug, Serialize, Deserialize)]
struct Read {
    /// `None` for a root file system, and for layers.
    image: Option<ImageDescription>,
    unpacked: Unpacked,
}

/// What to read, and how.
struct Job<'a> {
    input: &'a Input,
    image: Scope<'a>,
    keeps_layers: bool,
    platform: Platform,
    form: Form,
    limits: RootLimits,
}

impl Store {
    /// Reads the `image` of `input`, and builds its root file system, unless it is a directory with a root file system. With
    /// `keeps_layers` its layers are added to the store.
    pub(super) fn read(
        &self,
        input: &Input,
        image: Scope<'_>,
        keeps_layers: bool,
        progress: Progress,
    ) -> Result<(Option<Imported>, Option<Root>)> {
        let import = Import::new(self, input, keeps_layers);
        let limits = RootLimits { unpacked_bytes: self.unpack_limit()? };
        let job = Job { input, image, keeps_layers, platform: Platform::default(), form: self.form, limits };
        let read = if self.sandbox {
            let mut follower = Follower::new(progress);
            let mut answer = |question| outside::answer(&import, &mut follower, question);
            let read = || read(&job, &Remote, progress.reported(Remote::report));
            let confined = Confined {
                role: ThreadRole::Unpacker,
                files: input.files(),
                file_bytes_max: job.limits.unpacked_bytes.saturating_add(NAMES_IN_ROOT_MAX_BYTES),
            };
            task::run(Some(&confined), read, &mut answer)?
        } else {
            read(&job, &import, progress)?
        };
        import.finish(read)
    }

    /// Builds the root file system of these layers, unless it exists.
    pub(super) fn root_of_layers(&self, layers: Vec<Layer>, progress: Progress) -> Result<Root> {
        let (_, root) = self.read(&Input::Layers(layers), Scope::Only, false, progress)?;
        root.context("its root filesystem was not built")
    }
}

impl Input {
    fn files(&self) -> Vec<RawFd> {
        match self {
            Input::Archive(file, _) => vec![file.as_raw_fd()],
            Input::Directory(_) => Vec::new(),
            Input::Layers(layers) => layers.iter().map(|layer| layer.part.as_raw_fd()).collect(),
        }
    }
}

/// Reads the input: everything here may run in a confined process.
fn read(job: &Job, outside: &dyn Outside, progress: Progress) -> Result<Read> {
    let max_bytes = job.limits.unpacked_bytes;
    let found = match job.input {
        Input::Archive(file, _) => source::look_into(file.try_clone()?, job.image, &job.platform, max_bytes, outside)?,
        Input::Directory(_) => source::look_in_directory(job.image, &job.platform, outside)?,
        Input::Layers(layers) => {
            let unpacked = root::of_layers(layers, outside, job.form, &job.limits, progress)?;
            return Ok(Read { image: None, unpacked });
        }
    };
    Ok(match found {
        Found::Image(image) => {
            image.config.check_platform()?;
            let unpacked = root::of_layers(&image.layers, outside, job.form, &job.limits, progress)?;
            let blobs = if job.keeps_layers { keep_layers(&image.layers, outside)? } else { Vec::new() };
            let Image { config_json, names, beside, .. } = *image;
            let description = ImageDescription { config_json, names, count: beside.len().max(1), blobs };
            Read { image: Some(description), unpacked }
        }
        Found::RootArchive(archive) => {
            let unpacked = root::of_archive(&archive, outside, job.form, &job.limits, progress)?;
            Read { image: None, unpacked }
        }
        Found::RootDirectory => Read { image: None, unpacked: Unpacked::default() },
    })
}

/// Copies layers to the store, and returns their digests.
fn keep_layers(layers: &[Layer], outside: &dyn Outside) -> Result<Vec<Digest>> {
    layers.iter().map(|layer| keep_layer(layer, outside).context("keep a layer")).collect()
}

fn keep_layer(layer: &Layer, outside: &dyn Outside) -> Result<Digest> {
    let mut start = Vec::new();
    layer.part.clone().take(512).read_to_end(&mut start)?;
    let digest = match (layer.blob, layer.diff_id) {
        (Some(blob), _) => blob,
        (None, Some(diff_id)) if unpack::compression(&start).is_none() => diff_id,
        _ => {
            let mut hasher = Hasher::default();
            io::copy(&mut layer.part.clone(), &mut hasher)?;
            hasher.digest()
        }
    };
    if let Some(file) = outside.begin_layer(digest)? {
        io::copy(&mut layer.part.clone(), &mut &file)?;
        outside.end_layer()?;
    }
    Ok(digest)
}

/// An import under way, in the process that has the store.
struct Import<'a> {
    store: &'a Store,
    input: &'a Input,
    state: RefCell<State>,
    new_files: Cell<u32>,
    keeps_layers: bool,
    /// The layer that is written.
    layer: RefCell<Option<(Digest, Work)>>,
    /// The layers that are in the store.
    layers: RefCell<BTreeSet<Digest>>,
}

/// The state of a root file system that is built.
#[derive(Default)]
enum State {
    #[default]
    Unknown,
    /// Its key is known, and its file is written.
    Keyed(Digest, Work),
    /// Its file is written, and its archive is hashed by another thread.
    Hashing(Work, FileState, JoinHandle<Result<Digest>>),
    /// It exists.
    Exists(Root),
}

impl Outside for Import<'_> {
    fn open_part(&self, name: &str) -> Result<File> {
        let Input::Directory(dir) = self.input else { bail!("it is not a directory") };
        bundle::open_in(dir, name)
    }

    fn has_only_known_names(&self) -> Result<bool> {
        let Input::Directory(dir) = self.input else { bail!("it is not a directory") };
        let mut entries = fs::read_dir(dir)?;
        Ok(entries.all(|entry| entry.is_ok_and(|entry| bundle::is_of_an_image(entry.file_name().as_bytes()))))
    }

    fn new_file(&self) -> Result<File> {
        self.new_files.set(self.new_files.get() + 1);
        ensure!(self.new_files.get() <= NEW_FILES_MAX, "too many files");
        self.store.nameless_file()
    }

    fn begin_layer(&self, digest: Digest) -> Result<Option<File>> {
        ensure!(self.keeps_layers, "layers are not kept");
        ensure!(self.layers.borrow().len() < MAX_LAYERS, "too many layers");
        let Some(work) = self.store.begin_blob(digest)? else {
            self.layers.borrow_mut().insert(digest);
            return Ok(None);
        };
        work.file.set_len(0)?;
        let file = work.file.try_clone()?;
        self.layer.replace(Some((digest, work)));
        Ok(Some(file))
    }

    fn end_layer(&self) -> Result<()> {
        let (digest, work) = self.layer.take().context("no layer is written")?;
        self.store.keep_blob(digest, work)?;
        self.layers.borrow_mut().insert(digest);
        Ok(())
    }

    fn begin_root(&self, source: &RootSource) -> Result<Option<File>> {
        let mut state = self.state.borrow_mut();
        ensure!(matches!(*state, State::Unknown), "a second root filesystem");
        *state = match (source, self.input) {
            (RootSource::Layers(diff_ids), _) => self.begin_layers(diff_ids)?,
            (RootSource::Archive, Input::Archive(file, identity)) => {
                let work = self.store.work_file(&identity.hex())?;
                let file = file.try_clone()?;
                let before = FileState::of(&file)?;
                let hash = move || bundle::digest_of(&file);
                State::Hashing(work, before, sandbox::spawn("digest", hash).context("start a thread")?)
            }
            (RootSource::Archive, _) => bail!("it is not an archive"),
        };
        match &*state {
            State::Keyed(_, work) | State::Hashing(work, ..) => {
                work.file.set_len(0)?;
                Ok(Some(work.file.try_clone()?))
            }
            State::Unknown | State::Exists(_) => Ok(None),
        }
    }

    fn root_key(&self, content: Digest) -> Result<Option<Digest>> {
        let mut state = self.state.borrow_mut();
        *state = match std::mem::take(&mut *state) {
            State::Hashing(work, before, hashing) => {
                let Input::Archive(file, _) = self.input else { bail!("it is not an archive") };
                let digest = hashing.join().map_err(|_| anyhow!("the thread that hashes it panicked"))??;
                // It was hashed while the other process has read it. Not every change shows in the file's state; the digest of
                // the content that was read keeps such a root file system from being taken for that of another archive.
                ensure!(before == FileState::of(file)?, "it was changed while it was read");
                let key = root::key("archive and content", self.store.form, &[digest, content]);
                // The same root file system may have been built from another file, and machines may be using it.
                self.store
                    .existing_root(key, Unpacked::default())?
                    .map_or_else(|| State::Keyed(key, work), State::Exists)
            }
            other => other,
        };
        Ok(if let State::Keyed(key, _) = &*state { Some(*key) } else { None })
    }
}

impl<'a> Import<'a> {
    fn new(store: &'a Store, input: &'a Input, keeps_layers: bool) -> Import<'a> {
        let (layer, layers) = (RefCell::default(), RefCell::default());
        Import { store, input, state: RefCell::default(), new_files: Cell::new(0), keeps_layers, layer, layers }
    }

    fn begin_layers(&self, diff_ids: &[Digest]) -> Result<State> {
        if let Input::Layers(layers) = self.input {
            ensure!(diff_ids.iter().copied().eq(layers.iter().filter_map(|layer| layer.diff_id)), "other layers");
        }
        ensure!(diff_ids.len() <= MAX_LAYERS, "too many layers");
        let key = self.store.key_of_layers(diff_ids);
        if let Some(root) = self.store.existing_root(key, Unpacked::default())? {
            return Ok(State::Exists(root));
        }
        let work = self.store.work_file(&key.hex())?;
        // Another process may have built it while this one was waiting.
        Ok(self.store.existing_root(key, Unpacked::default())?.map_or_else(|| State::Keyed(key, work), State::Exists))
    }

    /// Names the file that was written. What `read` describes may be anything.
    fn finish(self, read: Read) -> Result<(Option<Imported>, Option<Root>)> {
        let Read { image, unpacked } = read;
        let image = image.map(Imported::verify).transpose()?;
        let root = match self.state.into_inner() {
            State::Unknown if image.is_none() && matches!(self.input, Input::Directory(_)) => return Ok((None, None)),
            State::Keyed(key, work) => self.store.keep_root(key, work, unpacked)?,
            State::Exists(root) => Root { unpacked, ..root },
            State::Unknown | State::Hashing(..) => bail!("its root filesystem was not built"),
        };
        if let Some(image) = &image {
            let expected = self.store.key_of_layers(&image.config.diff_ids);
            ensure!(root.key == expected, "its root filesystem has other layers than its configuration");
            let kept = self.layers.into_inner();
            let is_all = image.blobs.is_empty() || image.blobs.len() == image.config.diff_ids.len();
            ensure!(is_all && image.blobs.iter().all(|blob| kept.contains(blob)), "its layers were not kept");
        }
        Ok((image, Some(root)))
    }
}

/// The size and the time of the last change.
#[derive(PartialEq, Eq)]
struct FileState(u64, i64, i64);

impl FileState {
    fn of(file: &File) -> io::Result<FileState> {
        file.metadata().map(|m| FileState(m.size(), m.ctime(), m.ctime_nsec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(store: &Store, id: &[u8]) -> Layer {
        let part = bundle::Part::whole(store.nameless_file().unwrap()).unwrap();
        Layer { part, blob: None, diff_id: Some(Digest::of(id)) }
    }

    /// What a process that was taken over may try.
    #[test]
    fn a_process_cannot_name_another_root_than_that_of_its_input() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let begin = |input: &Input, sources: &[RootSource]| -> Vec<bool> {
            let import = Import::new(&store, input, false);
            sources.iter().map(|source| import.begin_root(source).is_ok()).collect()
        };
        let (own, other) = (Digest::of(b"own"), Digest::of(b"other"));
        let layers = |ids: &[Digest]| RootSource::Layers(ids.to_vec());
        let of_layers = Input::Layers(vec![layer(&store, b"own")]);
        for refused in [layers(&[other]), layers(&[own, other]), layers(&[]), RootSource::Archive] {
            assert_eq!(begin(&of_layers, &[refused]), [false]);
        }
        assert_eq!(begin(&of_layers, &[layers(&[own]), layers(&[own])]), [true, false]);
        let of_directory = Input::Directory(dir.path().to_owned());
        assert_eq!(begin(&of_directory, &[RootSource::Archive]), [false]);
        assert_eq!(begin(&of_directory, &[layers(&vec![own; MAX_LAYERS + 1])]), [false]);
    }

    #[test]
    fn an_archive_that_changes_while_it_is_read_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let path = dir.path().join("x.tar");
        fs::write(&path, "one").unwrap();
        let input = Input::Archive(File::open(&path).unwrap(), Digest::of(b"x"));
        let import = Import::new(&store, &input, false);
        assert!(import.begin_root(&RootSource::Archive).unwrap().is_some());
        fs::write(&path, "another").unwrap();
        let error = format!("{:#}", import.root_key(Digest::of(b"")).unwrap_err());
        assert_eq!(error, "it was changed while it was read");
        let read = Read { image: None, unpacked: Unpacked::default() };
        assert!(import.finish(read).is_err());
    }

    #[test]
    fn an_image_is_identified_by_its_configuration_and_has_its_layers() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let input = Input::Archive(store.nameless_file().unwrap(), Digest::of(b"x"));
        let json = |layer: &[u8]| format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#, Digest::of(layer));
        let made = |begun: &[u8], config_json: String| {
            let import = Import::new(&store, &input, false);
            assert!(import.begin_root(&RootSource::Layers(vec![Digest::of(begun)])).unwrap().is_some());
            let image = ImageDescription { config_json, names: Vec::new(), count: 1, blobs: Vec::new() };
            import.finish(Read { image: Some(image), unpacked: Unpacked::default() })
        };
        let (image, _) = made(b"own", json(b"own")).unwrap();
        assert_eq!(image.unwrap().id, Digest::of(json(b"own").as_bytes()));
        // It has built one root file system, and claims the configuration of another image.
        let error = made(b"evil", json(b"good")).map(drop).unwrap_err();
        assert!(format!("{error:#}").contains("other layers than its configuration"), "{error:#}");
    }

    #[test]
    fn a_process_that_writes_nothing_makes_no_image() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let input = Input::Archive(store.nameless_file().unwrap(), Digest::of(b"x"));
        let config_json = r#"{"rootfs":{"type":"layers"}}"#.to_owned();
        for image in [None, Some(ImageDescription { config_json, names: Vec::new(), count: 1, blobs: Vec::new() })] {
            let import = Import::new(&store, &input, false);
            let found = import.finish(Read { image, unpacked: Unpacked::default() });
            assert!(!matches!(found, Ok((_, Some(_)))));
        }
        assert_eq!(fs::read_dir(dir.path().join("roots")).unwrap().count(), 0);
    }
}
