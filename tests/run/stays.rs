//! Machines that stay until they are removed, with what they have changed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::background::Machines;
use crate::image::{archive, run, store};
use crate::{Ended, finish, guests, husk_run};

/// `husk run` or `create` with these words, among the machines of a test.
fn with(machines: &Machines, create: bool, words: &[&str], input: &[u8]) -> Ended {
    let mut command = husk_run(&machines.guests, words);
    if create {
        let arguments: Vec<_> = command.get_args().skip(1).map(ToOwned::to_owned).collect();
        command = machines.command(&["create"]);
        command.args(arguments).env("HUSK_DATA", store());
    }
    command.env("XDG_RUNTIME_DIR", machines.runtime.path());
    finish(command, input.to_vec())
}

/// What is kept of machines.
fn kept() -> Vec<PathBuf> {
    fs::read_dir(store().join("machines")).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn a_machine_keeps_what_it_changes_until_it_is_removed() {
    let machines = Machines::new(guests!());
    let script =
        "echo run >>/srv/runs; rm -f /etc/group; cat /srv/runs; ls /etc/group; began=$(date +%s); read -t 4 word
        test $(($(date +%s) - began)) -lt 2 || echo waited; echo \"$word\" >&2; exit 3";
    let first = with(&machines, false, &["-i", "--name", "job", archive(), "sh", "-c", script], b"one\n");
    assert_eq!(first.expect(3).text(), "run\n", "{}", first.errors);
    assert!(machines.ok(&["ps", "-a"]).contains("Exited (3)"));
    let again = finish(machines.command(&["start", "-a", "-i", "job"]), b"two\n".to_vec());
    assert_eq!(again.expect(3).text(), "run\nrun\n");
    assert!(again.errors.ends_with("two\n"), "{}", again.errors);
    let logs = machines.husk(&["logs", "job"]);
    assert_eq!(logs.expect(0).text(), "run\nrun\nrun\n");
    assert!(logs.errors.contains("one\n") && logs.errors.contains("two\n"), "{}", logs.errors);
    // Standard input stays open, and says nothing, for a machine that is attached without it.
    let silent = finish(machines.command(&["start", "-a", "job"]), b"three\n".to_vec());
    assert_eq!(silent.expect(3).text(), "run\nrun\nrun\nwaited\n");
}

#[test]
fn a_machine_that_is_sent_no_signals_can_be_started_again() {
    let machines = Machines::new(guests!());
    let words = ["--name", "job", "--sig-proxy=false", archive(), "sh", "-c", "exit 4"];
    with(&machines, false, &words, b"").expect(4);
    for flags in [&["start", "-a", "job"][..], &["start", "-a", "--sig-proxy=false", "job"]] {
        let again = finish(machines.command(flags), Vec::new());
        assert_eq!(again.code, Some(4), "{}", again.errors);
    }
}

#[test]
fn a_machine_survives_its_husk_and_the_state_directory() {
    let machines = Machines::new(guests!());
    let script = "cat /srv/runs; echo run >>/srv/runs; sync; exec sleep 1000";
    machines.start("box", &[], script).expect(0);
    let id = machines.ok(&["ps", "-q"]).trim_end().to_owned();
    machines.ok(&["exec", "box", "sh", "-c", "while ! test -s /srv/runs; do sleep 0.1; done"]);
    let refused = finish(with_store(&machines, &["rmi", archive()]), Vec::new());
    assert!(refused.expect(1).errors.contains("in use"), "{}", refused.errors);
    let json: serde_json::Value = serde_json::from_str(&machines.ok(&["inspect", "box"])).unwrap();
    run(Command::new("kill").args(["-9", &json[0]["State"]["Pid"].to_string()]));
    while !machines.ok(&["ps", "-a"]).contains("Lost") {}
    let refused = finish(with_store(&machines, &["rmi", archive()]), Vec::new());
    assert!(refused.expect(1).errors.contains("husk rm box"), "{}", refused.errors);
    // As after a restart of the host.
    fs::remove_dir_all(machines.runtime.path().join("husk")).unwrap();
    let mut listed = with_store(&machines, &["ps", "-aq"]);
    listed.env("XDG_RUNTIME_DIR", machines.runtime.path());
    assert_eq!(finish(listed, Vec::new()).expect(0).text(), format!("{id}\n"));
    machines.ok(&["start", "box"]);
    machines.ok(&["exec", "box", "sh", "-c", "while ! test $(wc -l </srv/runs) = 2; do sleep 0.1; done"]);
    assert_eq!(machines.ok(&["logs", "box"]), "run\n");
    // A snapshot has the changes, and a machine that is restored from it has its own.
    let snapshot = machines.runtime.path().join("snapshot");
    machines.ok(&["snapshot", "box", snapshot.to_str().unwrap()]);
    machines.ok(&["exec", "box", "sh", "-c", "echo more >>/srv/runs"]);
    let mut restore = with_store(&machines, &["restore", "-d", "--name", "copy", snapshot.to_str().unwrap()]);
    restore.env("XDG_RUNTIME_DIR", machines.runtime.path());
    finish(restore, Vec::new()).expect(0);
    assert_eq!(machines.ok(&["exec", "copy", "cat", "/srv/runs"]), "run\nrun\n");
    machines.ok(&["rm", "-f", "copy"]);
    machines.ok(&["stop", "-t", "0.1", "box"]);
    assert!(kept().iter().any(|path| path.ends_with(&id)));
    machines.ok(&["rm", "box"]);
    assert!(!kept().iter().any(|path| path.ends_with(&id)), "{:?}", kept());
}

#[test]
fn files_of_a_stopped_machine_are_reached_and_become_an_image() {
    let machines = Machines::new(guests!());
    let script =
        "echo changed >/srv/file; rm /etc/group; mkdir /srv/dir; mkfifo /srv/dir/pipe; rm -rf /root; mkdir /root";
    let shared = machines.runtime.path().join("shared");
    let mount = format!("{}:/data", shared.display());
    with(&machines, false, &["--name", "job", "-v", &mount, archive(), "sh", "-c", script], b"").expect(0);
    let husk = |words: &[&str]| finish(with_store(&machines, words), Vec::new());
    let diff = husk(&["diff", "job"]).expect(0).text();
    for line in ["A /srv/file", "A /srv/dir/pipe", "D /etc/group", "C /etc"] {
        assert!(diff.lines().any(|found| found == line), "{line}\n{diff}");
    }
    assert!(!diff.contains("hosts") && !diff.contains("/proc"), "{diff}");
    assert!(machines.ok(&["ps", "-a"]).contains("Exited (0)"), "it was not started");
    // In and out, with links and archives as for a running one.
    let local = machines.runtime.path().join("file");
    fs::write(&local, "copied").unwrap();
    husk(&["cp", local.to_str().unwrap(), "job:/srv/copied"]).expect(0);
    // What it mounts is reached as well.
    husk(&["cp", local.to_str().unwrap(), "job:/data/"]).expect(0);
    assert_eq!(fs::read_to_string(shared.join("file")).unwrap(), "copied");
    assert!(husk(&["cp", "job:/srv/copied", "-"]).expect(0).text().contains("copied"));
    let exported = husk(&["export", "job"]).expect(0).output.clone();
    let mut tar = Command::new("tar");
    tar.arg("t");
    let names = finish(piped(tar), exported).expect(0).text();
    for (name, is_there) in [("srv/copied", true), ("srv/dir/pipe", true), ("etc/group", false), ("bin/busybox", true)]
    {
        assert_eq!(names.lines().any(|found| found == name), is_there, "{name}\n{names}");
    }
    let made = husk(&["commit", "-m", "why", "-c", "ENV MADE=1", "job", "made:1"]);
    assert!(made.expect(0).text().starts_with("sha256:"), "{}", made.text());
    let check = "cat /srv/file /srv/copied; ls -d /etc/group; test -p /srv/dir/pipe && echo $MADE $FROM_IMAGE";
    let ran = with(&machines, false, &["made:1", "sh", "-c", check], b"");
    assert_eq!(ran.expect(0).text(), "changed\ncopied1 yes\n", "{}", ran.errors);
    // Of a running one, whose image it is now.
    let mut start = husk_run(&machines.guests, &["-d", "--name", "next", "made:1", "sleep", "1000"]);
    start.env("XDG_RUNTIME_DIR", machines.runtime.path());
    finish(start, Vec::new()).expect(0);
    let script = "echo more >/srv/file; rm /srv/copied; rm -r /srv/dir; mkdir /srv/dir; touch /srv/dir/new";
    machines.ok(&["exec", "next", "sh", "-c", script]);
    let expected = "C /srv\nD /srv/copied\nC /srv/dir\nA /srv/dir/new\nC /srv/file\n";
    assert_eq!(husk(&["diff", "next"]).expect(0).text(), expected);
    // One layer more, with what is gone.
    husk(&["commit", "next", "made:2"]).expect(0);
    machines.ok(&["rm", "-f", "next"]);
    let ran = with(&machines, false, &["made:2", "sh", "-c", "cat /srv/file; cd /srv; find . | sort | xargs"], b"");
    assert_eq!(ran.expect(0).text(), "more\n. ./dir ./dir/new ./file ./not-a-program\n");
}

fn piped(mut command: Command) -> Command {
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    command
}

/// Any husk command, with the image store of the tests.
fn with_store(machines: &Machines, words: &[&str]) -> Command {
    let mut command = machines.command(words);
    command.env("HUSK_DATA", store());
    command
}

#[test]
fn a_created_machine_runs_when_it_is_started() {
    let machines = Machines::new(guests!());
    let file = machines.runtime.path().join("id");
    let words = ["--name", "later", "--cidfile", file.to_str().unwrap(), archive(), "sh", "-c", "echo ran; exit 4"];
    let created = with(&machines, true, &words, b"");
    let id = created.expect(0).text();
    assert_eq!(fs::read_to_string(&file).unwrap(), id.trim_end());
    let again = with(&machines, true, &words, b"");
    assert!(again.expect(125).errors.contains("id exists"), "{}", again.errors);
    assert!(machines.ok(&["ps", "-a"]).contains("Created"));
    assert_eq!(machines.ok(&["ps", "-q"]), "");
    assert_eq!(machines.ok(&["wait", "later"]), "0\n");
    let ran = machines.husk(&["start", "-a", "later"]);
    assert_eq!(ran.expect(4).text(), "ran\n");
    assert_eq!(machines.ok(&["wait", "later"]), "4\n");
    // In the background, and with --rm it is gone afterwards.
    let brief = ["--rm", "--name", "brief", archive(), "sh", "-c", "exit 5"];
    let id = with(&machines, true, &brief, b"").expect(0).text();
    machines.ok(&["start", "brief"]);
    while machines.ok(&["ps", "-a"]).contains("brief") {}
    assert!(!kept().iter().any(|path| path.ends_with(id.trim_end())));
}
