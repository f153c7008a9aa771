//! Snapshots: the time until a restored guest answers, to save memory, and what many machines of one snapshot cost.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::memory::family;
use crate::{Target, boot, median, report};

const RUNS: usize = 50;
const CLONES: usize = 100;
const SAVES: usize = 5;
/// The aim for a restore, whatever the size of its memory.
const FIRST_INSTRUCTION_MS: f64 = 3.0;
/// The guest repeats this input, and ends at an EOT.
const INPUT: &[u8] = b"x\x04";
const WORDS: &str = "do=echo wait=interrupt";
/// What is below belongs to the guest; the rest of its memory can be filled.
const USED_BYTES: u64 = 16 << 20;
/// How long a guest may take to be ready.
const READY: Duration = Duration::from_millis(300);

/// A snapshot of a guest that answers, in a directory of its own.
struct Saved {
    dir: TempDir,
    path: PathBuf,
}

impl Saved {
    fn husk(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.args(words).env("XDG_RUNTIME_DIR", self.dir.path()).stdin(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn ok(&self, words: &[&str]) -> Result<Duration> {
        let start = Instant::now();
        let output = self.husk(words).output().context("start husk")?;
        ensure!(output.status.success(), "{words:?}: {}", output.status);
        Ok(start.elapsed())
    }

    fn of(memory_mib: u64) -> Result<Saved> {
        let dir = tempfile::tempdir_in(".").context("create a temporary directory")?;
        let path = dir.path().join("snapshot");
        let saved = Saved { dir, path };
        let memory = format!("{memory_mib}M");
        let kernel = ["--kernel", husk_guests::SERIAL, "--cmdline", WORDS];
        saved.ok(&[&["boot", "-d", "--rm", "--name", "guest", "--memory", &memory], &kernel[..]].concat())?;
        thread::sleep(READY);
        saved.ok(&["snapshot", "--stop", "guest", saved.place()])?;
        Ok(saved)
    }

    fn place(&self) -> &str {
        self.path.to_str().unwrap_or_default()
    }

    /// Restores a machine. Returns the time from husk's first instruction to the guest's, in milliseconds.
    fn to_first_instruction(&self) -> Result<f64> {
        let mut restore = self.husk(&["restore", "--timings", self.place()]);
        let mut child = restore.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("no standard input")?.write_all(INPUT)?;
        let printed = String::from_utf8(child.wait_with_output()?.stderr)?;
        let line = printed.lines().find(|line| line.contains("first guest instruction")).context(printed.clone())?;
        line.split_whitespace().find_map(|word| word.parse().ok()).context(printed.clone())
    }

    /// Fills the memory that the guest does not use.
    fn fill(&self) -> Result<()> {
        let file = File::options().write(true).open(self.path.join("memory"))?;
        let content: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 251) as u8).collect();
        let len_bytes = file.metadata()?.len();
        for at in (USED_BYTES..len_bytes).step_by(content.len()) {
            file.write_all_at(&content, at)?;
        }
        Ok(file.sync_all()?)
    }
}

/// Restores, compared with a boot, both until the guest has answered; saves; and many machines at once.
pub fn machines() -> Result<()> {
    for (memory_mib, filled) in [(64, false), (512, false), (512, true), (4096, false)] {
        let saved = Saved::of(memory_mib)?;
        if filled {
            saved.fill()?;
        }
        let (mut restores, mut instructions, mut boots) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..RUNS {
            restores.push(to_answer(saved.husk(&["restore", saved.place()]))?);
            instructions.push(saved.to_first_instruction()?);
            let mut command = boot(husk_guests::SERIAL, WORDS);
            command.args(["--memory", &format!("{memory_mib}M")]);
            boots.push(to_answer(command)?);
        }
        let content = if filled { ", all of it used" } else { "" };
        report(&format!("restore of {memory_mib} MiB{content}, to the answer"), median(restores), "ms", Target::None);
        let target = Target::Below(FIRST_INSTRUCTION_MS);
        report("  in which husk runs before the first instruction", median(instructions), "ms", target);
        report("  boot of the same guest, to its first byte", median(boots), "ms", Target::None);
    }
    save()?;
    pause()?;
    clones()
}

/// From the start of the command to the first byte that the guest prints, in milliseconds.
fn to_answer(mut command: Command) -> Result<f64> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = command.spawn().context("start husk")?;
    child.stdin.take().context("no standard input")?.write_all(INPUT)?;
    let mut output = child.stdout.take().context("no standard output")?;
    output.read_exact(&mut [0])?;
    let answered = start.elapsed();
    output.read_to_end(&mut Vec::new())?;
    ensure!(child.wait()?.success(), "the guest has failed");
    Ok(answered.as_secs_f64() * 1e3)
}

