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
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{UnmountFlags, unmount};

use super::contender::{Fixture, WORKLOAD};
use super::report::{self, Limits};
use super::workload;
use crate::image::{Progress, Source, Store, on_demand};
use crate::resources::programs;
use crate::resources::root_file::Kind;
use crate::sandbox::cgroup::pen;
use crate::sys;

/// The name of the root in the run's store.
pub const IMAGE: &str = "husk-bench";
/// The file for read benchmarks. It is incompressible, so that all contenders read the same number of bytes.
pub const DATA: &str = "/.husk-bench/data";
/// The size of that file: larger than CPU caches, smaller than the memory of a small machine.
pub const DATA_BYTES: u64 = 64 << 20;
/// The size with `--quick`.
pub const QUICK_DATA_BYTES: u64 = 16 << 20;

/// The directory of all runs in the image store.
const SUBDIR: &str = "bench";
/// Directories that must exist in every root, because they are mount points.
const MOUNT_POINTS: [&str; 6] = ["proc", "sys", "dev", "run", "tmp", "scratch"];
const ID_BYTES: usize = 3;
const ATTEMPTS: usize = 8;

/// A locked work directory. Dropping it unmounts and removes everything in it.
#[derive(Debug)]
pub struct WorkDir {
    /// The path.
    pub dir: PathBuf,
    _lock: File,
}

impl WorkDir {
    /// Creates a work directory in `base`, or next to the image store, and removes those that killed runs left behind.
    pub fn claim(base: Option<&Path>) -> Result<WorkDir> {
        let base = match base {
            Some(base) => fs::canonicalize(base).with_context(|| format!("open {}", base.display()))?,
            None => Store::open_default()?.folder().join(SUBDIR),
        };
        // Overlays and QEMU use these characters as separators.
        let odd = |character: char| matches!(character, ',' | ':' | '\\' | '"' | '\'') || character.is_whitespace();
        let path = base.to_str().filter(|path| !path.contains(odd));
        ensure!(path.is_some(), "{}: a comma, colon, quote or space is in the way, type --folder PATH", base.display());
        let make = DirBuilder::new().recursive(true).mode(0o700).create(&base);
        make.with_context(|| format!("make {} (--folder PATH is another)", base.display()))?;
        sweep(&base)?;
        WorkDir::create(&base)
    }

    fn create(base: &Path) -> Result<WorkDir> {
        for _ in 0..ATTEMPTS {
            let mut random = [0; ID_BYTES];
            sys::getrandom(&mut random).context("choose a name")?;
            let dir = base.join(format!("{IMAGE}-{}", random.map(|byte| format!("{byte:02x}")).concat()));
            match DirBuilder::new().mode(0o700).create(&dir) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                made => made.with_context(|| format!("make {}", dir.display()))?,
            }
            // Another run may have removed the directory before it was locked.
            let Ok(lock) = open(&dir) else { continue };
            if lock.try_lock().is_ok() && dir.exists() {
                return Ok(WorkDir { dir, _lock: lock });
            }
        }
        bail!("every name in {} is taken", base.display())
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        super::contender::remove_networks(&self.dir);
        let id = super::contender::bench_id(&self.dir);
        for result in [pen::remove_left_behind(&format!("{id}-")), clear(&self.dir)] {
            if let Err(error) = result {
                log::warn!("{error:#}");
            }
        }
    }
}

/// Removes work directories in `base` that killed runs left behind.
fn sweep(base: &Path) -> Result<()> {
    for entry in fs::read_dir(base).with_context(|| format!("list {}", base.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(&format!("{IMAGE}-")) || !entry.file_type()?.is_dir() {
            continue;
        }
        let Ok(lock) = open(&entry.path()) else { continue };
        if lock.try_lock().is_ok() {
            log::info!("{} was left by a bench that was killed", entry.path().display());
            super::contender::remove_leftovers(&entry.path());
            pen::remove_left_behind(&format!("{name}-"))?;
            clear(&entry.path())?;
        }
    }
    Ok(())
}

fn open(dir: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(dir)
}

/// Removes a directory of a run, after unmounting everything below it.
pub fn clear(dir: &Path) -> Result<()> {
    for mount in mounts_below(dir)?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH).with_context(|| format!("unmount {}", mount.display()))?;
    }
    let mounted = mounts_below(dir)?;
    ensure!(mounted.is_empty(), "{} is still mounted", mounted.first().unwrap_or(&PathBuf::new()).display());
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context(format!("remove {}", dir.display())),
        _ => Ok(()),
    }
}

