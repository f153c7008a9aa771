//! Ways in which the memory of a restored machine can come back from its file: how long it takes until what a guest uses first was
//! touched, and how many page faults it costs. No guest is involved, but the file is like that of a warm image with Debian.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Advice as FileAdvice, fadvise};

use crate::median;
use crate::pages::{Advice, Memory, PAGE, cached, faults, may_answer};

const RUNS: usize = 11;
const BLOCK: usize = 2 << 20;
const BLOCK_PAGES: usize = BLOCK / PAGE;
/// The blocks that have content.
const BLOCKS: usize = 19;
/// The pages that have content, and those of them that are touched, in so many runs of consecutive pages.
const CONTENT_PAGES: usize = 7000;
const TOUCHED_PAGES: usize = 2000;
const RUN_COUNT: usize = 400;
/// The lengths of runs, over and over: half of them are of one or two pages, and a tenth has half of all pages.
const RUN_LENS: [usize; 10] = [1, 3, 1, 27, 2, 1, 8, 2, 1, 4];

/// Consecutive pages that are touched: all read, or all written to.
#[derive(Clone)]
struct Run {
    pages: Range<usize>,
    is_written: bool,
}

/// The file of a machine's memory, and what its guest does with it.
struct Saved {
    file: File,
    len_bytes: usize,
    blocks: Vec<Range<usize>>,
    content: Vec<usize>,
    /// In the order of their places.
    runs: Vec<Run>,
    /// In the order in which the guest gets to them.
    touched: Vec<Run>,
}

impl Saved {
    fn new(memory_mib: usize) -> Result<Saved> {
        let len_bytes = memory_mib << 20;
        let distance = len_bytes / BLOCK / BLOCKS * BLOCK_PAGES;
        let blocks: Vec<_> = (0..BLOCKS).map(|block| block * distance..block * distance + BLOCK_PAGES).collect();
        let in_block = CONTENT_PAGES.div_ceil(BLOCKS);
        let content: Vec<_> = (0..CONTENT_PAGES).map(|index| index / in_block * distance + index % in_block).collect();
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR"))?;
        file.set_len(len_bytes as u64)?;
        for page in &content {
            let mut bytes = [0x5a; PAGE];
            bytes[..8].copy_from_slice(&stamp(*page).to_ne_bytes());
            file.write_all_at(&bytes, (page * PAGE) as u64)?;
        }
        file.sync_all()?;
        let runs = runs(&content);
        let mut touched = runs.clone();
        fastrand::Rng::with_seed(1).shuffle(&mut touched);
        Ok(Saved { file, len_bytes, blocks, content, runs, touched })
    }

