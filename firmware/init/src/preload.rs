//! Reads programs into memory before the machine is saved, together with what they are linked with: the processes of machines
//! that are restored from there need not wait for the disk.
//!
//! All of this is a matter of speed: nothing that fails here matters.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk_protocol::{FIXED_PATH, Preload};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, geteuid};

/// Larger files are not read: of them, a process uses only a part.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// How long a dynamic linker may take to say what it would load.
const LINKER_TIMEOUT: Duration = Duration::from_secs(5);
/// The maximum size of its answer.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// A script may be run by another script.
const INTERPRETERS_MAX: usize = 3;
/// What is read of a program to find out who runs it.
const HEAD_BYTES: u64 = 4096;
/// The user that a dynamic linker runs as. It is a program of the image, and what it may do to init would last.
const LINKER_USER: u32 = 65534;
/// Type of a program header (System V ABI, PT_INTERP).
const PT_INTERP: u32 = 3;

/// Reads the programs, as far as a quarter of the free memory allows it.
pub fn read(preload: &Preload) {
    let mut reader = Reader { env: &preload.env, room_bytes: free_bytes() / 4, done: BTreeSet::new() };
    for name in &preload.programs {
        if let Some(path) = reader.find(name) {
            reader.read_program(&path);
        }
    }
}

struct Reader<'a> {
    env: &'a [Vec<u8>],
    room_bytes: u64,
    done: BTreeSet<PathBuf>,
}

impl Reader<'_> {
    /// Reads a program and what runs it, in turn.
    fn read_program(&mut self, path: &Path) {
        let mut path = path.to_owned();
        for _ in 0..INTERPRETERS_MAX {
            self.read_file(&path);
            let head = head(&path);
            if let Some(words) = shebang(&head) {
                // What `env` would run.
                let names = words.iter().rev().copied().filter(|word| !word.starts_with(b"-"));
                let Some(next) = names.filter_map(|name| self.find(name)).next() else { return };
                words.first().and_then(|first| self.find(first)).iter().for_each(|first| self.read_file(first));
                path = next;
                continue;
            }
            if let Some(linker) = linker(&head) {
                let answer = self.ask(linker, &path);
                let words = answer.split(|byte| byte.is_ascii_whitespace()).filter(|word| word.starts_with(b"/"));
                words.for_each(|word| self.read_file(Path::new(OsStr::from_bytes(word))));
            }
            return;
        }
    }

    /// Reads a file, once.
    fn read_file(&mut self, path: &Path) {
        let Ok(path) = fs::canonicalize(path) else { return };
        let Ok(size) = fs::metadata(&path).map(|found| if found.is_file() { found.len() } else { 0 }) else { return };
        if size == 0 || size > FILE_BYTES_MAX.min(self.room_bytes) || !self.done.insert(path.clone()) {
            return;
        }
        self.room_bytes -= size;
        let Ok(mut file) = File::open(path) else { return };
        let mut buffer = [0; 64 << 10];
        while file.read(&mut buffer).is_ok_and(|count| count > 0) {}
    }

    /// Finds a program in PATH.
    fn find(&self, name: &[u8]) -> Option<PathBuf> {
        let path = self.env.iter().rev().find_map(|variable| variable.strip_prefix(b"PATH="));
        let dirs = path.unwrap_or(FIXED_PATH.as_bytes()).split(|byte| *byte == b':');
        let name = Path::new(OsStr::from_bytes(name));
        // An absolute name replaces the directory.
        let mut candidates = dirs.map(|dir| Path::new("/").join(OsStr::from_bytes(dir)).join(name));
        candidates.find(|path| path.is_file())
    }

    /// What a dynamic linker prints about a program that it does not run: names and paths of libraries.
    fn ask(&self, linker: &[u8], program: &Path) -> Vec<u8> {
        let mut command = Command::new(OsStr::from_bytes(linker));
        command.arg("--list").arg(program).env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        for variable in self.env {
            if let Some(at) = variable.iter().position(|byte| *byte == b'=') {
                let (name, value) = variable.split_at(at);
                command.env(OsStr::from_bytes(name), OsStr::from_bytes(value.get(1..).unwrap_or_default()));
            }
        }
        if geteuid().is_root() {
            command.uid(LINKER_USER).gid(LINKER_USER);
        }
        let Ok(mut child) = command.spawn() else { return Vec::new() };
        let answer = child.stdout.take().map(read_within).unwrap_or_default();
        let _ = child.kill();
        let _ = child.wait();
        answer
    }
}

/// Ends the processes that programs of the image have left behind: nothing but init is to be saved with the machine. For PID 1.
pub fn end_others() {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    let until = Instant::now() + LINKER_TIMEOUT;
    while Instant::now() < until {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => break,
            Ok(WaitStatus::StillAlive) => thread::sleep(Duration::from_millis(1)),
            _ => {}
        }
    }
}

