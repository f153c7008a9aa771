//! Requests on open folders.

use std::mem::MaybeUninit;
use std::sync::PoisonError;

use rustix::fs::{FileType, Mode, OFlags, RawDir, SeekFrom, seek};
use rustix::io::Errno;

use super::handles::Handle;
use super::inodes::Inode;
use super::wire::{Body, ENTRY_BYTES, dirent_bytes, open_flag};
use super::worker::{Call, Reply, Worker};

/// The size of the buffer for what the host's kernel returns at once.
const BUFFER_BYTES: usize = 32 << 10;
/// The most that a reply has.
const REPLY_BYTES_MAX: usize = 128 << 10;

impl Worker {
    /// OPENDIR.
    pub fn open_folder(&self, call: Call<'_>) -> Result<Reply, Errno> {
        let inode = self.server.inodes.get(call.header.node)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let file = self.open_in(&inode, ".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        let cached = open_flag::KEEP_CACHE | open_flag::CACHE_DIR;
        let flags = if self.server.options.cache.is_own() { cached } else { 0 };
        let mut body = Body::default();
        body.open(self.server.handles.insert(Handle::new(file, OFlags::DIRECTORY))?, flags);
        Ok(Reply::Body(body.0))
    }

    /// READDIR and, with attributes, READDIRPLUS.
    pub fn read_folder(&self, mut call: Call<'_>, with_attributes: bool) -> Result<Reply, Errno> {
        let (handle, offset, size) = (call.fields.u64()?, call.fields.u64()?, call.fields.u32()?);
        let folder = self.server.inodes.get(call.header.node)?;
        let handle = self.server.handles.get(handle)?;
        let room_bytes = (size as usize).min(call.room_bytes).min(REPLY_BYTES_MAX);
        let _alone = handle.reading.lock().unwrap_or_else(PoisonError::into_inner);
        seek(&handle.file, SeekFrom::Start(offset))?;
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
        let mut entries = RawDir::new(&handle.file, &mut buffer);
        let mut body = Body::default();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            let entry_bytes = if with_attributes { ENTRY_BYTES } else { 0 } + dirent_bytes(name.to_bytes());
            if body.0.len() + entry_bytes > room_bytes {
                break;
            }
            if with_attributes {
                self.add_entry(&folder, name, &mut body);
            }
            let kind = entry.file_type().as_raw_mode() >> 12;
            body.dirent(entry.ino(), entry.next_entry_cookie(), kind, name.to_bytes());
        }
        Ok(Reply::Body(body.0))
    }

    /// Adds what a lookup of `name` would return. The guest looks it up itself if that fails.
    fn add_entry(&self, folder: &Inode, name: &std::ffi::CStr, body: &mut Body) {
        let is_link = matches!(name.to_bytes(), b"." | b"..");
        let found = if is_link || self.server.inodes.is_half_full() { None } else { self.identify(folder, name).ok() };
        match found {
            Some((id, stat)) => body.entry(id, &stat, self.server.options.cache.validity()),
            None => body.no_entry(),
        };
    }
}
