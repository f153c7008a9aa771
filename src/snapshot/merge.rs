//! Makes a diff snapshot whole: the memory of its base with the pages that have changed.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{Base, Description, Parts, SnapshotWriter};
use crate::image::Progress;
use crate::resources::disk::copy;
use crate::sys;
use crate::sys::disk;

/// The maximum number of diff snapshots that are merged at once. Each has some open files.
const CHAIN_MAX: usize = 100;
const PAGE_BYTES: u64 = 4096;
/// The amount that is copied at once.
const PIECE_BYTES: usize = 1 << 20;

/// Writes the snapshot `diff`, which may have a base that has one itself, and so on, to the directory `out` as a whole one. Its base
/// is where it was, or at `base`. `out` is the same snapshot: its ID is that of `diff`.
pub fn merge(diff: &Path, base: Option<&Path>, out: &Path) -> Result<()> {
    let (whole, diffs) = chain(diff, base)?;
    let mut writer = SnapshotWriter::create(out)?;
    let Parts { description, state, disks, shares, .. } = diffs.first().unwrap_or(&whole);
    write(&whole, &diffs, writer.memory()).with_context(|| format!("write the snapshot {}", out.display()))?;
    disks.copy_to(&mut writer)?;
    let copy = |(index, file): (usize, &File)| copy::copy(file, &writer.share(index)?, &|| false, &|_| {});
    shares.iter().enumerate().try_for_each(copy).context("copy what the guest knows of a share")?;
    writer.finish(&Description { base: None, ..description.clone() }, state)
}

/// The whole snapshot at the end of the chain of bases, and the diff snapshots before it, from `diff`.
fn chain(diff: &Path, base: Option<&Path>) -> Result<(Parts, Vec<Parts>)> {
    let mut diffs = Vec::new();
    let mut parts = Parts::open(diff)?;
    ensure!(parts.changed.is_some(), "the snapshot {} is whole already", diff.display());
    while let Some(Base { path, id }) = parts.description.base.clone() {
        ensure!(
            diffs.len() < CHAIN_MAX,
            "more than {CHAIN_MAX} snapshots depend on each other: merge some of them first"
        );
        // Only that of the first one may have been moved.
        let path = base.filter(|_| diffs.is_empty()).unwrap_or(&path);
        let below = Parts::open(path).context("open the base")?;
        if below.description.id != id {
            let hint = if base.is_none() { ": name the base with --base if it was moved" } else { "" };
            bail!("{} is another snapshot than the base{hint}", path.display());
        }
        let (one, other) = (below.description.config.memory_mib, parts.description.config.memory_mib);
        ensure!(one == other, "the base has {one} MiB of memory instead of {other}");
        diffs.push(std::mem::replace(&mut parts, below));
    }
    Ok((parts, diffs))
}

fn write(whole: &Parts, diffs: &[Parts], memory: &File) -> Result<()> {
    let bar = Progress::on_terminal().bar("Merging", disk::allocated_bytes(&whole.memory.metadata()?));
    copy::copy(&whole.memory, memory, &|| false, &|bytes| bar.set(bytes))?;
    for diff in diffs.iter().rev() {
        let changed = diff.changed.as_ref().context("a diff snapshot without changes")?;
        apply(changed, &diff.memory, memory)?;
    }
    Ok(())
}

/// Replaces the pages of `to` whose bits are set in `changed` by those of `from`. Holes of `from` become holes. The bitmap, whose
/// lowest bit of the first byte is for the first page, has a bit for each page of both files at most.
pub fn apply(changed: &File, from: &File, to: &File) -> io::Result<()> {
    let mut bits = vec![0; usize::try_from(changed.metadata()?.len()).map_err(io::Error::other)?];
    changed.read_exact_at(&mut bits, 0)?;
    let mut piece = vec![0; PIECE_BYTES];
    for range in runs(&bits) {
        sys::disk::punch_hole(to, range.start, range.end - range.start)?;
        let mut at = range.start;
        while at < range.end
            && let Some(data) = sys::disk::next_data(from, at)?
        {
            at = data.start.max(at);
            let end = data.end.min(range.end);
            while at < end {
                let part = piece.get_mut(..PIECE_BYTES.min((end - at) as usize)).unwrap_or_default();
                from.read_exact_at(part, at)?;
                to.write_all_at(part, at)?;
                at += part.len() as u64;
            }
            at = at.max(data.end);
        }
    }
    Ok(())
}

