//! Restrictions on a machine's processes. This is the only module that creates threads: every thread of a machine has a
//! name, a signal mask and a purpose before it runs any code, and those of a monitor process have a system call filter.
//!
//! `confine.rs` takes away what a monitor process could reach by a path, a number or a privilege, `filter.rs` what it could
//! call, by the tables in `tables.rs`. `folder.rs` confines a process to a folder.

pub mod affinity;
pub mod bpf;
pub mod cgroup;
mod confine;
mod filter;
pub mod folder;
mod requests;
mod tables;
pub mod task;

use std::io;
use std::thread::{Builder, JoinHandle};

pub use confine::{Confinement, Layers, probe};
pub use filter::{confine_this_thread, enable as enable_filters};

/// The stack of a thread. With 2 MiB, Rust's default, the first access would allocate a transparent huge page for each
/// thread on hosts that use them for all memory, as Debian does: 2 MiB of memory, and the time to clear them.
const STACK_BYTES: usize = 512 << 10;

/// The kinds of threads of confined processes: of monitors, and of those that read foreign data for another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadRole {
    /// The first one: the supervisor's calls and the machine's end.
    Main,
    /// Loads the kernel.
    Loader,
    /// Runs a vCPU.
    Vcpu,
    /// Serves queues of a device.
    Worker,
    /// Writes the serial port's output.
    Console,
    /// All threads of a process that unpacks an image.
    Unpacker,
    /// All threads of a process that downloads one.
    Downloader,
    /// All threads of a process that serves a folder of the host.
    Share,
}

impl ThreadRole {
    /// Whether the thread may use the host's network.
    fn uses_network(self) -> bool {
        self == ThreadRole::Downloader
    }
}

/// Starts a thread named `name` (the kernel keeps 15 bytes).
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

/// Like [`spawn`], for a thread of a monitor process, where its first act is to install the filter for its `role`.
pub fn spawn_confined<T, F>(role: ThreadRole, name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    spawn(name, move || {
        confine_this_thread(role);
        body()
    })
}
