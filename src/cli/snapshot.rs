//! `husk snapshot`: saves a running machine to a directory.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use super::machines;
use crate::config::DiskConfig;
use crate::image::Progress;
use crate::request::{AfterSnapshot, Base, Request, SnapshotOptions};
use crate::snapshot;
use crate::state_dir::{LAYER, StateDir};
use crate::sys::disk;

const EXAMPLES: &str = "\
Examples:
  Save a machine, which is paused until its memory is written:
    husk snapshot web ./web.snap

  Continue it later, as often as wanted:
    husk restore -d ./web.snap

  Save and stop it:
    husk snapshot --stop web ./web.snap

  Save it with its disks:
    husk snapshot --with-disks web ./web.snap

  Save it, then only what has changed, and make that whole:
    husk snapshot --track web ./web.snap
    husk snapshot --base ./web.snap web ./web.1
    husk merge ./web.1 ./web.now

A snapshot contains the memory, and so the secrets, of the machine: only you can read it.
It contains the changes that a machine of `husk run` has made to its root filesystem.
Without --with-disks it does not contain other disks: when one of them has changed, it cannot
be restored. With it, the machine is also paused until its disks are copied, which takes no
time on file systems that can share blocks (Btrfs, XFS). Backing files are never copied.

--base names the snapshot that the machine was restored from, one that was taken of it with
--track, or a later one. With --track the machine reads its memory from the snapshot from
then on: it is paused until that is durable, and the snapshot must not be changed while the
machine runs.";

// Named so because of `snapshot::Snapshot`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SnapshotArgs {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Directory to create
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Stop the machine as soon as it is saved
    #[arg(long)]
    stop: bool,

    /// Copy the writable disks into the snapshot, so that it can be restored after they have changed
    #[arg(long)]
    with_disks: bool,

    /// Remember what the machine changes in memory from now on, for later snapshots with --base
    #[arg(long, conflicts_with_all = ["stop", "base"])]
    track: bool,

    /// Take a diff snapshot: save only the memory that has changed since the snapshot DIR
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
}

impl SnapshotArgs {
    /// Returns when the snapshot is complete.
    pub fn run(self) -> Result<Exit> {
        let entry = StateDir::open()?.find(&self.machine)?;
        let path = snapshot::absolute(&self.dir)?;
        let then = if self.stop { AfterSnapshot::Stop } else { AfterSnapshot::Continue };
        let base = self.base.as_deref().map(base).transpose()?;
        let options = SnapshotOptions { then, with_disks: self.with_disks, track: self.track, base };
        let request = Request::Snapshot { path: path.clone().into_os_string().into_vec(), options };
        let bar = Progress::on_terminal().count("Saving");
        let wait = || bar.set(written_bytes(&path));
        machines::request_slowly(&entry, &request, wait).with_context(|| entry.name().to_owned())?;
        drop(bar);
        let layer = entry.kept().map(|kept| kept.join(LAYER));
        let is_own = |disk: &DiskConfig| disk.is_nameless() || Some(&disk.path) == layer.as_ref();
        let is_shared = |disk: &DiskConfig| !disk.readonly && !is_own(disk);
        if !self.stop && !self.with_disks && entry.record()?.config.disks.iter().any(is_shared) {
            log::warn!(
                "the snapshot cannot be restored any more as soon as the machine writes to its disk: use --stop or \
                 --with-disks"
            );
        }
        super::print(&format!("{}\n", self.dir.display()))?;
        Ok(Exit::Success)
    }
}

/// The snapshot at `path`, for the machine.
fn base(path: &Path) -> Result<Base> {
    let id = snapshot::id_of(path)?;
    Ok(Base { path: snapshot::absolute(path)?.into_os_string().into_vec(), id })
}

/// The disk usage of the files in a directory.
fn written_bytes(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|found| disk::allocated_bytes(&found)).sum()
}