/// The ranges of bytes of consecutive pages whose bits are set.
fn runs(bits: &[u8]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let set = |(index, byte): (usize, &u8)| {
        let byte = *byte;
        (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| (index * 8 + bit) as u64 * PAGE_BYTES)
    };
    for start in bits.iter().enumerate().filter(|(_, byte)| **byte != 0).flat_map(set) {
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += PAGE_BYTES,
            _ => runs.push(start..start + PAGE_BYTES),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    use super::super::tests::description;
    use super::super::{Snapshot, id_of};
    use super::*;

    const BYTES: usize = 32 << 20;

    /// Writes a snapshot whose memory has these pages, which are a diff to `base` if there is one.
    fn snapshot(dir: &Path, name: &str, base: Option<&Path>, pages: &[(u64, u8)]) -> PathBuf {
        let path = dir.join(name);
        let mut writer = SnapshotWriter::create(&path).unwrap();
        writer.memory().set_len(BYTES as u64).unwrap();
        let mut bits = vec![0_u8; BYTES / 4096 / 8];
        for (page, value) in pages {
            bits[*page as usize / 8] |= 1 << (page % 8);
            if *value != 0 {
                writer.memory().write_all_at(&[*value; 4096], page * 4096).unwrap();
            }
        }
        let id = format!("{name}{name}");
        let base = base.map(|path| Base { path: path.to_owned(), id: id_of(path).unwrap() });
        if base.is_some() {
            writer.changed().unwrap().write_all_at(&bits, 0).unwrap();
        }
        writer.finish(&Description { id, base, ..description() }, name.as_bytes()).unwrap();
        path
    }

    #[track_caller]
    fn refused(diff: &Path, base: Option<&Path>, words: &str) {
        let out = diff.with_file_name("refused");
        let error = format!("{:#}", merge(diff, base, &out).unwrap_err());
        assert!(error.contains(words) && !error.contains('\n') && !out.exists(), "{error}");
    }

    #[test]
    fn a_chain_is_merged_to_one_whole_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let whole = snapshot(dir.path(), "a", None, &[(0, 1), (7, 1), (8, 1), (9, 1), (8191, 1)]);
        let diff = snapshot(dir.path(), "b", Some(&whole), &[(7, 0), (8, 2), (100, 2), (101, 2)]);
        let last = snapshot(dir.path(), "c", Some(&diff), &[(100, 0), (8190, 3)]);
        let out = dir.path().join("out");
        merge(&last, None, &out).unwrap();
        let Snapshot { description, files, .. } = Snapshot::open(&out).unwrap();
        assert_eq!((description.id.as_str(), description.base, files.state), ("cc", None, b"c".to_vec()));
        let bytes = fs::read(out.join("memory")).unwrap();
        let found: Vec<_> = (0..8192).map(|page| (page, bytes[page * 4096])).filter(|(_, byte)| *byte != 0).collect();
        assert_eq!(found, [(0, 1), (8, 2), (9, 1), (101, 2), (8190, 3), (8191, 1)]);
        assert!(bytes.chunks(4096).all(|page| page.iter().all(|byte| *byte == page[0])));
        assert!(files.memory.metadata().unwrap().blocks() * 512 <= 64 << 10, "holes stay holes");
        let error = format!("{:#}", Snapshot::open(&last).map(drop).unwrap_err());
        assert!(error.contains("make it whole with `husk merge /") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_base_that_is_missing_changed_or_another_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let whole = snapshot(dir.path(), "a", None, &[(0, 1)]);
        let diff = snapshot(dir.path(), "b", Some(&whole), &[(1, 2)]);
        refused(&whole, None, "is whole already");
        let moved = dir.path().join("moved");
        fs::rename(&whole, &moved).unwrap();
        refused(&diff, None, "open the base: open the snapshot /");
        merge(&diff, Some(&moved), &dir.path().join("out")).unwrap();
        let other = snapshot(dir.path(), "a2", None, &[(0, 1)]);
        refused(&diff, Some(&other), "is another snapshot than the base");
        refused(&diff, Some(&diff), "is another snapshot than the base");
        fs::rename(&moved, &whole).unwrap();
        fs::remove_file(whole.join("state")).unwrap();
        refused(&diff, None, "it is incomplete");
        let changed = File::options().write(true).open(diff.join("changed")).unwrap();
        changed.set_len(1).unwrap();
        refused(&diff, None, "the file `changed` has 1 bytes instead of 1024");
        fs::remove_file(diff.join("changed")).unwrap();
        refused(&diff, None, "open the file `changed`: No such file");
    }

    #[test]
    fn runs_are_of_consecutive_pages() {
        let pages =
            |bits: &[u8]| runs(bits).into_iter().map(|run| (run.start / 4096, run.end / 4096)).collect::<Vec<_>>();
        assert_eq!(pages(&[0b1000_0011, 0b0000_0001, 0, 0xff]), [(0, 2), (7, 9), (24, 32)]);
        assert_eq!(pages(&[0; 64]), []);
    }
}
