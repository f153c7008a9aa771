//! A guest under load that is saved and restored at random moments: nothing is lost, and nothing is done twice.
//!
//! `HUSK_SNAPSHOT_ROUNDS=N` (`scripts/soak snapshot N`) saves and restores N times instead of a few.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::Duration;

use husk_guests as guests;
use tempfile::TempDir;

use crate::background::Machines;
use crate::datagrams::Datagrams;
use crate::husk::{disk_image, is_emulated};
use crate::killed::{has_qemu_img, qemu_img, random};
use crate::own_network::{GUEST_MAC, has_vhost, with_tap};

const DISK_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: usize = 4096;
const SECTOR_WORDS: usize = 64;
const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyz";
const WAYS: [[&str; 2]; 6] = [
    ["mmio", ",aio=io_uring"],
    ["pci", ",aio=threads"],
    ["mmio", ",format=qcow2"],
    ["pci", ",aio=io_uring"],
    ["mmio", ",aio=threads"],
    ["pci", ",format=qcow2"],
];

/// A guest that goes on in one machine after the other.
struct Steady {
    machines: Machines,
    dir: TempDir,
    disk: PathBuf,
    /// How often it was saved and restored, which names the current machine.
    rounds: usize,
    /// The numbers that it printed, in all machines.
    numbers: String,
    /// What it repeated of each machine's input.
    echoes: Vec<String>,
    /// With a network.
    datagrams: Option<Datagrams>,
}

impl Steady {
    fn start(bus: &str, options: &str, network: Option<&str>) -> Steady {
        let (dir, mut disk) = disk_image(DISK_BYTES);
        if options.contains("qcow2") {
            disk = dir.path().join("disk.qcow2");
            let size = DISK_BYTES.to_string();
            assert!(qemu_img(&["create", "-q", "-f", "qcow2"], &[&disk, Path::new(&size)]).status.success());
        }
        let machines = Machines::new();
        let disk_flag = format!("{}{options}", disk.display());
        let mut flags = vec!["--name", "0", "--cpus", "3", "--transport", bus, "--disk", &disk_flag];
        flags.extend(network.iter().flat_map(|network| ["--network", network]));
        machines.start(guests::STEADY, "", &flags);
        machines.await_log("0", "1\n");
        let datagrams = network.map(|_| Datagrams::start());
        Steady { machines, dir, disk, rounds: 0, numbers: String::new(), echoes: vec![String::new()], datagrams }
    }

    fn name(&self) -> String {
        self.rounds.to_string()
    }

    /// What the current machine receives: in the other case than the one before, so that their echoes differ.
    fn input(&self) -> String {
        if self.rounds.is_multiple_of(2) { ALPHABET.to_owned() } else { ALPHABET.to_uppercase() }
    }

    fn send(&self, input: &str) -> Child {
        let mut attached = self.machines.attach(&self.name());
        attached.stdin.as_mut().unwrap().write_all(input.as_bytes()).unwrap();
        attached
    }

    fn snapshot(&self, round: usize) -> PathBuf {
        self.dir.path().join(format!("snapshot.{round}"))
    }

    /// Saves the machine while it receives input, and continues with another one.
    fn renew(&mut self) {
        let (name, path) = (self.name(), self.snapshot(self.rounds));
        let attached = self.send(&self.input());
        thread::sleep(random(Duration::from_millis(if is_emulated() { 1000 } else { 60 })));
        self.machines.ok(&["snapshot", "--stop", &name, path.to_str().unwrap()]);
        attached.wait_with_output().unwrap();
        self.finish_machine();
        self.rounds += 1;
        self.echoes.push(String::new());
        self.machines.ok(&["restore", "-d", "--name", &self.name(), path.to_str().unwrap()]);
        // Some are saved again before they can do much.
        if random(Duration::from_secs(2)) > Duration::from_secs(1) {
            self.machines.await_log(&self.name(), "\n");
        }
    }

    /// Notes what the current machine has printed when it has ended, and removes it.
    fn finish_machine(&mut self) {
        let name = self.name();
        self.machines.await_status(&name, "exited");
        assert_eq!(self.machines.inspect(&name, "State/ExitCode"), "0", "{}", self.machines.ok(&["logs", &name]));
        let printed = self.machines.ok(&["logs", &name]);
        self.machines.ok(&["rm", &name]);
        // The memory of this machine.
        if let Some(before) = self.rounds.checked_sub(1) {
            fs::remove_dir_all(self.snapshot(before)).unwrap();
        }
        self.note(&printed);
    }

