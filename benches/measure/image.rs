//! Throughput of preparing an image.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use husk::image::{Form, Progress, Source, Store};

use crate::{Aim, median, report};

const RUNS: usize = 3;
/// A mix of programs, libraries and texts that every Linux host has, similar to an image.
const CONTENT: &str = "find /usr/bin /usr/share/doc /usr/share/perl* -type f -size -20M -print0 2>/dev/null \
    | head -z -n 20000 | tar --null -T - --ignore-failed-read -cf content.tar 2>/dev/null; test -s content.tar; \
    gzip -6 -k content.tar";

/// Plain and gzip-compressed archives, to plain and LZ4-compressed roots.
pub fn prepare() -> Result<()> {
    let folder = tempfile::tempdir().context("make a folder")?;
    let made = Command::new("bash").args(["-ec", CONTENT]).current_dir(folder.path()).status()?;
    ensure!(made.success(), "tar makes no archive");
    let megabytes = fs::metadata(folder.path().join("content.tar"))?.len() as f64 / 1e6;
    report("the archive that is prepared", megabytes, "MB", Aim::None);
    for (name, file, form) in [
        ("archive to LZ4 root", "content.tar", Form::Lz4),
        ("gzip archive to LZ4 root", "content.tar.gz", Form::Lz4),
        ("archive to plain root", "content.tar", Form::Plain),
        ("gzip archive to plain root", "content.tar.gz", Form::Plain),
    ] {
        let mut speeds = Vec::new();
        let mut root_bytes = 0;
        for run in 0..RUNS {
            let store = folder.path().join(format!("store-{file}-{form:?}-{run}"));
            let (seconds, bytes) = once(&folder.path().join(file), &store, form)?;
            speeds.push(megabytes / seconds);
            root_bytes = bytes;
            fs::remove_dir_all(&store)?;
        }
        report(name, median(speeds), "MB/s", Aim::None);
        report(&format!("{name}: its size, as a share"), root_bytes as f64 / 1e4 / megabytes, "%", Aim::None);
    }
    let store = folder.path().join("store");
    once(&folder.path().join("content.tar"), &store, Form::Lz4)?;
    let (seconds, _) = once(&folder.path().join("content.tar"), &store, Form::Lz4)?;
    report("the same archive again", seconds * 1e3, "ms", Aim::Below(10.0));
    Ok(())
}

/// Returns the seconds to prepare an image, and the size of the root.
fn once(archive: &Path, store: &Path, form: Form) -> Result<(f64, u64)> {
    let mut store = Store::open(store)?;
    store.form = form;
    let source = Source::Path { path: archive.to_owned(), image: None };
    let start = Instant::now();
    let prepared = store.prepare(&source, &Progress::hidden())?;
    Ok((start.elapsed().as_secs_f64(), fs::metadata(prepared.root)?.len()))
}
