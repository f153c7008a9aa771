//! Pulls images: a confined process talks to the registry, and this one gives it files, and names what it has written.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};

use super::credentials::{self, Credential};
use super::outside::{self, Outside, Remote};
use super::{Client, RemoteImage, fetch};
use crate::image::Prepared;
use crate::image::digest::Digest;
use crate::image::index::{LayerRecord, Record};
use crate::image::manifest::Platform;
use crate::image::progress::{Follower, Progress};
use crate::image::reference::Reference;
use crate::image::store::{Store, Work};
use crate::sandbox::{ThreadRole, task};

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
        let name = reference.to_string();
        let is_known = self.index()?.names.get(&name) == Some(&image.id);
        if is_known && let Some(prepared) = self.stored(image.id)? {
            return Ok(Pulled { prepared, digest: image.digest, is_known });
        }
        let layers = || image.layers.iter().zip(&image.config.diff_ids);
        let root = match self.existing_root(self.key_of_layers(&image.config.diff_ids), 0)? {
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
            layers: layers().map(|(layer, &diff_id)| LayerRecord { diff_id, blob: Some(layer.digest) }).collect(),
            unpacked_bytes: root.unpacked_bytes,
        };
        let prepared = self.record(image.id, record, root, None, vec![name])?;
        Ok(Pulled { prepared, digest: image.digest, is_known })
    }

    /// Finds the image, and downloads its layers unless its root file system exists.
    fn fetch(&self, reference: &Reference, platform: &Platform, progress: Progress) -> Result<RemoteImage> {
        let fetch = Arc::new(Fetch { store: self.clone(), reference: reference.clone(), state: Mutex::default() });
        let client = Client::new(reference);
        if self.sandbox {
            let mut follower = Follower::new(progress);
            let mut answer = |question| outside::answer(&*fetch, &mut follower, question);
            let run = || fetch::fetch(client, platform, Arc::new(Remote), progress.reported(Remote::report));
            task::run(ThreadRole::Downloader, Vec::new(), run, &mut answer)?;
        } else {
            fetch::fetch(client, platform, fetch.clone(), progress)?;
        }
        let image = fetch.state().image.take();
        image.context("no image was found")
    }
}

/// A download under way, in the process that has the store.
struct Fetch {
    store: Store,
    reference: Reference,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    image: Option<RemoteImage>,
    /// The layers that are written.
    layers: BTreeMap<Digest, Work>,
}

impl Fetch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outside for Fetch {
    fn wants_layers(&self, image: &RemoteImage) -> Result<bool> {
        image.check()?;
        let total_bytes = image.layers.iter().try_fold(0u64, |sum, layer| sum.checked_add(layer.size));
        let total_bytes = total_bytes.context("its layers are too large")?;
        let is_new = self.state().image.replace(image.clone()).is_none();
        ensure!(is_new, "a second image");
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
        Ok(true)
    }

    fn begin_layer(&self, digest: Digest) -> Result<Option<File>> {
        let size_bytes = {
            let state = self.state();
            let layers = state.image.iter().flat_map(|image| &image.layers);
            let layer = layers.into_iter().find(|layer| layer.digest == digest).context("no such layer")?;
            ensure!(!state.layers.contains_key(&digest), "the layer is written already");
            layer.size
        };
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

    fn end_layer(&self, digest: Digest, is_complete: bool) -> Result<()> {
        let mut work = self.state().layers.remove(&digest).context("the layer is not written")?;
        if is_complete {
            work.keep_as(&self.store, &self.store.blob_path(digest))?;
        } else {
            work.remove();
        }
        Ok(())
    }

    fn addresses(&self, host_and_port: &str) -> Result<Vec<SocketAddr>> {
        Ok(host_and_port.to_socket_addrs()?.collect())
    }

    fn credential(&self) -> Result<Option<Credential>> {
        Ok(credentials::find(&self.reference))
    }
}
