//! `husk system df`: shows the disk usage.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use indicatif::HumanBytes;

use crate::cli::exit::Exit;
use crate::cli::list::{Columns, ListFlags, Row};
use crate::cli::reach;
use crate::image::{Listed, Store};
use crate::state_dir::record::Record;
use crate::state_dir::{MachineEntry, StateDir};
use crate::sys::disk::allocated_bytes;

const COLUMNS: Columns = Columns {
    all: &[
        ("Type", "TYPE"),
        ("TotalCount", "TOTAL"),
        ("Active", "ACTIVE"),
        ("Size", "SIZE"),
        ("Reclaimable", "RECLAIMABLE"),
    ],
    shown: &["Type", "TotalCount", "Active", "Size", "Reclaimable"],
    key: "Type",
    filters: &[],
};

/// Files deeper in a volume are not counted.
const DEPTH_MAX: usize = 64;

#[derive(Debug, Args)]
pub(super) struct Df {
    /// Also list each image, machine, disk and volume
    #[arg(short = 'v')]
    shows_all: bool,

    #[command(flatten)]
    list: ListFlags,
}

/// A thing that takes disk space.
struct Item {
    name: String,
    bytes: u64,
    is_active: bool,
}

impl Df {
    /// Prints a row for each kind of data, and with -v also each thing.
    pub fn run(self) -> Result<Exit> {
        self.list.filters(&COLUMNS)?;
        let store = Store::open_default()?;
        let machines = reach::machines(&StateDir::open()?)?;
        let images = store.list()?;
        let kinds = [
            ("Images", images_of(&store, &images, &machines)),
            ("Layers", layers(&images)),
            ("Warm images", warm(&images)),
            ("Machines", machines.iter().map(machine).collect()),
            ("Disks", disks(&store)?),
            ("Volumes", volumes(&store)?),
        ];
        self.list.print(&COLUMNS, kinds.iter().map(|(kind, items)| row(kind, items)).collect())?;
        if self.shows_all {
            for (kind, items) in kinds.iter().filter(|(_, items)| !items.is_empty()) {
                let mut rows = vec![[kind.to_uppercase(), "SIZE".to_owned(), "STATE".to_owned()]];
                rows.extend(items.iter().map(|item| {
                    let state = if item.is_active { "in use" } else { "free" };
                    [item.name.clone(), HumanBytes(item.bytes).to_string(), state.to_owned()]
                }));
                crate::cli::print(&format!("\n{}", crate::cli::images::table(&rows)))?;
            }
        }
        Ok(Exit::Success)
    }
}

fn row(kind: &str, items: &[Item]) -> Row {
    let total: u64 = items.iter().map(|item| item.bytes).sum();
    let free: u64 = items.iter().filter(|item| !item.is_active).map(|item| item.bytes).sum();
    let percent = (free * 100).checked_div(total).unwrap_or(0);
    Row::new(
        [
            ("Type", kind.to_owned()),
            ("TotalCount", items.len().to_string()),
            ("Active", items.iter().filter(|item| item.is_active).count().to_string()),
            ("Size", HumanBytes(total).to_string()),
            ("Reclaimable", format!("{} ({percent}%)", HumanBytes(free))),
        ],
        &BTreeMap::new(),
    )
}

/// The root file systems; those of machines, running or not, are in use.
fn images_of(store: &Store, images: &[Listed], machines: &[MachineEntry]) -> Vec<Item> {
    let disks = machines.iter().filter_map(|machine| machine.record.as_ref()).flat_map(|record| &record.config.disks);
    let used: BTreeSet<&Path> = disks.map(|disk| disk.path.as_path()).collect();
    let item = |image: &Listed| Item {
        name: name(image),
        bytes: image.root_bytes,
        is_active: used.contains(store.root_of(image).as_path()),
    };
    images.iter().map(item).collect()
}

fn name(image: &Listed) -> String {
    image.names.first().cloned().unwrap_or_else(|| image.id.short())
}

/// Layers are only needed for other versions of images, and to save them.
fn layers(images: &[Listed]) -> Vec<Item> {
    let of = |image: &Listed| Item { name: name(image), bytes: image.layer_bytes, is_active: false };
    images.iter().filter(|image| image.layer_bytes > 0).map(of).collect()
}

fn warm(images: &[Listed]) -> Vec<Item> {
    let of = |image: &Listed| Item { name: name(image), bytes: image.warm_bytes, is_active: true };
    images.iter().filter(|image| image.warm_bytes > 0).map(of).collect()
}

/// What a machine has written: its logs, and the disks that are its own.
fn machine(entry: &MachineEntry) -> Item {
    let paths = |record: &Record| -> Vec<PathBuf> {
        let pid = if entry.alive { record.pid } else { 0 };
        let own = record.config.disks.iter().filter(|disk| !disk.readonly);
        own.map(|disk| disk.path_in(pid)).collect()
    };
    let files = entry.record.iter().flat_map(paths).filter_map(|path| fs::metadata(path).ok());
    let disk_bytes: u64 = files.map(|found| allocated_bytes(&found)).sum();
    let dir_bytes = entry.file("").parent().map_or(0, |dir| tree_bytes(dir, 1));
    Item { name: entry.name().to_owned(), bytes: dir_bytes + disk_bytes, is_active: entry.alive }
}

fn disks(store: &Store) -> Result<Vec<Item>> {
    let item = |disk: crate::image::Kept| Item { name: disk.name, bytes: disk.disk_bytes, is_active: disk.in_use };
    Ok(store.kept_disks()?.into_iter().map(item).collect())
}

fn volumes(store: &Store) -> Result<Vec<Item>> {
    let item = |volume: crate::image::volumes::Volume| Item {
        bytes: tree_bytes(&volume.path, DEPTH_MAX),
        name: volume.name,
        is_active: volume.in_use,
    };
    Ok(store.volumes()?.into_iter().map(item).collect())
}

/// The disk usage of the files in a folder. Links are not followed.
fn tree_bytes(dir: &Path, depth: usize) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() && depth > 0 => tree_bytes(&entry.path(), depth - 1),
        Ok(found) => allocated_bytes(&found),
        Err(_) => 0,
    };
    entries.map(bytes).sum()
}
