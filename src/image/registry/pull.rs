//! Pulls images: a confined process talks to the registry, and this one gives it files, and names what it has written.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};

use super::credentials::{self, Credential};
use super::outside::{self, Answer, Outside, Question, Remote};
use super::{Client, Document, RemoteImage, fetch};
use crate::image::Prepared;
use crate::image::digest::Digest;
use crate::image::index::{LayerRecord, Record};
use crate::image::manifest::Platform;
use crate::image::progress::{Follower, Progress};
use crate::image::reference::Reference;
use crate::image::root::Unpacked;
use crate::image::store::{Store, Work};
use crate::sandbox::ThreadRole;
use crate::sandbox::task::{self, Confined};

/// The result of a pull.
#[derive(Debug)]
pub struct Pulled {
    /// The image.
    pub prepared: Prepared,
    /// The digest with which the same image can be pulled again.
    pub digest: Digest,
    /// Whether the name already referred to this image.
    pub is_known: bool,
}

impl Store {
    /// Downloads an image, builds its root file system, and tags it with the requested name.
    pub fn pull(&self, reference: &Reference, platform: &Platform, progress: Progress) -> Result<Pulled> {
        self.pull_image(reference, platform, progress).with_context(|| format!("pull {}", reference.familiar()))
    }

    fn pull_image(&self, reference: &Reference, platform: &Platform, progress: Progress) -> Result<Pulled> {
        // Protects layers that no image has yet.
        let _blobs = self.use_blobs()?;
        let image = self.fetch(reference, platform, progress)?;
        self.keep_config(&image.config_json)?;
        let name = reference.to_string();
        let is_known = self.index()?.names.get(&name) == Some(&image.id);
        if is_known && let Some(prepared) = self.stored(image.id)? {
            return Ok(Pulled { prepared, digest: image.digest, is_known });
        }
        let layers = || image.layers.iter().zip(&image.config.diff_ids);
        let root = match self.existing_root(self.key_of_layers(&image.config.diff_ids), Unpacked::default())? {
            Some(root) => root,
            None => {
                let layers = layers().map(|(layer, &diff_id)| self.stored_layer(layer.digest, diff_id));
                self.root_of_layers(layers.collect::<Result<_>>()?, progress)?
            }
        };
        let record = Record {
            root: root.key,
            process: image.config.process.clone(),
            architecture: image.config.architecture.clone(),
            created: image.config.created.clone(),
            added_seconds: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
            source: None,
            own_names: Vec::new(),
            layers: layers().map(|(layer, &diff_id)| LayerRecord::new(diff_id, Some(layer.digest))).collect(),
            unpacked_bytes: root.unpacked.bytes,
        };
        let prepared = self.record(image.id, record, root, None, vec![name])?;
        Ok(Pulled { prepared, digest: image.digest, is_known })
    }

    /// Finds the image, and downloads its layers unless its root file system exists.
    ///
    /// Credentials and proxies are read in a copy of this process: the one that later unpacks the image, another copy, has
    /// nothing of them in its memory.
    fn fetch(&self, reference: &Reference, platform: &Platform, progress: Progress) -> Result<RemoteImage> {
        let documents = if self.sandbox {
            let mut follower = Follower::new(progress);
            let mut answer = |question| match question {
                Question::Progress(step) => {
                    follower.show(step);
                    Ok((Answer::Nothing, None))
                }
                _ => bail!("another question"),
            };
            let run = || self.fetch_in_this_process(reference, platform, progress.reported(Remote::report));
            task::run(None, run, &mut answer)?
        } else {
            self.fetch_in_this_process(reference, platform, progress)?
        };
        image_of(reference, platform, &documents)
    }

    /// Returns the documents that describe the image.
    fn fetch_in_this_process(
        &self,
        reference: &Reference,
        platform: &Platform,
        progress: Progress,
    ) -> Result<Vec<String>> {
        let fetch = Arc::new(Fetch {
            store: self.clone(),
            reference: reference.clone(),
            platform: platform.clone(),
            state: Mutex::default(),
            credential: OnceLock::new(),
        });
        let client = Client::new(reference);
        if self.sandbox {
            let mut follower = Follower::new(progress);
            let mut answer = |question| outside::answer(&*fetch, &mut follower, question);
            let confined =
                Confined { role: ThreadRole::Downloader, files: Vec::new(), file_bytes_max: self.unpack_limit()? };
            let run = || fetch::fetch(client, platform, Arc::new(Remote), progress.reported(Remote::report));
            task::run(Some(&confined), run, &mut answer)?;
        } else {
            fetch::fetch(client, platform, fetch.clone(), progress)?;
        }
        let documents = std::mem::take(&mut fetch.state().documents);
        ensure!(!documents.is_empty(), "no image was found");
        Ok(documents)
    }
}

/// Finds an image in documents: for fuzzing.
pub fn find_in(documents: &[String]) {
    if let Ok(reference) = "alpine".parse::<Reference>() {
        let _ = image_of(&reference, &Platform::default(), documents);
    }
}

/// The image that documents describe, verified.
fn image_of(reference: &Reference, platform: &Platform, documents: &[String]) -> Result<RemoteImage> {
    let mut left = documents.iter();
    let mut read = |_: Document<'_>| Ok(left.next().context("a document is missing")?.as_bytes().to_vec());
    RemoteImage::find(reference, platform, &mut read)
}

