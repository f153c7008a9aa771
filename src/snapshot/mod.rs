//! Snapshots: a machine in files, written by `husk snapshot` and read by `husk restore`.
//!
//! ```text
//! DIR/state    header, description (JSON), state of the machine (JSON); its presence completes the snapshot
//! DIR/memory   the guest's memory, sparse; mapped by the machines that are restored from it
//! DIR/changed  of a diff snapshot: a bitmap of the pages that `memory` has; all others are those of another snapshot
//! DIR/disk-N   a copy of disk N, counted from 0, if the snapshot contains it; each machine gets a copy of its own
//! DIR/share-N  what the guest knows of share N (fs/saved.rs)
//! DIR/touched  of a warm image: which pages the first run from it has touched (memory/touched.rs); not needed
//! ```
//!
//! The supervisor writes the description, the monitor the state and the memory. Whoever reads a snapshot trusts neither: the
//! description is checked like a configuration file, and only a confined monitor decodes the state.

mod disks;
mod header;
mod merge;
mod read_ahead;
pub mod touched;
pub mod warm;
mod writer;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use crate::config::{DiskConfig, HealthCheck, MachineConfig};
use crate::memory::bitmap_bytes;
use crate::resources::SnapshotFiles;
use crate::resources::disk::stamp::Stamp;
use crate::state_dir::SNAPSHOT_STATE;
use crate::state_dir::identity::IdentityRecord;
use crate::state_dir::mounts::MountRecord;
use crate::state_dir::record::Inherited;
use crate::sys;
pub use disks::{DisksOfSnapshot, OwnDisks};
use header::{HEADER_BYTES, Header};
pub use merge::{apply, merge};
use warm::Fingerprint;
pub use writer::SnapshotWriter;

const STATE: &str = SNAPSHOT_STATE;
const MEMORY: &str = "memory";
const CHANGED: &str = "changed";
const TOUCHED: &str = "touched";
/// The length of an ID in bytes; it is written in hexadecimal.
const ID_BYTES: usize = 16;
/// What the names of disks start with.
const DISK: &str = "disk-";
/// What the names of files for shares start with.
const SHARE: &str = "share-";
/// The maximum size of a description. Most of it are the process's environment and the configuration.
const DESCRIPTION_BYTES_MAX: u64 = 16 << 20;

/// What a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Its random ID, by which diff snapshots name their base. What they are merged to is the same snapshot, with the same ID.
    pub id: String,
    /// Of a diff snapshot: the one that has the pages which have not changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// The version of husk that has written it.
    pub husk: String,
    /// When it was written, in milliseconds since 1970.
    pub created_ms: u64,
    /// The image or kernel of the machine, as specified by the user.
    pub image: String,
    /// The command line of its process, if known.
    pub command: Vec<String>,
    /// What additional processes inherit, if the machine runs husk's init.
    pub process: Option<Inherited>,
    /// What the machine is called and how it is connected, if it runs husk's init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<IdentityRecord>,
    /// What it mounts from the host, and its anonymous volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<MountRecord>,
    /// The signal that asks its process to terminate.
    pub stop_signal: u8,
    /// How long its process may take to terminate, if that was set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout_ms: Option<u64>,
    /// How its health is checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// The configuration of the machine. A disk with a relative path is inside of the snapshot; all other paths are absolute.
    pub config: MachineConfig,
    /// The files of all other disks, which must not have changed.
    pub disks: Vec<Stamp>,
    /// What has arrived of its process's outputs.
    #[serde(default)]
    pub received: Received,
    /// Of a machine that waits for its command: what it was booted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
}

/// How many bytes of the outputs of a machine's process have arrived.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Received {
    /// Of standard output; with a terminal, of both.
    pub stdout: u64,
    /// Of standard error.
    pub stderr: u64,
}

/// A snapshot as another one names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its directory.
    pub path: PathBuf,
    /// Its ID.
    pub id: String,
}

