//! Warm machines for containers: snapshots of machines that wait for a container, which any container starts from whose machine would boot in
//! the same way. Its files, network addresses and process come when it begins.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use husk_protocol::{Container, Process};

use super::machine::Shape;
use crate::config::{Attachment, MachineConfig, NetworkConfig};
use crate::guest::GuestSpec;
use crate::guest::network::{InterfaceSetup, NetworkSetup};
use crate::resources::guest_kernel::GuestKernel;
use crate::resources::{data_dir, net};
use crate::snapshot::{Snapshot, warm};
use crate::sys::namespaces::is_hosts_root;

/// Where root's are: engines give a runtime no home directory.
const SYSTEM_DATA: &str = "/var/lib/husk";
/// The directory in `warm` of an image store, and of the same layout where there is none.
const DIR: &str = "warm/containers";
/// The largest packet of the devices of warm machines. A guest lowers it to that of its interface.
const MTU_BYTES_MAX: u32 = 1500;

/// The directory with warm machines: in `$HUSK_DATA`, for the host's root otherwise in /var/lib/husk, for others in their image store.
pub fn dir() -> Result<PathBuf> {
    let chosen = std::env::var_os("HUSK_DATA").is_some_and(|dir| !dir.is_empty());
    let base = if is_hosts_root() && !chosen { Some(SYSTEM_DATA.into()) } else { data_dir::find() };
    Ok(base.context("there is no place for warm machines: neither $HUSK_DATA nor $HOME is set")?.join(DIR))
}

/// What a warm machine with `interfaces` network interfaces is made of: nothing of a container. `name` is a unique name.
pub fn spec(name: &str, interfaces: usize) -> GuestSpec {
    let mut spec = GuestSpec::with_container(PathBuf::new(), Container::default(), Process::default());
    let interface = |index| {
        let mac = Some(net::mac_of(name, index));
        InterfaceSetup::from(NetworkConfig { mac, ..NetworkConfig::of(tap(index)) })
    };
    spec.connect(NetworkSetup::new((0..interfaces).map(interface).collect(), &[]));
    spec
}

/// The configuration of that machine, which boots `kernel`, with `socket` for its sessions.
pub fn config(spec: &GuestSpec, shape: &Shape, kernel: &GuestKernel, socket: &Path) -> Result<MachineConfig> {
    let config = shape.config(spec, kernel, socket)?;
    let config = MachineConfig { shares: Vec::new(), spare_slots: true, ..config };
    config.validate()?;
    Ok(config)
}

/// The device on which nobody else is, in a network namespace of its own.
fn tap(index: usize) -> Attachment {
    Attachment::Tap { name: format!("husk{index}") }
}

/// The warm machine from which one of this shape starts, whose configuration and network are these.
pub fn find(shape: &Shape, config: &MachineConfig, network: &NetworkSetup) -> Option<Snapshot> {
    let has_small_packets = network.interfaces.iter().all(|interface| interface.mtu_bytes <= Some(MTU_BYTES_MAX));
    if !shape.warm || !shape.cmdline.is_empty() || !has_small_packets {
        return None;
    }
    warm::find_in(&dir().ok()?, config)
}
