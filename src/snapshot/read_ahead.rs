//! Reading a warm image from the disk before a machine starts from it.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZero;

use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::sys::disk;

/// Starts to read a file if it is not in the page cache, as after a reboot. Most of a warm image's memory is used, and its guest
/// would wait for one part after the other. Returns whether there is something to read; if not, this costs two system calls.
pub fn if_not_cached(file: &File) -> io::Result<bool> {
    let Some(first) = disk::next_data(file, 0)? else { return Ok(false) };
    let probe = preadv2(file, &mut [IoSliceMut::new(&mut [0])], first.start, ReadWriteFlags::NOWAIT);
    if probe != Err(Errno::AGAIN) {
        return Ok(false);
    }
    let mut next = Some(first);
    while let Some(part) = next {
        fadvise(file, part.start, NonZero::new(part.end - part.start), Advice::WillNeed)?;
        next = disk::next_data(file, part.end)?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_what_is_not_in_the_page_cache_is_read() {
        let file = tempfile::tempfile().unwrap();
        let parts = [1_u64 << 20, 8 << 20];
        for at in parts {
            file.write_all_at(&[1; 64 << 10], at).unwrap();
        }
        assert!(!if_not_cached(&file).unwrap());
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        if !if_not_cached(&file).unwrap() {
            eprintln!("SKIPPED: the file is not on a disk");
            return;
        }
        for at in parts {
            let cached = || preadv2(&file, &mut [IoSliceMut::new(&mut [0])], at, ReadWriteFlags::NOWAIT) == Ok(1);
            while !cached() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(!if_not_cached(&file).unwrap());
    }
}
