//! What a guest knows of a folder, as bytes: for a machine that is saved, and for the server of one that is restored.
//!
//! A file is known by its path beneath the folder and by what identifies it. A server opens it again by that path; if another file
//! is there, or none, the guest gets ESTALE. The bytes are a user's, and what they name is no more than a guest may ask for: each
//! path is resolved beneath the folder.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags, openat, openat2, readlinkat, statx};
use rustix::io::Errno;

use super::handles::Handle;
use super::inodes::{Inode, Restored};
use super::wire::{Body, Fields, ROOT_ID};
use super::{Server, worker};

/// What the bytes begin with.
const MAGIC: u64 = u64::from_le_bytes(*b"huskfs 1");
/// Larger than any ID or count that a server reaches.
const NUMBER_MAX: u64 = 1 << 60;
/// The longest path (PATH_MAX).
const PATH_BYTES_MAX: usize = 4096;

/// What tells a file from all others, as long as its file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    /// When it was made, if the file system knows: inode numbers are used again.
    made_s: u64,
    made_ns: u64,
}

impl Identity {
    /// That of an open file.
    pub fn of(fd: impl AsFd) -> Result<Identity, Errno> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
        let found = statx(fd, "", flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME)?;
        let has_time = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::BTIME);
        let (made_s, made_ns) =
            if has_time { (found.stx_btime.tv_sec as u64, found.stx_btime.tv_nsec.into()) } else { (0, 0) };
        let device = u64::from(found.stx_dev_major) << 32 | u64::from(found.stx_dev_minor);
        Ok(Identity { device, inode: found.stx_ino, made_s, made_ns })
    }

    pub(super) fn write(self, body: &mut Body) {
        body.u64(self.device).u64(self.inode).u64(self.made_s).u64(self.made_ns);
    }

    fn read(fields: &mut Fields<'_>) -> Result<Identity, Errno> {
        let (device, inode, made_s, made_ns) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
        Ok(Identity { device, inode, made_s, made_ns })
    }
}

/// Where a file is found again.
struct Place {
    identity: Identity,
    /// Beneath the folder.
    path: CString,
}

impl Place {
    fn write(&self, body: &mut Body) {
        self.identity.write(body);
        body.u32(self.path.as_bytes().len() as u32);
        body.0.extend_from_slice(self.path.as_bytes());
    }

    fn read(fields: &mut Fields<'_>) -> Result<Place, Errno> {
        let identity = Identity::read(fields)?;
        let len_bytes = fields.u32()? as usize;
        if len_bytes > PATH_BYTES_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        Ok(Place { identity, path: CString::new(fields.bytes(len_bytes)?).map_err(|_| Errno::INVAL)? })
    }

    /// Opens the file (O_PATH). Fails with ESTALE if it is not the one.
    fn open(&self, root: &Inode) -> Result<std::os::fd::OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        let fd = openat2(&root.fd, &self.path, flags, Mode::empty(), resolve)?;
        if Identity::of(&fd)? == self.identity { Ok(fd) } else { Err(Errno::STALE) }
    }
}

/// Finds the paths of open files.
struct Paths<'a, D> {
    /// The folder of this process's descriptors.
    descriptors: &'a D,
    root: PathBuf,
}