/// How long a guest that goes on does not run while it is saved, as its own clock says.
fn pause() -> Result<()> {
    let dir = tempfile::tempdir_in(".").context("create a temporary directory")?;
    let saved = Saved { path: dir.path().join("snapshot"), dir };
    let printed = saved.dir.path().join("printed");
    for content_mib in [64, 512] {
        let words = format!("do=gaps mib={content_mib}");
        let memory = format!("{}M", content_mib + 64);
        let mut guest = saved.husk(&["boot", "--name", "guest", "--memory", &memory, "--kernel", husk_guests::CLOCK]);
        guest.args(["--cmdline", &words]).stdout(File::create(&printed)?);
        let mut guest = guest.spawn().context("start husk")?;
        let (mut gaps, mut times, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        let content = vec![1_u8; content_mib << 20];
        for _ in 0..SAVES {
            // Until then the guest fills its memory, or what was written before is synced.
            thread::sleep(READY);
            let before = std::fs::read_to_string(&printed)?.len();
            times.push(saved.ok(&["snapshot", "guest", saved.place()])?.as_secs_f64() * 1e3);
            thread::sleep(READY);
            let text = std::fs::read_to_string(&printed)?;
            let reported = text.get(before..).unwrap_or_default().lines();
            let gap = reported.filter_map(|line| line.strip_prefix("gap ")?.strip_suffix(" us")?.parse::<f64>().ok());
            gaps.push(gap.fold(0.0, f64::max) / 1e3);
            std::fs::remove_dir_all(&saved.path)?;
            plain.push(plain_write(&content)?);
        }
        guest.kill()?;
        guest.wait()?;
        report(&format!("husk snapshot of {content_mib} MiB, to its end"), median(times), "ms", Target::None);
        report("  in which the guest is paused", median(gaps), "ms", Target::None);
        report("  a plain write of as much to the page cache", median(plain), "ms", Target::None);
    }
    Ok(())
}

/// Writes `content` to a new file, in pieces of 2 MiB, in milliseconds.
fn plain_write(content: &[u8]) -> Result<f64> {
    let mut file = tempfile::tempfile_in(".")?;
    let start = Instant::now();
    content.chunks(2 << 20).try_for_each(|piece| file.write_all(piece))?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// The time to save a machine with 512 MiB of content that was restored.
fn save() -> Result<()> {
    let saved = Saved::of(512)?;
    saved.fill()?;
    saved.ok(&["restore", "-d", "--rm", "--name", "guest", saved.place()])?;
    let mut times = Vec::new();
    let path = saved.dir.path().join("again");
    for _ in 0..SAVES {
        let took = saved.ok(&["snapshot", "guest", path.to_str().unwrap_or_default()])?;
        times.push(took.as_secs_f64() * 1e3);
        std::fs::remove_dir_all(&path)?;
    }
    saved.ok(&["rm", "-f", "guest"])?;
    report("husk snapshot of 512 MiB of content", median(times), "ms", Target::None);
    Ok(())
}

/// Machines of one snapshot, all started at once.
fn clones() -> Result<()> {
    let saved = Saved::of(512)?;
    saved.fill()?;
    let start = Instant::now();
    let mut machines = (0..CLONES).map(|_| start_clone(&saved)).collect::<Result<Vec<Child>>>()?;
    for machine in &mut machines {
        machine.stdout.as_mut().context("no standard output")?.read_exact(&mut [0])?;
    }
    let answered = start.elapsed();
    thread::sleep(Duration::from_secs(1));
    let mut kib = 0;
    for machine in &machines {
        kib += family(machine.id())?.into_iter().map(pss_kib).sum::<Result<u64>>()?;
    }
    for mut machine in machines {
        drop(machine.stdin.take());
        machine.kill()?;
        machine.wait()?;
    }
    report(&format!("{CLONES} restores at once, to the last answer"), answered.as_secs_f64() * 1e3, "ms", Target::None);
    report("  memory of each, its guest's included (PSS)", kib as f64 / 1024.0 / CLONES as f64, "MiB", Target::None);
    Ok(())
}

fn start_clone(saved: &Saved) -> Result<Child> {
    let mut command = saved.husk(&["restore", saved.place()]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start husk")?;
    child.stdin.as_mut().context("no standard input")?.write_all(b"x")?;
    Ok(child)
}

/// The proportional set size of a process.
fn pss_kib(process: u32) -> Result<u64> {
    let path: &Path = &PathBuf::from(format!("/proc/{process}/smaps_rollup"));
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}
