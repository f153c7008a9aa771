//! Folders of the host that a machine shares (virtio-fs): the process that serves one to a guest's kernel, which speaks FUSE.
//!
//! ```text
//! supervisor: process::start ─ clone ─> server process: confined to the folder, threads ─ worker.rs ─> names, files, ...
//! monitor:    virtio/fs.rs ─ link.rs (slots, messages) ───────────────────────────────────┘
//! ```
//!
//! The device in the monitor passes requests on as they are. This process is the only one that reads them, and the only one
//! that touches the folder: it may have been taken over by its guest, and can then do no more than the guest may ask for.

mod attributes;
mod files;
mod folders;
pub mod fuzzing;
mod handles;
mod inodes;
pub mod link;
mod names;
pub mod process;
mod saved;
#[cfg(test)]
mod tests;
mod users;
pub mod wire;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use handles::Handles;
use inodes::{Inode, Inodes};
use link::DATA_BYTES_MAX;
use wire::{Body, MAJOR, MINOR, MINOR_MIN, Validity, feature};
use worker::{Call, Reply, Worker};

use crate::config::ShareCache as Cache;

/// The capabilities of a server, in a user namespace: to make files of others, and to act on them as the guest's kernel has
/// allowed its users.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// The most inodes that a guest's kernel can know of a folder.
const INODES_MAX: usize = 500_000;
/// The most files of a folder that a guest can have open.
const HANDLES_MAX: usize = 64_000;
/// Descriptors for everything else: the link, and files during a request.
const FILES_RESERVED: usize = 64;
/// How long the guest's kernel may rely on names and attributes with `cache=auto`, in seconds.
const AUTO_SECONDS: u64 = 1;
/// The same with `cache=always`.
const ALWAYS_SECONDS: u64 = 86_400;

impl Cache {
    /// Whether the guest is the only one who changes anything.
    fn is_own(self) -> bool {
        matches!(self, Cache::Always | Cache::Writeback)
    }

    fn validity(self) -> Validity {
        let seconds = match self {
            Cache::Auto => AUTO_SECONDS,
            Cache::Always | Cache::Writeback => ALWAYS_SECONDS,
            Cache::Never => 0,
        };
        Validity { entries: seconds, attributes: seconds }
    }
}

/// How a folder is served.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Whether the guest can change nothing.
    pub readonly: bool,
    /// Whether that begins only when the folder is sealed: it is empty, and gets what it is to contain.
    pub fills: bool,
    /// What the guest's kernel keeps.
    pub cache: Cache,
}

impl Options {
    /// The flags of open(2) for a file that the guest opens with `flags`. A kernel that writes pages later first reads what is around a
    /// change.
    fn access(&self, flags: OFlags) -> OFlags {
        match self.cache {
            Cache::Writeback if flags & OFlags::ACCMODE == OFlags::WRONLY => (flags - OFlags::ACCMODE) | OFlags::RDWR,
            _ => flags,
        }
    }
}

/// A folder that is served, to one guest. Any thread.
struct Server {
    inodes: Inodes,
    handles: Handles,
    options: Options,
    /// Whether a kernel has mounted the folder.
    was_mounted: AtomicBool,
    /// Whether nothing can be changed any more.
    is_sealed: AtomicBool,
    /// Whether it has [`CAPABILITIES`].
    is_privileged: bool,
    /// The number of requests in progress.
    busy: AtomicUsize,
}

impl Server {
    /// Serves the folder `root` (O_PATH) with `files_max` descriptors.
    fn new(root: OwnedFd, options: Options, is_privileged: bool, files_max: usize) -> io::Result<Server> {
        let stat = worker::attributes(&root)?;
        let files_max = files_max.saturating_sub(FILES_RESERVED);
        let handles_max = (files_max / 4).min(HANDLES_MAX);
        let inodes = Inodes::new(Inode::new(root, &stat), (files_max - handles_max).min(INODES_MAX));
        let (handles, busy) = (Handles::new(handles_max), AtomicUsize::new(0));
        let (was_mounted, is_sealed) = (AtomicBool::new(false), AtomicBool::new(options.readonly && !options.fills));
        Ok(Server { inodes, handles, options, was_mounted, is_sealed, is_privileged, busy })
    }

    /// Whether the guest can change nothing.
    fn is_readonly(&self) -> bool {
        self.is_sealed.load(Ordering::Acquire)
    }

    /// Ends the time in which a read-only folder gets its content. There is no way back.
    fn seal(&self) {
        self.is_sealed.fetch_or(self.options.readonly, Ordering::AcqRel);
    }

    /// Forgets all that the guest's kernel knows and has opened.
    fn clear(&self) {
        self.handles.clear();
        self.inodes.clear();
    }
}

impl Worker {
    /// INIT: a kernel mounts the folder. What another one knew, before a reset, is forgotten.
    fn init(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let fields = &mut call.fields;
        let (major, minor, readahead, flags) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
        let offered = u64::from(flags)
            | if u64::from(flags) & feature::INIT_EXT == 0 { 0 } else { u64::from(fields.u32()?) << 32 };
        if major != MAJOR || minor < MINOR_MIN {
            return Err(Errno::PROTO);
        }
        self.server.clear();
        // Who mounts it again has filled it.
        if self.server.was_mounted.swap(true, Ordering::AcqRel) {
            self.server.seal();
        }
        let used = offered & self.features();
        const PAGE_BYTES: usize = 4096;
        let mut body = Body::default();
        body.u32(MAJOR).u32(MINOR).u32(readahead).u32(used as u32);
        // Requests in the background, and when that is many.
        body.u32(64 | 48 << 16);
        body.u32(DATA_BYTES_MAX as u32).u32(1).u32((DATA_BYTES_MAX / PAGE_BYTES) as u32);
        body.u32((used >> 32) as u32);
        body.0.resize(64, 0);
        Ok(Reply::Body(body.0))
    }

    fn features(&self) -> u64 {
        use feature::*;
        let of_cache = match self.server.options.cache {
            Cache::Auto => AUTO_INVAL_DATA | DO_READDIRPLUS | READDIRPLUS_AUTO,
            Cache::Always => DO_READDIRPLUS | READDIRPLUS_AUTO | CACHE_SYMLINKS,
            Cache::Writeback => DO_READDIRPLUS | READDIRPLUS_AUTO | CACHE_SYMLINKS | WRITEBACK_CACHE,
            Cache::Never => DIRECT_IO_ALLOW_MMAP,
        };
        let of_privilege = if self.server.is_privileged { HANDLE_KILLPRIV_V2 } else { 0 };
        let all = ASYNC_READ | ATOMIC_O_TRUNC | BIG_WRITES | DONT_MASK | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES;
        all | POSIX_ACL | INIT_EXT | of_cache | of_privilege
    }
}