/// A download under way, in the process that has the store.
struct Fetch {
    store: Store,
    reference: Reference,
    platform: Platform,
    state: Mutex<State>,
    /// What was found when credentials were asked for first. No lock is held meanwhile: a helper program may be asked.
    credential: OnceLock<Option<Credential>>,
}

#[derive(Default)]
struct State {
    documents: Vec<String>,
    /// The sizes of the layers that are wanted.
    wanted: BTreeMap<Digest, u64>,
    /// The layers that are written.
    layers: BTreeMap<Digest, Work>,
}

impl Fetch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outside for Fetch {
    fn wants_layers(&self, documents: &[String]) -> Result<bool> {
        let image = image_of(&self.reference, &self.platform, documents)?;
        let total_bytes = image.layers.iter().try_fold(0u64, |sum, layer| sum.checked_add(layer.size));
        let total_bytes = total_bytes.context("its layers are too large")?;
        let is_first = std::mem::replace(&mut self.state().documents, documents.to_vec()).is_empty();
        ensure!(is_first, "a second image");
        if self.store.use_root(self.store.key_of_layers(&image.config.diff_ids))?.is_some() {
            return Ok(false);
        }
        let limit_bytes = self.store.unpack_limit()?;
        ensure!(
            total_bytes <= limit_bytes,
            "its layers take {} MiB, and {} MiB of disk space are free or allowed",
            total_bytes >> 20,
            limit_bytes >> 20
        );
        self.state().wanted = image.layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        Ok(true)
    }

    fn begin_layer(&self, digest: Digest) -> Result<Option<File>> {
        // Once each.
        let size_bytes = self.state().wanted.remove(&digest).context("no such layer")?;
        if self.store.has_blob(digest, size_bytes) {
            return Ok(None);
        }
        let mut work = self.store.work_file(&format!("blob-{}", digest.hex()))?;
        // Another process may have downloaded it while this one was waiting.
        if self.store.has_blob(digest, size_bytes) {
            return Ok(None);
        }
        // Partial data is kept for a later attempt.
        work.keep_unfinished();
        let file = work.file.try_clone()?;
        self.state().layers.insert(digest, work);
        Ok(Some(file))
    }

    fn end_layer(&self, digest: Digest) -> Result<()> {
        let work = self.state().layers.remove(&digest).context("the layer is not written")?;
        self.store.keep_blob(digest, work)
    }

    fn addresses(&self, host_and_port: &str) -> Result<Vec<SocketAddr>> {
        Ok(host_and_port.to_socket_addrs()?.collect())
    }

    fn credential(&self) -> Result<Option<Credential>> {
        Ok(self.credential.get_or_init(|| credentials::find(&self.reference)).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a process that was taken over may send.
    #[test]
    fn documents_are_verified_from_the_name_on() {
        let digest = |text: &str| Digest::of(text.as_bytes());
        let config = format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#, digest("layer"));
        let described = |text: &str| format!(r#"{{"digest":"{}","size":{}}}"#, digest(text), text.len());
        let manifest = |config: &str| {
            format!(r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#, described(config), described("blob"))
        };
        let good = manifest(&config);
        let by_digest: Reference = format!("app@{}", digest(&good)).parse().unwrap();
        let by_tag: Reference = "app:1".parse().unwrap();
        let find = |name: &Reference, documents: &[&str]| {
            let documents: Vec<String> = documents.iter().map(|text| (*text).to_owned()).collect();
            image_of(name, &Platform::default(), &documents)
        };
        let image = find(&by_digest, &[&good, &config]).unwrap();
        assert_eq!((image.id, image.digest), (digest(&config), digest(&good)));
        assert!(find(&by_tag, &[&good, &config]).is_ok());
        let other = config.replace("rootfs", "cmd\":[],\"rootfs");
        for (name, documents) in [
            (&by_digest, vec![manifest(&other), other.clone()]),
            (&by_digest, vec![good.clone(), other.clone()]),
            (&by_tag, vec![good.clone(), other.clone()]),
            (&by_tag, vec![good.clone()]),
            (&by_tag, Vec::new()),
        ] {
            let documents: Vec<&str> = documents.iter().map(String::as_str).collect();
            assert!(find(name, &documents).is_err(), "{documents:?}");
        }
    }

    #[test]
    fn a_layer_with_other_content_than_its_digest_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (good, other) = (Digest::of(b"good"), Digest::of(b"other"));
        let fetch = Fetch {
            store: store.clone(),
            reference: "app:1".parse().unwrap(),
            platform: Platform::default(),
            state: Mutex::new(State { wanted: BTreeMap::from([(good, 4)]), ..State::default() }),
            credential: OnceLock::new(),
        };
        assert!(fetch.begin_layer(other).is_err(), "it is no layer of this image");
        let file = fetch.begin_layer(good).unwrap().unwrap();
        std::io::Write::write_all(&mut &file, b"evil").unwrap();
        assert!(fetch.end_layer(good).is_err());
        assert!(!store.has_blob(good, 4));
        assert!(fetch.begin_layer(good).is_err(), "once each");
    }
}
