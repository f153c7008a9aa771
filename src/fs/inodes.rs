//! The inodes that the guest's kernel knows, each with a descriptor (O_PATH) by which all calls reach it.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::wire::ROOT_ID;

/// A file of any type. It stays the same file when its name changes.
#[derive(Debug)]
pub struct Inode {
    /// Opened with O_PATH.
    pub fd: OwnedFd,
    /// Its type, which never changes.
    pub kind: FileType,
    /// When it had last changed at its last opening, in nanoseconds since 1970; [`NEVER`] if it was not opened, or was changing.
    opened_as_of: AtomicI64,
}

const NEVER: i64 = i64::MIN;
/// A file that was changed so recently may change again without another time of change, which is that of the kernel's last tick.
const SETTLED_AFTER: Duration = Duration::from_millis(100);
/// The same where the file system may keep whole seconds, or every other one.
const SETTLED_AFTER_COARSE: Duration = Duration::from_secs(3);

impl Inode {
    /// An inode with this descriptor and these attributes.
    pub fn new(fd: OwnedFd, stat: &Statx) -> Inode {
        Inode { fd, kind: FileType::from_raw_mode(stat.stx_mode.into()), opened_as_of: AtomicI64::new(NEVER) }
    }

    /// Notes that the guest opens the file, which has the attributes `stat`. Returns whether it is as it was at the last time, so that
    /// what the guest has read since is still right.
    pub fn is_as_last_opened(&self, stat: &Statx) -> bool {
        let changed = stat.stx_ctime.tv_sec.saturating_mul(1_000_000_000).saturating_add(stat.stx_ctime.tv_nsec.into());
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let after = if stat.stx_ctime.tv_nsec == 0 { SETTLED_AFTER_COARSE } else { SETTLED_AFTER };
        let settled = i64::try_from(now.saturating_sub(after).as_nanos()).unwrap_or(NEVER);
        let as_of = if changed < settled { changed } else { NEVER };
        self.opened_as_of.swap(as_of, Ordering::AcqRel) == as_of && as_of != NEVER
    }

    /// Its path in the folder of descriptors: see [`super::worker`].
    pub fn path(&self) -> String {
        self.fd.as_raw_fd().to_string()
    }
}

/// Identifies a file of the host. As long as a descriptor refers to it, no other file has its number; one that has it later was born
/// at another time.
type Key = (u32, u32, u64, u64, (i64, u32));

fn key(stat: &Statx) -> Key {
    let born = (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec);
    (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino, stat.stx_mnt_id, born)
}

struct Known {
    inode: Arc<Inode>,
    key: Key,
    /// How often the kernel was told of it and has not forgotten it.
    lookups: u64,
}

/// An inode that a guest knows from before.
pub struct Restored {
    /// Its ID.
    pub id: u64,
    /// How often the kernel was told of it.
    pub lookups: u64,
    /// The inode.
    pub inode: Inode,
    /// Its attributes.
    pub stat: Statx,
}

struct Tables {
    by_id: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    /// Never used twice, so that one that was forgotten is never another file.
    next_id: u64,
}

/// All inodes by their IDs. Any thread.
pub struct Inodes {
    root: Arc<Inode>,
    tables: Mutex<Tables>,
    count_max: usize,
}

impl Inodes {
    /// A table with the root, and room for `count_max` others.
    pub fn new(root: Inode, count_max: usize) -> Inodes {
        let tables = Tables { by_id: HashMap::new(), by_key: HashMap::new(), next_id: ROOT_ID + 1 };
        Inodes { root: Arc::new(root), tables: Mutex::new(tables), count_max }
    }

    /// The inode with this ID. Fails with ESTALE if there is none.
    pub fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        if id == ROOT_ID {
            return Ok(self.root.clone());
        }
        self.lock().by_id.get(&id).map(|known| known.inode.clone()).ok_or(Errno::STALE)
    }

    /// Counts a lookup of a file, and returns its ID. Fails with ENFILE if there are too many.
    pub fn look_up(&self, inode: Inode, stat: &Statx) -> Result<u64, Errno> {
        let mut tables = self.lock();
        let Tables { by_id, by_key, next_id } = &mut *tables;
        let is_full = by_id.len() >= self.count_max;
        let key = key(stat);
        match by_key.entry(key) {
            Place::Occupied(place) => {
                let id = *place.get();
                let known = by_id.get_mut(&id).ok_or(Errno::STALE)?;
                known.lookups += 1;
                Ok(id)
            }
            Place::Vacant(_) if is_full => Err(Errno::NFILE),
            Place::Vacant(place) => {
                let id = *next_id;
                *next_id += 1;
                place.insert(id);
                by_id.insert(id, Known { inode: Arc::new(inode), key, lookups: 1 });
                Ok(id)
            }
        }
    }

    /// Counts a lookup of a file that is known, and returns its ID. `None` if it is not known.
    pub fn look_up_known(&self, stat: &Statx) -> Option<u64> {
        let mut tables = self.lock();
        let id = *tables.by_key.get(&key(stat))?;
        tables.by_id.get_mut(&id)?.lookups += 1;
        Some(id)
    }

    /// Takes back lookups. An inode without any is closed when no call uses it any more.
    pub fn forget(&self, id: u64, lookups: u64) {
        let mut tables = self.lock();
        let Some(known) = tables.by_id.get_mut(&id) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0
            && let Some(known) = tables.by_id.remove(&id)
        {
            tables.by_key.remove(&known.key);
            drop(tables);
            drop(known);
        }
    }

    /// All inodes but the root, with their IDs and lookups, and the ID of the next one.
    pub fn all(&self) -> (Vec<(u64, u64, Arc<Inode>)>, u64) {
        let tables = self.lock();
        let known = |(id, known): (&u64, &Known)| (*id, known.lookups, known.inode.clone());
        (tables.by_id.iter().map(known).collect(), tables.next_id)
    }

    /// Fills a table that knows only the root, with what [`Inodes::all`] has returned of another one.
    pub fn restore(&self, next_id: u64, inodes: Vec<Restored>) {
        let mut tables = self.lock();
        tables.next_id = next_id;
        for Restored { id, lookups, inode, stat } in inodes {
            let key = key(&stat);
            tables.by_key.insert(key, id);
            tables.by_id.insert(id, Known { inode: Arc::new(inode), key, lookups });
        }
    }

    /// How many there can be.
    pub fn count_max(&self) -> usize {
        self.count_max
    }

    /// Forgets all inodes but the root.
    pub fn clear(&self) {
        let mut tables = self.lock();
        let forgotten = (std::mem::take(&mut tables.by_id), std::mem::take(&mut tables.by_key));
        drop(tables);
        drop(forgotten);
    }

    /// The number of inodes besides the root.
    pub fn count(&self) -> usize {
        self.lock().by_id.len()
    }

    /// Whether so many are known that no others should be looked up in advance.
    pub fn is_half_full(&self) -> bool {
        self.count() >= self.count_max / 2
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