impl<'a, D: AsFd> Paths<'a, D> {
    fn new(descriptors: &'a D, root: &Inode) -> Result<Paths<'a, D>, Errno> {
        let paths = Paths { descriptors, root: PathBuf::new() };
        let root = paths.absolute(&root.fd)?;
        Ok(Paths { root, ..paths })
    }

    fn absolute(&self, fd: impl AsFd) -> Result<PathBuf, Errno> {
        let number = fd.as_fd().as_raw_fd().to_string();
        let path = readlinkat(self.descriptors, number, Vec::new())?;
        Ok(Path::new(std::ffi::OsStr::from_bytes(path.as_bytes())).to_owned())
    }

    /// Where an open file is. `None` if it has no name any more, as far as the kernel says.
    fn place(&self, fd: impl AsFd) -> Option<Place> {
        let identity = Identity::of(&fd).ok()?;
        let path = self.absolute(fd).ok()?;
        let beneath = path.strip_prefix(&self.root).ok()?.as_os_str().as_bytes();
        let beneath = if beneath.is_empty() { b"." } else { beneath };
        Some(Place { identity, path: CString::new(beneath).ok()? })
    }
}

/// All that the guest knows. `shared` is what the server shares, and `descriptors` the folder of this process's descriptors. Fails if
/// requests are in progress: the guest would wait for their replies in vain.
pub fn save(server: &Server, shared: Identity, descriptors: &impl AsFd) -> Result<Vec<u8>> {
    ensure!(server.busy.load(Ordering::Relaxed) == 0, "the host's file system does not answer: try again");
    let root = server.inodes.get(ROOT_ID)?;
    let paths = Paths::new(descriptors, &root).context("find the path of the folder")?;
    let (inodes, next_inode) = server.inodes.all();
    let (handles, last_handle) = server.handles.all();
    let mut body = Body::default();
    body.u64(MAGIC);
    shared.write(&mut body);
    body.u64(next_inode).u64(last_handle);
    // Those without a name are lost: their IDs are of no file then.
    for (id, lookups, inode) in inodes {
        if let Some(place) = paths.place(&inode.fd) {
            body.u64(id).u64(lookups);
            place.write(&mut body);
        }
    }
    body.u64(0);
    for (id, handle) in handles {
        if let Some(place) = paths.place(&handle.file) {
            body.u64(id).u32(handle.flags.bits());
            place.write(&mut body);
        }
    }
    body.u64(0);
    Ok(body.0)
}

/// Makes a new server know what `bytes` say. Fails if they are of another folder than `shared`, or malformed.
pub fn restore(server: &Server, shared: Identity, descriptors: &impl AsFd, bytes: &[u8]) -> Result<()> {
    let mut fields = Fields(bytes);
    let fields = &mut fields;
    let malformed = || "what the saved machine knows of it is malformed";
    ensure!(fields.u64().with_context(malformed)? == MAGIC, malformed());
    let saved = Identity::read(fields).with_context(malformed)?;
    ensure!(saved == shared, "it is not the one that the saved machine shares: another one has taken its place");
    let (next_inode, last_handle) = (fields.u64().with_context(malformed)?, fields.u64().with_context(malformed)?);
    ensure!((ROOT_ID + 1..NUMBER_MAX).contains(&next_inode) && last_handle < NUMBER_MAX, malformed());
    let root = server.inodes.get(ROOT_ID)?;
    let mut inodes = Vec::new();
    loop {
        let id = fields.u64().with_context(malformed)?;
        if id == 0 {
            break;
        }
        let (lookups, place) = (fields.u64().with_context(malformed)?, Place::read(fields).with_context(malformed)?);
        ensure!((ROOT_ID + 1..next_inode).contains(&id) && lookups < NUMBER_MAX, malformed());
        ensure!(
            inodes.len() < server.inodes.count_max(),
            "the saved machine knows more of its files than this host allows to be open"
        );
        let Ok(fd) = place.open(&root) else { continue };
        let stat = worker::attributes(&fd).context("read a file's attributes")?;
        inodes.push(Restored { id, lookups, inode: Inode::new(fd, &stat), stat });
    }
    server.inodes.restore(next_inode, inodes);
    let mut handles = Vec::new();
    loop {
        let id = fields.u64().with_context(malformed)?;
        if id == 0 {
            break;
        }
        let flags = OFlags::from_bits_retain(fields.u32().with_context(malformed)?);
        let place = Place::read(fields).with_context(malformed)?;
        ensure!(id <= last_handle && handles.len() < server.handles.count_max(), malformed());
        if let Ok(handle) = reopen(server, &place, flags, descriptors) {
            handles.push((id, Arc::new(handle)));
        }
    }
    ensure!(fields.0.is_empty(), malformed());
    server.handles.restore(last_handle, handles);
    Ok(())
}

/// Opens a file again as it was.
fn reopen(server: &Server, place: &Place, flags: OFlags, descriptors: &impl AsFd) -> Result<Handle, Errno> {
    let fd = place.open(&*server.inodes.get(ROOT_ID)?)?;
    let kind = FileType::from_raw_mode(worker::attributes(&fd)?.stx_mode.into());
    let access = match kind {
        FileType::Directory => OFlags::RDONLY | OFlags::DIRECTORY,
        FileType::RegularFile => flags & OFlags::ACCMODE,
        // To open a FIFO or a device would wait, or do something.
        _ => return Err(Errno::STALE),
    };
    let open = |access| openat(descriptors, fd.as_raw_fd().to_string(), access | OFlags::CLOEXEC, Mode::empty());
    let file = match open(server.options.access(access)) {
        Err(Errno::ACCESS) => open(access),
        opened => opened,
    };
    Ok(Handle::new(file?.into(), flags))
}