    /// Puts the content in the page cache, or all of the file out of it.
    fn cache(&self, is_cached: bool) -> Result<()> {
        let mut found = 0;
        // Pages that were unmapped just now may still be in use by the kernel.
        for _ in 0..100 {
            if is_cached {
                let read = |page: &usize| self.file.read_exact_at(&mut [0; PAGE], (page * PAGE) as u64);
                self.content.iter().try_for_each(read)?;
            } else {
                fadvise(&self.file, 0, None, FileAdvice::DontNeed)?;
            }
            found = self.blocks.iter().map(|block| cached(&self.file, block)).sum::<Result<usize>>()?;
            let is_done = if is_cached { found >= CONTENT_PAGES } else { found == 0 };
            if is_done {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!("{found} pages are in the page cache: set CARGO_TARGET_DIR to a directory on a disk")
    }
}

/// Which of the pages are touched: a third of the runs is written to.
fn runs(content: &[usize]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let (mut at, untouched) = (0, CONTENT_PAGES - TOUCHED_PAGES);
    for (index, len) in RUN_LENS.iter().cycle().take(RUN_COUNT).enumerate() {
        let is_written = index % 3 == 0;
        for page in &content[at..at + len] {
            match runs.last_mut() {
                // Runs end with their block, and there is something between two of them.
                Some(run) if run.pages.end == *page => run.pages.end += 1,
                _ => runs.push(Run { pages: *page..page + 1, is_written }),
            }
        }
        at += len + (index + 1) * untouched / RUN_COUNT - index * untouched / RUN_COUNT;
    }
    runs
}

/// The first number of a page with content.
fn stamp(page: usize) -> u64 {
    page as u64 + 1
}

/// A way to get memory ready, and its name.
type Way = (&'static str, fn(&Saved) -> Result<Memory>);

const WAYS: [Way; 7] = [
    ("private mapping", mapped),
    ("  populated before, where it is used", |saved| {
        let memory = mapped(saved)?;
        for Run { pages, is_written } in &saved.runs {
            memory.advise(pages, if *is_written { Advice::PopulateWrite } else { Advice::PopulateRead })?;
        }
        Ok(memory)
    }),
    ("  read ahead (MADV_WILLNEED), where it is used", |saved| {
        let memory = mapped(saved)?;
        saved.runs.iter().try_for_each(|run| memory.advise(&run.pages, Advice::WillNeed))?;
        Ok(memory)
    }),
    ("  replaced by copies, where it is used", |saved| {
        let memory = mapped(saved)?;
        saved.runs.iter().try_for_each(|run| memory.read(&saved.file, &run.pages, false))?;
        Ok(memory)
    }),
    ("  replaced by copies, as huge pages", |saved| {
        let memory = mapped(saved)?;
        saved.blocks.iter().try_for_each(|block| memory.read(&saved.file, block, true))?;
        Ok(memory)
    }),
    ("userfaultfd, a page at once", |saved| Memory::answered(&saved.file, saved.len_bytes, 1)),
    ("userfaultfd, 16 pages at once", |saved| Memory::answered(&saved.file, saved.len_bytes, 16)),
];

fn mapped(saved: &Saved) -> Result<Memory> {
    Memory::of_file(&saved.file, saved.len_bytes)
}

/// What one run costs.
struct Cost {
    ready: Duration,
    touched: Duration,
    faults: [f64; 2],
}

/// All ways in turn, with a file that is in the page cache and with one that is not.
pub fn ways() -> Result<()> {
    let permitted = may_answer();
    if let Err(error) = &permitted {
        eprintln!("restored-pages: SKIPPED all rows of userfaultfd: {error:#}");
    }
    let ways = if permitted.is_ok() { &WAYS[..] } else { &WAYS[..5] };
    println!(
        "from mapping memory until {TOUCHED_PAGES} pages were touched, the part of it after everything was got ready,"
    );
    println!("its ratio to the first way in the same round, and page faults without and with the disk");
    for memory_mib in [128, 512, 4096] {
        let saved = Saved::new(memory_mib)?;
        for is_cached in [true, false] {
            println!("{memory_mib} MiB, {} the page cache", if is_cached { "in" } else { "not in" });
            let mut costs: Vec<Vec<Cost>> = ways.iter().map(|_| Vec::new()).collect();
            for _ in 0..RUNS {
                for ((name, prepare), costs) in ways.iter().zip(&mut costs) {
                    saved.cache(is_cached)?;
                    costs.push(cost(&saved, *prepare).with_context(|| name.trim().to_owned())?);
                }
            }
            for ((name, _), cost) in ways.iter().zip(&costs) {
                print(name, cost, &costs[0]);
            }
        }
    }
    Ok(())
}

fn cost(saved: &Saved, prepare: fn(&Saved) -> Result<Memory>) -> Result<Cost> {
    let before = faults()?;
    let start = Instant::now();
    let memory = prepare(saved)?;
    let ready = start.elapsed();
    let mut is_right = true;
    for Run { pages, is_written } in &saved.touched {
        for page in pages.clone() {
            is_right &= memory.touch(page, *is_written) == stamp(page);
        }
    }
    let touched = start.elapsed();
    let after = faults()?;
    // The guest may go on with any other page.
    is_right &= saved.content.iter().all(|page| memory.touch(*page, false) == stamp(*page));
    is_right &= memory.touch(saved.len_bytes / PAGE - 1, false) == 0;
    memory.finish()?;
    ensure!(is_right, "the memory has not the content of its file");
    Ok(Cost { ready, touched, faults: [0, 1].map(|kind| (after[kind] - before[kind]) as f64) })
}

fn print(name: &str, costs: &[Cost], first: &[Cost]) {
    let of = |value: fn(&Cost) -> f64| median(costs.iter().map(value).collect());
    let total = of(|cost| cost.touched.as_secs_f64() * 1e3);
    let rest = of(|cost| (cost.touched - cost.ready).as_secs_f64() * 1e3);
    let ratios = costs.iter().zip(first).map(|(cost, first)| cost.touched.as_secs_f64() / first.touched.as_secs_f64());
    let [minor, major] = [of(|cost| cost.faults[0]), of(|cost| cost.faults[1])];
    println!(
        "{name:<52}{total:>12.3} ms     {rest:>8.3} ms {:>6.2} {minor:>6.0} + {major:.0}",
        median(ratios.collect())
    );
}
