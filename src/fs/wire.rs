//! The messages of FUSE (linux/fuse.h, version 7.38): reads the fields of requests, and builds replies.
//!
//! ```text
//! bytes of the guest ─ Request::parse ─> Header, Fields ─ ops ─> Reply ─> bytes
//! ```
//!
//! Every field is read with a check of its bounds; a request that ends too early is invalid (EINVAL).

use std::ffi::CStr;

use rustix::fs::Statx;
use rustix::io::Errno;

/// The size of a request's header (`struct fuse_in_header`).
pub const IN_HEADER_BYTES: usize = 40;
/// The size of a reply's header (`struct fuse_out_header`).
pub const OUT_HEADER_BYTES: usize = 16;
/// The size of the header and the arguments of a write, which its data follows.
pub const WRITE_HEADER_BYTES: usize = IN_HEADER_BYTES + 40;
/// The version of the protocol.
pub const MAJOR: u32 = 7;
/// See [`MAJOR`].
pub const MINOR: u32 = 38;
/// The oldest minor version with the messages that are used (Linux 4.20).
pub const MINOR_MIN: u32 = 28;
/// The inode of the root.
pub const ROOT_ID: u64 = 1;
/// The longest name of a file.
pub const NAME_BYTES_MAX: usize = 255;

/// What a request asks for.
pub mod opcode {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// What kernel and server can do, from INIT (FUSE_ASYNC_READ and so on).
pub mod feature {
    #![allow(missing_docs)]
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// How an open file is used (FOPEN_DIRECT_IO and so on).
pub mod open_flag {
    #![allow(missing_docs)]
    pub const DIRECT_IO: u32 = 1;
    pub const KEEP_CACHE: u32 = 2;
    pub const CACHE_DIR: u32 = 8;
    pub const NOFLUSH: u32 = 32;
}

/// The fields of SETATTR that are set (FATTR_MODE and so on).
pub mod set {
    #![allow(missing_docs)]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// FUSE_GETATTR_FH: the attributes are those of an open file.
pub const GETATTR_FH: u32 = 1;
/// FUSE_WRITE_CACHE: pages of the guest's cache, whatever the handle was opened for.
pub const WRITE_CACHE: u32 = 1;
/// FUSE_WRITE_KILL_SUIDGID: the writer may not keep the file's set-user-ID bit.
pub const WRITE_KILL_SUIDGID: u32 = 4;
/// FUSE_OPEN_KILL_SUIDGID: the same for a file that is truncated when it is opened.
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// FUSE_FSYNC_FDATASYNC.
pub const FSYNC_DATA: u32 = 1;

/// A request without its arguments (`struct fuse_in_header`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The length of the whole request.
    pub len_bytes: u32,
    /// What it asks for ([`opcode`]).
    pub opcode: u32,
    /// Identifies it.
    pub unique: u64,
    /// The inode.
    pub node: u64,
    /// The user who asks, in the guest.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Header {
    /// Reads it from the start of a request.
    pub fn parse(bytes: &[u8]) -> Option<Header> {
        let mut fields = Fields(bytes);
        let (len_bytes, opcode) = (fields.u32().ok()?, fields.u32().ok()?);
        let (unique, node) = (fields.u64().ok()?, fields.u64().ok()?);
        let (uid, gid) = (fields.u32().ok()?, fields.u32().ok()?);
        let (_pid, _extensions) = (fields.u32().ok()?, fields.u32().ok()?);
        Some(Header { len_bytes, opcode, unique, node, uid, gid })
    }
}

/// The arguments of a request that are not read yet.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (first, rest) = self.0.split_first_chunk::<N>().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*first)
    }

    /// The next number.
    pub fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    /// The next number.
    pub fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    /// The next text, up to its NUL.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.count_bytes() + 1..).unwrap_or_default();
        Ok(text)
    }

    /// The next name of a file in a folder: a single component, which is neither `.` nor `..`.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_BYTES_MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }

    /// The next `count` bytes.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// How long the guest's kernel may use what it has been told, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Validity {
    /// Names.
    pub entries: u64,
    /// Attributes.
    pub attributes: u64,
}

