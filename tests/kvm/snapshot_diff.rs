//! Diff snapshots: what they are merged to is what a whole snapshot of the same moment is.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use husk_guests as guests;
use tempfile::TempDir;

use crate::background::Machines;
use crate::husk::{disk_image, is_emulated};
use crate::snapshot::restored;

/// A guest under load, which notices any wrong byte, and some memory that it does not touch.
struct Loaded {
    machines: Machines,
    dir: TempDir,
}

impl Loaded {
    fn start(bus: &str) -> Loaded {
        let (dir, disk) = disk_image(1 << 20);
        let initrd = dir.path().join("initrd");
        fs::write(&initrd, vec![1; 8 << 20]).unwrap();
        let machines = Machines::new();
        let words = [disk, initrd].map(|path| path.to_str().unwrap().to_owned());
        let flags = ["--name", "steady", "--cpus", "3", "--transport", bus, "--disk", &words[0], "--initrd", &words[1]];
        machines.start(guests::STEADY, "", &flags);
        machines.await_log("steady", "1\n");
        Loaded { machines, dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn snapshot(&self, machine: &str, flags: &[&str], name: &str) -> String {
        let path = self.path(name);
        self.machines.ok(&[&["snapshot", "--with-disks"], flags, &[machine, &path]].concat());
        path
    }

    /// Takes a diff snapshot and a whole one at the same moment, and checks that they are the same. Returns the path of the diff
    /// snapshot, and of what it was merged to.
    fn diff(&self, machine: &str, base: &str, name: &str) -> (String, String) {
        let let_run = || thread::sleep(Duration::from_millis(if is_emulated() { 1000 } else { 100 }));
        let_run();
        self.machines.ok(&["pause", machine]);
        let diff = self.snapshot(machine, &["--base", base], name);
        let whole = self.snapshot(machine, &[], &format!("{name}.whole"));
        self.machines.ok(&["unpause", machine]);
        let merged = self.path(&format!("{name}.merged"));
        assert_eq!(self.machines.ok(&["merge", &diff, &merged]), format!("{merged}\n"));
        let read = |path: &str, file: &str| fs::read(Path::new(path).join(file)).unwrap();
        for file in ["memory", "disk-0"] {
            assert!(read(&merged, file) == read(&whole, file), "{name}: {file}");
        }
        let blocks = |path: &str| fs::metadata(Path::new(path).join("memory")).unwrap().blocks();
        println!("{name}: {} KiB of {} KiB", blocks(&diff) / 2, blocks(&whole) / 2);
        assert!(blocks(&diff) > 0 && blocks(&diff) < blocks(&whole) / 2);
        (diff, merged)
    }

    #[track_caller]
    fn end(&self, name: &str) {
        let mut attached = self.machines.attach(name);
        attached.stdin.as_mut().unwrap().write_all(b"\x04").unwrap();
        self.machines.await_log(name, "end\n");
        attached.wait_with_output().unwrap();
        self.machines.await_status(name, "exited");
        assert_eq!(self.machines.inspect(name, "State/ExitCode"), "0", "{}", self.machines.ok(&["logs", name]));
    }
}

#[test]
fn merged_diffs_are_the_whole_snapshot_of_the_same_moment() {
    needs_kvm!();
    // The bus matters least of all there.
    let buses = if is_emulated() { &["mmio"][..] } else { &["mmio", "pci"] };
    for bus in buses {
        let loaded = Loaded::start(bus);
        let base = loaded.snapshot("steady", &["--track"], "base");
        let (first, _) = loaded.diff("steady", &base, "first");
        // Both are known: the last one, and the one before.
        loaded.diff("steady", &base, "second");
        let (chained, merged) = loaded.diff("steady", &first, "chained");
        loaded.machines.ok(&["restore", "-d", "--name", "other", &merged]);
        // What was merged is the same snapshot.
        let (_, merged_again) = loaded.diff("other", &chained, "other.first");
        loaded.diff("other", &merged, "other.second");
        loaded.machines.ok(&["restore", "-d", "--name", "last", &merged_again]);
        ["steady", "other", "last"].iter().for_each(|name| loaded.end(name));
    }
}

#[test]
fn a_diff_to_what_is_not_known_is_refused_in_one_line() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "echo"]);
    machines.await_log("echo", "ready");
    let path = |name: &str| machines.runtime.path().join(name).to_str().unwrap().to_owned();
    let [plain, tracked, diff, last] = ["plain", "tracked", "diff", "last"].map(path);
    machines.ok(&["snapshot", "echo", &plain]);
    let refused = |base: &str| machines.fails(&["snapshot", "--base", base, "echo", &path("none")], 1);
    assert!(refused(&plain).contains("it is not known what has changed since /"), "{}", refused(&plain));
    machines.ok(&["snapshot", "--track", "echo", &tracked]);
    assert!(refused(&plain).contains("it is not known"), "{}", refused(&plain));
    assert!(refused("/nowhere").contains("open the snapshot /nowhere: No such file"), "{}", refused("/nowhere"));
    machines.ok(&["snapshot", "--base", &tracked, "echo", &diff]);
    let line = machines.fails(&["restore", &diff], 1);
    assert!(line.contains("has only what has changed since /") && line.contains("`husk merge /"), "{line}");
    assert!(!Path::new(&path("none")).exists());
    // It goes on, tracked again, while its memory is that of removed files.
    machines.ok(&["snapshot", "--track", "echo", &last]);
    fs::rename(&tracked, path("moved")).unwrap();
    let line = machines.fails(&["merge", &diff, &path("whole")], 1);
    assert!(line.contains("open the base: open the snapshot /"), "{line}");
    machines.ok(&["merge", "--base", &path("moved"), &diff, &path("whole")]);
    assert!(restored(&machines, &path("whole"), "word\x04").starts_with("word"));
    fs::remove_dir_all(&last).unwrap();
    let mut attached = machines.attach("echo");
    attached.stdin.as_mut().unwrap().write_all(b"word\x04").unwrap();
    attached.wait_with_output().unwrap();
    machines.await_status("echo", "exited");
    assert_eq!(machines.inspect("echo", "State/ExitCode"), "0");
}
