//! Simulates a power failure at every write, and tests that the image stays valid.
//!
//! Everything written before the last sync is preserved. Of later writes, any subset of sectors may be.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use super::super::Operation;
use super::medium::Medium;
use super::tests::{Disk, dir, pattern, qemu_img};
use super::*;

const SECTOR: usize = 512;
const SECTORS: u64 = 1024;

/// The operations on a file, in order.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<Event>>>);

#[derive(Clone)]
enum Event {
    Write(usize, Vec<u8>),
    Sync,
}

impl Log {
    pub fn write(&self, offset_bytes: u64, bytes: Vec<u8>) {
        self.0.lock().unwrap().push(Event::Write(offset_bytes as usize, bytes));
    }

    pub fn sync(&self) {
        self.0.lock().unwrap().push(Event::Sync);
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} events", self.len())
    }
}

/// A change of the disk, and the range of its events.
struct Step {
    events: Range<usize>,
    sectors: Range<u64>,
    /// The content of the sectors afterwards; `None` if they may contain zeroes or the previous content.
    tag: Option<u64>,
    flush: bool,
}

struct Run {
    base: Vec<u8>,
    events: Vec<Event>,
    steps: Vec<Step>,
    scratch: PathBuf,
    /// A raw backing file.
    backing: Option<PathBuf>,
}

fn open_raw(backing: Option<&Path>) -> Option<Backing> {
    backing.map(|path| Backing::raw(File::open(path).unwrap()).unwrap())
}

/// Sectors filled with a tag.
fn sectors(tag: u64, count: u64) -> Vec<u8> {
    tag.to_le_bytes().repeat(SECTOR / 8 * count as usize)
}

impl Run {
    /// Executes `count` random operations, chosen by `seed`, on the image at `path`, which reads as zeroes.
    fn record(path: &Path, seed: u64, count: u64) -> Run {
        Run::record_over(path, None, seed, count)
    }

    /// Executes them on an image with this backing file.
    fn record_over(path: &Path, backing: Option<PathBuf>, seed: u64, count: u64) -> Run {
        let base = fs::read(path).unwrap();
        let log = Log::default();
        let mut medium = Medium::new(File::options().read(true).write(true).open(path).unwrap()).unwrap();
        medium.log = Some(log.clone());
        let mut disk = Disk::new(Qcow2Disk::on(medium, false, open_raw(backing.as_deref())).unwrap());
        let mut steps = Vec::new();
        let mut numbers = pattern(seed);
        let mut number = |limit: u64| numbers.next().unwrap() % limit;
        for tag in 1..=count {
            let start = log.len();
            let len = 1 + number(if tag % 5 == 0 { 200 } else { 20 });
            // Mostly in a small area, so that clusters are freed and reused.
            let first = number(if tag % 3 == 0 { SECTORS - len } else { 300 });
            let (len_bytes, at) = (len * 512, first * 512);
            let (operation, tag, flush) = match number(10) {
                0 | 1 => (Operation::Flush, None, true),
                2 | 3 => (Operation::Discard { len_bytes }, None, false),
                4 => (Operation::WriteZeroes { len_bytes, unmap: number(2) == 0 }, Some(0), false),
                _ => (Operation::Write, Some(tag), false),
            };
            match operation {
                Operation::Write => disk.write(at, &sectors(tag.unwrap(), len)),
                _ => disk.run(operation, at, &[]).unwrap(),
            }
            let sectors = if flush { 0..0 } else { first..first + len };
            steps.push(Step { events: start..log.len(), sectors, tag, flush });
        }
        drop(disk);
        let events = log.0.lock().unwrap().clone();
        Run { base, events, steps, scratch: path.with_extension("cut"), backing }
    }

    /// The image contained `count` sectors with this tag before.
    fn contained(&mut self, tag: u64, count: u64) {
        self.steps.insert(0, Step { events: 0..0, sectors: 0..count, tag: Some(tag), flush: false });
        self.steps.insert(1, Step { events: 0..0, sectors: 0..0, tag: None, flush: true });
    }

