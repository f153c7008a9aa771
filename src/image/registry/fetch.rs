//! Finds an image in a registry and downloads the layers that the store does not have: what may run in a confined process.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::outside::Outside;
use super::{Client, Registry, RemoteImage};
use crate::image::digest::Digest;
use crate::image::manifest::{Descriptor, Platform};
use crate::image::progress::Progress;
use crate::sandbox;

/// The same as Docker's limit.
const DOWNLOADS_AT_ONCE: usize = 3;
/// The refresh interval of the progress bar.
const TICK: Duration = Duration::from_millis(50);

/// Finds the image for `platform`, and downloads the layers that `outside` wants.
pub fn fetch(client: Client, platform: &Platform, outside: Arc<dyn Outside>, progress: Progress) -> Result<()> {
    let registry = Registry::new(client, outside.clone())?;
    let (image, documents) = registry.image(platform)?;
    image.config.check_platform()?;
    if outside.wants_layers(&documents)? {
        download_all(registry, &image, progress)?;
    }
    Ok(())
}

fn download_all(registry: Registry, image: &RemoteImage, progress: Progress) -> Result<()> {
    // A layer that occurs twice is downloaded once.
    let blobs: BTreeMap<Digest, Descriptor> = image.layers.iter().map(|layer| (layer.digest, layer.clone())).collect();
    let bar = progress.bar("downloading", blobs.values().map(|blob| blob.size).sum());
    let shared = Arc::new(Downloads {
        registry,
        blobs: blobs.into_values().collect(),
        next: AtomicUsize::new(0),
        done_bytes: AtomicU64::new(0),
        error: Mutex::new(None),
    });
    let mut threads = Vec::new();
    for _ in 0..DOWNLOADS_AT_ONCE.min(shared.blobs.len()) {
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

/// The shared state of download threads.
struct Downloads {
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
            if let Err(error) = self.registry.download(blob, &self.done_bytes) {
                self.next.store(self.blobs.len(), Ordering::Relaxed);
                self.error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
            }
        }
    }
}
