//! Measures a process's actual use of host memory: the guest's memory, and the rest.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::{AddAssign, Range};

/// Resident memory (proc(5), smaps: Rss) and the proportional share of it (Pss), in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resident {
    /// All resident memory, shared or not.
    pub rss_bytes: u64,
    /// Each page divided by the number of processes that share it.
    pub pss_bytes: u64,
}

impl AddAssign for Resident {
    fn add_assign(&mut self, other: Resident) {
        self.rss_bytes += other.rss_bytes;
        self.pss_bytes += other.pss_bytes;
    }
}

/// A machine's use of host memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Memory that backs the guest's.
    pub guest: Resident,
    /// The rest of the process.
    pub husk: Resident,
}

impl MemoryUse {
    /// The current usage of process `pid`, split into what is at the addresses `guest` and the rest.
    ///
    /// The kernel inspects every page for this, which was measured to take 17 ms per GiB in small pages. Use it on
    /// request of a user, not in a loop.
    pub fn of(pid: u32, guest: &[Range<u64>]) -> io::Result<MemoryUse> {
        parse(BufReader::new(File::open(format!("/proc/{pid}/smaps"))?), guest)
    }
}

/// Sums up a file in the format of /proc/PID/smaps. A mapping that overlaps `guest` counts as the guest's, since the
/// kernel may have merged it with an adjacent mapping.
fn parse(smaps: impl BufRead, guest: &[Range<u64>]) -> io::Result<MemoryUse> {
    let (mut sum, mut is_guest) = (MemoryUse::default(), false);
    for line in smaps.lines() {
        let line = line?;
        if let Some(mapping) = addresses(&line) {
            is_guest = guest.iter().any(|guest| guest.start < mapping.end && mapping.start < guest.end);
            continue;
        }
        let Some((name, value)) = line.split_once(':') else { continue };
        let part = if is_guest { &mut sum.guest } else { &mut sum.husk };
        let (rss, pss) = match name {
            "Rss" => (1, 0),
            "Pss" => (0, 1),
            // Pages of the host's pool are in neither.
            "Private_Hugetlb" => (1, 1),
            _ => continue,
        };
        let kib = value.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok());
        let bytes = kib.ok_or_else(|| io::Error::other("/proc/self/smaps has sizes in an unknown format"))? << 10;
        (part.rss_bytes, part.pss_bytes) = (part.rss_bytes + rss * bytes, part.pss_bytes + pss * bytes);
    }
    Ok(sum)
}

/// The address range of a mapping, if the line starts one: `START-END PERMISSIONS ...`.
fn addresses(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

    use super::*;
    use crate::memory;

    #[test]
    fn mappings_are_distinguished_by_address() {
        let text = "55d0-55e0 r-xp 00000000 fe:00 123  /usr/bin/husk\n\
                    Size: 64 kB\nRss:                   8 kB\nPss:    4 kB\nPss_Dirty: 1000 kB\nVmFlags: rd ex\n\
                    7f00-7f80 rw-p 00000000 00:00 0 \nRss: 100 kB\nPss: 100 kB\nPrivate_Hugetlb: 0 kB\n\
                    7f80-7f90 rw-p 00000000 00:00 0 \nRss: 0 kB\nPss: 0 kB\nPrivate_Hugetlb: 8 kB\n\
                    7f90-7fa0 rw-p 00000000 00:00 0 [heap]\nRss: 2 kB\nPss: 1 kB\n";
        let found = parse(text.as_bytes(), &[0x7f10..0x7f90, 0x9000..0x9001]).unwrap();
        let resident = |rss: u64, pss: u64| Resident { rss_bytes: rss << 10, pss_bytes: pss << 10 };
        assert_eq!(found, MemoryUse { guest: resident(108, 108), husk: resident(10, 5) });
        assert!(parse("1-2 rw-p\nRss: much\n".as_bytes(), &[]).is_err());
    }

    #[test]
    fn touched_guest_memory_counts_as_the_guests() {
        const PAGES: u64 = 4096;
        let guest = memory::reserve(64).unwrap();
        let region = guest.iter().next().unwrap();
        let start = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
        let range = start..start + region.len();
        let used = || MemoryUse::of(std::process::id(), std::slice::from_ref(&range)).unwrap();
        let before = used();
        for page in 0..PAGES {
            guest.write_obj(1_u8, GuestAddress(page * 4096)).unwrap();
        }
        let after = used();
        let more_bytes = after.guest.rss_bytes - before.guest.rss_bytes;
        // Adjacent mappings may be counted as well, and other tests use those.
        assert!((PAGES * 4096..PAGES * 4096 + (16 << 20)).contains(&more_bytes), "{more_bytes}");
        assert!(after.husk.rss_bytes > 0 && after.husk.pss_bytes <= after.husk.rss_bytes);
    }
}