    /// The possible contents of each sector after a power failure after `cut` events.
    fn allowed(&self, cut: usize) -> Vec<Vec<u64>> {
        let mut allowed = vec![vec![0]; SECTORS as usize];
        for step in self.steps.iter().take_while(|step| step.events.start < cut || step.events.is_empty()) {
            if step.flush && step.events.end <= cut {
                // Only the last write is possible, unless the sector was discarded since.
                continue;
            }
            for sector in step.sectors.clone() {
                let durable = self.flushed_behind(step, cut);
                let tags = &mut allowed[sector as usize];
                match step.tag {
                    Some(tag) if durable => *tags = vec![tag],
                    tag => tags.push(tag.unwrap_or(0)),
                }
            }
        }
        allowed
    }

    /// Whether a flush that started after `step` was completed before `cut`.
    fn flushed_behind(&self, step: &Step, cut: usize) -> bool {
        let mut flushes = self.steps.iter().filter(|flush| flush.flush && flush.events.end <= cut);
        flushes.next_back().is_some_and(|flush| flush.events.start >= step.events.end)
    }

    /// The file after a power failure after `cut` events, with the sectors since the last sync that `keep` selects.
    fn file(&self, cut: usize, mut keep: impl FnMut() -> bool) -> Vec<u8> {
        let events = &self.events[..cut];
        let synced = events.iter().rposition(|event| matches!(event, Event::Sync)).unwrap_or(0);
        let mut file = self.base.clone();
        for (index, event) in events.iter().enumerate() {
            let Event::Write(at, bytes) = event else { continue };
            if bytes.is_empty() && (index < synced || keep()) {
                file.resize(file.len().max(*at), 0);
            }
            let mut done = 0;
            while done < bytes.len() {
                let step = (SECTOR - (at + done) % SECTOR).min(bytes.len() - done);
                if index < synced || keep() {
                    let (start, end) = (at + done, at + done + step);
                    file.resize(file.len().max(end), 0);
                    file[start..end].copy_from_slice(&bytes[done..done + step]);
                }
                done += step;
            }
        }
        file
    }

    /// Opens the resulting image, and checks that all durable data is there.
    fn check(&self, cut: usize, file: &[u8], with_qemu: bool) {
        fs::write(&self.scratch, file).unwrap();
        let open = || File::options().read(true).write(true).open(&self.scratch).unwrap();
        let disk = Qcow2Disk::open(open(), false, open_raw(self.backing.as_deref()))
            .unwrap_or_else(|refusal| panic!("behind event {cut}: {refusal}"));
        let mut disk = Disk::new(disk);
        let bytes = disk.read(0, SECTORS as usize * SECTOR);
        for (sector, (bytes, allowed)) in bytes.chunks(SECTOR).zip(self.allowed(cut)).enumerate() {
            let tag = u64::from_le_bytes(*bytes.first_chunk().unwrap());
            assert!(bytes == sectors(tag, 1), "behind event {cut}: sector {sector} is torn");
            assert!(allowed.contains(&tag), "behind event {cut}: sector {sector} is {tag}, not of {allowed:?}");
        }
        if with_qemu {
            // Continues to use it.
            (0..4).for_each(|step| disk.write(step * 90 * 512, &sectors(1 << 40, 50)));
            drop(disk);
            let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&self.scratch).output().unwrap();
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            // 3: only leaked clusters.
            assert!(matches!(output.status.code(), Some(0 | 3)), "behind event {cut}: {text}");
        }
    }

    /// Simulates a power failure after every event.
    fn cut_everywhere(&self, qemu_every: usize) {
        let mut numbers = pattern(77);
        for cut in 0..=self.events.len() {
            let with_qemu = cut % qemu_every == 0;
            self.check(cut, &self.file(cut, || true), with_qemu);
            // With different fractions of unsynced sectors.
            for odds in [2, 5] {
                self.check(cut, &self.file(cut, || numbers.next().unwrap().is_multiple_of(odds)), with_qemu);
            }
        }
    }
}

fn survives(options: &str, seed: u64, steps: u64) {
    let Some(dir) = dir() else { return };
    let path = dir.path().join("disk.qcow2");
    let size = (SECTORS * 512).to_string();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &size]);
    Run::record(&path, seed, steps).cut_everywhere(50);
}

#[test]
fn an_image_survives_a_power_failure_at_every_write() {
    survives("cluster_size=4096", 1, 45);
}

#[test]
fn an_image_with_small_clusters_and_wide_refcounts_survives_a_power_failure() {
    survives("cluster_size=512,refcount_bits=64", 2, 25);
}

#[test]
fn a_version_2_image_survives_a_power_failure() {
    survives("cluster_size=65536,compat=0.10", 3, 40);
}

