//! Finds the kernel modules of the drivers that a machine needs, in dependency order.
//!
//! Modules are looked up by name, in a directory with a file `load` (created by scripts/kernel) or in a distribution's
//! tree with `modules.dep`. Dependencies are read from the modules themselves, which works for both. Compressed modules
//! are unpacked once and kept in the user's cache.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::cache::{Cache, Identity};
use crate::decompress::unpacking_reader;

/// Far larger than any driver.
const MODULE_MAX_BYTES: u64 = 64 << 20;
const MAGIC: &[u8] = b"\x7fELF";
/// Enough for the modules of about ten kernels, most of which are far smaller than 1 MiB.
const CACHED_MODULES: usize = 256;

/// The location of a kernel's modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Modules {
    /// All drivers are built in.
    BuiltIn,
    /// A directory of files; drivers that are not there are assumed to be built in.
    Directory(PathBuf),
    /// `/lib/modules/RELEASE`.
    Tree(PathBuf),
}

/// An uncompressed module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// The name, with `_` instead of `-`.
    pub name: String,
    /// The ELF file.
    pub content: Vec<u8>,
}

/// Finds the modules for `drivers`, in load order. Built-in drivers are skipped. A driver that the kernel does not have
/// at all is an error, unless its name ends in `?`.
pub fn find(modules: &Modules, drivers: &[&str]) -> Result<Vec<Module>> {
    find_with_cache(modules, drivers, Cache::of_user("modules", CACHED_MODULES))
}

/// Whether a kernel is known to have `driver` neither built in nor as a module.
pub fn lacks(modules: &Modules, driver: &str) -> Result<bool> {
    let Modules::Tree(tree) = modules else { return Ok(false) };
    let index = Index::of_tree(tree)?;
    let name = driver.replace('-', "_");
    Ok(!index.files.contains_key(&name) && index.built_in.is_some_and(|all| !all.contains(&name)))
}

fn find_with_cache(modules: &Modules, drivers: &[&str], cache: Option<Cache>) -> Result<Vec<Module>> {
    let index = match modules {
        Modules::BuiltIn => return Ok(Vec::new()),
        Modules::Directory(dir) => Index::of_dir(dir),
        Modules::Tree(tree) => Index::of_tree(tree),
    }?;
    let mut search = Search { index, cache, under_way: Vec::new(), found: Vec::new() };
    for driver in drivers {
        let (driver, needed) = driver.strip_suffix('?').map_or((*driver, true), |driver| (driver, false));
        search.add(driver, needed)?;
    }
    Ok(search.found)
}

/// The files of all modules.
struct Index {
    files: HashMap<String, PathBuf>,
    /// Built-in modules, if known.
    built_in: Option<Vec<String>>,
    place: PathBuf,
}

impl Index {
    fn of_dir(dir: &Path) -> Result<Index> {
        let list = dir.join("load");
        let text = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
        let files = text.lines().map(|line| (name_of(line), dir.join(line))).collect();
        Ok(Index { files, built_in: None, place: dir.to_owned() })
    }

    fn of_tree(tree: &Path) -> Result<Index> {
        let read = |name: &str| {
            let path = tree.join(name);
            fs::read_to_string(&path).with_context(|| format!("read {} (run `sudo depmod`)", path.display()))
        };
        let dependencies = read("modules.dep")?;
        let paths = dependencies.lines().filter_map(|line| line.split_once(':'));
        let files = paths.map(|(path, _)| (name_of(path), tree.join(path))).collect();
        let built_in = read("modules.builtin")?.lines().map(name_of).collect();
        Ok(Index { files, built_in: Some(built_in), place: tree.to_owned() })
    }
}

/// The module name of a path: `kernel/fs/erofs/erofs.ko.xz` is `erofs`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

struct Search {
    index: Index,
    cache: Option<Cache>,
    under_way: Vec<String>,
    found: Vec<Module>,
}

