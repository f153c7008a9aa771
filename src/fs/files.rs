//! Requests on open files.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{
    FallocateFlags, FileType, Mode, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek, syncfs,
};
use rustix::io::Errno;

use super::Cache;
use super::handles::Handle;
use super::inodes::Inode;
use super::link::DATA_BYTES_MAX;
use super::wire::{
    Body, FSYNC_DATA, Fields, OPEN_KILL_SUIDGID, OUT_HEADER_BYTES, ROOT_ID, WRITE_CACHE, WRITE_HEADER_BYTES,
    WRITE_KILL_SUIDGID, opcode, open_flag,
};
use super::worker::{Call, Reply, Worker, attributes};
use crate::sys::disk;

/// The most that one request copies between files: a pause of the machine waits for it. The guest asks again for the rest.
const COPY_BYTES_MAX: u64 = 64 << 20;

impl Worker {
    /// OPEN.
    pub fn open(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (flags, fuse_flags) = (call.fields.u32()?, call.fields.u32()?);
        let inode = self.server.inodes.get(call.header.node)?;
        let file = self.open_known(&inode, flags, fuse_flags)?;
        let mut body = Body::default();
        let cache = self.server.options.cache;
        // What the guest's kernel has of a file is otherwise dropped when it is opened.
        let stat = (cache == Cache::Auto).then(|| attributes(&file)).transpose()?;
        let handle = self.keep(file, flags)?;
        // Only of an opening that has not failed: the guest has dropped nothing then.
        let is_unchanged = stat.is_some_and(|stat| inode.is_as_last_opened(&stat));
        let kept = if is_unchanged { open_flag::KEEP_CACHE } else { 0 };
        body.open(handle, cache.open_flags() | kept);
        Ok(Reply::Body(body.0))
    }

    fn open_known(&self, inode: &Inode, flags: u32, fuse_flags: u32) -> Result<File, Errno> {
        // Devices, sockets and FIFOs are the guest's own: its kernel never asks for those.
        if inode.kind != FileType::RegularFile {
            return Err(Errno::NXIO);
        }
        let (wanted, flags) = (host_flags(flags), self.open_flags(flags));
        if self.server.is_readonly() && flags.intersects(OFlags::ACCMODE | OFlags::TRUNC) {
            return Err(Errno::ROFS);
        }
        self.without_privilege(fuse_flags & OPEN_KILL_SUIDGID != 0, || match self.open_inode(inode, flags) {
            // Only the owner of the host's file may do so much.
            Err(Errno::ACCESS) if wanted != flags => self.open_inode(inode, wanted),
            opened => opened,
        })
    }

    fn open_flags(&self, guests: u32) -> OFlags {
        self.server.options.access(host_flags(guests))
    }

    fn keep(&self, file: File, flags: u32) -> Result<u64, Errno> {
        self.server.handles.insert(Handle::new(file, OFlags::from_bits_retain(flags)))
    }

    /// CREATE.
    pub fn create(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (flags, mode, mask, fuse_flags) = creation(&mut call.fields)?;
        let name = call.fields.name()?;
        let folder = self.server.inodes.get(call.header.node)?;
        let wanted = self.open_flags(flags) | OFlags::CREATE | OFlags::EXCL;
        let made = self.as_user(&call.header, mask, || self.open_in(&folder, name, wanted, mode));
        let (file, (inode, stat)) = match made {
            Ok(file) => (file, self.find(&folder, name)?),
            // The host has made it since the guest has looked for it.
            Err(Errno::EXIST) if !OFlags::from_bits_retain(flags).contains(OFlags::EXCL) => {
                let (inode, stat) = self.find(&folder, name)?;
                (self.open_known(&inode, flags, fuse_flags)?, (inode, stat))
            }
            Err(error) => return Err(error),
        };
        self.created(file, flags, inode, &stat)
    }

    /// TMPFILE: a file without a name.
    pub fn create_unnamed(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (flags, mode, mask, _) = creation(&mut call.fields)?;
        let folder = self.server.inodes.get(call.header.node)?;
        // Without O_EXCL it can get a name later.
        let wanted = self.open_flags(flags) | OFlags::TMPFILE | OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let file = self.as_user(&call.header, mask, || self.open_in(&folder, ".", wanted, mode))?;
        let stat = attributes(&file)?;
        let inode = Inode::new(self.as_path(&file)?, &stat);
        self.created(file, flags, inode, &stat)
    }

    fn created(&self, file: File, flags: u32, inode: Inode, stat: &rustix::fs::Statx) -> Result<Reply, Errno> {
        let handle = self.keep(file, flags)?;
        let id = self.server.inodes.look_up(inode, stat).inspect_err(|_| {
            let _ = self.server.handles.remove(handle);
        })?;
        let cache = self.server.options.cache;
        let mut body = Body::default();
        body.entry(id, stat, cache.validity()).open(handle, cache.open_flags());
        Ok(Reply::Body(body.0))
    }

