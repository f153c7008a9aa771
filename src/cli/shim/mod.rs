//! `containerd-shim-husk-v2`: husk as a shim of containerd, for its runtime `io.containerd.husk.v2` (containerd, core/runtime/v2/README.md).
//!
//! ```text
//! containerd ─ `start` ─> the address of the shim of a pod, which is started for its first container
//! containerd ─ ttrpc ─> service ─┬ runtime ─ `husk oci create, start, exec, delete, update` ─> processes ─ children ─> their ends
//!                                ├ cli::oci::operations ─> the machine: signals, pause, statistics, processes
//!                                └ events ─> containerd
//! FIFOs of containerd ─ streams ─> the processes themselves; a terminal's are copied here
//! containerd ─ `delete` ─> removes a container whose shim has been killed
//! ```

mod children;
mod events;
mod memory;
mod messages;
mod metrics;
mod place;
mod rootfs;
mod runtime;
mod service;
mod streams;
mod task;
mod ttrpc;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use prost::Message;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use self::children::Children;
use self::events::Publisher;
use self::messages::{Deleted, SERVICE, Timestamp};
use self::place::Place;
use self::runtime::Runtime;
use super::argv::SHIM_NAME;
use super::exit::Exit;
use crate::oci::state::Root;
use crate::sandbox;
use crate::sys::SignalFd;

/// Where containerd listens for events of shims.
const ADDRESS_VARIABLE: &str = "TTRPC_ADDRESS";
/// The file of a bundle with the address of its shim, from which a containerd that was restarted takes it.
const ADDRESS_FILE: &str = "address";
/// The FIFO of a bundle that containerd reads a shim's log from.
const LOG_FILE: &str = "log";
/// How long a shim that ends waits for containerd to hear of everything.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How a container has ended whose shim has been killed: as if it had been, which it is then.
const KILLED: u32 = 137;

// Flags that containerd gives every shim.
#[derive(Debug, Args)]
pub(super) struct Shim {
    #[arg(long, value_name = "NAMESPACE", default_value = "")]
    namespace: String,

    /// The container.
    #[arg(long, value_name = "ID", default_value = "")]
    id: String,

    /// containerd's own socket.
    #[arg(long, value_name = "SOCKET", default_value = "")]
    address: String,

    /// A program that publishes events, which a shim with ttRPC does not need.
    #[arg(long, value_name = "FILE", default_value = "")]
    publish_binary: String,

    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,

    #[arg(long)]
    debug: bool,

    /// Without one, it serves on the socket that is its standard input.
    action: Option<Action>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Action {
    Start,
    Delete,
}

impl Shim {
    /// How often `--verbose` is meant by `-debug`.
    pub fn verbosity(&self) -> u8 {
        2 * u8::from(self.debug)
    }

    pub fn run(self) -> Result<Exit> {
        ensure!(
            !self.namespace.is_empty() && !self.id.is_empty(),
            "{SHIM_NAME} is started by containerd: use it as the runtime io.containerd.husk.v2, such as `ctr run --runtime io.containerd.husk.v2`"
        );
        let bundle = match &self.bundle {
            Some(bundle) => bundle.clone(),
            None => std::env::current_dir().context("find the bundle, which is to be the working directory")?,
        };
        match self.action {
            Some(Action::Start) => self.start(&bundle),
            Some(Action::Delete) => self.delete(&bundle),
            None => self.serve(&bundle),
        }
    }

    /// Prints the address of the container's shim, which is started if it is not there.
    fn start(&self, bundle: &Path) -> Result<Exit> {
        events_address()?;
        let place = Place::of(bundle, &self.namespace, &self.id)?;
        if !place.is_served() {
            let listener = place.listen()?;
            let started = self.server(bundle, listener.into())?.spawn().context("start the shim");
            started.inspect_err(|_| place.leave())?;
        }
        let file = bundle.join(ADDRESS_FILE);
        fs::write(&file, place.address()).with_context(|| format!("write {}", file.display()))?;
        super::print(&place.address())?;
        Ok(Exit::Success)
    }