/// A reply's body under construction.
#[derive(Debug, Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    /// Adds a number.
    pub fn u32(&mut self, value: u32) -> &mut Body {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Adds a number.
    pub fn u64(&mut self, value: u64) -> &mut Body {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Adds `struct fuse_attr`.
    pub fn attributes(&mut self, stat: &Statx) -> &mut Body {
        self.u64(stat.stx_ino).u64(stat.stx_size).u64(stat.stx_blocks);
        for time in [stat.stx_atime, stat.stx_mtime, stat.stx_ctime] {
            self.u64(time.tv_sec as u64);
        }
        for time in [stat.stx_atime, stat.stx_mtime, stat.stx_ctime] {
            self.u32(time.tv_nsec);
        }
        self.u32(stat.stx_mode.into()).u32(stat.stx_nlink).u32(stat.stx_uid).u32(stat.stx_gid);
        self.u32(device(stat.stx_rdev_major, stat.stx_rdev_minor)).u32(stat.stx_blksize).u32(0)
    }

    /// Adds `struct fuse_attr_out`.
    pub fn attributes_out(&mut self, stat: &Statx, valid: Validity) -> &mut Body {
        self.u64(valid.attributes).u64(0).attributes(stat)
    }

    /// Adds `struct fuse_entry_out`.
    pub fn entry(&mut self, node: u64, stat: &Statx, valid: Validity) -> &mut Body {
        self.u64(node).u64(0).u64(valid.entries).u64(valid.attributes).u64(0).attributes(stat)
    }

    /// Adds `struct fuse_entry_out` of a file that was not looked up.
    pub fn no_entry(&mut self) -> &mut Body {
        self.0.resize(self.0.len() + ENTRY_BYTES, 0);
        self
    }

    /// Adds `struct fuse_entry_out` that says that there is no such file, and for how long that holds.
    pub fn absent(&mut self, valid: Validity) -> &mut Body {
        let end = self.0.len() + ENTRY_BYTES;
        self.u64(0).u64(0).u64(valid.entries).0.resize(end, 0);
        self
    }

    /// Adds `struct fuse_dirent`.
    pub fn dirent(&mut self, inode: u64, next: u64, kind: u32, name: &[u8]) -> &mut Body {
        self.u64(inode).u64(next).u32(name.len() as u32).u32(kind);
        self.0.extend_from_slice(name);
        self.0.resize(self.0.len() + padding(name), 0);
        self
    }

    /// Adds `struct fuse_open_out`.
    pub fn open(&mut self, handle: u64, flags: u32) -> &mut Body {
        self.u64(handle).u32(flags).u32(0)
    }
}

/// The size of `struct fuse_entry_out`.
pub const ENTRY_BYTES: usize = 128;

/// The size of `struct fuse_dirent` with a name.
pub fn dirent_bytes(name: &[u8]) -> usize {
    24 + name.len() + padding(name)
}

fn padding(name: &[u8]) -> usize {
    name.len().next_multiple_of(8) - name.len()
}

/// A device number as the kernel encodes it (`new_encode_dev`).
fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The header of a reply with a body of `body_bytes`, or an error.
pub fn reply_header(unique: u64, result: Result<usize, Errno>) -> [u8; OUT_HEADER_BYTES] {
    let (body_bytes, error) = result.map_or_else(|error| (0, -error.raw_os_error()), |body_bytes| (body_bytes, 0));
    let mut header = [0; OUT_HEADER_BYTES];
    let fields =
        u128::from((OUT_HEADER_BYTES + body_bytes) as u32) | u128::from(error as u32) << 32 | u128::from(unique) << 64;
    header.copy_from_slice(&fields.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_single_component() {
        let name = |bytes: &'static [u8]| Fields(bytes).name().map(CStr::to_bytes);
        assert_eq!(name(b"a b\xff\0rest"), Ok(&b"a b\xff"[..]));
        assert_eq!(name(b"...\0"), Ok(&b"..."[..]));
        for wrong in [&b""[..], b"\0", b".\0", b"..\0", b"/\0", b"a/b\0", b"../a\0", b"/etc\0", b"endless"] {
            assert_eq!(Fields(wrong).name(), Err(Errno::INVAL), "{wrong:?}");
        }
        let long = [[b'a'; 256].as_slice(), b"\0"].concat();
        assert_eq!(Fields(&long).name(), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn fields_end_with_the_request() {
        let mut fields = Fields(&[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!((fields.u32(), fields.u64(), fields.u32()), (Ok(1), Ok(2), Err(Errno::INVAL)));
        assert_eq!((fields.bytes(2), fields.bytes(1)), (Err(Errno::INVAL), Ok(&[3][..])));
        assert_eq!(Header::parse(&[0; 39]), None);
    }

    #[test]
    fn structures_have_the_sizes_of_the_kernels() {
        let stat = super::super::worker::attributes(std::fs::File::open(".").unwrap()).unwrap();
        let valid = Validity { entries: 1, attributes: 1 };
        let len = |add: &dyn for<'a> Fn(&'a mut Body) -> &'a mut Body| add(&mut Body::default()).0.len();
        assert_eq!(len(&|body| body.attributes(&stat)), 88);
        assert_eq!(len(&|body| body.attributes_out(&stat, valid)), 104);
        assert_eq!(len(&|body| body.entry(1, &stat, valid)), ENTRY_BYTES);
        assert_eq!(len(&|body| body.no_entry()), ENTRY_BYTES);
        assert_eq!(len(&|body| body.absent(valid)), ENTRY_BYTES);
        assert_eq!(len(&|body| body.open(1, 0)), 16);
        for name in [&b"a"[..], b"12345678", b"123456789"] {
            assert_eq!(len(&|body| body.dirent(1, 2, 4, name)), dirent_bytes(name));
            assert_eq!(dirent_bytes(name) % 8, 0);
        }
        assert_eq!(reply_header(7, Err(Errno::NOENT)), [16, 0, 0, 0, 254, 255, 255, 255, 7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(reply_header(7, Ok(4))[..8], [20, 0, 0, 0, 0, 0, 0, 0]);
    }
}
