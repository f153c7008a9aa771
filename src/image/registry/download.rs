//! Downloads blobs to the store: verified while they arrive, and resumed after an interruption.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ureq::http::StatusCode;

use super::Registry;
use crate::image::digest::Hasher;
use crate::image::manifest::Descriptor;
use crate::image::store::Store;

const BUFFER_BYTES: usize = 256 << 10;
/// The maximum number of consecutive interruptions without any data.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);

impl Registry {
    /// Downloads a blob to the store, unless it is there. `done_bytes` is increased as data arrives.
    pub fn download(&self, store: &Store, blob: &Descriptor, done_bytes: &AtomicU64) -> Result<()> {
        let download = || -> Result<()> {
            if store.has_blob(blob.digest, blob.size) {
                done_bytes.fetch_add(blob.size, Ordering::Relaxed);
                return Ok(());
            }
            let mut work = store.work_file(&format!("blob-{}", blob.digest.hex()))?;
            // Another process may have downloaded it while this one was waiting.
            if store.has_blob(blob.digest, blob.size) {
                done_bytes.fetch_add(blob.size, Ordering::Relaxed);
                return Ok(());
            }
            // Partial data is kept for a later attempt.
            work.keep_unfinished();
            let hasher = self.fill(&work.file, blob, done_bytes)?;
            let found = hasher.digest();
            if found != blob.digest {
                work.remove();
                bail!("the registry sent data with digest {found}");
            }
            work.keep_as(store, &store.blob_path(blob.digest))
        };
        download().with_context(|| format!("get {}", blob.digest))
    }

    /// Downloads the missing part of a file, and hashes all of it.
    fn fill(&self, file: &File, blob: &Descriptor, done_bytes: &AtomicU64) -> Result<Hasher> {
        let mut hasher = Hasher::default();
        if file.metadata()?.len() > blob.size {
            file.set_len(0)?;
        }
        io::copy(&mut &*file, &mut HashWriter(&mut hasher)).context("read the partial download")?;
        done_bytes.fetch_add(hasher.len_bytes(), Ordering::Relaxed);
        let mut attempts = 0;
        while hasher.len_bytes() < blob.size {
            let before = hasher.len_bytes();
            let result = self.get_rest(file, blob, &mut hasher, done_bytes);
            attempts = if hasher.len_bytes() > before { 0 } else { attempts + 1 };
            match result {
                Ok(()) => {}
                Err(error) if attempts < ATTEMPTS && is_passing(&error) => {
                    log::info!("{}: {error:#}: resuming at byte {}", blob.digest.short(), hasher.len_bytes());
                    std::thread::sleep(FIRST_PAUSE * (1 << attempts));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(hasher)
    }

    fn get_rest(&self, mut file: &File, blob: &Descriptor, hasher: &mut Hasher, done_bytes: &AtomicU64) -> Result<()> {
        let from_byte = hasher.len_bytes();
        let mut response = self.get(&format!("blobs/{}", blob.digest), "*/*", from_byte, None)?;
        let starts_there = response.status() == StatusCode::PARTIAL_CONTENT
            && content_start(response.headers().get("content-range").and_then(|value| value.to_str().ok()))
                == Some(from_byte);
        if from_byte > 0 && !starts_there {
            // The registry does not support ranges and sends everything again.
            file.set_len(0)?;
            done_bytes.fetch_sub(from_byte, Ordering::Relaxed);
            *hasher = Hasher::default();
            ensure!(response.status() == StatusCode::OK, "the registry sent a different range than requested");
        }
        file.seek(SeekFrom::Start(hasher.len_bytes()))?;
        let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let len = body.read(&mut buffer)?;
            if len == 0 {
                ensure!(hasher.len_bytes() == blob.size, Broken(hasher.len_bytes()));
                return Ok(());
            }
            let left_bytes = blob.size - hasher.len_bytes();
            ensure!(len as u64 <= left_bytes, "it is longer than the expected {} bytes", blob.size);
            file.write_all(&buffer[..len]).context("write it")?;
            hasher.update(&buffer[..len]);
            done_bytes.fetch_add(len as u64, Ordering::Relaxed);
        }
    }
}

/// A body that ended early.
#[derive(Debug, thiserror::Error)]
#[error("it ends after {0} bytes")]
struct Broken(u64);

/// Whether a retry may help: the connection failed or stalled.
fn is_passing(error: &anyhow::Error) -> bool {
    error.is::<Broken>()
        || error.is::<ureq::Error>()
        || error.chain().any(|cause| {
            cause.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error() != Some(libc::ENOSPC))
        })
}

/// The start offset in `bytes FIRST-LAST/SIZE`.
fn content_start(header: Option<&str>) -> Option<u64> {
    header?.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

struct HashWriter<'a>(&'a mut Hasher);

impl Write for HashWriter<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.update(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