    fn note(&mut self, printed: &str) {
        let (running, end) = printed.split_once("end\n").map_or((printed, None), |(running, end)| (running, Some(end)));
        let is_own = |letter: &char| self.input().contains(*letter);
        let letters: Vec<char> = running.chars().filter(char::is_ascii_alphabetic).collect();
        let own = letters.iter().position(is_own).unwrap_or(letters.len());
        assert!(letters[own..].iter().all(is_own), "{printed}");
        self.echoes[self.rounds].extend(&letters[own..]);
        if own > 0 {
            let before = self.rounds.checked_sub(1).expect("the first machine repeats its own input");
            self.echoes[before].extend(&letters[..own]);
        }
        self.numbers.extend(running.chars().filter(|letter| !letter.is_ascii_alphabetic()));
        self.numbers.extend(end.map(|end| format!("end {end}")));
    }

    /// Ends the guest, and returns what it says.
    fn end(&mut self) -> String {
        let answers = self.datagrams.take().map_or(0, Datagrams::end);
        let attached = self.send("\x04");
        self.machines.await_log(&self.name(), "end\n");
        attached.wait_with_output().unwrap();
        self.finish_machine();
        let (numbers, end) = self.numbers.split_once("end ").expect("it says what it has done");
        let lines = numbers.lines().count();
        let expected: String = (1..=lines).map(|number| format!("{number}\n")).collect();
        assert!(numbers == expected, "output is lost or repeated: {numbers}");
        for (round, echo) in self.echoes.iter().enumerate() {
            // What has not yet reached the port is lost with its terminal.
            assert!(ALPHABET.starts_with(&echo.to_lowercase()), "input is lost or repeated in round {round}: {echo}");
        }
        assert!(end.contains(&format!(" datagrams {answers}\n")), "{answers} were answered: {end}");
        end.trim_end().to_owned()
    }

    /// The numbers of all writes that are the last ones of their blocks.
    fn numbers_on_disk(&self) -> Vec<u64> {
        let mut disk = self.disk.clone();
        if disk.extension().is_some_and(|extension| extension == "qcow2") {
            let checked = qemu_img(&["check", "-q"], &[&disk]);
            assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
            let raw = self.dir.path().join("disk.raw");
            assert!(qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[&disk, &raw]).status.success());
            disk = raw;
        }
        fs::read(disk).unwrap().chunks(BLOCK_BYTES).enumerate().map(|(block, bytes)| number_of(block, bytes)).collect()
    }
}

/// The number of the write whose content a block has, or 0 if it was never written.
fn number_of(block: usize, bytes: &[u8]) -> u64 {
    let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let number = words[0];
    for (index, words) in words.chunks(SECTOR_WORDS).enumerate() {
        let sector = (block * BLOCK_BYTES / 512 + index) as u64;
        let word = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(sector);
        let is_written = words[..2] == [number, sector] && words[2..].iter().all(|found| *found == word);
        let is_empty = number == 0 && words.iter().all(|word| *word == 0);
        assert!(is_written || is_empty, "sector {sector} is not of write {number}: {words:x?}");
    }
    number
}

/// Saves and restores guests, each with another kind of disk and of network.
fn save_and_restore(rounds: usize, networks: &[String]) {
    let qcow2 = has_qemu_img();
    let ways: Vec<_> = WAYS.iter().filter(|[_, options]| qcow2 || !options.contains("qcow2")).collect();
    let mut echoed = 0;
    for (index, [bus, options]) in ways.iter().enumerate() {
        let network = networks.get(index % networks.len().max(1)).map(String::as_str);
        let mut steady = Steady::start(bus, options, network);
        for _ in (index..rounds).step_by(ways.len()) {
            steady.renew();
        }
        let end = steady.end();
        let numbers = steady.numbers_on_disk();
        assert!(end.contains(&format!(" sum {} ", numbers.iter().sum::<u64>())), "{end}: {numbers:?}");
        println!("{bus}{options} {network:?}: saved {} times: {end}", steady.rounds);
        echoed += steady.echoes.iter().map(String::len).sum::<usize>();
    }
    println!("{rounds} times saved and restored, {echoed} letters repeated, 0 lost");
    assert!(rounds < WAYS.len() || echoed > 0);
}

#[test]
fn a_guest_under_load_loses_nothing_and_repeats_nothing() {
    needs_kvm!();
    let default = if is_emulated() { WAYS.len() } else { 20 };
    let rounds = std::env::var("HUSK_SNAPSHOT_ROUNDS").map_or(default, |rounds| rounds.parse().unwrap());
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root makes networks: the guests have none");
        save_and_restore(rounds, &[]);
        return;
    }
    let kinds: &[&str] = if has_vhost() { &["off", "off", "on", "on"] } else { &["off"] };
    let networks: Vec<_> = kinds.iter().map(|vhost| format!("tap=tap0,vhost={vhost},mac={GUEST_MAC}")).collect();
    with_tap(|| save_and_restore(rounds, &networks));
}
