//! Resolves the kernel specified by the user, or the default kernel, to a file and its modules.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::modules::Modules;
use crate::boot::{Part, Unified};

/// The choice of the guest's kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// The first available of micro, stock and the host's.
    Any,
    /// A kernel built by scripts/kernel, by name.
    Made(&'static str),
    /// The kernel that the host was booted with.
    Host,
    /// A kernel file.
    Path(PathBuf),
}

/// Names of kernels built by scripts/kernel, best first.
const MADE: [&str; 2] = ["micro", "stock"];

/// Where kernels are that all users of a host have, after the user's own.
const SYSTEM_DIRS: [&str; 2] = ["/usr/local/lib/husk/kernels", "/usr/lib/husk/kernels"];

/// A kernel file and the location of its modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestKernel {
    /// A vmlinux or bzImage.
    pub path: PathBuf,
    /// Its modules.
    pub modules: Modules,
}

impl Choice {
    /// Interprets the user's argument: a name, or a path if it contains `/` or exists as a file.
    pub fn from_word(word: &Path) -> Choice {
        match MADE.iter().find(|name| word == Path::new(name)) {
            Some(name) => Choice::Made(name),
            None if word == Path::new("host") => Choice::Host,
            None => Choice::Path(word.to_owned()),
        }
    }

    /// Locates the kernel.
    pub fn find(&self) -> Result<GuestKernel> {
        match self {
            Choice::Any => any(),
            Choice::Made(name) => made(name).with_context(|| {
                let dir = kernels_dir().unwrap_or_default();
                format!("no {name} kernel in {}: build it with `scripts/kernel {name}`", dir.display())
            }),
            Choice::Host => host(),
            Choice::Path(path) if path.components().count() == 1 && !path.exists() => {
                bail!("there is no kernel {}: use micro, stock, host or the path of a file", path.display())
            }
            Choice::Path(path) => Ok(GuestKernel { modules: modules_beside(path), path: path.clone() }),
        }
    }
}

fn any() -> Result<GuestKernel> {
    if let Some(kernel) = MADE.iter().find_map(|name| made(name)) {
        return Ok(kernel);
    }
    host().map_err(|error| {
        anyhow::anyhow!("no kernel to boot ({error:#}): use --kernel PATH, or build one with `scripts/kernel micro`")
    })
}

fn kernels_dir() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("HUSK_CACHE")
        .or_else(|| absolute("XDG_CACHE_HOME").map(|cache| cache.join("husk")))
        .or_else(|| absolute("HOME").map(|home| home.join(".cache/husk")))?;
    Some(cache.join("kernels"))
}

fn made(name: &str) -> Option<GuestKernel> {
    let dirs = kernels_dir().into_iter().chain(SYSTEM_DIRS.map(PathBuf::from)).map(|dir| dir.join(name));
    // An ELF image needs no unpacking, so it comes first.
    let files = |dir: PathBuf| ["vmlinux", "bzImage"].map(|file| dir.join(file));
    let path = dirs.flat_map(files).find(|path| path.exists())?;
    Some(GuestKernel { modules: modules_beside(&path), path })
}

fn host() -> Result<GuestKernel> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("read the host kernel's release")?;
    let release = release.trim();
    let path = PathBuf::from(format!("/boot/vmlinuz-{release}"));
    if let Err(error) = File::open(&path) {
        bail!("open the host's kernel {}: {error}", path.display());
    }
    let tree = PathBuf::from("/lib/modules").join(release);
    let modules = if tree.join("modules.dep").exists() { Modules::Tree(tree) } else { Modules::BuiltIn };
    Ok(GuestKernel { path, modules })
}

/// The modules of the kernel at `path`: a directory `modules` next to it, as created by scripts/kernel, or the
/// installed modules of its release.
fn modules_beside(path: &Path) -> Modules {
    let dir = path.with_file_name("modules");
    if dir.join("load").exists() {
        return Modules::Directory(dir);
    }
    let tree = release(path).map(|release| Path::new("/lib/modules").join(release));
    match tree.filter(|tree| tree.join("modules.dep").exists()) {
        Some(tree) => Modules::Tree(tree),
        None => Modules::BuiltIn,
    }
}

/// The release of a bzImage (boot.rst: `kernel_version`), also within a unified kernel image, if it is valid as a
/// directory name.
fn release(path: &Path) -> Option<String> {
    const MAGIC_AT: u64 = 0x202;
    const POINTER_AT: u64 = 0x20e;
    const BASE: u64 = 0x200;
    let file = File::open(path).ok()?;
    let image = match Unified::parse(&file) {
        Ok(Some(unified)) => unified.linux,
        _ => Part::whole(file).ok()?,
    };
    let mut magic = [0; 4];
    image.read_exact_at(&mut magic, MAGIC_AT).ok()?;
    if magic != *b"HdrS" {
        return None;
    }
    let mut pointer = [0; 2];
    image.read_exact_at(&mut pointer, POINTER_AT).ok()?;
    let mut text = [0; 64];
    let len = image.read_at(&mut text, BASE + u64::from(u16::from_le_bytes(pointer))).ok()?;
    let release = text.get(..len)?.split(|byte| !byte.is_ascii_graphic() || *byte == b'/').next()?;
    String::from_utf8(release.to_vec()).ok().filter(|release| !release.is_empty() && !release.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::boot::sample;

    #[test]
    fn a_kernel_is_a_name_or_a_path() {
        assert_eq!(Choice::from_word(Path::new("micro")), Choice::Made("micro"));
        assert_eq!(Choice::from_word(Path::new("host")), Choice::Host);
        assert_eq!(Choice::from_word(Path::new("./micro")), Choice::Path("./micro".into()));
        assert_eq!(Choice::from_word(Path::new("/boot/vmlinuz")), Choice::Path("/boot/vmlinuz".into()));
        let error = Choice::from_word(Path::new("mikro")).find().unwrap_err().to_string();
        assert_eq!(error, "there is no kernel mikro: use micro, stock, host or the path of a file");
    }

    #[test]
    fn modules_next_to_a_kernel_belong_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        let find = || Choice::Path(kernel.clone()).find().unwrap().modules;
        assert_eq!(find(), Modules::BuiltIn);
        fs::create_dir(dir.path().join("modules")).unwrap();
        fs::write(dir.path().join("modules/load"), "").unwrap();
        assert_eq!(find(), Modules::Directory(dir.path().join("modules")));
    }

    #[test]
    fn a_bzimage_has_a_release() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bzImage");
        let image = |version: &[u8]| {
            let mut bytes = vec![0; 0x400];
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
            bytes[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
            bytes[0x300..0x300 + version.len()].copy_from_slice(version);
            fs::write(&path, &bytes).unwrap();
            let found = release(&path);
            fs::write(&path, sample::unified(&[(".initrd", b"070701"), (".linux", &bytes)])).unwrap();
            assert_eq!(release(&path), found, "in a unified image");
            found
        };
        assert_eq!(image(b"6.1.0-9-cloud (me@here) #1"), Some("6.1.0-9-cloud".into()));
        assert_eq!(image(b"../../etc"), None);
        assert_eq!(image(b""), None);
        fs::write(&path, b"short").unwrap();
        assert_eq!(release(&path), None);
    }
}
