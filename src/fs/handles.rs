//! The files and folders that the guest has opened.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use rustix::io::Errno;

/// An open file or folder.
#[derive(Debug)]
pub struct Handle {
    /// The file.
    pub file: File,
    /// As the guest has opened it. With O_APPEND the file itself is opened without that, since pages of the guest's cache have
    /// their places.
    pub flags: OFlags,
    /// Held while a folder is read, which moves its position.
    pub reading: Mutex<()>,
}

impl Handle {
    /// An open file.
    pub fn new(file: File, flags: OFlags) -> Handle {
        Handle { file, flags, reading: Mutex::new(()) }
    }

    /// Whether writes append.
    pub fn appends(&self) -> bool {
        self.flags.contains(OFlags::APPEND)
    }
}

#[derive(Default)]
struct Table {
    by_id: HashMap<u64, Arc<Handle>>,
    last_id: u64,
    /// Those up to this one are of the server of a machine that was saved.
    restored_id: u64,
}

/// All handles by their IDs, which are never used twice. Any thread.
pub struct Handles {
    table: Mutex<Table>,
    count_max: usize,
}

impl Handles {
    /// An empty table with room for `count_max`.
    pub fn new(count_max: usize) -> Handles {
        Handles { table: Mutex::default(), count_max }
    }

    /// Adds a handle and returns its ID. Fails with ENFILE if there are too many.
    pub fn insert(&self, handle: Handle) -> Result<u64, Errno> {
        let mut table = self.lock();
        if table.by_id.len() >= self.count_max {
            return Err(Errno::NFILE);
        }
        table.last_id += 1;
        let id = table.last_id;
        table.by_id.insert(id, Arc::new(handle));
        Ok(id)
    }

    /// The handle with this ID. Fails with EBADF if there is none, and with ESTALE if its file was not found again.
    pub fn get(&self, id: u64) -> Result<Arc<Handle>, Errno> {
        let table = self.lock();
        let missing = if (1..=table.restored_id).contains(&id) { Errno::STALE } else { Errno::BADF };
        table.by_id.get(&id).cloned().ok_or(missing)
    }

    /// All handles with their IDs, and the last ID.
    pub fn all(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let table = self.lock();
        (table.by_id.iter().map(|(id, handle)| (*id, handle.clone())).collect(), table.last_id)
    }

    /// Fills an empty table with what [`Handles::all`] has returned of another one.
    pub fn restore(&self, last_id: u64, handles: Vec<(u64, Arc<Handle>)>) {
        *self.lock() = Table { by_id: handles.into_iter().collect(), last_id, restored_id: last_id };
    }

    /// How many there can be.
    pub fn count_max(&self) -> usize {
        self.count_max
    }

    /// Removes a handle. Its file is closed when no call uses it any more.
    pub fn remove(&self, id: u64) -> Result<(), Errno> {
        let removed = self.lock().by_id.remove(&id);
        removed.map(drop).ok_or(Errno::BADF)
    }

    /// Removes all handles.
    pub fn clear(&self) {
        let removed = std::mem::take(&mut self.lock().by_id);
        drop(removed);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
