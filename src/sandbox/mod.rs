//! What a machine's process may do and use. The only creator of threads: every thread of a machine has a name, a signal mask and a purpose before its first line runs.

pub mod affinity;
pub mod cgroup;

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts a thread of the machine, named `name` (15 bytes are kept by the kernel).
///
/// The thread inherits the caller's signal mask. The caller joins it: no thread is left detached.
pub fn spawn<T, F>(name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    Builder::new().name(name.to_owned()).spawn(body)
}
