//! `husk snapshot` of a machine whose supervisor or monitor is killed meanwhile, and `husk merge` that is killed: what is left is a whole
//! snapshot or none.
//!
//! `HUSK_SNAPSHOT_ROUNDS=N` (`scripts/soak snapshot N`) kills N times instead of a few.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use husk_guests as guests;

use crate::background::Machines;
use crate::husk::{await_exit, await_none_of, is_emulated, monitor_of, own_lines, send_signal};
use crate::killed::random;
use crate::snapshot::restored;

/// Whether the snapshot at `path` is whole: then its machine goes on, and otherwise one line says that it is not.
fn is_whole(machines: &Machines, path: &str) -> bool {
    if Path::new(path).join("state").exists() {
        let disk = fs::read(Path::new(path).join("disk-0")).unwrap();
        assert!(disk == fs::read(machines.runtime.path().join("disk")).unwrap(), "a disk is not whole");
        assert!(restored(machines, path, "word\x04").starts_with("word"));
        return true;
    }
    let line = machines.fails(&["restore", path], 1);
    let says_so =
        ["No such file or directory", "not a snapshot", "it is incomplete"].iter().any(|words| line.contains(words));
    assert!(says_so, "{line}");
    false
}

/// Starts a machine with some memory and a disk that are not zero, so that it takes a while to save.
fn start(machines: &Machines) {
    let [initrd, disk] = ["initrd", "disk"].map(|name| machines.runtime.path().join(name));
    for file in [&initrd, &disk].into_iter().filter(|file| !file.exists()) {
        fs::write(file, vec![1; 24 << 20]).unwrap();
    }
    let flags = ["--name", "echo", "--initrd", initrd.to_str().unwrap(), "--disk", disk.to_str().unwrap()];
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &flags);
    machines.await_log("echo", "ready");
}

/// How long a snapshot takes here, at least.
fn usual_time(machines: &Machines, path: &str) -> Duration {
    start(machines);
    let time = || {
        let started = Instant::now();
        machines.ok(&["snapshot", "--with-disks", "echo", path]);
        let time = started.elapsed();
        fs::remove_dir_all(path).unwrap();
        time
    };
    let least = (0..3).map(|_| time()).min().unwrap();
    machines.ok(&["rm", "-f", "echo"]);
    least
}

#[test]
fn a_killed_snapshot_is_whole_or_none() {
    needs_kvm!();
    let default = if is_emulated() { 4 } else { 16 };
    let kills = std::env::var("HUSK_SNAPSHOT_ROUNDS").map_or(default, |rounds| rounds.parse().unwrap());
    let machines = Machines::new();
    let path = machines.runtime.path().join("snapshot").to_str().unwrap().to_owned();
    let limit = usual_time(&machines, &path);
    println!("a snapshot takes {limit:?}");
    let mut ends = BTreeMap::new();
    for kill in 0..kills {
        start(&machines);
        let supervisor: u32 = machines.inspect("echo", "State/Pid").parse().unwrap();
        let victim = if kill % 2 == 0 { supervisor } else { monitor_of(supervisor) };
        let mut command = machines.command(&["snapshot", "--with-disks", "echo", &path]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        thread::sleep(random(limit));
        send_signal(victim, "KILL");
        let output = child.wait_with_output().unwrap();
        let errors = own_lines(&output.stderr);
        assert_eq!(errors.lines().count(), usize::from(!output.status.success()), "{output:?}");
        await_exit(supervisor);
        let is_left = Path::new(&path).exists();
        let whole = is_whole(&machines, &path);
        assert!(whole || !output.status.success(), "it was said to be whole");
        *ends.entry((output.status.success(), is_left, whole)).or_insert(0) += 1;
        machines.ok(&["rm", "-f", "echo"]);
        await_none_of(machines.place());
        // What is whole is not overwritten, and anything else is.
        if whole {
            fs::remove_dir_all(&path).unwrap();
        }
        start(&machines);
        machines.ok(&["snapshot", "--with-disks", "echo", &path]);
        assert!(is_whole(&machines, &path));
        machines.ok(&["rm", "-f", "echo"]);
        fs::remove_dir_all(&path).unwrap();
    }
    println!("{kills} killed; successful, left, whole: {ends:?}");
}

#[test]
fn a_killed_merge_is_whole_or_none() {
    needs_kvm!();
    let kills = if is_emulated() { 4 } else { 16 };
    let machines = Machines::new();
    let path = |name: &str| machines.runtime.path().join(name).to_str().unwrap().to_owned();
    let [base, diff, out] = ["base", "diff", "merged"].map(path);
    start(&machines);
    machines.ok(&["snapshot", "--with-disks", "--track", "echo", &base]);
    machines.ok(&["snapshot", "--with-disks", "--base", &base, "echo", &diff]);
    machines.ok(&["rm", "-f", "echo"]);
    let started = Instant::now();
    machines.ok(&["merge", &diff, &out]);
    let limit = started.elapsed();
    let mut ends = BTreeMap::new();
    for _ in 0..kills {
        let _ = fs::remove_dir_all(&out);
        let mut command = machines.command(&["merge", &diff, &out]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(random(limit));
        child.kill().unwrap();
        let successful = child.wait().unwrap().success();
        let (is_left, whole) = (Path::new(&out).exists(), is_whole(&machines, &out));
        assert!(whole || !successful, "it was said to be whole");
        *ends.entry((successful, is_left, whole)).or_insert(0) += 1;
        // What is not whole is replaced, from snapshots that are as they were.
        if !whole {
            machines.ok(&["merge", &diff, &out]);
            assert!(is_whole(&machines, &out));
        }
    }
    println!("{kills} killed; successful, left, whole: {ends:?}");
}
