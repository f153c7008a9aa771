//! Downloads blobs to the store, and resumes after an interruption. Outside verifies them.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ureq::http::StatusCode;

use super::Registry;
use crate::image::manifest::Descriptor;

const BUFFER_BYTES: usize = 256 << 10;
/// The maximum number of consecutive interruptions without any data.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);

impl Registry {
    /// Downloads a blob to a file from outside, unless the store has it. `done_bytes` is increased as data arrives.
    pub fn download(&self, blob: &Descriptor, done_bytes: &AtomicU64) -> Result<()> {
        let download = || -> Result<()> {
            let Some(file) = self.outside.begin_layer(blob.digest)? else {
                done_bytes.fetch_add(blob.size, Ordering::Relaxed);
                return Ok(());
            };
            self.fill(&file, blob, done_bytes)?;
            self.outside.end_layer(blob.digest)
        };
        download().with_context(|| format!("get {}", blob.digest))
    }

    /// Downloads the missing part of a file.
    fn fill(&self, file: &File, blob: &Descriptor, done_bytes: &AtomicU64) -> Result<()> {
        if file.metadata()?.len() > blob.size {
            file.set_len(0)?;
        }
        let mut len_bytes = file.metadata()?.len();
        done_bytes.fetch_add(len_bytes, Ordering::Relaxed);
        let mut attempts = 0;
        while len_bytes < blob.size {
            let before = len_bytes;
            let result = self.get_rest(file, blob, &mut len_bytes, done_bytes);
            attempts = if len_bytes > before { 0 } else { attempts + 1 };
            match result {
                Ok(()) => {}
                Err(error) if attempts < ATTEMPTS && is_passing(&error) => {
                    log::info!("{}: {error:#}: resuming at byte {}", blob.digest.short(), len_bytes);
                    std::thread::sleep(FIRST_PAUSE * (1 << attempts));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Downloads from byte `len_bytes` of the file on, which becomes the number of bytes that it has.
    fn get_rest(&self, mut file: &File, blob: &Descriptor, len_bytes: &mut u64, done_bytes: &AtomicU64) -> Result<()> {
        let from_byte = *len_bytes;
        let mut response = self.get(&format!("blobs/{}", blob.digest), "*/*", from_byte, None)?;
        let starts_there = response.status() == StatusCode::PARTIAL_CONTENT
            && content_start(response.headers().get("content-range").and_then(|value| value.to_str().ok()))
                == Some(from_byte);
        if from_byte > 0 && !starts_there {
            // The registry does not support ranges and sends everything again.
            file.set_len(0)?;
            done_bytes.fetch_sub(from_byte, Ordering::Relaxed);
            *len_bytes = 0;
            ensure!(response.status() == StatusCode::OK, "the registry sent a different range than requested");
        }
        file.seek(SeekFrom::Start(*len_bytes))?;
        let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let len = body.read(&mut buffer)?;
            if len == 0 {
                ensure!(*len_bytes == blob.size, Broken(*len_bytes));
                return Ok(());
            }
            let left_bytes = blob.size - *len_bytes;
            ensure!(len as u64 <= left_bytes, "it is longer than the expected {} bytes", blob.size);
            file.write_all(&buffer[..len]).context("write it")?;
            *len_bytes += len as u64;
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