/// The refcount table becomes too small in the process.
#[test]
fn an_image_whose_refcount_table_grows_survives_a_power_failure() {
    let Some(dir) = dir() else { return };
    let path = dir.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path.to_str().unwrap(), "4M"]);
    let mut disk =
        Disk::new(Qcow2Disk::open(File::options().read(true).write(true).open(&path).unwrap(), false, None).unwrap());
    // A refcount table cluster covers 4096 clusters, most of which are used by this and its metadata.
    disk.write(1 << 20, &vec![7; 3900 * 512 / 2]);
    disk.write(2 << 20, &vec![7; 3650 * 512 / 2]);
    drop(disk);
    let table = |bytes: &[u8]| bytes[48..56].to_vec();
    let run = Run::record(&path, 4, 14);
    assert!(table(&run.file(run.events.len(), || true)) != table(&run.base), "it did not move");
    run.cut_everywhere(60);
}

/// Clusters with several references: compressed ones and those of a snapshot.
#[test]
fn an_image_with_compressed_clusters_and_a_snapshot_survives_a_power_failure() {
    let Some(dir) = dir() else { return };
    for snapshot in [false, true] {
        let (raw, path) = (dir.path().join("plain"), dir.path().join("disk.qcow2"));
        fs::write(&raw, vec![0; SECTORS as usize * SECTOR]).unwrap();
        let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
        // Zeroes are omitted instead of compressed, so other data is used.
        fs::write(&raw, sectors(0x0101_0000, SECTORS)).unwrap();
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", from, to]);
        if snapshot {
            qemu_img(&["snapshot", "-c", "before", to]);
        }
        let mut run = Run::record(&path, 5 + u64::from(snapshot), 30);
        run.contained(0x0101_0000, SECTORS);
        run.cut_everywhere(60);
    }
}

/// What was discarded must neither reappear from the backing file, nor may copied clusters be torn.
#[test]
fn an_image_over_a_backing_file_survives_a_power_failure() {
    let Some(dir) = dir() else { return };
    for (options, steps) in [("cluster_size=4096", 45), ("cluster_size=65536,compat=0.10", 30)] {
        let (base, path) = (dir.path().join("base.img"), dir.path().join("disk.qcow2"));
        // It ends before the disk does.
        let count = SECTORS / 2 + 3;
        fs::write(&base, sectors(0x0101_0000, count)).unwrap();
        let (below, top, size) = (base.to_str().unwrap(), path.to_str().unwrap(), (SECTORS * 512).to_string());
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", below, "-o", options, top, &size]);
        let mut run = Run::record_over(&path, Some(base), 8, steps);
        run.contained(0x0101_0000, count);
        run.cut_everywhere(60);
    }
}

/// The state left by a writer with lazy refcounts that did not close the image.
#[test]
fn refcounts_are_repaired_with_few_syncs_and_survive_a_power_failure() {
    let Some(dir) = dir() else { return };
    let path = dir.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path.to_str().unwrap(), "4M"]);
    let open = || File::options().read(true).write(true).open(&path).unwrap();
    let mut disk = Disk::new(Qcow2Disk::open(open(), false, None).unwrap());
    disk.write(0, &sectors(1, SECTORS));
    drop(disk);
    // Removes all refcount blocks except the first.
    let mut base = fs::read(&path).unwrap();
    let table = u64::from_be_bytes(*base[48..].first_chunk().unwrap()) as usize;
    let entries = base[table..][..SECTOR].iter_mut().skip(8);
    entries.for_each(|byte| *byte = 0);
    fs::write(&path, &base).unwrap();
    let log = Log::default();
    let mut medium = Medium::new(open()).unwrap();
    medium.log = Some(log.clone());
    drop(Qcow2Disk::on(medium, false, None).unwrap());
    let events = log.0.lock().unwrap().clone();
    let syncs = events.iter().filter(|event| matches!(event, Event::Sync)).count();
    assert!(syncs < 6, "{syncs} syncs for {} blocks", SECTORS / 64);
    let steps = vec![
        Step { events: 0..0, sectors: 0..SECTORS, tag: Some(1), flush: false },
        Step { events: 0..0, sectors: 0..0, tag: None, flush: true },
    ];
    Run { base, events, steps, scratch: path.with_extension("cut"), backing: None }.cut_everywhere(20);
}
