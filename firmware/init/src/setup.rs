//! Sets up the machine for a run: first what is the same for all, and then what the run's process finds in it.

use std::fs;
use std::path::Path;

use husk_protocol::{Identity, Overlay, Root, Run, Spec, Start};
use nix::unistd::sethostname;

use crate::devices;
use crate::errors::{Context, Failure};
use crate::mounts;
use crate::network::Network;
use crate::process;
use crate::report;
use crate::root::{self, Initramfs, Kept, make_dir};
use crate::sysctl;

/// A machine in its root file system that may be set up for a run.
pub struct Prepared {
    /// The file system to sync when the machine ends, if any.
    pub kept: Option<Kept>,
    network: Result<Network, Failure>,
    is_readonly: bool,
    /// Of a machine that waits for its run, which may have another writable layer.
    initramfs: Option<Initramfs>,
    /// The share that the containers of such a machine need.
    share: Option<String>,
    /// What the machine was told last; at first, nothing.
    identity: Identity,
}

impl Prepared {
    /// Prepares all that does not depend on the run.
    pub fn new(spec: &Spec) -> Result<Prepared, Failure> {
        let kept = root::mount(spec)?;
        let initramfs = matches!(spec.start, Start::Wait(_)).then(Initramfs::open).transpose()?;
        root::enter()?;
        let is_readonly = matches!(spec.root, Root::Image { overlay: Overlay::ReadOnly, .. });
        let share = match &spec.root {
            Root::Share { tag } => Some(tag.clone()),
            Root::Image { .. } | Root::Disk { .. } => None,
        };
        let (network, identity) = (prepare_network(), Identity::default());
        Ok(Prepared { kept, network, is_readonly, initramfs, share, identity })
    }

    /// Sets up a machine that has waited for its run, with the writable layer `overlay`.
    pub fn begin(&mut self, overlay: &Overlay, run: &Run) -> Result<(), Failure> {
        let initramfs = self.initramfs.take();
        let is_on_disk = matches!(overlay, Overlay::Disk(_));
        if is_on_disk || !run.shares.is_empty() || self.share.is_some() {
            devices::find_added();
        }
        self.share.take().map_or(Ok(()), |tag| root::mount_share(&tag, root::SHARE))?;
        if is_on_disk && let Some(initramfs) = initramfs {
            self.kept = initramfs.replace_layer(overlay)?;
        }
        self.is_readonly = *overlay == Overlay::ReadOnly;
        self.set_up(run)
    }

    /// Sets up what the run's process finds in the machine.
    pub fn set_up(&mut self, run: &Run) -> Result<(), Failure> {
        self.take_on(&run.identity)?;
        mounts::mount_all(run, self.is_readonly)?;
        sysctl::set_all(&run.sysctls)?;
        if run.container.is_none() {
            make_dir(process::working_dir(&run.process))?;
        }
        if self.is_readonly { root::forbid_changes() } else { Ok(()) }
    }

    /// Changes a machine that was [set up](Prepared::set_up) where `identity` differs from what it was told before. What others
    /// have changed meanwhile stays.
    pub fn change(&mut self, identity: &Identity) -> Result<(), Failure> {
        if *identity == self.identity {
            return Ok(());
        }
        if self.is_readonly {
            root::allow_changes()?;
        }
        let changed = self.take_on(identity);
        if self.is_readonly { changed.and(root::forbid_changes()) } else { changed }
    }

    /// The host name that the machine was told.
    pub fn hostname(&self) -> &str {
        &self.identity.hostname
    }

    fn take_on(&mut self, identity: &Identity) -> Result<(), Failure> {
        let earlier = std::mem::replace(&mut self.identity, identity.clone());
        if identity.hostname != earlier.hostname {
            set_hostname(&identity.hostname)?;
        }
        write_files(&earlier, identity);
        let network = match &self.network {
            Ok(network) => network,
            // Without any interface to configure, a kernel without networking is no error.
            Err(failure) if identity.interfaces.is_empty() => {
                report::say(&failure.message);
                return Ok(());
            }
            Err(failure) => return Err(failure.clone()),
        };
        identity.interfaces.iter().try_for_each(|interface| {
            let known = earlier.interfaces.iter().find(|known| known.mac == interface.device_mac);
            known.map_or_else(|| network.set_up(interface), |known| network.change(known, interface))
        })
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

fn write_files(earlier: &Identity, identity: &Identity) {
    let hostname = |identity: &Identity| {
        Some(&identity.hostname).filter(|name| !name.is_empty()).map(|name| format!("{name}\n").into_bytes())
    };
    for (name, before, after) in [
        ("hostname", hostname(earlier), hostname(identity)),
        ("hosts", earlier.hosts.clone(), identity.hosts.clone()),
        ("resolv.conf", earlier.resolv_conf.clone(), identity.resolv_conf.clone()),
    ] {
        let Some(after) = after.filter(|after| before.as_ref() != Some(after)) else { continue };
        let path = Path::new("/etc").join(name);
        let written = match before {
            None => make_dir("/etc").and_then(|()| replace(&path, &after)),
            Some(before) => substitute(&path, &before, &after),
        };
        if let Err(failure) = written {
            report::say(&failure.message);
        }
    }
}

/// A link, which would lead to another program's file, is replaced by a file.
fn replace(path: &Path, content: &[u8]) -> Result<(), Failure> {
    if path.is_symlink() {
        let _ = fs::remove_file(path);
    }
    fs::write(path, content).context(format_args!("write {}", path.display()))
}

/// Writes `after` in place of `before`, and keeps what others have added. A file in which `before` is no longer to be found is
/// theirs.
fn substitute(path: &Path, before: &[u8], after: &[u8]) -> Result<(), Failure> {
    let content = fs::read(path).context(format_args!("read {}", path.display()))?;
    let Some(at) = content.windows(before.len().max(1)).position(|bytes| bytes == before) else { return Ok(()) };
    let (front, back) = (content.get(..at).unwrap_or_default(), content.get(at + before.len()..).unwrap_or_default());
    replace(path, &[front, after, back].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_written_stays() {
        let path = std::env::temp_dir().join(format!("husk-init-hosts-{}", std::process::id()));
        let check = |content: &str, wanted: &str| {
            fs::write(&path, content).unwrap();
            substitute(&path, b"10.0.0.2\tweb\n", b"10.0.0.3\tcopy\n").unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), wanted);
        };
        check("10.0.0.2\tweb\n", "10.0.0.3\tcopy\n");
        check("::1 me\n10.0.0.2\tweb\n10.0.0.9 db\n", "::1 me\n10.0.0.3\tcopy\n10.0.0.9 db\n");
        check("10.0.0.7 web\n", "10.0.0.7 web\n");
        check("", "");
        fs::remove_file(&path).unwrap();
        assert!(substitute(&path, b"a", b"b").is_err());
    }
}
