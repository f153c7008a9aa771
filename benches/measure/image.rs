//! Throughput of preparing an image.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use husk::image::{Form, Progress, Source, Store};

use crate::{Target, median, report};

const RUNS: usize = 3;
/// A mix of programs, libraries and texts that every Linux host has, similar to an image.
const CONTENT: &str = "find /usr/bin /usr/share/doc /usr/share/perl* -type f -size -20M -print0 2>/dev/null \
    | head -z -n 20000 | tar --null -T - --ignore-failed-read -cf content.tar 2>/dev/null; test -s content.tar; \
    gzip -6 -k content.tar";

/// Plain and gzip-compressed archives, to plain and LZ4-compressed roots.
pub fn prepare() -> Result<()> {
    let dir = tempfile::tempdir().context("create a temporary directory")?;
    let made = Command::new("bash").args(["-ec", CONTENT]).current_dir(dir.path()).status()?;
    ensure!(made.success(), "tar failed");
    let megabytes = fs::metadata(dir.path().join("content.tar"))?.len() as f64 / 1e6;
    report("size of the archive", megabytes, "MB", Target::None);
    for (name, file, form) in [
        ("archive to LZ4 root", "content.tar", Form::Lz4),
        ("gzip archive to LZ4 root", "content.tar.gz", Form::Lz4),
        ("archive to plain root", "content.tar", Form::Plain),
        ("gzip archive to plain root", "content.tar.gz", Form::Plain),
    ] {
        let mut speeds = Vec::new();
        let mut root_bytes = 0;
        for run in 0..RUNS {
            let store = dir.path().join(format!("store-{file}-{form:?}-{run}"));
            let (seconds, bytes) = once(&dir.path().join(file), &store, form)?;
            speeds.push(megabytes / seconds);
            root_bytes = bytes;
            fs::remove_dir_all(&store)?;
        }
        report(name, median(speeds), "MB/s", Target::None);
        report(&format!("{name}: relative size"), root_bytes as f64 / 1e4 / megabytes, "%", Target::None);
    }
    let store = dir.path().join("store");
    once(&dir.path().join("content.tar"), &store, Form::Lz4)?;
    let (seconds, _) = once(&dir.path().join("content.tar"), &store, Form::Lz4)?;
    report("same archive again", seconds * 1e3, "ms", Target::Below(10.0));
    Ok(())
}

/// Returns the seconds to prepare an image, and the size of the root.
fn once(archive: &Path, store: &Path, form: Form) -> Result<(f64, u64)> {
    let mut store = Store::open(store)?;
    store.form = form;
    let source = Source::Path { path: archive.to_owned(), image: None };
    let start = Instant::now();
    let prepared = store.prepare(&source, Progress::Hidden)?;
    Ok((start.elapsed().as_secs_f64(), fs::metadata(prepared.root)?.len()))
}
