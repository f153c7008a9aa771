//! How the bench reaches what listens in an instance.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Ground, Job, Unable, is_root, program};
use crate::resources::programs;

/// A port that is the host's own, or leads on from it.
pub fn on_loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// A network namespace for one instance, and its link to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The namespace.
    name: String,
    /// The host's end.
    interface: String,
    /// The host's address and the instance's.
    addresses: (Ipv4Addr, Ipv4Addr),
}

impl Link {
    /// What an instance's link is called, and its addresses: of those that are set aside for benchmarks (RFC 2544).
    fn of(ground_id: &str, instance: u32) -> Link {
        // Four addresses each, so that instances that run at the same time share none.
        let first = u32::from(Ipv4Addr::new(198, 18, 0, 0)) | (instance & 0x7fff) << 2;
        let random = ground_id.rsplit('-').next().unwrap_or_default();
        Link {
            name: format!("{ground_id}-{instance}"),
            // The kernel takes 15 bytes.
            interface: format!("hb{random}-{:x}", instance & 0xfffff),
            addresses: (Ipv4Addr::from(first | 1), Ipv4Addr::from(first | 2)),
        }
    }

    /// Makes the link for a job with a port. Only root may.
    pub fn make(ground: &Ground, job: &Job) -> Result<Option<Link>> {
        if job.port.is_none() {
            return Ok(None);
        }
        if !is_root() {
            return Err(Unable("only root can link a container's network to the host's".into()).into());
        }
        if !program::which("ip") {
            return Err(Unable("there is no program ip: type `sudo apt-get install iproute2`".into()).into());
        }
        let link = Link::of(&ground.id(), job.instance);
        link.set_up().inspect_err(|_| drop(link.remove())).context("link a container's network to the host's")?;
        Ok(Some(link))
    }

    fn set_up(&self) -> Result<()> {
        let Link { name, interface, addresses: (ours, its) } = self;
        let (ours, its) = (format!("{ours}/30"), format!("{its}/30"));
        for line in [
            &["netns", "add", name] as &[&str],
            &["link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", name],
            &["addr", "add", &ours, "dev", interface],
            &["link", "set", interface, "up"],
            &["-n", name, "addr", "add", &its, "dev", "eth0"],
            &["-n", name, "link", "set", "eth0", "up"],
            &["-n", name, "link", "set", "lo", "up"],
        ] {
            programs::run("ip", line)?;
        }
        Ok(())
    }

    /// The namespace's file.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Where the instance's port is.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.addresses.1, port))
    }

    /// Takes it away, both ends.
    pub fn remove(&self) -> Result<()> {
        // The namespace lives on as long as there is a process in it; its end of the link goes with ours.
        let _ = programs::run("ip", &["link", "delete", &self.interface]);
        programs::run("ip", &["netns", "delete", &self.name])
    }
}

/// Removes the links of a killed bench.
pub fn remove_left_behind(folder: &Path) {
    let id = folder.file_name().unwrap_or_default().to_string_lossy();
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
    for name in entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()) {
        let instance = name.strip_prefix(&*id).and_then(|rest| rest.strip_prefix('-')?.parse().ok());
        if let Some(instance) = instance
            && let Err(error) = Link::of(&id, instance).remove()
        {
            log::warn!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_instances_are_apart() {
        let link = |instance| Link::of("husk-bench-0a1b2c", instance);
        assert_eq!(link(0).addresses, (Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 18, 0, 2)));
        assert_eq!(link(64).addresses, (Ipv4Addr::new(198, 18, 1, 1), Ipv4Addr::new(198, 18, 1, 2)));
        assert_eq!(link(0x7fff).addresses.1, Ipv4Addr::new(198, 19, 255, 254));
        assert_eq!(link(7).path(), Path::new("/run/netns/husk-bench-0a1b2c-7"));
        assert!(link(u32::MAX).interface.len() <= 15);
        assert_ne!(link(1).interface, link(2).interface);
    }
}
