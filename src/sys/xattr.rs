//! Extended attributes of a file itself, without following links.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The names of a file's extended attributes (llistxattr(2)); empty if the file system does not support them.
pub fn list(path: &Path) -> io::Result<Vec<CString>> {
    let path = c_path(path)?;
    // SAFETY: the path is NUL-terminated, and the buffer has the given length.
    let call = |buffer: &mut [u8]| unsafe { libc::llistxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    match read(call) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        Err(error) => Err(error),
        Ok(names) => {
            let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
            names.map(|name| CString::new(name).map_err(io::Error::from)).collect()
        }
    }
}

/// The value of an extended attribute (lgetxattr(2)).
pub fn get(path: &Path, name: &CStr) -> io::Result<Vec<u8>> {
    let path = c_path(path)?;
    // SAFETY: path and name are NUL-terminated, and the buffer has the given length.
    read(|buffer| unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// Queries the length and then reads the data. Linux limits both to 64 KiB.
fn read(mut call: impl FnMut(&mut [u8]) -> isize) -> io::Result<Vec<u8>> {
    const MAX_BYTES: usize = 64 << 10;
    let checked = |count: isize| usize::try_from(count).map_err(|_| io::Error::last_os_error());
    if checked(call(&mut []))? == 0 {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; MAX_BYTES];
    let len = checked(call(&mut bytes))?;
    bytes.truncate(len);
    Ok(bytes)
}
