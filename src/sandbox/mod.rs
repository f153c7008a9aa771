//! Restrictions on a machine's process. This is the only module that creates threads: every thread of a machine has a
//! name, a signal mask and a purpose before it runs any code.

pub mod affinity;
pub mod cgroup;

use std::io;
use std::thread::{Builder, JoinHandle};

/// The stack of a thread. With 2 MiB, Rust's default, the first access would allocate a transparent huge page for each
/// thread on hosts that use them for all memory, as Debian does: 2 MiB of memory, and the time to clear them.
const STACK_BYTES: usize = 512 << 10;

/// Starts a thread of the machine, named `name` (the kernel keeps 15 bytes).
///
/// The thread inherits the caller's signal mask. The caller joins it, unless it reads from or writes to a process that
/// may never respond; such a thread is asked to end, and ends with the process at the latest.
pub fn spawn<T, F>(name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    Builder::new().name(name.to_owned()).stack_size(STACK_BYTES).spawn(body)
}
