//! Tests of setup scripts, with stand-ins for programs that would change this machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

const LOCKED: &str = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 1 (unattended-upgr)";

fn program(dir: &Path, name: &str, script: &str) {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs `scripts/deps fuzz` with no package installed and apt's lock held for the first `times` attempts; returns its
/// output, and the number of installation attempts.
fn deps_while_locked(times: u32) -> (Output, String) {
    let dir = tempfile::tempdir().unwrap();
    let calls = dir.path().join("calls");
    program(dir.path(), "dpkg-query", "exit 1");
    program(dir.path(), "sleep", "exit 0");
    program(dir.path(), "sudo", "exec \"$@\"");
    let apt = format!(
        "echo \"$2\" >>{calls}; [ $(wc -l <{calls}) -gt {times} ] || {{ echo '{LOCKED}' >&2; exit 100; }}",
        calls = calls.display()
    );
    program(dir.path(), "apt-get", &apt);
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/deps");
    let output = Command::new(script).arg("fuzz").env("PATH", path).output().unwrap();
    (output, fs::read_to_string(calls).unwrap())
}

#[test]
fn waiting_for_apts_lock_is_announced() {
    let (output, calls) = deps_while_locked(3);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}");
    assert_eq!(printed, format!("deps: waiting for another program that installs packages: {LOCKED}\n"));
    assert_eq!(calls, "update\nupdate\nupdate\nupdate\ninstall\n");
}

#[test]
fn waiting_for_apts_lock_times_out_with_its_error() {
    let (output, calls) = deps_while_locked(u32::MAX);
    assert_eq!(output.status.code(), Some(100));
    assert!(String::from_utf8_lossy(&output.stderr).ends_with(&format!("{LOCKED}\n")), "{output:?}");
    assert_eq!(calls.lines().count(), 240);
}

/// All text below a directory.
fn sources(dir: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            all.push_str(&sources(&entry.path()));
        } else if entry.path().extension().is_some_and(|extension| extension == "rs") {
            all.push_str(&fs::read_to_string(entry.path()).unwrap());
        }
    }
    all
}

#[test]
fn every_promise_of_security_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/security.md")).unwrap();
    let sources = [sources(&root.join("tests")), sources(&root.join("src"))].concat();
    let tests: String = sources.lines().map(|line| format!("{}\n", line.trim_start())).collect();
    let rows = page.lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    let mut named = 0;
    for row in rows {
        let names: Vec<&str> = row.rsplit('|').nth(1).unwrap().split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{row}");
        for name in names {
            assert!(tests.contains(&format!("#[test]\nfn {name}()")), "{name} is no test");
            named += 1;
        }
    }
    assert!(named > 15, "{named}");
}