/// A complete snapshot, from which machines can be restored.
pub struct Snapshot {
    /// What it is of. The configuration is valid.
    pub description: Description,
    /// What a machine is restored from.
    pub files: SnapshotFiles,
    /// The disks inside of it.
    pub disks: DisksOfSnapshot,
    /// Its directory.
    pub path: PathBuf,
}

impl Snapshot {
    /// Opens the snapshot in the directory `path`, and checks everything but the state of the machine: that is decoded when the
    /// machine is built. Fails if it is a diff snapshot.
    pub fn open(path: &Path) -> Result<Snapshot> {
        let Parts { description, state, memory, changed: _, touched, disks, shares } = Parts::open(path)?;
        if let Some(base) = &description.base {
            bail!(
                "the snapshot {} has only what has changed since {}: make it whole with `husk merge {0} NEW`",
                path.display(),
                base.path.display()
            );
        }
        Ok(Snapshot {
            description,
            files: SnapshotFiles { state, memory, touched, shares, added_devices: 0 },
            disks,
            path: path.to_owned(),
        })
    }
}

/// The parts of a complete snapshot, which may be a diff snapshot.
struct Parts {
    description: Description,
    state: Vec<u8>,
    memory: File,
    /// Of a diff snapshot.
    changed: Option<File>,
    /// Of a warm image from which a machine has started.
    touched: Option<Vec<u8>>,
    disks: DisksOfSnapshot,
    /// What the guest knows of each share.
    shares: Vec<File>,
}

impl Parts {
    fn open(path: &Path) -> Result<Parts> {
        Parts::read(path).with_context(|| format!("open the snapshot {}", path.display()))
    }

    /// The files are those of one directory even if another one takes its place meanwhile.
    fn read(path: &Path) -> Result<Parts> {
        let dir = match fs::open(path, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOTDIR) => bail!("not a snapshot, which is a directory"),
            dir => dir?,
        };
        check_owner(&dir)?;
        // Links lead elsewhere, and a FIFO would have to be waited for.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = |name: &str| fs::openat(&dir, name, flags, Mode::empty()).map(File::from);
        let mut file = match open(STATE) {
            Err(Errno::NOENT) if open(MEMORY).is_ok() => {
                bail!("it is incomplete: `husk snapshot` was interrupted, or is not done yet")
            }
            Err(Errno::NOENT) => bail!("not a snapshot"),
            opened => opened.context("open the file `state`")?,
        };
        check_file(&file).context("the file `state`")?;
        let mut header = [0; HEADER_BYTES];
        read_whole(&mut file, &mut header)?;
        let header = Header::parse(&header)?;
        let mut content = vec![0; header.content_bytes()?];
        read_whole(&mut file, &mut content)?;
        ensure!(file.read(&mut [0])? == 0, "the file `state` is longer than its header says");
        let (description, state) = header.split(&content)?;
        let mut description: Description = serde_json::from_slice(description).context("read its description")?;
        // Whether this process is confined is not for a file to say.
        description.config.sandbox = true;
        description.config.validate().context("its configuration is invalid")?;
        let memory = open(MEMORY).context("open the file `memory`")?;
        check_file(&memory).context("the file `memory`")?;
        let memory_bytes = description.config.memory_mib << 20;
        let found = memory.metadata()?.len();
        ensure!(found == memory_bytes, "the file `memory` has {found} bytes instead of {memory_bytes}");
        let mut disks = Vec::new();
        for (index, disk) in description.config.disks.iter().enumerate().filter(|(_, disk)| is_inside(disk)) {
            let name = disk_name(index);
            ensure!(disk.path.as_os_str() == &*name && !disk.readonly, "its configuration is invalid: a relative path");
            let file = open(&name).with_context(|| format!("open the file `{name}`"))?;
            check_file(&file).with_context(|| format!("the file `{name}`"))?;
            disks.push((index, file));
        }
        let disks = DisksOfSnapshot::new(path, disks);
        let mut shares = Vec::new();
        for index in 0..description.config.shares.len() {
            let name = share_name(index);
            let file = open(&name).with_context(|| format!("open the file `{name}`"))?;
            check_file(&file).with_context(|| format!("the file `{name}`"))?;
            shares.push(file);
        }
        let changed = description.base.as_ref().map(|_| open_changed(&open, memory_bytes)).transpose()?;
        let touched = open(TOUCHED).ok().and_then(|file| touched::read(file).ok());
        Ok(Parts { description, state: state.to_vec(), memory, changed, touched, disks, shares })
    }
}