    fn server(&self, bundle: &Path, listener: OwnedFd) -> Result<Command> {
        // containerd opens the other end before. It may go and come again, and a shim never waits for it.
        let log = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join(LOG_FILE));
        let mut command = Command::new("/proc/self/exe");
        command.arg0(SHIM_NAME).args(["-namespace", &self.namespace, "-id", &self.id, "-address", &self.address]);
        command.args(self.debug.then_some("-debug")).arg("-bundle").arg(bundle);
        command
            .stdin(Stdio::from(listener))
            .stdout(Stdio::null())
            .stderr(log.map_or_else(|_| Stdio::null(), Stdio::from));
        Ok(command)
    }

    /// Removes what is left of a container whose shim has been killed, and prints how it has ended.
    fn delete(&self, bundle: &Path) -> Result<Exit> {
        let place = Place::of(bundle, &self.namespace, &self.id)?;
        runtime::delete(&place.root, bundle, &self.id)?;
        rootfs::unmount_all(bundle)?;
        if !place.is_served() {
            place.leave();
        }
        let deleted = Deleted { pid: 0, exit_status: KILLED, exited_at: Some(Timestamp::now()) };
        std::io::stdout().write_all(&deleted.encode_to_vec()).context("print how the container has ended")?;
        Ok(Exit::Success)
    }

    /// Serves until there is no container any more.
    fn serve(&self, bundle: &Path) -> Result<Exit> {
        // Before there are other threads. A shim ends when containerd says so.
        let ignored = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
        let signals = SignalFd::block(&[&[libc::SIGCHLD][..], &ignored].concat()).context("block signals")?;
        let listener = take_listener()?;
        rustix::process::setsid().context("leave the session")?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("PR_SET_CHILD_SUBREAPER")?;
        let place = Place::of(bundle, &self.namespace, &self.id)?;
        rustix::process::chdir("/").context("leave the bundle")?;
        let root = Root::new(Some(place.root.clone()))?;
        let events = Publisher::start(&self.namespace, events_address()?)?;
        let children = Arc::new(Children::default());
        let runtime = Runtime::new(place, children.clone());
        let shim = service::Shim::new(root, runtime, events, leave);
        let server = shim.clone();
        let handle = move |method: &str, payload: &[u8], reply| server.handle(method, payload, reply);
        sandbox::spawn("accept", move || ttrpc::serve(&listener, SERVICE, handle)).context("start a thread")?;
        loop {
            let mut fds = vec![PollFd::new(&signals, PollFlags::IN)];
            fds.extend(shim.memory().map(|memory| PollFd::new(memory, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("wait for signals"),
            }
            while signals.read().context("read a signal")?.is_some() {}
            shim.note_short_memory();
            children.reap();
        }
    }
}

fn events_address() -> Result<PathBuf> {
    let address = std::env::var_os(ADDRESS_VARIABLE).filter(|address| !address.is_empty());
    let told =
        format!("{ADDRESS_VARIABLE} is not set: {SHIM_NAME} is started by containerd (1.3 or later), which sets it");
    address.map(PathBuf::from).context(told)
}

/// The socket that is standard input, which then is empty.
fn take_listener() -> Result<UnixListener> {
    let stdin = std::io::stdin();
    let is_socket = rustix::net::sockopt::socket_acceptconn(&stdin).unwrap_or(false);
    ensure!(is_socket, "standard input is not a socket: containerd runs `{SHIM_NAME} start`");
    let listener = UnixListener::from(stdin.as_fd().try_clone_to_owned().context("duplicate a file descriptor")?);
    listener.set_nonblocking(false).context("set up the socket")?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?).context("redirect standard input")?;
    Ok(listener)
}

/// Ends the process of a shim that has no containers.
fn leave(runtime: &Runtime, events: &Publisher) -> ! {
    runtime.place.leave();
    events.flush(FLUSH_TIMEOUT);
    Exit::Success.leave()
}
