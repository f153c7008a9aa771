//! Machines in the background with husk's init: exec, cp, attach and stop.

mod long;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::image::{archive, run};
use crate::terminal::Terminal;
use crate::{Ended, finish, guests, husk_run, wait};

/// A separate set of machines.
pub struct Machines {
    pub guests: std::path::PathBuf,
    pub runtime: TempDir,
}

impl Machines {
    pub fn new(guests: std::path::PathBuf) -> Machines {
        Machines { guests, runtime: tempfile::tempdir().unwrap() }
    }

    /// Any husk command.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
        command.args(words).env("XDG_RUNTIME_DIR", self.runtime.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn husk(&self, words: &[&str]) -> Ended {
        finish(self.command(words), Vec::new())
    }

    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> String {
        self.husk(words).expect(0).text()
    }

    /// `husk run -d` of a shell command; returns the result.
    pub fn start(&self, name: &str, flags: &[&str], script: &str) -> Ended {
        let words = [&["-d", "--name", name], flags, &[archive(), "sh", "-c", script]].concat();
        let mut command = husk_run(&self.guests, &words);
        command.env("XDG_RUNTIME_DIR", self.runtime.path());
        finish(command, Vec::new())
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let ids = self.husk(&["ps", "-aq"]).text();
        let words: Vec<&str> = ["rm", "-f"].into_iter().chain(ids.lines()).collect();
        if words.len() > 2 {
            self.husk(&words);
        }
    }
}

#[test]
fn a_machine_is_entered_by_processes_with_separate_streams_and_exit_codes() {
    let machines = Machines::new(guests!());
    machines.start("box", &["-e", "MINE=1", "-w", "/tmp"], "echo main; sleep 1000").expect(0);
    let exec = |words: &[&str]| machines.husk(&[&["exec"], words].concat());
    let both = exec(&["box", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((both.expect(7).text(), both.errors.as_str()), ("out\n".into(), "err\n"));
    let inherited = exec(&["box", "sh", "-c", "echo $FROM_IMAGE $MINE $PWD $(id -u)"]);
    assert_eq!(inherited.expect(0).text(), "yes 1 /tmp 0\n");
    let changed = exec(&["-e", "MINE=2", "-w", "/srv", "-u", "user", "box", "sh", "-c", "echo $MINE $PWD $(id -u)"]);
    assert_eq!(changed.expect(0).text(), "2 /srv 1000\n");
    assert!(exec(&["box", "no-such-thing"]).expect(127).errors.contains("not found in PATH"));
    exec(&["box", "/srv"]).expect(126);
    exec(&["box", "sh", "-c", "kill -9 $$"]).expect(137);
    exec(&["box", "sh", "-c", "kill -34 $$"]).expect(162);
    exec(&["box"]).expect(125);
    assert!(exec(&["box", ""]).expect(127).errors.contains("\"\": the command is empty"));
    let nowhere = exec(&["-w", "/nowhere", "box", "pwd"]);
    assert!(nowhere.expect(126).errors.contains("working directory /nowhere: No such file"), "{}", nowhere.errors);
    exec(&["box", "ls", "/nowhere"]).expect(1);
    assert!(exec(&["nobody", "true"]).expect(125).errors.contains("husk ps -a"));
    // In both directions at once, and more than any buffer holds.
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    assert!(finish(machines.command(&["exec", "-i", "box", "cat"]), bytes.clone()).expect(0).output == bytes);
    let mut terminal = Terminal::start(machines.command(&["exec", "-it", "box", "sh"]));
    terminal.wait_for("# ");
    terminal.type_keys(b"echo tty=$(tty); exit 3\n");
    terminal.wait_for("tty=/dev/pts/");
    assert_eq!(terminal.wait(), Some(3));
    machines.ok(&["pause", "box"]);
    assert!(exec(&["box", "true"]).expect(125).errors.contains("husk unpause box"));
    machines.ok(&["unpause", "box"]);
    for n in 0..50 {
        assert_eq!(exec(&["box", "echo", &n.to_string()]).expect(0).text(), format!("{n}\n"));
    }
    assert_eq!(machines.ok(&["logs", "box"]), "main\n", "others' output is not the machine's");
    let stats: serde_json::Value = serde_json::from_str(&machines.ok(&["stats", "--json", "box"])).unwrap();
    assert!(stats[0]["cpu_us"].as_u64().unwrap() > 1000, "{stats}");
    machines.ok(&["stop", "box"]);
    assert!(exec(&["box", "true"]).expect(125).errors.contains("is not running"));
    assert_eq!(machines.ok(&["wait", "box"]), "143\n");
}

#[test]
fn with_input_alone_attached_a_machine_is_fed_and_left_in_the_background() {
    let machines = Machines::new(guests!());
    let run = |flags: &[&str], script: &str, input: &[u8]| {
        let mut command =
            husk_run(&machines.guests, &[flags, &["-a", "stdin", archive(), "sh", "-c", script]].concat());
        command.env("XDG_RUNTIME_DIR", machines.runtime.path());
        finish(command, input.to_vec()).expect(0).text()
    };
    let id = run(&["-i", "--name", "fed"], "sleep 1; wc -c; exit 3", &[b'x'; 300_000]);
    assert_eq!(machines.ok(&["wait", id.trim()]), "3\n", "its input has ended");
    assert_eq!(machines.ok(&["logs", "fed"]), "300000\n");
    let id = run(&[], "cat; echo hungry", b"x");
    assert_eq!(machines.ok(&["wait", id.trim()]), "0\n");
    assert_eq!(machines.ok(&["logs", id.trim()]), "hungry\n");
}

#[test]
fn any_number_of_concurrent_processes_run() {
    // Seven used to hang before the guest's backlog was increased.
    const COUNT: usize = 100;
    let machines = Machines::new(guests!());
    machines.start("box", &[], "sleep 1000").expect(0);
    let started: Vec<_> = (0..COUNT)
        .map(|n| machines.command(&["exec", "box", "sh", "-c", &format!("echo {n}; exit {n}")]).spawn().unwrap())
        .collect();
    for (n, child) in started.into_iter().enumerate() {
        let ended = wait(child);
        assert_eq!(ended.expect(n as i32).text(), format!("{n}\n"));
    }
}

#[test]
fn a_guest_has_the_hosts_time_after_a_pause_and_when_that_is_set() {
    let machines = Machines::new(guests!());
    machines.start("box", &[], "sleep 1000").expect(0);
    let is_wrong = || machines.ok(&["exec", "box", "date", "+%s"]).trim().parse::<u64>().unwrap() < 1_500_000_000;
    let make_wrong = || machines.ok(&["exec", "box", "date", "-s", "@1400000000"]);
    let deadline = Instant::now() + Duration::from_secs(60);
    let await_right = |what: &str| {
        while is_wrong() {
            assert!(Instant::now() < deadline, "{what}");
        }
    };
    make_wrong();
    assert!(is_wrong());
    machines.ok(&["pause", "box"]);
    machines.ok(&["unpause", "box"]);
    await_right("after a pause");
    if std::env::var_os("HUSK_TEST_EMULATED").is_none() {
        eprintln!("SKIPPED: nobody's clock is set but the lab's");
        return;
    }
    make_wrong();
    // Setting the clock to the current time is also a change.
    run(Command::new("sh").args(["-c", "date -s @$(date +%s)"]));
    await_right("after the host's clock was set");
}

#[test]
fn a_process_can_be_stopped_by_any_signal() {
    let machines = Machines::new(guests!());
    let script = "trap 'echo sixty' 60; trap 'exit 5' 37; echo ready; while :; do sleep 0.1; done";
    machines.start("job", &["--stop-signal", "SIGRTMIN+3"], script).expect(0);
    let await_logs = |logs: &str| while machines.ok(&["logs", "job"]) != logs {};
    await_logs("ready\n");
    machines.ok(&["kill", "-s", "60", "job"]);
    await_logs("ready\nsixty\n");
    machines.ok(&["stop", "-t", "60", "job"]);
    assert_eq!(machines.ok(&["wait", "job"]), "5\n");
}

#[test]
fn a_process_can_be_detached_in_a_machine() {
    let machines = Machines::new(guests!());
    machines.start("box", &[], "sleep 1000").expect(0);
    let exec = |words: &[&str]| machines.husk(&[&["exec", "-d", "box"], words].concat());
    // Its output is discarded, and it outlives the command that started it.
    let script = "echo out; echo err >&2; while [ ! -e /tmp/go ]; do sleep 0.1; done
        echo more && echo $$ >/tmp/gone; exec sleep 1000";
    let started = exec(&["sh", "-c", script]);
    assert_eq!((started.expect(0).text().as_str(), started.errors.as_str()), ("", ""));
    let lives = "touch /tmp/go; while [ ! -s /tmp/gone ]; do sleep 0.1; done; kill -0 $(cat /tmp/gone)";
    machines.ok(&["exec", "box", "sh", "-c", lives]);
    assert!(exec(&["no-such-thing"]).expect(127).errors.contains("not found in PATH"));
    assert_eq!(machines.husk(&["exec", "-dt", "box", "true"]).expect(125).errors.lines().count(), 1);
    // A process that exits is reaped by init.
    exec(&["true"]).expect(0);
    let zombies = "sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status | wc -l";
    assert_eq!(machines.ok(&["exec", "box", "sh", "-c", zombies]), "0\n");
    machines.ok(&["stop", "box"]);
}

#[test]
fn exec_enters_the_right_machine() {
    let machines = Machines::new(guests!());
    let names: Vec<String> = (0..8).map(|n| format!("box-{n}")).collect();
    for name in &names {
        machines.start(name, &[], "sleep 1000").expect(0);
    }
    let list = machines.ok(&["ps"]);
    for name in &names {
        assert!(list.contains(name), "{list}");
        // Its host name is its name.
        assert_eq!(machines.ok(&["exec", name, "hostname"]), format!("{name}\n"));
    }
    let all: Vec<&str> = ["rm", "--force"].into_iter().chain(names.iter().map(String::as_str)).collect();
    machines.ok(&all);
    assert_eq!(machines.ok(&["ps", "-aq"]), "");
}

#[test]
fn files_are_copied_in_and_out_unchanged() {
    let machines = Machines::new(guests!());
    machines.start("box", &[], "sleep 1000").expect(0);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir_all(at("tree/sub/empty")).unwrap();
    fs::write(at("tree/sub/data"), vec![0xa5; 1_000_000]).unwrap();
    fs::write(at("tree/run.sh"), "#!/bin/sh\n").unwrap();
    run(Command::new("sh").args([
        "-c",
        &format!("cd {}; chmod 750 run.sh; ln -s sub/data link; touch -d @1000000000 run.sh", at("tree")),
    ]));
    machines.ok(&["cp", &at("tree"), "box:/srv"]);
    let listed = machines.ok(&["exec", "box", "stat", "-c", "%n %a %u %Y", "/srv/tree/run.sh", "/srv/tree/sub/data"]);
    assert!(listed.starts_with("/srv/tree/run.sh 750 0 1000000000\n"), "{listed}");
    assert_eq!(machines.ok(&["exec", "box", "readlink", "/srv/tree/link"]), "sub/data\n");
    machines.ok(&["exec", "box", "mkfifo", "/srv/tree/pipe"]);
    let fetched = machines.husk(&["cp", "box:/srv/tree", &at("back")]);
    assert!(fetched.expect(0).errors.contains("skipped"), "{}", fetched.errors);
    let list = |tree: &str| {
        let script = format!(
            "cd {} && find . | sort | xargs ls -ldn --time-style=+%s | awk '{{print $1, $5, $6, $7}}'",
            at(tree)
        );
        run(Command::new("sh").args(["-c", &script]))
    };
    if Path::new("/usr/bin/awk").exists() {
        assert_eq!(list("back"), list("tree"));
    }
    assert_eq!(fs::read(at("back/sub/data")).unwrap(), vec![0xa5; 1_000_000]);
    machines.ok(&["cp", &at("tree/run.sh"), "box:/srv/renamed"]);
    machines.ok(&["exec", "box", "test", "-f", "/srv/renamed"]);
    for (words, why) in [
        (["cp", "box:/nowhere", &at("x")], "No such file"),
        (["cp", &at("nothing"), "box:/srv"], "No such file"),
        (["cp", &at("tree"), "box:/srv/renamed"], "cannot be replaced with a directory"),
        (["cp", &at("tree/run.sh"), "box:/none/"], "no such directory"),
        (["cp", "a", "b"], "neither path is in a machine"),
        (["cp", "box:/a", "box:/b"], "between machines is not supported"),
    ] {
        let ended = machines.husk(&words);
        assert!(ended.expect(1).errors.contains(why) && ended.errors.lines().count() == 1, "{}", ended.errors);
    }
    assert!(!Path::new(&at("x")).exists());
    // A link given by the user is followed when written to, and copied as a link or followed on request.
    machines.ok(&["exec", "box", "sh", "-c", "echo old >/real; ln -s real /link; ln -s nope /dangling"]);
    fs::write(at("new"), "new").unwrap();
    machines.ok(&["cp", &at("new"), "box:/link"]);
    machines.ok(&["cp", &at("new"), "box:/dangling"]);
    let links = machines.ok(&["exec", "box", "sh", "-c", "readlink /link; readlink /dangling; cat /real /nope"]);
    assert_eq!(links, "real\nnope\nnewnew");
    machines.ok(&["cp", "-L", "box:/link", &at("followed")]);
    assert_eq!(fs::read(at("followed")).unwrap(), b"new");
    let as_link = machines.husk(&["cp", "box:/link", &at("as-link")]);
    assert!(as_link.expect(0).errors.contains("use -L"), "{}", as_link.errors);
    assert_eq!(fs::read_link(at("as-link")).unwrap(), Path::new("real"));
    // For /proc and /sys the actual content counts.
    for path in ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"] {
        let content = machines.husk(&["exec", "box", "cat", path]).output.clone();
        machines.ok(&["cp", &format!("box:{path}"), &at("content")]);
        assert_eq!(fs::read(at("content")).unwrap(), content, "{path}");
        let archive = machines.husk(&["cp", &format!("box:{path}"), "-"]).expect(0).output.clone();
        assert_eq!(archive.get(512..512 + content.len()), Some(&content[..]), "{path}");
        assert_eq!(u64::from_str_radix(std::str::from_utf8(&archive[124..135]).unwrap(), 8), Ok(content.len() as u64));
    }
}

#[test]
fn archives_are_copied_in_and_out() {
    let machines = Machines::new(guests!());
    machines.start("box", &[], "sleep 1000").expect(0);
    let script = "mkdir -p /tmp/in/sub && cd /tmp/in && head -c 300000 /dev/urandom >sub/data && ln sub/data same
        ln -s sub/data link && chmod 750 sub && tar c .";
    let packed = machines.husk(&["exec", "box", "sh", "-c", script]).expect(0).output.clone();
    finish(machines.command(&["cp", "-", "box:/srv/in"]), packed).expect(0);
    let check =
        "cd /srv/in && cmp sub/data /tmp/in/sub/data && test sub/data -ef same && readlink link && stat -c %a sub";
    assert_eq!(machines.ok(&["exec", "box", "sh", "-c", check]), "sub/data\n750\n");
    let fetched = machines.husk(&["cp", "box:/srv/in", "-"]).expect(0).output.clone();
    let check =
        "mkdir /tmp/out && cd /tmp/out && tar x && find in | sort | tr '\\n' ' ' && cmp in/sub/data /tmp/in/sub/data";
    let unpacked = finish(machines.command(&["exec", "-i", "box", "sh", "-c", check]), fetched);
    assert_eq!(unpacked.expect(0).text(), "in in/link in/same in/sub in/sub/data ");
    let compressed = machines.husk(&["exec", "box", "tar", "cz", "-C", "/tmp/in", "."]).expect(0).output.clone();
    assert!(compressed.starts_with(&[0x1f, 0x8b]));
    finish(machines.command(&["cp", "-", "box:/srv/compressed"]), compressed).expect(0);
    machines.ok(&["exec", "box", "cmp", "/srv/compressed/same", "/tmp/in/same"]);
    let none = machines.husk(&["cp", "box:/nowhere", "-"]);
    assert!(none.expect(1).errors.contains("read /nowhere: No such file"), "{}", none.errors);
    let noise = finish(machines.command(&["cp", "-", "box:/srv"]), vec![7; 10_000]);
    assert!(
        noise.expect(1).errors.contains("read the archive") && noise.errors.lines().count() == 1,
        "{}",
        noise.errors
    );
}

#[test]
fn a_machine_from_an_image_is_restarted() {
    let machines = Machines::new(guests!());
    let script = "echo $MINE $(hostname); trap 'exit 3' TERM; while :; do sleep 0.1; done";
    machines.start("box", &["-e", "MINE=1"], script).expect(0);
    let await_lines = |count: usize| while machines.ok(&["logs", "box"]).lines().count() < count {};
    await_lines(1);
    machines.ok(&["stop", "box"]);
    machines.ok(&["start", "box"]);
    await_lines(2);
    assert_eq!(machines.ok(&["exec", "box", "sh", "-c", "echo $MINE"]), "1\n");
    machines.ok(&["restart", "-t", "60", "box"]);
    assert_eq!(machines.ok(&["exec", "box", "hostname"]), "box\n");
    await_lines(3);
    machines.ok(&["stop", "--time", "60", "box"]);
    assert_eq!((machines.ok(&["wait", "box"]), machines.ok(&["logs", "box"])), ("3\n".into(), "1 box\n".repeat(3)));
}

#[test]
fn a_background_process_is_stopped_and_its_streams_are_logged_separately() {
    let machines = Machines::new(guests!());
    // A failed start is reported to the user, and leaves nothing behind.
    let words = ["-d", "--name", "bad", archive(), "no-such-thing"];
    let mut command = husk_run(&machines.guests, &words);
    command.env("XDG_RUNTIME_DIR", machines.runtime.path());
    assert!(finish(command, Vec::new()).expect(127).errors.contains("not found in PATH"));
    assert_eq!(machines.ok(&["ps", "-aq"]), "");

    let script = "trap 'echo bye; exit 4' TERM; trap 'echo usr' USR1; echo out; echo err >&2
        while read line; do echo \"got $line\"; done & wait; while :; do sleep 0.1; done";
    machines.start("job", &["-i"], script).expect(0);
    // It is running, but may not have printed anything yet.
    let logs = || machines.husk(&["logs", "job"]);
    let printed = std::iter::repeat_with(logs).find(|logs| logs.errors == "err\n").unwrap();
    assert_eq!(printed.expect(0).text(), "out\n");
    machines.ok(&["kill", "-s", "USR1", "job"]);
    let followed = machines.command(&["logs", "-f", "job"]).spawn().unwrap();
    machines.ok(&["stop", "-t", "60", "job"]);
    let followed = followed.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&followed.stdout), "out\nusr\nbye\n");
    assert_eq!(machines.ok(&["wait", "job"]), "4\n");
    machines.ok(&["rm", "job"]);

    machines
        .start("echo", &["-i"], "while read line; do echo \"got $line\"; test $line != end || exit 9; done")
        .expect(0);
    let mut attached = machines.command(&["attach", "echo"]).stdin(Stdio::piped()).spawn().unwrap();
    attached.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
    let mut seen = [0; 8];
    attached.stdout.as_mut().unwrap().read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"got one\n");
    attached.kill().unwrap();
    attached.wait().unwrap();
    // Its input has not ended with the first client.
    finish(machines.command(&["attach", "echo"]), b"two\nend\n".to_vec()).expect(9);
    assert_eq!(machines.ok(&["logs", "echo"]), "got one\ngot two\ngot end\n");
}
