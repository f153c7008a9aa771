//! Pushes images: a confined process talks to the registry, and has the files of the layers to read.
//!
//! What the registry has is not sent again, and what it has in another repository is mounted from there.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::credentials::{self, Credential};
use super::outside::{self, Outside, Question, Remote};
use super::tags::TAGS_MAX;
use super::upload::Upload;
use super::{Client, Registry};
use crate::image::bundle::Part;
use crate::image::digest::Digest;
use crate::image::progress::{Follower, Progress};
use crate::image::reference::Reference;
use crate::image::save::{MANIFEST_TYPE, Whole};
use crate::image::store::Store;
use crate::sandbox::ThreadRole;
use crate::sandbox::task::{self, Confined};

/// The result of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// The digest with which the image can be pulled.
    pub digest: Digest,
    /// The size of its manifest.
    pub manifest_bytes: usize,
}

impl Store {
    /// Uploads the image that has this name to the name's registry.
    pub fn push(&self, name: &Reference, progress: Progress) -> Result<Pushed> {
        let push = || -> Result<Pushed> {
            let _blobs = self.use_blobs()?;
            let index = self.index()?;
            let id = *index.names.get(&name.to_string()).context("there is no such image (see `husk images`)")?;
            let whole = self.whole(id)?;
            let parts = whole.layers.iter().map(|layer| Part::whole(layer.file.try_clone()?));
            let parts = parts.collect::<Result<Vec<_>>>()?;
            let files = parts.iter().map(AsRawFd::as_raw_fd).collect();
            let sources = self.repositories_of_layers(name, &whole)?;
            talk(self.sandbox, Access::of_user(name), files, progress, |client, outside, progress| {
                let registry = Registry::new(client, outside)?;
                send(&registry, name, &whole, &parts, &sources, progress)
            })?;
            Ok(Pushed { digest: Digest::of(&whole.manifest), manifest_bytes: whole.manifest.len() })
        };
        push().with_context(|| format!("push {}", name.familiar()))
    }

    /// The tags of a repository in its registry.
    pub fn remote_tags(&self, name: &Reference) -> Result<Vec<Reference>> {
        let list = || -> Result<Vec<Reference>> {
            let tags =
                talk(self.sandbox, Access::of_user(name), Vec::new(), Progress::Hidden, |client, outside, _| {
                    Registry::new(client, outside)?.tags()
                })?;
            ensure!(tags.len() <= TAGS_MAX, "it has too many tags");
            let Reference { registry, repository, .. } = name;
            tags.iter().map(|tag| format!("{registry}/{repository}:{tag}").parse()).collect()
        };
        list().with_context(|| format!("list the tags of {}/{}", name.registry, name.repository))
    }

    /// For each layer another repository of the same registry that has it, as far as the store's names tell.
    fn repositories_of_layers(&self, target: &Reference, image: &Whole) -> Result<BTreeMap<Digest, String>> {
        let index = self.index()?;
        let mut sources = BTreeMap::new();
        for (name, id) in &index.names {
            let Ok(name) = name.parse::<Reference>() else { continue };
            let Some(record) = index.images.get(id) else { continue };
            if name.registry != target.registry || name.repository == target.repository {
                continue;
            }
            let layers = record.layers.iter().filter_map(|layer| layer.blob);
            for blob in layers.filter(|blob| image.layers.iter().any(|layer| layer.digest == *blob)) {
                sources.entry(blob).or_insert_with(|| name.repository.clone());
            }
        }
        Ok(sources)
    }
}

fn send(
    registry: &Registry,
    name: &Reference,
    image: &Whole,
    parts: &[Part],
    sources: &BTreeMap<Digest, String>,
    progress: Progress,
) -> Result<()> {
    let total_bytes: u64 = image.layers.iter().map(|layer| layer.size_bytes).sum();
    let bar = progress.bar("pushing", total_bytes);
    let mut done_bytes = 0;
    for (layer, part) in image.layers.iter().zip(parts) {
        let upload = Upload { digest: layer.digest, content: part, source: sources.get(&layer.digest) };
        registry.upload(&upload, &mut |sent_bytes| bar.set(done_bytes + sent_bytes))?;
        done_bytes += layer.size_bytes;
        bar.set(done_bytes);
    }
    registry.upload_bytes(&image.config)?;
    registry.put_manifest(&name.version(), MANIFEST_TYPE, &image.manifest)
}

/// Checks that the registry of `server` accepts a credential. `server` has an empty repository.
pub fn check_login(server: &Reference, credential: Credential, confined: bool) -> Result<()> {
    let access = Access { reference: server.clone(), credential: OnceLock::from(Some(credential)) };
    talk(confined, access, Vec::new(), Progress::Hidden, |client, outside, _| Registry::new(client, outside)?.ping())
}

/// Runs a conversation with a registry in a confined process, which has these files.
fn talk<T: Serialize + DeserializeOwned>(
    confined: bool,
    access: Access,
    files: Vec<RawFd>,
    progress: Progress,
    talk: impl FnOnce(Client, Arc<dyn Outside>, Progress) -> Result<T>,
) -> Result<T> {
    let client = Client::new(&access.reference);
    if !confined {
        return talk(client, Arc::new(access), progress);
    }
    let mut follower = Follower::new(progress);
    let mut answer = |question: Question| outside::answer(&access, &mut follower, question);
    let confined = Confined { role: ThreadRole::Downloader, files, file_bytes_max: 0 };
    let run = || talk(client, Arc::new(Remote), progress.reported(Remote::report));
    task::run(Some(&confined), run, &mut answer)
}

/// What a conversation needs of the host.
struct Access {
    reference: Reference,
    credential: OnceLock<Option<Credential>>,
}

impl Access {
    /// With the user's credentials, which are looked up when they are asked for.
    fn of_user(reference: &Reference) -> Access {
        Access { reference: reference.clone(), credential: OnceLock::new() }
    }
}

impl Outside for Access {
    fn wants_layers(&self, _documents: &[String]) -> Result<bool> {
        bail!("nothing is downloaded")
    }

    fn begin_layer(&self, _digest: Digest) -> Result<Option<std::fs::File>> {
        bail!("nothing is downloaded")
    }

    fn end_layer(&self, _digest: Digest) -> Result<()> {
        bail!("nothing is downloaded")
    }

    fn addresses(&self, host_and_port: &str) -> Result<Vec<SocketAddr>> {
        Ok(host_and_port.to_socket_addrs()?.collect())
    }

    fn credential(&self) -> Result<Option<Credential>> {
        Ok(self.credential.get_or_init(|| credentials::find(&self.reference)).clone())
    }
}
