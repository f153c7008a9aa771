//! What code that talks to a registry needs of the store and the host: files to write, addresses, credentials.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::credentials::Credential;
use crate::image::digest::Digest;
use crate::image::progress::{Follower, Step};
use crate::sandbox::task;

/// What a download needs. Any thread.
pub trait Outside: Send + Sync {
    /// Whether the layers of the image that was found are needed: the one that these documents describe (see
    /// [`Registry::image`](super::Registry::image)). Called once, before any is downloaded.
    fn wants_layers(&self, documents: &[String]) -> Result<bool>;

    /// The file of a layer, with what an earlier download has left; `None` if it is complete.
    fn begin_layer(&self, digest: Digest) -> Result<Option<File>>;

    /// The file of a layer is complete. Fails, and forgets it, if it has another digest.
    fn end_layer(&self, digest: Digest) -> Result<()>;

    /// The addresses of a host, given with a port.
    fn addresses(&self, host_and_port: &str) -> Result<Vec<SocketAddr>>;

    /// The user's credentials for the registry.
    fn credential(&self) -> Result<Option<Credential>>;
}

/// A call of [`Outside`] by another process, or its progress.
#[derive(Debug, Serialize, Deserialize)]
pub enum Question {
    /// [`Outside::wants_layers`].
    WantsLayers(Vec<String>),
    /// [`Outside::begin_layer`].
    BeginLayer(Digest),
    /// [`Outside::end_layer`].
    EndLayer(Digest),
    /// [`Outside::addresses`].
    Addresses(String),
    /// [`Outside::credential`].
    Credential,
    /// A step of the progress, which has no answer.
    Progress(Step),
}

/// The answer to a question; files are sent with it.
#[derive(Serialize, Deserialize)]
pub enum Answer {
    /// There is none, or only a file.
    Nothing,
    /// Yes or no.
    Is(bool),
    /// Addresses.
    Addresses(Vec<SocketAddr>),
    /// Credentials.
    Credential(Option<Credential>),
}

/// Answers a question with `outside`, and shows progress.
pub fn answer(outside: &dyn Outside, follower: &mut Follower, question: Question) -> Result<task::Answer<Answer>> {
    let answer = match question {
        Question::WantsLayers(documents) => Answer::Is(outside.wants_layers(&documents)?),
        Question::BeginLayer(digest) => {
            return Ok((Answer::Nothing, outside.begin_layer(digest)?.map(OwnedFd::from)));
        }
        Question::EndLayer(digest) => {
            outside.end_layer(digest)?;
            Answer::Nothing
        }
        Question::Addresses(host_and_port) => Answer::Addresses(outside.addresses(&host_and_port)?),
        Question::Credential => Answer::Credential(outside.credential()?),
        Question::Progress(step) => {
            follower.show(step);
            Answer::Nothing
        }
    };
    Ok((answer, None))
}

/// Asks the process that has started this one.
pub struct Remote;

impl Remote {
    /// Reports a step of the progress.
    pub fn report(step: Step) {
        let _ = task::tell(Question::Progress(step));
    }
}

impl Outside for Remote {
    fn wants_layers(&self, documents: &[String]) -> Result<bool> {
        let question = Question::WantsLayers(documents.to_vec());
        let (Answer::Is(is), _) = task::ask(question)? else { bail!("another answer") };
        Ok(is)
    }

    fn begin_layer(&self, digest: Digest) -> Result<Option<File>> {
        let (Answer::Nothing, file) = task::ask(Question::BeginLayer(digest))? else { bail!("another answer") };
        Ok(file.map(File::from))
    }

    fn end_layer(&self, digest: Digest) -> Result<()> {
        let (Answer::Nothing, _) = task::ask(Question::EndLayer(digest))? else { bail!("another answer") };
        Ok(())
    }

    fn addresses(&self, host_and_port: &str) -> Result<Vec<SocketAddr>> {
        let question = Question::Addresses(host_and_port.to_owned());
        let (Answer::Addresses(addresses), _) = task::ask(question)? else { bail!("another answer") };
        Ok(addresses)
    }

    fn credential(&self) -> Result<Option<Credential>> {
        let (Answer::Credential(credential), _) = task::ask(Question::Credential)? else { bail!("another answer") };
        Ok(credential)
    }
}