impl Search {
    /// Adds a module after its dependencies.
    fn add(&mut self, driver: &str, needed: bool) -> Result<()> {
        let name = driver.replace('-', "_");
        if self.found.iter().any(|module| module.name == name) || self.under_way.contains(&name) {
            return Ok(());
        }
        let Some(path) = self.index.files.get(&name) else {
            let built_in = self.index.built_in.as_ref().is_none_or(|all| all.contains(&name));
            ensure!(built_in || !needed, "the kernel of {} has no driver {driver}", self.index.place.display());
            return Ok(());
        };
        let content = read(path, self.cache.as_ref()).with_context(|| format!("read module {}", path.display()))?;
        self.under_way.push(name.clone());
        for list in values(&content, b"depends=") {
            for dependency in list.split(',') {
                self.add(dependency, true)?;
            }
        }
        // A soft dependency, loaded if it is a module.
        for list in values(&content, b"softdep=").filter_map(|list| list.strip_prefix("pre:")) {
            for name in list.split_whitespace().take_while(|name| !name.ends_with(':')) {
                self.add(name, false)?;
            }
        }
        self.under_way.pop();
        self.found.push(Module { name, content });
        Ok(())
    }
}

/// The values of a key in a module's `.modinfo` section, which consists of NUL-terminated strings.
fn values<'a>(content: &'a [u8], key: &'a [u8]) -> impl Iterator<Item = &'a str> {
    content
        .split(|&byte| byte == 0)
        .filter_map(move |text| text.strip_prefix(key))
        .filter_map(|value| std::str::from_utf8(value).ok())
        .filter(|value| !value.is_empty())
}

/// The uncompressed content of a module's file. Signatures cover the uncompressed module, so nothing else changes.
fn read(path: &Path, cache: Option<&Cache>) -> Result<Vec<u8>> {
    let file = File::open(path)?;
    let is_packed = path.extension().is_some_and(|extension| extension != "ko");
    let Some(cache) = cache.filter(|_| is_packed) else { return unpack(&file) };
    let Identity { name, settled } = Identity::of(&file)?;
    let name = format!("{name}.ko");
    if let Some(content) = cached(cache, &name) {
        return Ok(content);
    }
    let content = unpack(&file)?;
    if settled && let Err(error) = cache.fill(&name, |mut file| Ok(file.write_all(&content)?)) {
        log::info!("the decompressed module {} is not cached: {error:#}", path.display());
    }
    Ok(content)
}

/// The entry in the cache, if it is intact.
fn cached(cache: &Cache, name: &str) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    cache.open(name)?.take(MODULE_MAX_BYTES).read_to_end(&mut content).ok()?;
    is_whole(&content).then_some(content)
}

fn unpack(file: &File) -> Result<Vec<u8>> {
    let mut packed = Vec::new();
    file.take(MODULE_MAX_BYTES + 1).read_to_end(&mut packed)?;
    let mut unpacked = None;
    if let Some(reader) = unpacking_reader(&packed)? {
        let content = unpacked.insert(Vec::new());
        reader.take(MODULE_MAX_BYTES + 1).read_to_end(content)?;
    }
    let content = unpacked.unwrap_or(packed);
    ensure!(content.len() as u64 <= MODULE_MAX_BYTES, "too large for a kernel module");
    if !content.starts_with(MAGIC) {
        bail!("not a kernel module");
    }
    Ok(content)
}

