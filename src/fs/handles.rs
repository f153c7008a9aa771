//! The files and folders that the guest has opened.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

/// An open file or folder.
#[derive(Debug)]
pub struct Handle {
    /// The file.
    pub file: File,
    /// Whether writes append (O_APPEND). The file itself is opened without it, since pages of the guest's cache have their
    /// places.
    pub appends: bool,
    /// Held while a folder is read, which moves its position.
    pub reading: Mutex<()>,
}

impl Handle {
    /// An open file.
    pub fn new(file: File, appends: bool) -> Handle {
        Handle { file, appends, reading: Mutex::new(()) }
    }
}

#[derive(Default)]
struct Table {
    by_id: HashMap<u64, Arc<Handle>>,
    next_id: u64,
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
        table.next_id += 1;
        let id = table.next_id;
        table.by_id.insert(id, Arc::new(handle));
        Ok(id)
    }

    /// The handle with this ID. Fails with EBADF if there is none.
    pub fn get(&self, id: u64) -> Result<Arc<Handle>, Errno> {
        self.lock().by_id.get(&id).cloned().ok_or(Errno::BADF)
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
