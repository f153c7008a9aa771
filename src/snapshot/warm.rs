//! Warm images: snapshots of machines that wait just before their command, kept next to the image store's root file systems.
//!
//! ```text
//! warm/ROOT/KEY/    in the image store: a snapshot for machines on the root file system roots/ROOT.erofs; KEY is the digest of the configuration
//! ```
//!
//! A guest notices whatever it was booted with, so a snapshot fits only machines that would boot in exactly the same way: with
//! the same configuration as far as the guest sees it, and with the same [`Fingerprint`].

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::system::uname;
use serde::{Deserialize, Serialize};

use super::{Description, Snapshot, read_ahead};
use crate::config::{Attachment, DiskConfig, MachineConfig, NetworkConfig, Rate, Transport, UserNetwork, VsockConfig};
use crate::image::store::{self, Store};
use crate::image::{Digest, Pruned};
use crate::layout::VirtioBus;
use crate::resources::disk::stamp::Stamp;
use crate::resources::lock;
use crate::sys::processor;

const MICROCODE: &str = "/sys/devices/system/cpu/cpu0/microcode/version";
const MICROCODE_BYTES_MAX: u64 = 64;

/// What a booted guest depends on besides its configuration: a change makes warm images useless.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// This program.
    husk: Stamp,
    /// The guest's kernel.
    kernel: Stamp,
    /// The root file system, unless it is only in memory until the run begins.
    root: Option<Stamp>,
    /// Release and version of the host's kernel, with its KVM.
    host: String,
    /// The processor's identity and features, in hexadecimal.
    processor: String,
    /// The version of its microcode, if known.
    microcode: String,
    /// Names of programs that are in the machine's memory already.
    #[serde(default)]
    programs: BTreeSet<String>,
}

impl Fingerprint {
    /// The current one of a machine with this configuration, whose first disk, if it has any, is its root file system.
    pub fn of(config: &MachineConfig) -> Result<Fingerprint> {
        let host = uname();
        Ok(Fingerprint {
            husk: Stamp::of(&std::env::current_exe().context("find this program")?)?,
            kernel: Stamp::of(&config.kernel)?,
            root: config.disks.first().map(|disk| Stamp::of(&disk.path)).transpose()?,
            host: format!("{} {}", host.release().to_string_lossy(), host.version().to_string_lossy()),
            processor: processor::identity(),
            microcode: microcode(),
            programs: BTreeSet::new(),
        })
    }

    /// The same of a machine that has read these programs.
    pub fn with_programs(self, programs: &[String]) -> Fingerprint {
        Fingerprint { programs: programs.iter().cloned().collect(), ..self }
    }

    /// Whether the machine has read all of these programs.
    pub fn has_programs(&self, programs: &[String]) -> bool {
        programs.iter().all(|program| self.programs.contains(program))
    }

    /// What has changed since `earlier`, if anything has that the guest could notice.
    pub fn change_since(&self, earlier: &Fingerprint) -> Option<&'static str> {
        let same = [
            (self.husk == earlier.husk, "husk"),
            (self.kernel == earlier.kernel, "the guest kernel"),
            (self.root == earlier.root, "the image"),
            (self.host == earlier.host, "the host's kernel"),
            (self.processor == earlier.processor, "the processor"),
            (self.microcode == earlier.microcode, "the processor's microcode"),
        ];
        same.iter().find(|(is_same, _)| !is_same).map(|(_, name)| *name)
    }
}

fn microcode() -> String {
    let mut version = String::new();
    let read = File::open(MICROCODE).and_then(|file| file.take(MICROCODE_BYTES_MAX).read_to_string(&mut version));
    // Not every host shows it.
    read.map_or_else(|_| String::new(), |_| version.trim().to_owned())
}

/// Where the warm image for machines with this configuration is, whether it exists or not. Fails if the root file system is not in
/// the image store.
pub fn place(config: &MachineConfig) -> Result<PathBuf> {
    let dir =
        dir_of(config).context("the image is not in the image store: use --output DIR, and `husk run --from DIR`")?;
    place_in(&dir, config)
}

/// The same in the directory `dir`.
pub fn place_in(dir: &Path, config: &MachineConfig) -> Result<PathBuf> {
    let json = serde_json::to_vec(&seen_by_guest(config)?)?;
    Ok(dir.join(Digest::of(&json).hex()))
}

/// The directory with the warm images of the machine's root file system, if that is in the image store.
fn dir_of(config: &MachineConfig) -> Option<PathBuf> {
    store::warm_dir_of(&config.disks.first()?.path)
}