/// Opens the bitmap of changed pages.
fn open_changed(open: &dyn Fn(&str) -> rustix::io::Result<File>, memory_bytes: u64) -> Result<File> {
    let changed = open(CHANGED).with_context(|| format!("open the file `{CHANGED}`"))?;
    check_file(&changed).with_context(|| format!("the file `{CHANGED}`"))?;
    let (found, expected) = (changed.metadata()?.len(), bitmap_bytes(memory_bytes));
    ensure!(found == expected, "the file `{CHANGED}` has {found} bytes instead of {expected}");
    Ok(changed)
}

/// The ID of the snapshot in the directory `path`, whole or a diff snapshot.
pub fn id_of(path: &Path) -> Result<String> {
    Ok(Parts::open(path)?.description.id)
}

/// A random ID for a new snapshot.
pub fn new_id() -> Result<String> {
    let mut random = [0; ID_BYTES];
    sys::getrandom(&mut random).context("generate an ID")?;
    Ok(random.map(|byte| format!("{byte:02x}")).concat())
}

/// Fails unless the file or directory belongs to this user or to root, and nobody else can change it: a snapshot names the files and
/// devices that its machine gets.
fn check_owner(file: impl AsFd) -> Result<()> {
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    let found = fs::fstat(file)?;
    let (owner, user) = (found.st_uid, geteuid().as_raw());
    ensure!(
        owner == user || owner == 0,
        "it belongs to another user, who could give its machine your files: copy it if you trust it (`cp -r`)"
    );
    ensure!(
        found.st_mode & WRITABLE_BY_OTHERS == 0,
        "others can change it, and could give its machine your files: use `chmod -R go-w` if you trust it"
    );
    Ok(())
}

fn check_file(file: &File) -> Result<()> {
    ensure!(file.metadata()?.is_file(), "not a file");
    check_owner(file)
}

fn read_whole(file: &mut File, bytes: &mut [u8]) -> Result<()> {
    match file.read_exact(bytes) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => bail!("the file `state` is truncated"),
        read => Ok(read?),
    }
}

/// Which of a machine's disks its snapshot contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisksInside {
    /// Those that nobody else can have: the ones without a name, and the writable layer of a machine that stays.
    Own,
    /// Those without a name, which are lost with the process that has them.
    Nameless,
    /// All that are writable.
    Writable,
}

/// Whether the disk of a snapshot's configuration is inside of the snapshot.
pub fn is_inside(disk: &DiskConfig) -> bool {
    disk.path.is_relative()
}

/// The name of disk `index` in a snapshot that contains it.
fn disk_name(index: usize) -> String {
    format!("{DISK}{index}")
}

/// The name of the file for share `index` in a snapshot.
fn share_name(index: usize) -> String {
    format!("{SHARE}{index}")
}

/// The configuration as a snapshot describes it, and the disks that the snapshot contains: their indices and where they are now.
/// The disk `layer` belongs to a machine that stays: it is inside unless that machine itself is to continue with it.
pub fn portable(
    config: &MachineConfig,
    inside: DisksInside,
    layer: Option<&Path>,
) -> Result<(MachineConfig, Vec<(usize, PathBuf)>)> {
    let mut config = with_absolute_paths(config)?;
    let mut moved = Vec::new();
    for (index, disk) in config.disks.iter_mut().enumerate() {
        match inside {
            DisksInside::Writable if !disk.readonly => {}
            DisksInside::Own if layer == Some(&disk.path) => {}
            _ if disk.is_nameless() => {}
            _ => continue,
        }
        // It no longer follows from the name.
        disk.format = Some(disk.format());
        moved.push((index, std::mem::replace(&mut disk.path, disk_name(index).into())));
    }
    Ok((config, moved))
}