/// Reads a pipe until its end, but not for long.
fn read_within(mut pipe: impl Read + AsFd) -> Vec<u8> {
    let (until, mut answer, mut buffer) = (Instant::now() + LINKER_TIMEOUT, Vec::new(), [0; 4096]);
    while (answer.len() as u64) < ANSWER_BYTES_MAX {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let ready = poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout);
        match ready.is_ok_and(|count| count > 0).then(|| pipe.read(&mut buffer)) {
            Some(Ok(count @ 1..)) => answer.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            _ => break,
        }
    }
    answer
}

fn head(path: &Path) -> Vec<u8> {
    let mut head = Vec::new();
    // Files of the kernel without a size may wait for something.
    if !fs::metadata(path).is_ok_and(|found| found.len() > 0) {
        return head;
    }
    let _ = File::open(path).and_then(|file| file.take(HEAD_BYTES).read_to_end(&mut head));
    head
}

/// The words of a script's first line (execve(2)).
fn shebang(head: &[u8]) -> Option<Vec<&[u8]>> {
    let line = head.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    Some(line.split(|byte| byte.is_ascii_whitespace()).filter(|word| !word.is_empty()).collect())
}

/// The dynamic linker of an ELF program (System V ABI, AMD64 supplement).
fn linker(head: &[u8]) -> Option<&[u8]> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(*head.get(at..)?.first_chunk()?));
    let u64_at = |at: usize| usize::try_from(u64::from_le_bytes(*head.get(at..)?.first_chunk()?)).ok();
    // 64 bits, little-endian.
    head.strip_prefix(b"\x7fELF\x02\x01")?;
    let (table, entry_bytes, count) = (u64_at(32)?, usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    let entries = (0..count).map_while(|index| table.checked_add(index.checked_mul(entry_bytes)?));
    for entry in entries {
        let kind = u32::from_le_bytes(*head.get(entry..)?.first_chunk()?);
        if kind == PT_INTERP {
            let (start, len_bytes) = (u64_at(entry.checked_add(8)?)?, u64_at(entry.checked_add(32)?)?);
            return head.get(start..start.checked_add(len_bytes)?)?.strip_suffix(b"\0");
        }
    }
    None
}

/// The memory that processes can get.
fn free_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(env: &[Vec<u8>]) -> Reader<'_> {
        Reader { env, room_bytes: 1 << 30, done: BTreeSet::new() }
    }

    #[test]
    fn a_program_is_read_with_its_linker_and_libraries() {
        let program = std::env::current_exe().unwrap();
        // The tests' own program is linked statically.
        assert_eq!(linker(&head(&program)), None);
        let sleep = Path::new("/bin/sleep");
        let Some(linker) = linker(&head(sleep)).map(<[u8]>::to_vec) else {
            eprintln!("SKIPPED: {} is not linked dynamically", sleep.display());
            return;
        };
        let env = [b"PATH=/nowhere:/usr/bin:/bin".to_vec()];
        let mut reader = reader(&env);
        reader.read_program(&reader.find(b"sleep").unwrap());
        let names: Vec<_> = reader.done.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        let linker = fs::canonicalize(OsStr::from_bytes(&linker)).unwrap();
        assert!(reader.done.contains(&linker), "{names:?}");
        assert!(names.iter().any(|name| name.starts_with("libc.so") || name.starts_with("ld-musl")), "{names:?}");
        assert!(reader.find(b"no-such-program").is_none());
    }

    #[test]
    fn a_script_is_read_with_its_interpreter() {
        let script = std::env::temp_dir().join(format!("husk-preload-{}", std::process::id()));
        fs::write(&script, "#!/usr/bin/env -S sleep 1\n").unwrap();
        let mut reader = reader(&[]);
        reader.read_program(&script);
        let (found, is_read) = (fs::canonicalize(&script).unwrap(), reader.find(b"sleep").unwrap());
        fs::remove_file(&script).unwrap();
        assert!(reader.done.contains(&found) && reader.done.contains(&fs::canonicalize(is_read).unwrap()));
        assert!(shebang(b"#! /bin/sh  -e\nrest").unwrap() == [&b"/bin/sh"[..], b"-e"]);
        assert!(shebang(b"#").is_none());
        assert!(head(Path::new("/proc/kmsg")).is_empty());
    }

    #[test]
    fn malformed_programs_have_no_linker() {
        let mut head = vec![0; 200];
        head[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert_eq!(linker(&head), None);
        (head[32], head[54], head[56], head[120]) = (120, 56, 1, PT_INTERP as u8);
        (head[128], head[152]) = (180, 20);
        assert_eq!(linker(&head), Some(&[0; 19][..]));
        head[135] = 0xff;
        assert_eq!(linker(&head), None);
        head[32..40].fill(0xff);
        head[56..58].fill(0xff);
        assert_eq!(linker(&head), None);
    }
}