/// The configuration as far as a guest that waits for its command sees it. It gets all disks but the first, and shares, when its run
/// begins.
fn seen_by_guest(config: &MachineConfig) -> Result<MachineConfig> {
    let config = super::with_absolute_paths(config)?;
    let vsock = config.vsock.as_ref().map(|vsock| VsockConfig { socket: PathBuf::new(), ..vsock.clone() });
    // An interface gets its addresses, and the one of its device, later.
    let networks = config.networks.iter().map(|network| NetworkConfig {
        to: match &network.to {
            Attachment::User(_) => Attachment::User(UserNetwork::default()),
            Attachment::Tap { .. } | Attachment::Bridge { .. } | Attachment::Interface { .. } => {
                Attachment::Tap { name: String::new() }
            }
        },
        mac: None,
        rate: Rate::default(),
        vhost: None,
    });
    let networks = networks.collect();
    let root = config.disks.first().map(|disk| DiskConfig { rate: Rate::default(), ..disk.clone() });
    let transport = match config.virtio_bus() {
        VirtioBus::Mmio { .. } => Transport::Mmio,
        VirtioBus::Pci => Transport::Pci,
    };
    Ok(MachineConfig {
        cmdline: String::new(),
        cpu_limit_millicpus: None,
        cpuset: Vec::new(),
        cpu_shares: None,
        host_memory_mib: None,
        sandbox: true,
        vsock,
        networks,
        transport,
        spare_slots: true,
        disks: root.into_iter().collect(),
        late_disks: 0,
        shares: Vec::new(),
        ..config
    })
}

/// Opens the snapshot at `path`, from which a machine with this configuration starts. Fails if it would not boot in the same way.
pub fn open(path: &Path, config: &MachineConfig) -> Result<Snapshot> {
    let mut snapshot = Snapshot::open(path)?;
    let check = || -> Result<usize> {
        let Description { config: saved, fingerprint, .. } = &snapshot.description;
        let made_with = fingerprint.as_ref().context("its machine does not wait for a command")?;
        if let Some(change) = Fingerprint::of(config)?.change_since(made_with) {
            bail!("{change} has changed since it was made: make another one with `husk warm`");
        }
        ensure!(
            seen_by_guest(saved)? == seen_by_guest(config)?,
            "its machine has other devices or limits than this one"
        );
        config.device_count().checked_sub(saved.device_count()).context("its machine has more devices than this one")
    };
    snapshot.files.added_devices = check().with_context(|| format!("start from the snapshot {}", path.display()))?;
    Ok(snapshot)
}

/// The warm image that a machine with this configuration starts from. `None` if there is none, or, with a line of the log, if it
/// is of no use. Where an image has never been warm, this costs one look into the store.
pub fn find(config: &MachineConfig) -> Option<Snapshot> {
    find_in(&dir_of(config)?, config)
}

/// The same in the directory `dir`.
pub fn find_in(dir: &Path, config: &MachineConfig) -> Option<Snapshot> {
    dir.exists().then_some(())?;
    let path = place_in(dir, config).ok().filter(|path| path.exists())?;
    let snapshot = open(&path, config).inspect_err(|error| log::info!("the machine boots: {error:#}")).ok()?;
    if let Err(error) = read_ahead::if_not_cached(&snapshot.files.memory) {
        log::debug!("read ahead the memory of the warm image: {error}");
    }
    Some(snapshot)
}

/// Removes all warm images that no machine can start from any more, and what killed processes have left of others.
pub fn prune(store: &Store, pruned: &mut Pruned) -> Result<()> {
    prune_all(store.warm_paths(), pruned)
}

/// The same with those at `paths`.
pub fn prune_all(paths: impl IntoIterator<Item = PathBuf>, pruned: &mut Pruned) -> Result<()> {
    for path in paths {
        let is_useful = || -> Result<bool> {
            let Description { config, fingerprint, .. } = Snapshot::open(&path)?.description;
            let made_with = fingerprint.context("it does not wait for a command")?;
            Ok(Fingerprint::of(&config)?.change_since(&made_with).is_none())
        };
        // One that is being made is not complete yet.
        let Some(_alone) = lock::try_alone(&path.with_extension("lock"))? else { continue };
        if path.is_dir() && !is_useful().unwrap_or(false) {
            pruned.remove_dir(&path)?;
        }
    }
    Ok(())
}