/// The configuration as another process understands it.
fn with_absolute_paths(config: &MachineConfig) -> Result<MachineConfig> {
    let mut config = config.clone();
    let disks = config.disks.iter_mut().flat_map(|disk| {
        let backing = disk.backing.iter_mut().map(|backing| &mut backing.path);
        backing.chain([&mut disk.path])
    });
    let sockets = config.vsock.iter_mut().map(|vsock| &mut vsock.socket);
    let shares = config.shares.iter_mut().map(|share| &mut share.path);
    let absolute = |path: &mut PathBuf| absolute(path).map(|absolute| *path = absolute);
    disks.chain(sockets).chain(shares).chain(&mut config.initrd).chain([&mut config.kernel]).try_for_each(absolute)?;
    Ok(config)
}

/// The absolute path of a file, for another process.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("find {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;
    use crate::config::{BackingConfig, DiskConfig, VsockConfig};

    pub(super) fn description() -> Description {
        Description {
            id: "0123456789abcdef0123456789abcdef".into(),
            base: None,
            husk: "0.1.0".into(),
            created_ms: 1,
            image: "vmlinux".into(),
            command: Vec::new(),
            process: None,
            identity: None,
            mounts: Vec::new(),
            stop_signal: 15,
            stop_timeout_ms: None,
            health_check: None,
            config: MachineConfig { kernel: "vmlinux".into(), memory_mib: 32, ..MachineConfig::default() },
            disks: Vec::new(),
            received: Received::default(),
            fingerprint: None,
        }
    }

    /// A complete snapshot in a directory that is about to be removed.
    fn written() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        let writer = SnapshotWriter::create(&path).unwrap();
        writer.memory().set_len(32 << 20).unwrap();
        writer.finish(&description(), b"{}").unwrap();
        (dir, path)
    }

    #[track_caller]
    fn assert_refused(path: &Path, words: &str) {
        let error = format!("{:#}", Snapshot::open(path).map(drop).unwrap_err());
        assert!(error.starts_with("open the snapshot /") && error.contains(words), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn a_snapshot_is_read_as_it_was_written() {
        let (_dir, path) = written();
        let snapshot = Snapshot::open(&path).unwrap();
        assert_eq!((snapshot.description, snapshot.files.state), (description(), b"{}".to_vec()));
    }

    #[test]
    fn what_is_no_snapshot_is_refused() {
        let (dir, path) = written();
        assert_refused(&dir.path().join("missing"), "No such file or directory");
        assert_refused(dir.path(), "not a snapshot");
        assert_refused(&path.join(MEMORY), "not a snapshot, which is a directory");
        fs::remove_file(path.join(STATE)).unwrap();
        assert_refused(&path, "it is incomplete");
    }

    #[test]
    fn a_truncated_or_extended_snapshot_is_refused() {
        let (_dir, path) = written();
        let state = fs::read(path.join(STATE)).unwrap();
        for len in [0, 1, HEADER_BYTES - 1, HEADER_BYTES, state.len() - 1] {
            fs::write(path.join(STATE), &state[..len]).unwrap();
            assert_refused(&path, "the file `state` is truncated");
        }
        fs::write(path.join(STATE), [&state[..], b"x"].concat()).unwrap();
        assert_refused(&path, "longer than its header says");
        fs::write(path.join(STATE), &state).unwrap();
        File::options().write(true).open(path.join(MEMORY)).unwrap().set_len((32 << 20) - 1).unwrap();
        assert_refused(&path, "the file `memory` has 33554431 bytes instead of 33554432");
        fs::remove_file(path.join(MEMORY)).unwrap();
        assert_refused(&path, "open the file `memory`: No such file");
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let (_dir, path) = written();
        let file = File::options().read(true).write(true).open(path.join(STATE)).unwrap();
        for at in 0..file.metadata().unwrap().len() {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
            assert!(Snapshot::open(&path).is_err(), "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        Snapshot::open(&path).unwrap();
    }

    #[test]
    fn an_invalid_configuration_is_refused() {
        let (_dir, path) = written();
        fs::remove_dir_all(&path).unwrap();
        let writer = SnapshotWriter::create(&path).unwrap();
        let mut description = description();
        description.config.cpus = 1000;
        writer.memory().set_len(32 << 20).unwrap();
        writer.finish(&description, b"{}").unwrap();
        assert_refused(&path, "its configuration is invalid: 1000 vCPUs");
    }

    #[test]
    fn all_paths_become_absolute() {
        let backing = vec![BackingConfig { path: "base.img".into(), format: None }];
        let config = MachineConfig {
            kernel: "vmlinux".into(),
            initrd: Some("/initrd".into()),
            disks: vec![DiskConfig { backing, ..DiskConfig::of("../disk.img".into()) }],
            vsock: Some(VsockConfig { socket: "v.sock".into(), cid: 3 }),
            ..MachineConfig::default()
        };
        let text = serde_json::to_string(&with_absolute_paths(&config).unwrap()).unwrap();
        let here = std::env::current_dir().unwrap();
        for path in ["vmlinux", "base.img", "../disk.img", "v.sock"] {
            assert!(text.contains(&format!("\"{}/{path}\"", here.display())), "{path}: {text}");
        }
        assert!(text.contains("\"/initrd\""), "{text}");
    }

    #[test]
    fn a_snapshot_contains_a_disk_without_a_name() {
        let disks = ["/proc/self/fd/7", "/named"].map(|path| DiskConfig::of(path.into())).to_vec();
        let config = MachineConfig { disks, kernel: "k".into(), ..MachineConfig::default() };
        let moved = |inside| portable(&config, inside, None).unwrap().1.len();
        assert_eq!([DisksInside::Own, DisksInside::Nameless, DisksInside::Writable].map(moved), [1, 1, 2]);
    }

    #[test]
    fn a_snapshot_contains_the_layer_of_a_machine_unless_that_continues_with_it() {
        let disks = ["/layer", "/named"].map(|path| DiskConfig::of(path.into())).to_vec();
        let config = MachineConfig { disks, kernel: "k".into(), ..MachineConfig::default() };
        let moved = |inside| portable(&config, inside, Some(Path::new("/layer"))).unwrap().1.len();
        let kinds = [DisksInside::Own, DisksInside::Nameless, DisksInside::Writable];
        assert_eq!(kinds.map(moved), [1, 0, 2]);
    }

    fn make_fifo(path: &Path) {
        use rustix::fs::{CWD, FileType, mknodat};
        mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }

    #[test]
    fn files_of_others_links_and_fifos_are_refused() {
        let (dir, path) = written();
        let chmod = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        chmod(&path, 0o770);
        assert_refused(&path, "others can change it");
        chmod(&path, 0o700);
        chmod(&path.join(MEMORY), 0o666);
        assert_refused(&path, "the file `memory`: others can change it");
        chmod(&path.join(MEMORY), 0o600);
        Snapshot::open(&path).unwrap();
        fs::rename(path.join(MEMORY), dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), path.join(MEMORY)).unwrap();
        assert_refused(&path, "open the file `memory`: Too many levels of symbolic links");
        fs::remove_file(path.join(MEMORY)).unwrap();
        make_fifo(&path.join(MEMORY));
        assert_refused(&path, "the file `memory`: not a file");
        fs::remove_file(path.join(STATE)).unwrap();
        make_fifo(&path.join(STATE));
        assert_refused(&path, "the file `state`: not a file");
    }

    #[test]
    fn a_snapshot_does_not_turn_the_sandbox_off() {
        let (_dir, path) = written();
        fs::remove_dir_all(&path).unwrap();
        let writer = SnapshotWriter::create(&path).unwrap();
        writer.memory().set_len(32 << 20).unwrap();
        let mut description = description();
        description.config.sandbox = false;
        writer.finish(&description, b"{}").unwrap();
        assert!(Snapshot::open(&path).unwrap().description.config.sandbox);
    }
}
