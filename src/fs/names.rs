//! Requests on names: finds, makes, renames and removes files.

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, RenameFlags, linkat, mkdirat, mknodat, readlinkat, renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::wire::{Body, opcode};
use super::worker::{Call, Reply, Worker};

impl Worker {
    /// LOOKUP. In a folder of its own, the guest's kernel remembers also that there is no such file.
    pub fn look_up(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let cache = self.server.options.cache;
        match self.entry(call.header.node, call.fields.name()?) {
            Err(Errno::NOENT) if cache.is_own() => {
                let mut body = Body::default();
                body.absent(cache.validity());
                Ok(Reply::Body(body.0))
            }
            found => found,
        }
    }

    /// The reply that tells of the file `name` in a folder.
    fn entry(&self, folder: u64, name: &std::ffi::CStr) -> Result<Reply, Errno> {
        let folder = self.server.inodes.get(folder)?;
        let (id, stat) = self.identify(&folder, name)?;
        let mut body = Body::default();
        body.entry(id, &stat, self.server.options.cache.validity());
        Ok(Reply::Body(body.0))
    }

    /// FORGET.
    pub fn forget(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        self.server.inodes.forget(call.header.node, call.fields.u64()?);
        Ok(Reply::Nothing)
    }

    /// BATCH_FORGET.
    pub fn forget_all(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (count, _) = (call.fields.u32()?, call.fields.u32()?);
        for _ in 0..count {
            let (Ok(id), Ok(lookups)) = (call.fields.u64(), call.fields.u64()) else { break };
            self.server.inodes.forget(id, lookups);
        }
        Ok(Reply::Nothing)
    }

    /// READLINK.
    pub fn read_link(&self, call: Call<'_>) -> Result<Reply, Errno> {
        let inode = self.server.inodes.get(call.header.node)?;
        readlinkat(&inode.fd, "", Vec::new()).map(|target| Reply::Body(target.into_bytes()))
    }

    /// SYMLINK.
    pub fn make_symlink(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (name, target) = (call.fields.name()?, call.fields.text()?);
        let folder = self.server.inodes.get(call.header.node)?;
        self.as_user(&call.header, 0, || symlinkat(target, &folder.fd, name))?;
        self.entry(call.header.node, name)
    }

    /// MKNOD. Devices of the host are none of the guest's business; a device 0:0 marks a removed file (overlayfs).
    pub fn make_node(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (mode, device, mask, _) = (call.fields.u32()?, call.fields.u32()?, call.fields.u32()?, call.fields.u32()?);
        let name = call.fields.name()?;
        let kind = FileType::from_raw_mode(mode);
        let is_allowed = match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => true,
            FileType::CharacterDevice => device == 0,
            _ => false,
        };
        if !is_allowed {
            return Err(Errno::PERM);
        }
        let folder = self.server.inodes.get(call.header.node)?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        self.as_user(&call.header, mask, || mknodat(&folder.fd, name, kind, mode, 0))?;
        self.entry(call.header.node, name)
    }

    /// MKDIR.
    pub fn make_folder(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (mode, mask, name) = (call.fields.u32()?, call.fields.u32()?, call.fields.name()?);
        let folder = self.server.inodes.get(call.header.node)?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        self.as_user(&call.header, mask, || mkdirat(&folder.fd, name, mode))?;
        self.entry(call.header.node, name)
    }

    /// UNLINK and RMDIR.
    pub fn remove(&self, mut call: Call<'_>, flags: AtFlags) -> Result<Reply, Errno> {
        let folder = self.server.inodes.get(call.header.node)?;
        unlinkat(&folder.fd, call.fields.name()?, flags)?;
        Ok(Reply::done())
    }

    /// RENAME and RENAME2.
    pub fn rename(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let to = call.fields.u64()?;
        let flags = if call.header.opcode == opcode::RENAME2 {
            let (flags, _) = (call.fields.u32()?, call.fields.u32()?);
            RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?
        } else {
            RenameFlags::empty()
        };
        let (old, new) = (call.fields.name()?, call.fields.name()?);
        let (from, to) = (self.server.inodes.get(call.header.node)?, self.server.inodes.get(to)?);
        renameat_with(&from.fd, old, &to.fd, new, flags)?;
        Ok(Reply::done())
    }

    /// LINK.
    pub fn make_link(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (id, name) = (call.fields.u64()?, call.fields.name()?);
        let (inode, folder) = (self.server.inodes.get(id)?, self.server.inodes.get(call.header.node)?);
        linkat(CWD, inode.path(), &folder.fd, name, AtFlags::SYMLINK_FOLLOW)?;
        self.entry(call.header.node, name)
    }
}
