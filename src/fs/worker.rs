//! A thread of the server: takes a request, performs it, and replies.
//!
//! The working directory of such a thread is its own: the folder of this process's descriptors (`/proc/self/fd`), which is the
//! only way to reach an inode for calls that take no descriptor. A path in it is the number of a descriptor, never
//! something from the guest.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat, openat2, statx};
use rustix::io::Errno;
use rustix::process::{fchdir, umask};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities};

use super::inodes::Inode;
use super::link::{Link, Message, SLOT_BYTES};
use super::wire::{self, Fields, Header, IN_HEADER_BYTES, OUT_HEADER_BYTES, WRITE_HEADER_BYTES, opcode};
use super::{CAPABILITIES, Server};
use crate::sys::{identity, namespaces};

/// The most that a request other than a write may have: a value of an extended attribute and its name.
const REQUEST_BYTES_MAX: usize = 80 << 10;
/// How names are resolved: below the given folder, and through none of the kernel's own links.
const RESOLVE: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// What is asked of each file.
const ATTRIBUTES: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

/// What becomes of a request.
pub(super) enum Reply {
    /// It has no reply.
    Nothing,
    /// A body.
    Body(Vec<u8>),
    /// A body of this size, which is in the slot already.
    InSlot(usize),
}

impl Reply {
    /// Success without a body.
    pub fn done() -> Reply {
        Reply::Body(Vec::new())
    }
}

/// A request with its arguments.
pub(super) struct Call<'a> {
    pub header: Header,
    pub fields: Fields<'a>,
    pub slot: u32,
    /// The length of the data of a write, which is in the slot.
    pub data_bytes: usize,
    /// The room for the reply's body.
    pub room_bytes: usize,
}

/// A thread that serves.
pub(super) struct Worker {
    pub server: Arc<Server>,
    pub link: Arc<Link>,
}

impl Worker {
    /// Makes the calling thread a worker: with its own working directory and mask for permissions. `descriptors` is the
    /// folder of this process's descriptors.
    pub fn new(server: Arc<Server>, link: Arc<Link>, descriptors: impl AsFd) -> io::Result<Worker> {
        namespaces::unshare(UnshareFlags::FS)?;
        fchdir(descriptors)?;
        umask(Mode::empty());
        Ok(Worker { server, link })
    }

    /// Serves until the other side is gone, and returns why.
    pub fn run(&self) -> io::Error {
        loop {
            let served = self.link.receive().and_then(|message| {
                self.server.busy.fetch_add(1, Ordering::Relaxed);
                let served = self.serve(message);
                // Before the reply, after which no request is in progress for the device.
                self.server.busy.fetch_sub(1, Ordering::Relaxed);
                let len_bytes = served? as u32;
                self.link.send(Message { slot: message.slot, len_bytes, room_bytes: 0 })
            });
            if let Err(error) = served {
                return error;
            }
        }
    }

    /// Performs the request in a slot, and returns the length of the reply there: 0 if there is none.
    pub fn serve(&self, message: Message) -> io::Result<usize> {
        let Message { slot, len_bytes, room_bytes } = message;
        let memory = self.link.slot(slot)?;
        let (len_bytes, room_bytes) = (len_bytes as usize, (room_bytes as usize).min(SLOT_BYTES));
        // Read once: what is checked is what is used.
        let mut head = [0; IN_HEADER_BYTES];
        let head = head.get_mut(..len_bytes.min(IN_HEADER_BYTES)).unwrap_or_default();
        memory.copy_to(head);
        let Some(header) = Header::parse(head) else { return Ok(0) };
        let len_bytes = len_bytes.min(header.len_bytes as usize);
        let is_write = header.opcode == opcode::WRITE;
        let args_max = if is_write { WRITE_HEADER_BYTES } else { REQUEST_BYTES_MAX };
        let mut request = vec![0; len_bytes.min(args_max)];
        memory.copy_to(&mut request);
        let result = if !is_write && len_bytes > REQUEST_BYTES_MAX {
            Err(Errno::TOOBIG)
        } else {
            self.perform(Call {
                header,
                fields: Fields(request.get(IN_HEADER_BYTES..).unwrap_or_default()),
                slot,
                data_bytes: len_bytes.saturating_sub(WRITE_HEADER_BYTES),
                room_bytes: room_bytes.saturating_sub(OUT_HEADER_BYTES),
            })
        };
        self.reply(&header, slot, room_bytes, result)
    }

    fn reply(&self, header: &Header, slot: u32, room_bytes: usize, result: Result<Reply, Errno>) -> io::Result<usize> {
        let memory = self.link.slot(slot)?;
        if matches!(result, Ok(Reply::Nothing)) || room_bytes < OUT_HEADER_BYTES {
            return Ok(0);
        }
        let result = result.and_then(|reply| match reply {
            Reply::Nothing => Ok(0),
            Reply::InSlot(body_bytes) => Ok(body_bytes),
            Reply::Body(body) if body.len() > room_bytes - OUT_HEADER_BYTES => Err(Errno::INVAL),
            Reply::Body(body) => {
                let rest = memory.offset(OUT_HEADER_BYTES).map_err(|_| Errno::INVAL)?;
                rest.copy_from(&body);
                Ok(body.len())
            }
        });
        memory.copy_from(&wire::reply_header(header.unique, result));
        Ok(OUT_HEADER_BYTES + result.unwrap_or(0))
    }

