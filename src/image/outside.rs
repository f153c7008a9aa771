//! What code that reads foreign archives needs of the store and the file system: files to read and write, and keys.
//!
//! ```text
//! source, bundle, root ─ Outside ─┬───────────────────────────────> import.rs
//!                                 └ Remote ─ Question ─ answer() ─> import.rs, in another process
//! ```

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::progress::{Follower, Step};
use crate::sandbox::task;

/// What a root file system is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootSource {
    /// Layers with these uncompressed digests, lowest first.
    Layers(Vec<Digest>),
    /// The archive that is read.
    Archive,
}

/// The files and keys that an import needs. Called by one thread.
pub trait Outside {
    /// Opens a file of the directory that is read.
    fn open_part(&self, name: &str) -> Result<File>;

    /// Whether the directory that is read has only names used in images.
    fn has_only_known_names(&self) -> Result<bool>;

    /// A new temporary file.
    fn new_file(&self) -> Result<File>;

    /// An empty file for a layer with this digest; `None` if it is not wanted, or kept already.
    fn begin_layer(&self, digest: Digest) -> Result<Option<File>>;

    /// Keeps the layer that was begun last, if it has its digest.
    fn end_layer(&self) -> Result<()>;

    /// An empty file for a root file system; `None` if it exists already. Called once.
    fn begin_root(&self, source: &RootSource) -> Result<Option<File>>;

    /// The key of the root file system whose source has been read completely, with the digest of its uncompressed content; `None`
    /// if it exists already.
    fn root_key(&self, content: Digest) -> Result<Option<Digest>>;
}

/// A call of [`Outside`] by another process, or its progress.
#[derive(Debug, Serialize, Deserialize)]
pub enum Question {
    /// [`Outside::open_part`].
    OpenPart(String),
    /// [`Outside::has_only_known_names`].
    HasOnlyKnownNames,
    /// [`Outside::new_file`].
    NewFile,
    /// [`Outside::begin_layer`].
    BeginLayer(Digest),
    /// [`Outside::end_layer`].
    EndLayer,
    /// [`Outside::begin_root`].
    BeginRoot(RootSource),
    /// [`Outside::root_key`].
    RootKey(Digest),
    /// A step of the progress, which has no answer.
    Progress(Step),
}

/// The answer to a question; files are sent with it.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// There is none, or only a file.
    Nothing,
    /// Yes or no.
    Is(bool),
    /// A key.
    Key(Option<Digest>),
}

/// Answers a question with `outside`, and shows progress.
pub fn answer(outside: &dyn Outside, follower: &mut Follower, question: Question) -> Result<task::Answer<Answer>> {
    let file = |file: File| Some(OwnedFd::from(file));
    Ok(match question {
        Question::OpenPart(name) => (Answer::Nothing, file(outside.open_part(&name)?)),
        Question::HasOnlyKnownNames => (Answer::Is(outside.has_only_known_names()?), None),
        Question::NewFile => (Answer::Nothing, file(outside.new_file()?)),
        Question::BeginLayer(digest) => (Answer::Nothing, outside.begin_layer(digest)?.and_then(file)),
        Question::EndLayer => {
            outside.end_layer()?;
            (Answer::Nothing, None)
        }
        Question::BeginRoot(source) => (Answer::Nothing, outside.begin_root(&source)?.and_then(file)),
        Question::RootKey(content) => (Answer::Key(outside.root_key(content)?), None),
        Question::Progress(step) => {
            follower.show(step);
            (Answer::Nothing, None)
        }
    })
}

/// Asks the process that has started this one.
pub struct Remote;

impl Remote {
    /// Reports a step of the progress.
    pub fn report(step: Step) {
        let _ = task::tell(Question::Progress(step));
    }

    fn file(&self, question: Question) -> Result<Option<File>> {
        let (Answer::Nothing, file) = task::ask(question)? else { bail!("another answer") };
        Ok(file.map(File::from))
    }
}

impl Outside for Remote {
    fn open_part(&self, name: &str) -> Result<File> {
        self.file(Question::OpenPart(name.to_owned()))?.context("no file")
    }

    fn has_only_known_names(&self) -> Result<bool> {
        let (Answer::Is(is), _) = task::ask(Question::HasOnlyKnownNames)? else { bail!("another answer") };
        Ok(is)
    }

    fn new_file(&self) -> Result<File> {
        self.file(Question::NewFile)?.context("no file")
    }

    fn begin_layer(&self, digest: Digest) -> Result<Option<File>> {
        self.file(Question::BeginLayer(digest))
    }

    fn end_layer(&self) -> Result<()> {
        self.file(Question::EndLayer).map(drop)
    }

    fn begin_root(&self, source: &RootSource) -> Result<Option<File>> {
        self.file(Question::BeginRoot(source.clone()))
    }

    fn root_key(&self, content: Digest) -> Result<Option<Digest>> {
        let (Answer::Key(key), _) = task::ask(Question::RootKey(content))? else { bail!("another answer") };
        Ok(key)
    }
}
