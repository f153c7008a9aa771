//! What a machine's process may do and use. The only creator of threads: every thread of a machine has a name, a signal mask and a purpose before its first line runs.

pub mod affinity;
pub mod cgroup;

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread of the machine, named `name` (15 bytes are kept by the kernel).
///
/// The thread inherits the caller's signal mask. The caller joins it, unless it writes to or reads from somebody who may never
/// answer: such a thread is asked to end, and goes with the process at the latest.
pub fn spawn<T, F>(name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    Builder::new().name(name.to_owned()).spawn(body)
}
