//! Those that are compared: each knows how to find itself on the host and how to start an instance.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::result::{self, Limits, Walls};

/// Where the work program stands in every contender's root.
pub const WORK: &str = "/.husk-bench/work";
/// Where an instance finds its scratch disk, when its job wants one.
pub const SCRATCH: &str = "/scratch";

/// What was prepared once, for all contenders and all jobs.
#[derive(Debug)]
pub struct Ground {
    /// The bench's own folder, on a real disk; removed at the end.
    pub folder: PathBuf,
    /// The image's root as files, with the work program in it.
    pub root: PathBuf,
    /// The same root as an EROFS disk, from `store`.
    pub disk: PathBuf,
    /// A store of husk's own (`HUSK_DATA`), in which the same root has the name `husk-bench`.
    pub store: PathBuf,
    /// husk itself.
    pub husk: PathBuf,
    /// What every instance may use.
    pub limits: Limits,
}

/// What an instance is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Program and arguments, in the root.
    pub command: Vec<String>,
    /// Whether it wants a disk of its own at [`SCRATCH`], and how large.
    pub scratch_mib: Option<u64>,
    /// Whether it listens on this TCP port, which has to be reached from here.
    pub port: Option<u16>,
    /// A number that no other instance of this bench has: for names and files.
    pub instance: u32,
}

/// An instance that is ready to be started.
pub struct Launch {
    /// Starts it, in the foreground, with its output on standard output. The instance is over when this process is.
    pub command: Command,
    /// Whether the process's exit code is the command's own. If not, the work program says its own on the console.
    pub passes_exit_code: bool,
    /// Where its port is reached, if its job has one.
    pub address: Option<std::net::SocketAddr>,
    /// Removes what the start and the run leave behind; to be called when the process is over, or did not start.
    pub clean_up: Option<Box<dyn FnOnce() -> Result<()> + Send>>,
}

/// One of those that are compared.
pub trait Contender: Send {
    /// As `--against` and the results name it.
    fn name(&self) -> &str;
    /// What separates its instances from the host.
    fn walls(&self) -> Walls;
    /// What the results say about it: version, kernel, notes, or why it is absent. Asked once, before the first run.
    fn about(&self, ground: &Ground) -> result::Contender;
    /// Makes what its instances share, once: a bundle, an image in an engine's store. `clean_up` takes it away again.
    fn prepare(&mut self, ground: &Ground) -> Result<()>;
    /// An instance for the job. Quick: what takes long belongs to `prepare`; where an instance needs files of its own (a
    /// scratch disk), they are made here, which no measure counts.
    fn launch(&self, ground: &Ground, job: &Job) -> Result<Launch>;
    /// Every process of an instance whose [`Launch::command`] has this process ID, for what it uses of memory: descendants are
    /// found by the caller; this adds those that are no descendants (of an engine's daemon).
    fn more_processes(&self, _job: &Job) -> Vec<u32> {
        Vec::new()
    }
    /// Removes what `prepare` made. To be called at the end, whatever happened.
    fn clean_up(&mut self, ground: &Ground) -> Result<()>;
}
