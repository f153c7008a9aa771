//! Prepares an image for all contenders: one root file system, as a directory and as a disk, in a temporary work
//! directory.
//!
//! ```text
//! work_dir/              locked while its run is alive; an unlocked one was left behind by a killed run
//!   root/              the image's files, with the workload program
//!   store/             a separate image store, whose only image is made of root/
//!   instances/NAME-N/  the files of one instance: bundle, overlay, scratch disk
//!   ...                files shared by a contender's instances, by its name
//! ```
//!
//! The files are taken out of husk's EROFS image, either by the host's kernel or by erofs-utils, so that names in an
//! archive are never interpreted by the host. Files of the image in places that the benchmark needs are replaced;
//! symbolic links are never followed.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::contender::{Job, WORKLOAD};
use super::report::{self, Limits};
use super::work_dir::{self, WorkDir};
use super::workload;
use crate::image::on_demand::Finding;
use crate::image::{Progress, Source, Store, on_demand};
use crate::resources::programs;
use crate::resources::root_file::Kind;
use crate::sys;

/// The name of the root in the run's store.
pub const IMAGE: &str = "husk-bench";
/// The file for read benchmarks. It is incompressible, so that all contenders read the same number of bytes.
pub const DATA: &str = "/.husk-bench/data";
/// Directories that must exist in every root, because they are mount points.
const MOUNT_POINTS: [&str; 6] = ["proc", "sys", "dev", "run", "tmp", "scratch"];

/// The files prepared once for all contenders and jobs.
#[derive(Debug, Default)]
pub struct Fixture {
    /// The run's work directory, on a real disk; removed at the end.
    pub dir: PathBuf,
    /// The image's root file system as a directory, including the workload program.
    pub root: PathBuf,
    /// The same root file system as an EROFS disk, from `store`.
    pub disk: PathBuf,
    /// A separate image store (`HUSK_DATA`) that has the same root as `husk-bench`.
    pub store: PathBuf,
    /// The husk executable.
    pub husk: PathBuf,
    /// The resource limits of every instance.
    pub limits: Limits,
}

impl Fixture {
    /// Returns a name for an instance that is unique on this host.
    pub(super) fn instance_name(&self, contender: &str, job: &Job) -> String {
        format!("{}-{contender}-{}", self.id(), job.instance)
    }

    /// Returns the ID of this run.
    pub(super) fn id(&self) -> String {
        work_dir::id_of(&self.dir)
    }

    /// Creates a directory for the files of one instance.
    pub(super) fn instance_dir(&self, contender: &str, job: &Job) -> Result<PathBuf> {
        let dir = self.dir.join("instances").join(format!("{contender}-{}", job.instance));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(dir)
    }

    /// Returns the number of virtual CPUs needed to use the whole CPU limit.
    pub(super) fn vcpus(&self) -> u32 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "husk has 32 at most")]
        let vcpus = self.limits.cpus.ceil().clamp(1.0, 255.0) as u32;
        vcpus
    }

    /// Returns the CPU limit in thousandths of a CPU.
    pub(super) fn millicpus(&self) -> u32 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "husk has 32 at most")]
        let millicpus = (self.limits.cpus * 1000.0).round().clamp(1.0, 255_000.0) as u32;
        millicpus
    }
}

/// An image in the store.
#[derive(Debug)]
pub struct PreparedImage {
    /// The image's entry in the report.
    pub info: report::Image,
    /// The root, an EROFS image.
    root: PathBuf,
    /// Protects the image from removal.
    _in_use: Option<File>,
}

/// Finds the image that `word` refers to, as for `husk run`, and prepares it if necessary. Returns `None` if a child
/// process has reported why that failed.
pub fn find(word: &str, max_bytes: Option<u64>) -> Result<Option<PreparedImage>> {
    let path = Path::new(word);
    let (id, root, in_use) = match on_demand::identify(path)? {
        Kind::Disk => bail!("{word} is a disk image, which containers cannot use: type a container image"),
        Kind::Root { uuid } => (uuid.map(|byte| format!("{byte:02x}")).concat(), path.to_owned(), None),
        Kind::Other => {
            match on_demand::find_or_prepare(word, Finding { max_bytes, sandbox: true, ..Finding::default() })? {
                Some(prepared) => (prepared.id.hex(), prepared.root, Some(prepared.in_use)),
                None => return Ok(None),
            }
        }
    };
    let info = report::Image { name: word.to_owned(), id: format!("sha256:{id}"), bytes: 0 };
    Ok(Some(PreparedImage { info, root, _in_use: in_use }))
}

