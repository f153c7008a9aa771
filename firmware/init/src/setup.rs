//! Sets up the machine for a run: first what is the same for all, and then what the run's process finds in it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use husk_protocol::{Overlay, Root, Run, Spec};
use nix::mount::MsFlags;
use nix::unistd::sethostname;

use crate::errors::{Context, Failure};
use crate::network::Network;
use crate::process;
use crate::report;
use crate::root::{self, Kept, make_dir, mount_at};

/// A machine in its root file system that may be set up for a run.
pub struct Prepared {
    /// The file system to sync when the machine ends, if any.
    pub kept: Option<Kept>,
    network: Result<Network, Failure>,
    is_readonly: bool,
}

impl Prepared {
    /// Prepares all that does not depend on the run.
    pub fn new(spec: &Spec) -> Result<Prepared, Failure> {
        let kept = root::mount(spec)?;
        root::enter()?;
        let is_readonly = matches!(spec.root, Root::Image { overlay: Overlay::ReadOnly, .. });
        Ok(Prepared { kept, network: prepare_network(), is_readonly })
    }

    /// Sets up what the run's process finds in the machine.
    pub fn set_up(&self, run: &Run) -> Result<(), Failure> {
        set_hostname(&run.hostname)?;
        match &self.network {
            Ok(network) => run.interfaces.iter().try_for_each(|interface| network.set_up(interface))?,
            // Without any interface to configure, a kernel without networking is no error.
            Err(failure) if run.interfaces.is_empty() => report::say(&failure.message),
            Err(failure) => return Err(failure.clone()),
        }
        write_files(run);
        for tmpfs in &run.tmpfs {
            let path = String::from_utf8_lossy(&tmpfs.path).into_owned();
            make_dir(&path)?;
            mount_at("tmpfs", &path, MsFlags::from_bits_truncate(tmpfs.flags), &tmpfs.options)?;
        }
        make_dir(process::working_dir(&run.process))?;
        if self.is_readonly { root::forbid_changes() } else { Ok(()) }
    }
}

/// Sets the host name, unless it is empty.
pub fn set_hostname(hostname: &str) -> Result<(), Failure> {
    if hostname.is_empty() {
        return Ok(());
    }
    sethostname(hostname).context(format_args!("set the host name {hostname:?}"))
}

/// The network of a container without its interfaces: the loopback interface, and unprivileged ports and pings.
fn prepare_network() -> Result<Network, Failure> {
    let network = Network::open()?;
    network.bring_loopback_up()?;
    let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    Ok(network)
}

fn write_files(run: &Run) {
    let hostname = format!("{}\n", run.hostname).into_bytes();
    for (name, content) in
        [("hostname", Some(&hostname)), ("hosts", run.hosts.as_ref()), ("resolv.conf", run.resolv_conf.as_ref())]
    {
        let Some(content) = content else { continue };
        let path = PathBuf::from("/etc").join(name);
        if let Err(failure) = make_dir("/etc").and_then(|()| replace(&path, content)) {
            report::say(&failure.message);
        }
    }
}

/// A link, which would lead to another program's file, is replaced by a file.
fn replace(path: &Path, content: &[u8]) -> Result<(), Failure> {
    if path.is_symlink() {
        let _ = fs::remove_file(path);
    }
    File::create(path).and_then(|mut file| file.write_all(content)).context(format_args!("write {}", path.display()))
}
