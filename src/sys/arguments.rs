//! Overwrites this process's visible arguments, /proc/PID/cmdline.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, ErrorKind};
use std::ptr;

/// Overwrites the ends of arguments with `*`. Each is given by its index, where 0 is the program's name, and a byte
/// offset. Must be called while there is only one thread. Fails without any change if the kernel does not provide their
/// addresses.
pub fn cover(from: &[(usize, usize)]) -> io::Result<()> {
    if from.is_empty() {
        return Ok(());
    }
    let start = start()?;
    let mut at = 0;
    for (number, argument) in fs::read("/proc/self/cmdline")?.split(|&byte| byte == 0).enumerate() {
        for &(_, begin) in from.iter().filter(|(covered, _)| *covered == number) {
            for byte in begin..argument.len() {
                // SAFETY: the kernel has just read this byte of an argument at this address, in memory that stays
                // mapped and writable for the lifetime of the process. Only the standard library accesses it, to copy
                // the arguments when they are requested, and there is no other thread that could do so now.
                unsafe { ptr::with_exposed_provenance_mut::<u8>(start + at + byte).write_volatile(b'*') };
            }
        }
        at += argument.len() + 1;
    }
    Ok(())
}

/// Overwrites this process's environment variables. Must be called while there is only one thread, which does not use them
/// later.
pub fn forget_environment() {
    unsafe extern "C" {
        /// environ(7).
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: it is an array of pointers to strings that end with a NUL, and ends with a null pointer. All are in memory of
    // this process that is writable, and nothing else uses them.
    unsafe {
        let mut variable = environ;
        while !variable.is_null() && !(*variable).is_null() {
            let len = libc::strlen(*variable);
            ptr::write_bytes((*variable).cast::<u8>(), 0, len);
            variable = variable.add(1);
        }
    }
}

/// The address of the first argument (proc_pid_stat(5), `arg_start`).
fn start() -> io::Result<usize> {
    /// The index after the program's name, which is in parentheses and may contain spaces.
    const FIELD: usize = 48 - 3;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields).unwrap_or_default();
    let start = fields.split_whitespace().nth(FIELD).and_then(|field| field.parse().ok());
    start.filter(|&start| start != 0).ok_or_else(|| ErrorKind::Unsupported.into())
}