/// Prepares the image: extracts its files, adds the workload program and `data_bytes` of data, and builds the disk.
pub fn prepare(work_dir: &WorkDir, image: &mut PreparedImage, data_bytes: u64, limits: Limits) -> Result<Fixture> {
    let root = work_dir.dir.join("root");
    extract(&image.root, work_dir)?;
    image.info.bytes = file_bytes(&root).with_context(|| format!("read {}", root.display()))?;
    add(&root, data_bytes).with_context(|| format!("add the workload program to {}", root.display()))?;
    let store = Store::open(&work_dir.dir.join("store"))?;
    let source = Source::Path { path: root.clone(), image: None };
    let loaded = store.load(&source, Some(&IMAGE.parse()?), Progress::Hidden)?;
    let (prepared, _) = loaded.into_iter().next().context("no image was loaded")?;
    let dir = work_dir.dir.clone();
    fs::create_dir(dir.join("instances")).context("create a directory for instances")?;
    let husk = std::env::current_exe().context("find the husk executable")?;
    Ok(Fixture { dir, root, disk: prepared.root, store: store.dir().to_owned(), husk, limits })
}

/// Extracts an EROFS image. Mounting preserves all file attributes; without the right to mount, erofs-utils preserves
/// only contents and modes.
fn extract(image: &Path, work_dir: &WorkDir) -> Result<()> {
    let (root, view) = (work_dir.dir.join("root"), work_dir.dir.join("view"));
    let image = image.to_str().context("the image's path is not UTF-8")?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    fs::create_dir(&view).with_context(|| format!("create {}", view.display()))?;
    let mounted = programs::run("mount", &["-t", "erofs", "-o", "ro,loop,nodev,nosuid", image, &text(&view)]);
    let extracted = match mounted {
        Ok(()) => programs::run("cp", &["-aT", &text(&view), &text(&root)]),
        Err(refused) => {
            log::info!("{refused:#}: extracting with fsck.erofs");
            let extracted = programs::run("fsck.erofs", &[&format!("--extract={}", root.display()), image]);
            match extracted {
                Err(error) if programs::is_missing(&error) => {
                    Err(error.context("extract the image (run as root, or type `sudo apt-get install erofs-utils`)"))
                }
                extracted => extracted,
            }
        }
    };
    work_dir::remove(&view)?;
    extracted.with_context(|| format!("extract {image}"))
}

/// Adds the workload program, the data file and mount points to a root.
fn add(root: &Path, data_bytes: u64) -> Result<()> {
    let own = Path::new(WORKLOAD)
        .parent()
        .and_then(|own| own.strip_prefix("/").ok())
        .context("the workload program has no parent directory")?;
    let own = root.join(own);
    ensure!(fs::symlink_metadata(&own).is_err(), "the image already contains {}", own.display());
    for name in MOUNT_POINTS {
        let path = root.join(name);
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => continue,
            // A symbolic link could lead outside of the root.
            Ok(_) => fs::remove_file(&path)?,
            Err(_) => {}
        }
        fs::create_dir(&path)?;
        let mode = if name == "tmp" { 0o1777 } else { 0o755 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    DirBuilder::new().mode(0o755).create(&own)?;
    workload::write(&own)?;
    let data = root.join(DATA.trim_start_matches('/'));
    let mut data = File::options().write(true).create_new(true).mode(0o644).open(data)?;
    let mut random = vec![0; 1 << 20];
    let mut left_bytes = data_bytes;
    while left_bytes > 0 {
        let part = random.len().min(usize::try_from(left_bytes).unwrap_or(usize::MAX));
        let part = random.get_mut(..part).context("no buffer")?;
        sys::getrandom(part)?;
        data.write_all(part)?;
        left_bytes -= part.len() as u64;
    }
    // Without a sync, the write-back would disturb the measurements.
    data.sync_all()?;
    Ok(())
}

/// Returns the total size of the files in a directory.
fn file_bytes(dir: &Path) -> io::Result<u64> {
    let (mut bytes, mut dirs) = (0, vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            match metadata.is_dir() {
                true => dirs.push(entry.path()),
                false => bytes += metadata.len(),
            }
        }
    }
    Ok(bytes)
}