/// Whether an ELF file includes its section headers, which are at the end (System V ABI: `e_shoff`, `e_shentsize`,
/// `e_shnum`).
fn is_whole(content: &[u8]) -> bool {
    const TABLE_AT: usize = 0x28;
    const ENTRY_BYTES_AT: usize = 0x3a;
    let half = |at: usize| content.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes);
    let end = || {
        let table = u64::from_le_bytes(content.get(TABLE_AT..TABLE_AT + 8)?.try_into().ok()?);
        let bytes = u64::from(half(ENTRY_BYTES_AT)?) * u64::from(half(ENTRY_BYTES_AT + 2)?);
        table.checked_add(bytes)
    };
    content.starts_with(MAGIC) && end().is_some_and(|end| end <= content.len() as u64)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::boot::sample;

    /// A minimal module: an ELF header, the content of `.modinfo`, and an empty section table.
    fn module(info: &[&str]) -> Vec<u8> {
        let mut content = [b"\x7fELF".to_vec(), vec![0; 60], info.join("\0").into_bytes(), vec![0]].concat();
        let end = content.len() as u64;
        content[0x28..0x30].copy_from_slice(&end.to_le_bytes());
        content
    }

    /// A module tree in which `c` is compressed and depends on `a-b`, which depends on `d`.
    fn tree() -> (TempDir, Modules) {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let list = "kernel/c.ko.gz: kernel/a-b.ko\nkernel/a-b.ko:\nkernel/d.ko:\nkernel/loop1.ko:\nkernel/loop2.ko:\n";
        fs::create_dir(at("kernel")).unwrap();
        fs::write(at("modules.dep"), list).unwrap();
        fs::write(at("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let c = module(&["depends=a-b", "softdep=pre: d missing post: loop1"]);
        fs::write(at("kernel/c.ko.gz"), sample::packed(&c, "gzip -n").expect("gzip is part of every Debian")).unwrap();
        fs::write(at("kernel/a-b.ko"), module(&["name=a_b", "depends=d,ext4"])).unwrap();
        fs::write(at("kernel/d.ko"), module(&["depends="])).unwrap();
        fs::write(at("kernel/loop1.ko"), module(&["depends=loop2"])).unwrap();
        fs::write(at("kernel/loop2.ko"), module(&["depends=loop1"])).unwrap();
        let modules = Modules::Tree(dir.path().to_owned());
        (dir, modules)
    }

    fn names(modules: &Modules, drivers: &[&str]) -> Result<Vec<String>> {
        Ok(find_with_cache(modules, drivers, None)?.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn a_module_follows_its_dependencies_once() {
        let (_dir, modules) = tree();
        assert_eq!(names(&modules, &["c", "a_b", "d"]).unwrap(), ["d", "a_b", "c"]);
        assert_eq!(names(&modules, &["loop1"]).unwrap(), ["loop2", "loop1"]);
    }

    #[test]
    fn a_compressed_module_is_unpacked() {
        let (_dir, modules) = tree();
        assert!(
            find_with_cache(&modules, &["c"], None)
                .unwrap()
                .iter()
                .all(|module| module.content.starts_with(b"\x7fELF"))
        );
    }

    #[test]
    fn a_compressed_module_is_cached() {
        let (dir, modules) = tree();
        let cache = dir.path().join("cache");
        let entries = || -> Vec<PathBuf> { fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect() };
        let find = || {
            let found = find_with_cache(&modules, &["c"], Some(Cache::at(&cache, CACHED_MODULES))).unwrap();
            found.into_iter().find(|module| module.name == "c").unwrap().content
        };
        let content = find();
        assert!(!cache.exists(), "it may change in the same tick of the clock");
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!(find(), content);
        let [entry] = entries().try_into().expect("those that are not packed are not kept");
        let other = module(&["depends="]);
        fs::write(&entry, &other).unwrap();
        assert_eq!(find(), other, "it is the one that is kept");
        // A damaged entry is ignored.
        for damaged in [&content[..content.len() - 1], b"\x7fELF", b""] {
            fs::write(&entry, damaged).unwrap();
            assert_eq!(find(), content);
        }
        // Replaces the module.
        fs::write(dir.path().join("kernel/c.ko.gz"), sample::packed(&other, "gzip -n").unwrap()).unwrap();
        assert_eq!(find(), other);
        assert_eq!(entries().len(), 1);
    }

    #[test]
    fn built_in_drivers_are_skipped_and_missing_ones_reported() {
        let (_dir, modules) = tree();
        assert_eq!(names(&modules, &["ext4", "xfs?"]).unwrap(), [""; 0]);
        assert!(names(&modules, &["xfs"]).unwrap_err().to_string().ends_with("has no driver xfs"));
        assert_eq!(names(&Modules::BuiltIn, &["xfs"]).unwrap(), [""; 0]);
    }

    #[test]
    fn a_module_directory_is_indexed() {
        let (dir, _) = tree();
        let kernel = dir.path().join("kernel");
        fs::write(kernel.join("load"), "d.ko\na-b.ko\n").unwrap();
        assert_eq!(names(&Modules::Directory(kernel), &["a-b", "erofs"]).unwrap(), ["d", "a_b"]);
    }

    #[test]
    fn an_invalid_module_is_rejected() {
        let (dir, modules) = tree();
        fs::write(dir.path().join("kernel/d.ko"), "text").unwrap();
        assert!(format!("{:#}", names(&modules, &["d"]).unwrap_err()).ends_with("d.ko: not a kernel module"));
    }
}
