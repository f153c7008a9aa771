//! What code that talks to a registry needs of the store and the host: files to write, addresses, credentials.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::RemoteImage;
use super::credentials::Credential;
use crate::image::digest::Digest;
use crate::image::progress::{Follower, Step};
use crate::sandbox::task;

/// What a download needs. Any thread.
pub trait Outside: Send + Sync {
    /// Whether the layers of the image that was found are needed. Called once, before any is downloaded.
    fn wants_layers(&self, image: &RemoteImage) -> Result<bool>;

    /// The file of a layer, with what an earlier download has left; `None` if it is complete.
    fn begin_layer(&self, digest: Digest) -> Result<Option<File>>;

    /// The file of a layer is complete and has its digest, or must be started again.
    fn end_layer(&self, digest: Digest, is_complete: bool) -> Result<()>;

    /// The addresses of a host, given with a port.
    fn addresses(&self, host_and_port: &str) -> Result<Vec<SocketAddr>>;

    /// The user's credentials for the registry.
    fn credential(&self) -> Result<Option<Credential>>;
}

/// A call of [`Outside`] by another process, or its progress.
#[derive(Debug, Serialize, Deserialize)]
pub enum Question {
    /// [`Outside::wants_layers`].
    WantsLayers(Box<RemoteImage>),
    /// [`Outside::begin_layer`].
    BeginLayer(Digest),
    /// [`Outside::end_layer`].
    EndLayer(Digest, bool),
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
        Question::WantsLayers(image) => Answer::Is(outside.wants_layers(&image)?),
        Question::BeginLayer(digest) => {
            return Ok((Answer::Nothing, outside.begin_layer(digest)?.map(OwnedFd::from)));
        }
        Question::EndLayer(digest, is_complete) => {
            outside.end_layer(digest, is_complete)?;
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
    fn wants_layers(&self, image: &RemoteImage) -> Result<bool> {
        let question = Question::WantsLayers(Box::new(image.clone()));
        let (Answer::Is(is), _) = task::ask(question)? else { bail!("another answer") };
        Ok(is)
    }

    fn begin_layer(&self, digest: Digest) -> Result<Option<File>> {
        let (Answer::Nothing, file) = task::ask(Question::BeginLayer(digest))? else { bail!("another answer") };
        Ok(file.map(File::from))
    }

    fn end_layer(&self, digest: Digest, is_complete: bool) -> Result<()> {
        let question = Question::EndLayer(digest, is_complete);
        let (Answer::Nothing, _) = task::ask(question)? else { bail!("another answer") };
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