    fn perform(&self, call: Call<'_>) -> Result<Reply, Errno> {
        if self.server.is_readonly() && changes_something(call.header.opcode) {
            return Err(Errno::ROFS);
        }
        match call.header.opcode {
            opcode::INIT => self.init(call),
            opcode::DESTROY => {
                self.server.clear();
                self.server.seal();
                Ok(Reply::done())
            }
            opcode::INTERRUPT => Ok(Reply::Nothing),
            opcode::FORGET => self.forget(call),
            opcode::BATCH_FORGET => self.forget_all(call),
            opcode::LOOKUP => self.look_up(call),
            opcode::GETATTR => self.get_attributes(call),
            opcode::SETATTR => self.set_attributes(call),
            opcode::READLINK => self.read_link(call),
            opcode::SYMLINK => self.make_symlink(call),
            opcode::MKNOD => self.make_node(call),
            opcode::MKDIR => self.make_folder(call),
            opcode::UNLINK => self.remove(call, AtFlags::empty()),
            opcode::RMDIR => self.remove(call, AtFlags::REMOVEDIR),
            opcode::RENAME | opcode::RENAME2 => self.rename(call),
            opcode::LINK => self.make_link(call),
            opcode::OPEN => self.open(call),
            opcode::CREATE => self.create(call),
            opcode::TMPFILE => self.create_unnamed(call),
            opcode::READ => self.read(call),
            opcode::WRITE => self.write(call),
            opcode::FLUSH => Ok(Reply::done()),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(call),
            opcode::FSYNC | opcode::FSYNCDIR => self.sync(call),
            opcode::SYNCFS => self.sync_all(),
            opcode::FALLOCATE => self.allocate(call),
            opcode::LSEEK => self.seek(call),
            opcode::COPY_FILE_RANGE => self.copy_range(call),
            opcode::STATFS => self.statistics(call),
            opcode::GETXATTR => self.get_xattr(call),
            opcode::SETXATTR => self.set_xattr(call),
            opcode::LISTXATTR => self.list_xattrs(call),
            opcode::REMOVEXATTR => self.remove_xattr(call),
            opcode::OPENDIR => self.open_folder(call),
            opcode::READDIR => self.read_folder(call, false),
            opcode::READDIRPLUS => self.read_folder(call, true),
            // The guest's kernel does it by itself then: locks, polling, access(2).
            _ => Err(Errno::NOSYS),
        }
    }

    /// Opens a file in a folder by its name, without reading it.
    pub fn find(&self, folder: &Inode, name: impl rustix::path::Arg) -> Result<(Inode, Statx), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat2(&folder.fd, name, flags, Mode::empty(), RESOLVE)?;
        let stat = attributes(&fd)?;
        Ok((Inode::new(fd, &stat), stat))
    }

    /// Looks up a file in a folder by its name for the guest: its ID, and its attributes. One that the guest knows is not opened again.
    pub fn identify(&self, folder: &Inode, name: &CStr) -> Result<(u64, Statx), Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = statx(&folder.fd, name, flags, ATTRIBUTES)?;
        if let Some(id) = self.server.inodes.look_up_known(&stat) {
            return Ok((id, stat));
        }
        let (inode, stat) = self.find(folder, name)?;
        Ok((self.server.inodes.look_up(inode, &stat)?, stat))
    }

    /// Opens a file of a folder, which may be created, by its name.
    pub fn open_in(
        &self,
        folder: &Inode,
        name: impl rustix::path::Arg,
        flags: OFlags,
        mode: Mode,
    ) -> Result<std::fs::File, Errno> {
        let resolve = RESOLVE | ResolveFlags::NO_SYMLINKS;
        openat2(&folder.fd, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode, resolve).map(Into::into)
    }

    /// Opens an inode that has a descriptor already.
    pub fn open_inode(&self, inode: &Inode, flags: OFlags) -> Result<std::fs::File, Errno> {
        openat(CWD, inode.path(), flags | OFlags::CLOEXEC, Mode::empty()).map(Into::into)
    }

    /// Does `make` as the guest's user who asks for it, so that what is made is theirs. Fails with EPERM if the host gives this
    /// user no such identity.
    ///
    /// The guest's kernel has checked the user's rights, for which it knows groups that the host does not.
    pub fn as_user<T>(&self, header: &Header, mask: u32, make: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let (uid, gid) = (header.uid, header.gid);
        let others = (uid, gid) != (0, 0);
        if others && !self.server.is_privileged {
            return Err(Errno::PERM);
        }
        let is_theirs = !others || {
            let has_changed = identity::set_fs_gid(gid) && identity::set_fs_uid(uid);
            has_changed && set_effective(CAPABILITIES - CapabilitySet::FSETID).is_ok()
        };
        let made = if is_theirs {
            umask(Mode::from_raw_mode(mask & 0o777));
            let made = make();
            umask(Mode::empty());
            made
        } else {
            Err(Errno::PERM)
        };
        if others {
            identity::set_fs_uid(0);
            identity::set_fs_gid(0);
            set_effective(CAPABILITIES)?;
        }
        made
    }

    /// Does `change` so that the kernel removes set-user-ID and set-group-ID bits, if `kills`.
    pub fn without_privilege<T>(&self, kills: bool, change: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        if !kills || !self.server.is_privileged {
            return change();
        }
        set_effective(CAPABILITIES - CapabilitySet::FSETID)?;
        let changed = change();
        set_effective(CAPABILITIES)?;
        changed
    }
}

/// Sets the capabilities that this thread uses, out of those that it has.
fn set_effective(effective: CapabilitySet) -> Result<(), Errno> {
    set_capabilities(None, CapabilitySets { effective, permitted: CAPABILITIES, inheritable: CapabilitySet::empty() })
}

/// The attributes of an open file.
pub(super) fn attributes(fd: impl AsFd) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    statx(fd, "", flags, ATTRIBUTES)
}

fn changes_something(opcode: u32) -> bool {
    matches!(
        opcode,
        opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::TMPFILE
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE
    )
}
