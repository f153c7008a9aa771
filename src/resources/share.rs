//! Folders that a machine shares: opens each, and starts the process that serves it.

use std::fs::{self, File};
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::config::{SHARED_FILE, ShareConfig};
use crate::fs::Options;
use crate::fs::link::Ends;
use crate::fs::process::{self, KNOWN_BYTES_MAX, Process, Starting};
use crate::sandbox::folder::{self, Folder};

/// A folder that a process serves, for the device of the guest.
#[derive(Debug)]
pub struct SharedFolder {
    /// What the guest mounts.
    pub tag: String,
    /// The connection with the server.
    pub ends: Ends,
}

impl SharedFolder {
    /// All descriptors.
    pub fn fds(&self) -> [RawFd; 2] {
        self.ends.fds()
    }
}

/// A folder whose server is about to serve.
pub struct Opening {
    tag: String,
    server: Starting,
}

/// Opens what `config` names, and starts its server, confined if the machine `is_confined`. `known` is what the guest of a machine
/// that is restored knows of it, and `files_max` the server's share of [`process::FILES_MAX`].
pub fn open(config: &ShareConfig, known: Option<File>, files_max: u64, is_confined: bool) -> Result<Opening> {
    let ShareConfig { path, tag, readonly, fills, cache, follows_mounts } = config;
    let what = || format!("share {}", path.display());
    let path = path.canonicalize().with_context(what)?;
    let file = folder::open_path(&path).with_context(what)?;
    let kind = file.metadata().with_context(what)?.file_type();
    ensure!(kind.is_dir() || kind.is_file(), "{}: only folders and regular files can be shared", what());
    let file_name = kind.is_file().then_some(SHARED_FILE);
    // Not again in a machine that is restarted or restored.
    let fills = *fills && known.is_none() && fs::read_dir(&path).with_context(what)?.next().is_none();
    let is_sealed = *readonly && !fills;
    let folder = Folder { path, fd: file.into(), file_name, readonly: is_sealed, follows_mounts: *follows_mounts };
    let options = Options { readonly: *readonly, fills, cache: *cache };
    let known = known.map(|file| read_known(&file)).transpose().with_context(what)?;
    let server = process::start(folder, options, files_max, is_confined, known.as_deref()).with_context(what)?;
    Ok(Opening { tag: tag.clone(), server })
}

/// Reads what a snapshot has of a share.
fn read_known(file: &File) -> Result<Vec<u8>> {
    let len_bytes = file.metadata()?.len();
    ensure!(len_bytes <= KNOWN_BYTES_MAX, "the snapshot's file for it has {len_bytes} bytes");
    let mut bytes = vec![0; usize::try_from(len_bytes)?];
    file.read_exact_at(&mut bytes, 0).context("read the snapshot's file for it")?;
    Ok(bytes)
}

impl Opening {
    /// Waits until the folder is served. It is, until the process is dropped.
    pub fn finish(self) -> Result<(SharedFolder, Process)> {
        let (ends, process) = self.server.finish()?;
        Ok((SharedFolder { tag: self.tag, ends }, process))
    }
}
