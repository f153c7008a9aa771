//! Requests on inodes: attributes, extended attributes and statistics.

use std::ffi::CStr;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags, chmodat,
    chownat, fstatvfs, ftruncate, getxattr, listxattr, removexattr, setxattr, utimensat,
};
use rustix::io::Errno;

use super::inodes::Inode;
use super::wire::{Body, NAME_BYTES_MAX, set};
use super::worker::{Call, Reply, Worker, attributes};

/// The longest value, and list of names, that Linux has (XATTR_SIZE_MAX).
const XATTR_BYTES_MAX: usize = 64 << 10;

impl Worker {
    /// GETATTR. An open file has the attributes of its inode.
    pub fn get_attributes(&self, call: Call<'_>) -> Result<Reply, Errno> {
        let inode = self.server.inodes.get(call.header.node)?;
        self.told_attributes(&inode)
    }

    fn told_attributes(&self, inode: &Inode) -> Result<Reply, Errno> {
        let mut body = Body::default();
        body.attributes_out(&attributes(&inode.fd)?, self.server.options.cache.validity());
        Ok(Reply::Body(body.0))
    }

    /// SETATTR.
    pub fn set_attributes(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let fields = &mut call.fields;
        let (valid, _, handle, size, _owner) =
            (fields.u32()?, fields.u32()?, fields.u64()?, fields.u64()?, fields.u64()?);
        let (atime, mtime, _ctime) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (atime_ns, mtime_ns, _ctime_ns) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let (mode, _, uid, gid) = (fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?);
        let has = |flag| valid & flag != 0;
        let inode = self.server.inodes.get(call.header.node)?;
        if has(set::MODE) {
            // The host's kernel would follow it.
            if inode.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            chmodat(CWD, inode.path(), Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())?;
        }
        if has(set::UID) || has(set::GID) {
            let uid = (has(set::UID) && uid != u32::MAX).then(|| Uid::from_raw(uid));
            let gid = (has(set::GID) && gid != u32::MAX).then(|| Gid::from_raw(gid));
            // An ID that the host gives this machine no equivalent of.
            let refused = |error| if error == Errno::INVAL { Errno::PERM } else { error };
            chownat(&inode.fd, "", uid, gid, AtFlags::EMPTY_PATH).map_err(refused)?;
        }
        if has(set::SIZE) {
            let handle = has(set::FH).then_some(handle);
            self.without_privilege(has(set::KILL_SUIDGID), || self.truncate(&inode, handle, size))?;
        }
        if has(set::ATIME) || has(set::MTIME) {
            let time = |is_set, is_now, seconds: u64, nanoseconds: u32| Timespec {
                tv_sec: seconds as i64,
                tv_nsec: match (is_set, is_now) {
                    (false, _) => UTIME_OMIT,
                    (true, true) => UTIME_NOW,
                    (true, false) => nanoseconds.into(),
                },
            };
            let times = Timestamps {
                last_access: time(has(set::ATIME), has(set::ATIME_NOW), atime, atime_ns),
                last_modification: time(has(set::MTIME), has(set::MTIME_NOW), mtime, mtime_ns),
            };
            let is_set = utimensat(CWD, inode.path(), &times, AtFlags::empty());
            // Only then the times are those of a handle or come with a size: a kernel that writes data late also says when a file was
            // changed. Whoever may write to a file of another user may not set its times, and the host's time of writing stays.
            let is_late = has(set::FH) || has(set::SIZE);
            if !(is_late && is_set == Err(Errno::PERM)) {
                is_set?;
            }
        }
        self.told_attributes(&inode)
    }

    fn truncate(&self, inode: &Inode, handle: Option<u64>, size: u64) -> Result<(), Errno> {
        if let Some(handle) = handle.and_then(|id| self.server.handles.get(id).ok()) {
            return ftruncate(&handle.file, size);
        }
        if inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        ftruncate(self.open_inode(inode, OFlags::WRONLY)?, size)
    }

    /// STATFS.
    pub fn statistics(&self, call: Call<'_>) -> Result<Reply, Errno> {
        let inode = self.server.inodes.get(call.header.node)?;
        let found = fstatvfs(&inode.fd)?;
        let mut body = Body::default();
        body.u64(found.f_blocks).u64(found.f_bfree).u64(found.f_bavail).u64(found.f_files).u64(found.f_ffree);
        body.u32(found.f_bsize as u32).u32(NAME_BYTES_MAX as u32).u32(found.f_frsize as u32).u32(0);
        body.0.resize(body.0.len() + 24, 0);
        Ok(Reply::Body(body.0))
    }

    /// GETXATTR.
    pub fn get_xattr(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (room_bytes, _, name) = (call.fields.u32()?, call.fields.u32()?, xattr_name(call.fields.text()?)?);
        let inode = self.server.inodes.get(call.header.node)?;
        reply_with(room_bytes, |buffer| getxattr(inode.path(), name, buffer))
    }

    /// LISTXATTR. Those that a guest could neither read nor write are left out.
    pub fn list_xattrs(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let room_bytes = call.fields.u32()?;
        let inode = self.server.inodes.get(call.header.node)?;
        let mut names = vec![0; XATTR_BYTES_MAX];
        let len = listxattr(inode.path(), names.as_mut_slice())?;
        names.truncate(len);
        let kept: Vec<u8> = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| CStr::from_bytes_with_nul(name).is_ok_and(|name| xattr_name(name).is_ok()))
            .flatten()
            .copied()
            .collect();
        reply_with(room_bytes, |buffer| {
            let target = buffer.get_mut(..kept.len()).ok_or(Errno::RANGE)?;
            target.copy_from_slice(&kept);
            Ok(kept.len())
        })
    }

    /// SETXATTR.
    pub fn set_xattr(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let (len_bytes, flags) = (call.fields.u32()?, call.fields.u32()?);
        let name = xattr_name(call.fields.text()?)?;
        let value = call.fields.bytes(len_bytes as usize)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let inode = self.server.inodes.get(call.header.node)?;
        setxattr(inode.path(), name, value, flags)?;
        Ok(Reply::done())
    }

    /// REMOVEXATTR.
    pub fn remove_xattr(&self, mut call: Call<'_>) -> Result<Reply, Errno> {
        let name = xattr_name(call.fields.text()?)?;
        let inode = self.server.inodes.get(call.header.node)?;
        removexattr(inode.path(), name)?;
        Ok(Reply::done())
    }
}

/// The attributes that are the guest's: its users', access lists, and capabilities of programs. Labels of the host's security
/// modules and what overlayfs keeps are the host's.
fn xattr_name(name: &CStr) -> Result<&CStr, Errno> {
    let bytes = name.to_bytes();
    let is_guests = bytes.strip_prefix(b"user.").is_some_and(|rest| !rest.is_empty())
        || [&b"security.capability"[..], b"system.posix_acl_access", b"system.posix_acl_default"].contains(&bytes);
    if is_guests { Ok(name) } else { Err(Errno::OPNOTSUPP) }
}

/// What `read` returns, or its length if the guest has no room and asks for that.
fn reply_with(room_bytes: u32, read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> Result<Reply, Errno> {
    let mut buffer = vec![0; XATTR_BYTES_MAX];
    let len = read(&mut buffer)?;
    if room_bytes == 0 {
        let mut body = Body::default();
        body.u32(len as u32).u32(0);
        return Ok(Reply::Body(body.0));
    }
    if len > room_bytes as usize {
        return Err(Errno::RANGE);
    }
    buffer.truncate(len);
    Ok(Reply::Body(buffer))
}