    /// READ.
    pub fn read(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (handle, offset, size) = (call.fields.u64()?, call.fields.u64()?, call.fields.u32()?);
        let handle = self.server.handles.get(handle)?;
        let size = (size as usize).min(call.room_bytes).min(DATA_BYTES_MAX);
        let mut done = 0;
        while done < size {
            let mut part = self.link.part(call.slot, OUT_HEADER_BYTES + done, size - done).map_err(errno)?;
            match disk::read_at(&handle.file, &mut part, offset.saturating_add(done as u64)).map_err(errno) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(Reply::InSlot(done))
    }

    /// WRITE.
    pub fn write(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let fields = &mut call.fields;
        let (handle, offset, size, flags) = (fields.u64()?, fields.u64()?, fields.u32()?, fields.u32()?);
        let handle = self.server.handles.get(handle)?;
        let size = size as usize;
        if size > call.data_bytes {
            return Err(Errno::INVAL);
        }
        // A guest that writes later knows the end of the file better than its host.
        let writes_later = self.server.options.cache == Cache::Writeback;
        let appends = handle.appends() && flags & WRITE_CACHE == 0 && !writes_later;
        let done = self.without_privilege(flags & WRITE_KILL_SUIDGID != 0, || {
            let mut done = 0;
            while done < size {
                let part = self.link.part(call.slot, WRITE_HEADER_BYTES + done, size - done).map_err(errno)?;
                let at = offset.saturating_add(done as u64);
                let written =
                    if appends { disk::append(&handle.file, &part) } else { disk::write_at(&handle.file, &part, at) };
                match written.map_err(errno) {
                    Ok(0) => break,
                    Ok(count) => done += count,
                    Err(_) if done > 0 => break,
                    Err(error) => return Err(error),
                }
            }
            Ok(done)
        })?;
        let mut body = Body::default();
        body.u32(done as u32).u32(0);
        Ok(Reply::Body(body.0))
    }

    /// RELEASE and RELEASEDIR.
    pub fn release(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        self.server.handles.remove(call.fields.u64()?)?;
        Ok(Reply::done())
    }

    /// FSYNC and FSYNCDIR.
    pub fn sync(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (handle, flags) = (call.fields.u64()?, call.fields.u32()?);
        let handle = self.server.handles.get(handle)?;
        let is_data = call.header.opcode == opcode::FSYNC && flags & FSYNC_DATA != 0;
        if is_data {
            fdatasync(&handle.file)?
        } else {
            fsync(&handle.file)?
        }
        Ok(Reply::done())
    }

    /// SYNCFS.
    pub fn sync_all(&self) -> Result<Reply, Errno> {
        let root = self.server.inodes.get(ROOT_ID)?;
        syncfs(self.open_in(&root, ".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?)?;
        Ok(Reply::done())
    }

    /// FALLOCATE.
    pub fn allocate(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let fields = &mut call.fields;
        let (handle, offset, len, mode) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u32()?);
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        fallocate(&self.server.handles.get(handle)?.file, mode, offset, len)?;
        Ok(Reply::done())
    }

    /// LSEEK, for data and holes: the guest's kernel knows the rest.
    pub fn seek(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (handle, offset, whence) = (call.fields.u64()?, call.fields.u64()?, call.fields.u32()?);
        let position = match whence as i32 {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        let mut body = Body::default();
        body.u64(seek(&self.server.handles.get(handle)?.file, position)?);
        Ok(Reply::Body(body.0))
    }

    /// COPY_FILE_RANGE.
    pub fn copy_range(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let fields = &mut call.fields;
        let (from, mut from_offset, _node) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (to, mut to_offset, len, flags) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.server.handles.get(from)?, self.server.handles.get(to)?);
        let len = usize::try_from(len.min(COPY_BYTES_MAX)).map_err(|_| Errno::INVAL)?;
        let count = copy_file_range(&from.file, Some(&mut from_offset), &to.file, Some(&mut to_offset), len)?;
        let mut body = Body::default();
        body.u32(count as u32).u32(0);
        Ok(Reply::Body(body.0))
    }

    /// A descriptor of the same file that can only be passed on (O_PATH).
    fn as_path(&self, file: impl AsFd) -> Result<std::os::fd::OwnedFd, Errno> {
        use std::os::fd::AsRawFd;
        let path = file.as_fd().as_raw_fd().to_string();
        rustix::fs::openat(rustix::fs::CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
    }
}

/// The arguments of CREATE and TMPFILE before the name: flags, mode, mask for permissions, and FUSE's flags.
fn creation(fields: &mut Fields<'_>) -> Result<(u32, Mode, u32, u32), Errno> {
    let (flags, mode, mask, fuse_flags) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
    Ok((flags, Mode::from_raw_mode(mode & 0o7777), mask, fuse_flags))
}

/// The flags with which the host's file is opened. O_DIRECT applies to the guest's cache alone: the host would want data at
/// other addresses. A handle appends by itself.
fn host_flags(guests: u32) -> OFlags {
    let kept = OFlags::ACCMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    OFlags::from_bits_retain(guests) & kept
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// The flags of open files and folders.
impl Cache {
    pub(super) fn open_flags(self) -> u32 {
        open_flag::NOFLUSH
            | match self {
                Cache::Never => open_flag::DIRECT_IO,
                Cache::Auto => 0,
                Cache::Always | Cache::Writeback => open_flag::KEEP_CACHE,
            }
    }
}
