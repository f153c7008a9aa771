//! Pulls images: downloads missing blobs in parallel, and adds the image to the store.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, ensure};

use super::{Registry, RemoteImage};
use crate::image::bundle::Part;
use crate::image::digest::Digest;
use crate::image::index::{LayerRecord, Record};
use crate::image::manifest::{Descriptor, Platform};
use crate::image::progress::Progress;
use crate::image::reference::Reference;
use crate::image::store::Store;
use crate::image::{Layer, Prepared};
use crate::sandbox;

/// The same as Docker's limit.
const DOWNLOADS_AT_ONCE: usize = 3;
/// The refresh interval of the progress bar.
const TICK: Duration = Duration::from_millis(50);

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
    pub fn pull(&self, reference: &Reference, platform: &Platform, progress: &Progress) -> Result<Pulled> {
        self.pull_image(reference, platform, progress).with_context(|| format!("pull {}", reference.familiar()))
    }

    fn pull_image(&self, reference: &Reference, platform: &Platform, progress: &Progress) -> Result<Pulled> {
        // Protects layers that no image has yet.
        let _blobs = self.use_blobs()?;
        let registry = Registry::new(reference)?;
        let image = registry.image(platform)?;
        image.config.check_platform()?;
        let name = reference.to_string();
        let is_known = self.index()?.names.get(&name) == Some(&image.id);
        if is_known && let Some(prepared) = self.stored(image.id)? {
            return Ok(Pulled { prepared, digest: image.digest, is_known });
        }
        let root_key = self.key_of_layers(&image.config.diff_ids);
        if self.use_root(root_key)?.is_none() {
            self.download_all(registry, &image, progress)?;
        }
        let layers = image.layers.iter().zip(&image.config.diff_ids);
        let parts = layers.clone().map(|(layer, &diff_id)| {
            let part = match File::open(self.blob_path(layer.digest)) {
                Ok(file) => Part::whole(file)?,
                // The root file system exists, so the layer will not be read.
                Err(_) => Part::empty(self.nameless_file()?),
            };
            Ok(Layer { part, blob: Some(layer.digest), diff_id: Some(diff_id) })
        });
        let root = self.root_of_layers(&parts.collect::<Result<Vec<_>>>()?, progress)?;
        let record = Record {
            root: root.key,
            process: image.config.process.clone(),
            architecture: image.config.architecture.clone(),
            created: image.config.created.clone(),
            added_seconds: SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
            source: None,
            own_names: Vec::new(),
            layers: layers.map(|(layer, &diff_id)| LayerRecord { diff_id, blob: Some(layer.digest) }).collect(),
            unpacked_bytes: root.unpacked_bytes,
        };
        let prepared = self.record(image.id, record, root, None, vec![name])?;
        Ok(Pulled { prepared, digest: image.digest, is_known })
    }

    fn download_all(&self, registry: Registry, image: &RemoteImage, progress: &Progress) -> Result<()> {
        // A layer that occurs twice is downloaded once.
        let blobs: BTreeMap<Digest, Descriptor> =
            image.layers.iter().map(|layer| (layer.digest, layer.clone())).collect();
        let blobs: Vec<Descriptor> = blobs.into_values().collect();
        let total_bytes = blobs.iter().try_fold(0u64, |sum, blob| sum.checked_add(blob.size));
        let total_bytes = total_bytes.context("its layers are too large")?;
        let limit_bytes = self.unpack_limit()?;
        ensure!(
            total_bytes <= limit_bytes,
            "its layers take {} MiB, and {} MiB of disk space are free or allowed",
            total_bytes >> 20,
            limit_bytes >> 20
        );
        let bar = progress.bar("downloading", total_bytes);
        let shared = Arc::new(Downloads {
            store: self.clone(),
            registry,
            next: AtomicUsize::new(0),
            done_bytes: AtomicU64::new(0),
            error: Mutex::new(None),
            blobs,
        });
        let count = DOWNLOADS_AT_ONCE.min(shared.blobs.len());
        let mut threads = Vec::new();
        for _ in 0..count {
            let shared = shared.clone();
            threads.push(sandbox::spawn("download", move || shared.work()).context("start a thread")?);
        }
        while threads.iter().any(|thread| !thread.is_finished()) {
            bar.set(shared.done_bytes.load(Ordering::Relaxed));
            std::thread::sleep(TICK);
        }
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a download thread panicked"))?;
        }
        let error = shared.error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        error.map_or(Ok(()), Err)
    }
}

/// The shared state of download threads.
struct Downloads {
    store: Store,
    registry: Registry,
    blobs: Vec<Descriptor>,
    next: AtomicUsize,
    done_bytes: AtomicU64,
    error: Mutex<Option<anyhow::Error>>,
}

impl Downloads {
    /// Downloads blobs until there are no more or one has failed.
    fn work(&self) {
        while let Some(blob) = self.blobs.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = self.registry.download(&self.store, blob, &self.done_bytes) {
                self.next.store(self.blobs.len(), Ordering::Relaxed);
                self.error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
            }
        }
    }
}