/// Returns the mount points below a directory, in mount order.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    // proc_pid_mountinfo(5): the fifth field. Paths of work directories need no unescaping.
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}

/// An image in the store.
#[derive(Debug)]
pub struct Image {
    /// The image's entry in the report.
    pub info: report::Image,
    /// The root, an EROFS image.
    root: PathBuf,
    /// Protects the image from removal.
    _in_use: Option<File>,
}

/// Finds the image that `word` refers to, as for `husk run`, and prepares it if necessary. Returns `None` if a child
/// process has reported why that failed.
pub fn find(word: &str, max_bytes: Option<u64>) -> Result<Option<Image>> {
    let path = Path::new(word);
    let (id, root, in_use) = match on_demand::identify(path)? {
        Kind::Disk => bail!("{word} is a disk with a system of its own: containers have no use for it, type an image"),
        Kind::Root { uuid } => (uuid.map(|byte| format!("{byte:02x}")).concat(), path.to_owned(), None),
        Kind::Other => match on_demand::find_or_prepare(word, max_bytes)? {
            Some(prepared) => (prepared.id.hex(), prepared.root, Some(prepared.in_use)),
            None => return Ok(None),
        },
    };
    let info = report::Image { name: word.to_owned(), id: format!("sha256:{id}"), bytes: 0 };
    Ok(Some(Image { info, root, _in_use: in_use }))
}

/// Prepares the image: extracts its files, adds the workload program and `data_bytes` of data, and builds the disk.
pub fn prepare(work_dir: &WorkDir, image: &mut Image, data_bytes: u64, limits: Limits) -> Result<Fixture> {
    let root = work_dir.dir.join("root");
    extract(&image.root, work_dir)?;
    image.info.bytes = file_bytes(&root).with_context(|| format!("look at {}", root.display()))?;
    add(&root, data_bytes).with_context(|| format!("add the work program to {}", root.display()))?;
    let store = Store::open(&work_dir.dir.join("store"))?;
    let source = Source::Path { path: root.clone(), image: None };
    let (prepared, _) = store.load(&source, Some(&IMAGE.parse()?), &Progress::hidden())?;
    let dir = work_dir.dir.clone();
    fs::create_dir(dir.join("instances")).context("make a folder for instances")?;
    let husk = std::env::current_exe().context("find husk itself")?;
    Ok(Fixture { dir, root, disk: prepared.root, store: store.folder().to_owned(), husk, limits })
}

/// Extracts an EROFS image. Mounting preserves all file attributes; without the right to mount, erofs-utils preserves
/// only contents and modes.
fn extract(image: &Path, work_dir: &WorkDir) -> Result<()> {
    let (root, view) = (work_dir.dir.join("root"), work_dir.dir.join("view"));
    let image = image.to_str().context("the image's path is no text")?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    fs::create_dir(&view).with_context(|| format!("make {}", view.display()))?;
    let mounted = programs::run("mount", &["-t", "erofs", "-o", "ro,loop,nodev,nosuid", image, &text(&view)]);
    let extracted =
        match mounted {
            Ok(()) => programs::run("cp", &["-aT", &text(&view), &text(&root)]),
            Err(refused) => {
                log::info!("{refused:#}: taking its files out by fsck.erofs");
                let extracted = programs::run("fsck.erofs", &[&format!("--extract={}", root.display()), image]);
                match extracted {
                    Err(error) if programs::is_missing(&error) => Err(error
                        .context("take the image's files out (be root, or type `sudo apt-get install erofs-utils`)")),
                    extracted => extracted,
                }
            }
        };
    clear(&view)?;
    extracted.with_context(|| format!("take the files out of {image}"))
}

/// Adds the workload program, the data file and mount points to a root.
fn add(root: &Path, data_bytes: u64) -> Result<()> {
    let own = Path::new(WORKLOAD).parent().and_then(|own| own.strip_prefix("/").ok()).context("it has no folder")?;
    let own = root.join(own);
    ensure!(fs::symlink_metadata(&own).is_err(), "the image has a {} of its own", own.display());
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
