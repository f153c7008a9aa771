//! Machines in the background: listed, attached, stopped, renamed, removed and restarted.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk_guests as guests;
use tempfile::TempDir;

use crate::husk::{disk_image, end_of, is_emulated, own_lines, processes_of, processes_with, send_signal};

/// Longer than anything here takes.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A separate set of machines.
pub struct Machines {
    pub runtime: TempDir,
    /// Whether a file system is mounted on it.
    pub mounted: bool,
}

impl Machines {
    pub fn new() -> Machines {
        Machines { runtime: tempfile::tempdir().unwrap(), mounted: false }
    }

    /// The state directory, unique to this test.
    pub fn place(&self) -> &str {
        self.runtime.path().to_str().unwrap()
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.args(words).env("XDG_RUNTIME_DIR", self.runtime.path()).stdin(Stdio::null());
        command
    }

    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Runs a command that must succeed, and returns its output.
    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with one line, and returns the line.
    #[track_caller]
    pub fn fails(&self, words: &[&str], code: i32) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
        let errors = own_lines(&output.stderr);
        assert_eq!(errors.lines().count(), 1, "{words:?}: {errors}");
        errors
    }

    /// Starts a guest in the background, and returns its ID.
    #[track_caller]
    pub fn start(&self, guest: &str, words: &str, flags: &[&str]) -> String {
        let fixed = ["boot", "-d", "--kernel", guest, "--cmdline", words, "--memory", "64M"];
        self.ok(&[&fixed, flags].concat()).trim_end().to_owned()
    }

    pub fn inspect(&self, name: &str, what: &str) -> String {
        let json: serde_json::Value = serde_json::from_str(&self.ok(&["inspect", name])).unwrap();
        json.pointer(&format!("/0/{what}")).map_or("none".into(), |value| value.to_string().replace('"', ""))
    }

    pub fn status(&self, name: &str) -> String {
        self.inspect(name, "State/Status")
    }

    pub fn await_status(&self, name: &str, wanted: &str) {
        let deadline = Instant::now() + TIMEOUT;
        while self.status(name) != wanted {
            assert!(Instant::now() < deadline, "{name} is {}, not {wanted}", self.status(name));
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn await_log(&self, name: &str, words: &str) {
        let deadline = Instant::now() + TIMEOUT;
        while !self.ok(&["logs", name]).contains(words) {
            assert!(Instant::now() < deadline, "{name} never printed {words}: {}", self.ok(&["logs", name]));
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// `husk attach`, with pipes for its streams.
    pub fn attach(&self, name: &str) -> Child {
        let mut command = self.command(&["attach", name]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The machines' directories, and any other files next to them.
    pub fn dirs(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.runtime.path().join("husk")).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| !["events", "lock", "names"].contains(&name.as_str())).collect()
    }

    /// The number of names that are not dangling.
    pub fn names(&self) -> usize {
        std::fs::read_dir(self.runtime.path().join("husk/names")).map_or(0, Iterator::count)
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let ids = self.run(&["ps", "-aq"]).stdout;
        let ids = String::from_utf8_lossy(&ids);
        let words: Vec<&str> = ["rm", "-f"].into_iter().chain(ids.lines()).collect();
        if words.len() > 2 {
            self.run(&words);
        }
        if self.mounted {
            // Detached when its last user exits.
            let _ = Command::new("umount").arg("-l").arg(self.runtime.path()).status();
        }
    }
}

#[test]
fn machines_are_filtered_and_formatted_as_by_docker() {
    needs_kvm!();
    let machines = Machines::new();
    let old = machines.start(guests::POWER, "do=exit code=3", &["--name", "old", "--label", "team=a", "-l", "x"]);
    assert_eq!(machines.ok(&["wait", "old"]), "3\n");
    let new = machines.start(guests::POWER, "do=wait-for-button", &["--name", "new", "--label", "team=b"]);
    machines.await_log("new", "listening");
    let named = |filters: &[&str]| {
        let filters: Vec<&str> = filters.iter().flat_map(|filter| ["--filter", filter]).collect();
        machines.ok(&[&["ps", "-a", "--format", "{{.Names}}"], &filters[..]].concat()).replace('\n', " ")
    };
    for (filters, names) in [
        (&[][..], "new old "),
        (&["name=ne"], "new "),
        (&["name=^/old$", "name=^new$"], "new old "),
        (&["label=team"], "new old "),
        (&["label=team=a", "label=x"], "old "),
        (&["status=exited"], "old "),
        (&["exited=3"], "old "),
        (&["exited=0"], ""),
        (&["before=new"], "old "),
        (&["since=old"], "new "),
        (&[&format!("id={}", &new[..5])], "new "),
        (&["network=web"], ""),
        (&["health=none", "status=running"], "new "),
    ] {
        assert_eq!(named(filters), names, "{filters:?}");
    }
    let table = machines.ok(&["ps", "-a", "--format", "table {{.Names}}\\t{{.ID}}\\t{{.Label \"team\"}}"]);
    assert_eq!(table, format!("NAMES  MACHINE ID    LABEL\nnew    {new}  b\nold    {old}  a\n"));
    let line = machines.ok(&["ps", "--format", "json"]);
    let row: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&row["Names"], &row["State"], &row["Memory"]), (&"new".into(), &"running".into(), &"64M".into()));
    let format =
        "{{.State.Status}} {{.State.Running}} {{.State.ExitCode}} {{if .State.Health}}h{{end}}{{.Config.Labels.team}}";
    assert_eq!(machines.ok(&["inspect", "-f", format, "old", "new"]), "exited false 3 a\nrunning true 0 b\n");
    assert_eq!(machines.ok(&["inspect", "--type", "container", "-sf", "{{.Name}} {{.SizeRw}}", "new"]), "new 0\n");
    machines.ok(&["rm", "-f", "old", "new"]);
}

#[test]
fn a_background_machine_is_listed_attached_and_stopped() {
    needs_kvm!();
    let machines = Machines::new();
    let id = machines.start(guests::POWER, "do=wait-for-button", &["--name", "web"]);
    assert!(id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
    assert_eq!(machines.ok(&["ps", "-q"]).trim_end(), id);
    let list = machines.ok(&["ps"]);
    assert!(list.contains(&id) && list.contains("web") && list.contains("64M") && list.contains("Up "), "{list}");
    machines.await_log("web", "listening");
    assert_eq!(machines.status("web"), "running");
    assert_eq!(machines.ok(&["stop", "web"]), "web\n");
    assert_eq!(machines.ok(&["ps", "-q"]), "");
    assert_eq!((machines.status(&id), machines.inspect(&id, "State/ExitCode")), ("exited".into(), "0".into()));
    assert_eq!(machines.ok(&["logs", "web"]), "ready\nlistening\npower button\n");
    assert!(machines.ok(&["ps", "-a"]).contains("Exited (0)"));
    assert_eq!(machines.ok(&["wait", "web"]), "0\n");
    assert_eq!(machines.ok(&["rm", &id[..6]]), format!("{}\n", &id[..6]));
    assert!(machines.fails(&["logs", "web"], 1).contains("husk ps -a"));
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
}

#[test]
fn a_failed_start_is_reported_and_leaves_nothing_behind() {
    needs_kvm!();
    let machines = Machines::new();
    let line = machines.fails(&["boot", "-d", "--name", "x", "--kernel", "/nowhere"], 1);
    assert!(line.contains("/nowhere: No such file"), "{line}");
    let line = machines.fails(&["boot", "-d", "--name", "x/y", "--kernel", guests::EXIT], 2);
    assert!(line.contains("invalid machine name"), "{line}");
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
    let id = machines.start(guests::EXIT, "", &["--name", "x"]);
    assert_eq!(machines.ok(&["wait", &id]), "42\n");
    let line = machines.fails(&["boot", "-d", "--name", "x", "--kernel", guests::EXIT], 1);
    assert!(line.contains("`husk rm x`") && line.contains(&id), "{line}");
}

#[test]
fn names_are_unique_among_concurrent_starts() {
    needs_kvm!();
    let machines = Machines::new();
    let start = || {
        let words =
            ["boot", "-d", "--name", "one", "--kernel", guests::POWER, "--cmdline", "do=halt", "--memory", "64M"];
        machines.run(&words).status.success()
    };
    let started: Vec<bool> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(started.iter().filter(|started| **started).count(), 1);
    assert_eq!(machines.dirs().len(), 1);
}

#[test]
fn a_paused_machine_uses_no_cpu_and_continues() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::POWER, "do=spin", &["--name", "busy"]);
    machines.ok(&["pause", "busy"]);
    assert_eq!(machines.status("busy"), "paused");
    assert!(machines.fails(&["pause", "busy"], 1).contains("is already paused"));
    let cpu = |machines: &Machines| {
        let json: serde_json::Value = serde_json::from_str(&machines.ok(&["stats", "--json", "busy"])).unwrap();
        json[0]["cpu_percent"].as_f64().unwrap()
    };
    assert!(cpu(&machines) < 5.0, "{}", cpu(&machines));
    machines.ok(&["unpause", "busy"]);
    assert!(cpu(&machines) > 20.0, "{}", cpu(&machines));
    assert!(machines.fails(&["unpause", "busy"], 1).contains("is not paused"));
    machines.ok(&["pause", "busy"]);
    // Stopping a paused machine works the same way.
    machines.ok(&["stop", "-t", "0.2", "busy"]);
    assert_eq!(machines.inspect("busy", "State/ExitCode"), "137");
}

#[test]
fn a_guest_that_does_not_stop_is_killed_after_the_timeout() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::POWER, "do=halt", &["--name", "deaf"]);
    let started = Instant::now();
    machines.ok(&["stop", "-t", "1", "deaf"]);
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(machines.ok(&["wait", "deaf"]), "137\n");
    machines.start(guests::POWER, "do=halt", &["--name", "other"]);
    assert!(machines.fails(&["kill", "-s", "USR1", "other"], 1).contains("runs its own init"));
    machines.ok(&["kill", "other"]);
    assert_eq!(machines.ok(&["wait", "other"]), "137\n");
    assert!(machines.fails(&["kill", "other"], 1).contains("is not running"));
}

#[test]
fn a_killed_machine_is_detected_and_its_name_freed() {
    needs_kvm!();
    let machines = Machines::new();
    let id = machines.start(guests::POWER, "do=halt", &["--name", "a"]);
    let waiting = machines.command(&["wait", "a"]).stdout(Stdio::piped()).spawn().unwrap();
    thread::sleep(Duration::from_millis(100));
    let pid: u32 = machines.inspect("a", "State/Pid").parse().unwrap();
    send_signal(pid, "KILL");
    assert_eq!(String::from_utf8(waiting.wait_with_output().unwrap().stdout).unwrap(), "137\n");
    machines.await_status("a", "lost");
    assert_eq!(machines.ok(&["ps", "-q"]), "");
    assert!(machines.ok(&["ps", "-a"]).contains("husk was killed"));
    machines.ok(&["rm", "a"]);
    let second = machines.start(guests::POWER, "do=halt", &["--name", "a", "--rm"]);
    assert_ne!(second, id);
    // A machine that is not kept disappears at the next command. Until then the kernel is tearing it down.
    send_signal(machines.inspect("a", "State/Pid").parse().unwrap(), "KILL");
    let deadline = Instant::now() + TIMEOUT;
    while !machines.ok(&["ps", "-q"]).is_empty() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(10));
    }
    machines.start(guests::POWER, "do=halt", &["--name", "a", "--rm"]);
    assert_eq!(machines.ok(&["ps", "-aq"]).lines().count(), 1);
    assert_eq!(machines.dirs().len(), 1);
}

/// Runs `words` and kills the process that runs the machine after this time.
fn start_and_kill(machines: &Machines, words: &[&str], after: Duration) -> Output {
    let mut command = machines.command(words);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    thread::sleep(after);
    // In the background, that is the child of the process started here.
    let victims = if words.contains(&"-d") {
        processes_of(machines.place()).into_iter().filter(|pid| *pid != child.id()).collect()
    } else {
        vec![child.id()]
    };
    for pid in victims {
        let _ = Command::new("sh").args(["-c", &format!("kill -KILL {pid} 2>/dev/null")]).status();
    }
    child.wait_with_output().unwrap()
}

#[test]
fn a_machine_killed_at_any_stage_leaves_a_reusable_name() {
    needs_kvm!();
    let machines = Machines::new();
    // A start takes 7 ms, perhaps 20 with a debug build, and more on an emulated processor.
    let (step_us, steps) = if is_emulated() { (100_000, 10) } else { (500, 60) };
    let words = ["--name", "a", "--kernel", guests::POWER, "--cmdline", "do=halt", "--memory", "64M"];
    let mut stages = std::collections::BTreeSet::new();
    for step in 0..steps {
        for how in [&["boot"][..], &["boot", "-d"]] {
            let killed = start_and_kill(&machines, &[how, &words].concat(), Duration::from_micros(step * step_us));
            let errors = own_lines(&killed.stderr);
            assert!(errors.lines().count() <= 1, "{errors}");
            // What is left: nothing, a directory, a record, or a machine to be removed.
            stages.insert((how.len(), machines.dirs().len(), machines.ok(&["ps", "-aq"]).lines().count()));
            let removed = machines.run(&["rm", "-f", "a"]);
            assert!(removed.status.success() || own_lines(&removed.stderr).contains("no such machine"), "{removed:?}");
            let id = machines.start(guests::POWER, "do=halt", &["--name", "a"]);
            assert_eq!(machines.ok(&["ps", "-aq"]).trim_end(), id, "{step}");
            assert_eq!(machines.dirs(), [id], "{step}");
            machines.ok(&["rm", "-f", "a"]);
        }
    }
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
    // Killed both too early to leave anything, and late enough to leave something.
    assert!(stages.len() >= 4, "{stages:?}");
}

#[test]
fn a_foreground_machine_is_listed_only_while_running() {
    needs_kvm!();
    let machines = Machines::new();
    let words = ["boot", "--name", "fore", "--kernel", guests::POWER, "--cmdline", "do=halt", "--memory", "64M"];
    let mut child = machines.command(&words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while !machines.ok(&["ps"]).contains("fore") || machines.status("fore") != "running" {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(10));
    }
    assert!(machines.fails(&["attach", "fore"], 1).contains("runs in the foreground"));
    assert!(machines.fails(&["logs", "fore"], 1).contains("has no logs"));
    assert!(machines.fails(&["exec", "fore", "true"], 125).contains("runs its own init"));
    machines.ok(&["stop", "-t", "0.1", "fore"]);
    assert_eq!(end_of(&mut child).unwrap().code(), Some(137));
    assert_eq!(machines.ok(&["ps", "-aq"]), "");
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
}

#[test]
fn a_renamed_machine_has_only_its_new_name() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::POWER, "do=halt", &["--name", "one"]);
    machines.start(guests::POWER, "do=halt", &["--name", "two"]);
    assert!(machines.fails(&["rename", "one", "two"], 1).contains("choose another name"));
    machines.ok(&["rename", "one", "three"]);
    assert_eq!((machines.status("three"), machines.names()), ("running".into(), 2));
    assert!(machines.fails(&["stop", "one"], 1).contains("no such machine"));
    machines.ok(&["kill", "three"]);
    machines.await_status("three", "exited");
    machines.ok(&["wait", "three"]);
    machines.ok(&["rename", "three", "one"]);
    assert_eq!(machines.status("one"), "exited");
}

#[test]
fn a_failing_machine_is_restarted_up_to_the_limit() {
    needs_kvm!();
    let machines = Machines::new();
    let exits = |code, policy, name| {
        machines.start(guests::POWER, &format!("do=exit code={code}"), &["--name", name, "--restart", policy]);
        let code = machines.ok(&["wait", name]);
        (code.trim_end().to_owned(), machines.inspect(name, "RestartCount"))
    };
    assert_eq!(exits(7, "on-failure:3", "a"), ("7".into(), "3".into()));
    assert_eq!(exits(0, "on-failure", "b"), ("0".into(), "0".into()));
    // A stop request prevents a restart, while the machine is running or waiting.
    machines.start(guests::POWER, "do=halt", &["--name", "c", "--restart", "on-failure"]);
    machines.ok(&["stop", "-t", "0", "c"]);
    assert_eq!((machines.status("c"), machines.inspect("c", "RestartCount")), ("exited".into(), "0".into()));
    machines.start(guests::POWER, "do=exit code=1", &["--name", "d", "--restart", "on-failure"]);
    machines.await_status("d", "restarting");
    machines.ok(&["stop", "d"]);
    assert_eq!(machines.status("d"), "exited");
    assert!(machines.fails(&["boot", "--restart", "sometimes", "--kernel", "x"], 2).contains("on-failure:MAX_RETRIES"));
}

#[test]
fn a_machine_is_restarted_until_it_is_stopped() {
    needs_kvm!();
    let machines = Machines::new();
    for (name, policy) in [("a", "always"), ("b", "unless-stopped")] {
        machines.start(guests::POWER, "do=exit code=0", &["--name", name, "--restart", policy]);
        let deadline = Instant::now() + TIMEOUT;
        while machines.inspect(name, "RestartCount").parse().unwrap_or(0) < 2 {
            assert!(Instant::now() < deadline, "{name} is not restarted");
            thread::sleep(Duration::from_millis(10));
        }
        machines.ok(&["stop", name]);
        assert_eq!(machines.status(name), "exited");
    }
    // The same if the host asks its husk to end, as when it shuts down.
    machines.start(guests::POWER, "do=wait-for-button", &["--name", "c", "--restart", "always"]);
    machines.await_log("c", "listening");
    send_signal(machines.inspect("c", "State/Pid").parse().unwrap(), "TERM");
    machines.ok(&["wait", "c"]);
    assert_eq!((machines.status("c"), machines.inspect("c", "RestartCount")), ("exited".into(), "0".into()));
}

#[test]
fn the_log_of_a_repeatedly_failing_machine_stays_small() {
    needs_kvm!();
    const FULL_BYTES: usize = 2 << 20;
    let machines = Machines::new();
    machines.start(guests::POWER, "do=reset", &["--name", "e", "--restart", "on-failure"]);
    let dir = machines.runtime.path().join("husk").join(&machines.dirs()[0]);
    let mut log = std::fs::File::options().append(true).create(true).open(dir.join("husk.log")).unwrap();
    log.write_all(&vec![b'.'; FULL_BYTES]).unwrap();
    let started = Instant::now();
    while !dir.join("husk.old").exists() {
        assert!(started.elapsed() < TIMEOUT, "the log is never put aside");
        thread::sleep(Duration::from_millis(10));
    }
    machines.ok(&["stop", "e"]);
    // Later messages are in the new one.
    let sizes = ["husk.old", "husk.log"].map(|name| dir.join(name).metadata().unwrap().len() as usize);
    assert!(sizes[0] > FULL_BYTES && sizes[1] < FULL_BYTES / 2, "{sizes:?}");
    assert!(machines.ok(&["logs", "--kernel", "e"]).contains("....husk: "), "{sizes:?}");
}

#[test]
fn a_stopped_machine_is_started_again() {
    needs_kvm!();
    let machines = Machines::new();
    // From another working directory, with a relative path.
    let place = tempfile::tempdir().unwrap();
    std::fs::copy(guests::POWER, place.path().join("kernel")).unwrap();
    let words = ["boot", "-d", "--name=old", "--kernel=kernel", "--cmdline=do=wait-for-button", "--memory=64M"];
    let started = machines.command(&words).current_dir(&place).output().unwrap();
    assert!(started.status.success(), "{started:?}");
    let id = String::from_utf8(started.stdout).unwrap().trim_end().to_owned();
    machines.await_log("old", "listening");
    let (pid, created) = (machines.inspect("old", "State/Pid"), machines.inspect("old", "Created"));
    assert_eq!(machines.ok(&["start", "old"]), "old\n");
    assert_eq!(machines.inspect("old", "State/Pid"), pid, "it runs, and goes on");
    machines.ok(&["stop", "old"]);
    machines.ok(&["rename", "old", "new"]);
    assert_eq!(machines.ok(&["start", "new"]), "new\n");
    assert_eq!((machines.status("new"), machines.inspect("new", "Id")), ("running".into(), id.clone()));
    assert_ne!(machines.inspect("new", "State/Pid"), pid);
    assert_eq!((machines.inspect("new", "Created"), machines.inspect("new", "Name")), (created, "new".into()));
    machines.await_log("new", "power button\nready\nlistening\n");
    // One that was killed, and then one that is running.
    send_signal(machines.inspect("new", "State/Pid").parse().unwrap(), "KILL");
    machines.await_status("new", "lost");
    machines.ok(&["start", &id]);
    let pid = machines.inspect("new", "State/Pid");
    assert_eq!(machines.ok(&["restart", "--time", "30", "new"]), "new\n");
    assert_ne!(machines.inspect("new", "State/Pid"), pid);
    assert_eq!((machines.status("new"), machines.dirs(), machines.names()), ("running".into(), vec![id], 1));
    // Its kernel is gone: it remains stopped.
    std::fs::remove_file(place.path().join("kernel")).unwrap();
    machines.ok(&["stop", "new"]);
    assert!(machines.fails(&["start", "new"], 1).contains("kernel: No such file"));
    assert!(machines.ok(&["logs", "new"]).contains("power button"));
    drop(place);
    assert!(machines.fails(&["start", "new"], 1).contains("which no longer exists"));
    assert_eq!(machines.status("new"), "exited");
    machines.ok(&["rm", "new"]);
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
    machines.start(guests::POWER, "do=halt", &["--name", "brief", "--rm"]);
    assert!(machines.fails(&["restart", "brief"], 1).contains("without --rm"));
    assert_eq!(machines.status("brief"), "running");
}

#[test]
fn concurrent_starts_run_a_machine_once() {
    needs_kvm!();
    let machines = Machines::new();
    let id = machines.start(guests::POWER, "do=halt", &["--name", "one"]);
    for _ in 0..3 {
        machines.ok(&["kill", "one"]);
        machines.ok(&["wait", "one"]);
        let outputs: Vec<Output> = thread::scope(|scope| {
            let threads: Vec<_> = (0..6).map(|_| scope.spawn(|| machines.run(&["start", "one"]))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(outputs.iter().all(|output| output.status.success() && output.stdout == b"one\n"), "{outputs:?}");
        assert_eq!((machines.status("one"), machines.dirs()), ("running".into(), vec![id.clone()]));
        assert_eq!(processes_with(&format!("--again={id}")).len(), 1);
    }
}

#[test]
fn stopped_machines_are_listed_with_running_ones() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::POWER, "do=halt", &["--name", "gone"]);
    machines.start(guests::POWER, "do=halt", &["--name", "here"]);
    machines.ok(&["kill", "gone"]);
    machines.ok(&["wait", "gone"]);
    let table = machines.ok(&["stats", "--no-stream", "gone", "here"]);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert_eq!((lines[1][1], &lines[1][2..]), ("gone", &["-"; 5][..]), "{table}");
    assert!(lines[2][1] == "here" && lines[2][2].ends_with('%'), "{table}");
    let json: serde_json::Value = serde_json::from_str(&machines.ok(&["stats", "--json", "gone", "here"])).unwrap();
    assert_eq!((&json[0]["running"], &json[1]["running"]), (&false.into(), &true.into()), "{json}");
    assert!(machines.fails(&["stats", "--no-stream", "nobody"], 1).contains("nobody"));
}

#[test]
fn limits_of_a_running_machine_can_be_changed() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::POWER, "do=spin", &["--name", "busy", "--cpus", "1"]);
    let used = |machines: &Machines| {
        let json: serde_json::Value = serde_json::from_str(&machines.ok(&["stats", "--json", "busy"])).unwrap();
        json[0].clone()
    };
    let stats = used(&machines);
    assert!(
        stats["guest_memory_bytes"].as_u64().unwrap() > 0 && stats["own_memory_bytes"].as_u64().unwrap() > 0,
        "{stats}"
    );
    assert_eq!(stats["memory_limit_bytes"], 64 << 20);
    machines.ok(&["update", "--memory", "40M", "busy"]);
    assert_eq!(
        (used(&machines)["memory_limit_bytes"].clone(), machines.inspect("busy", "Husk/Config/memory_target_mib")),
        (serde_json::json!(40 << 20), "40".into())
    );
    assert!(machines.fails(&["update", "--memory", "65M", "busy"], 1).contains("32 to 64 MiB"));
    assert!(machines.fails(&["update", "--cpus", "1.5", "busy"], 1).contains("1 vCPUs"));
    assert!(machines.fails(&["update", "busy"], 1).contains("nothing to update"));
    let limited = machines.run(&["update", "--cpus", "0.05", "busy"]);
    if limited.status.success() {
        // Earlier usage no longer counts.
        thread::sleep(Duration::from_millis(500));
        let percent = used(&machines)["cpu_percent"].as_f64().unwrap();
        assert!(percent < 12.0, "{percent}");
        machines.ok(&["update", "--cpus", "1", "busy"]);
        let percent = used(&machines)["cpu_percent"].as_f64().unwrap();
        assert!(percent > 12.0, "{percent}");
    } else {
        // Without delegated cgroups this is an error, with no other effect.
        assert!(String::from_utf8_lossy(&limited.stderr).contains("limit the machine to 0.05 CPUs"), "{limited:?}");
    }
    assert_eq!(machines.status("busy"), "running");
}

#[test]
fn a_background_console_accepts_input_from_attached_clients() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "tty"]);
    machines.await_log("tty", "ready");
    let mut first = machines.attach("tty");
    first.stdin.as_mut().unwrap().write_all(b"one ").unwrap();
    let mut seen = [0; 4];
    first.stdout.as_mut().unwrap().read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"one ");
    // Detaching does not affect the machine.
    first.kill().unwrap();
    first.wait().unwrap();
    machines.await_log("tty", "one ");
    let mut second = machines.attach("tty");
    second.stdin.as_mut().unwrap().write_all(b"two\x04").unwrap();
    let output = second.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("two"), "{output:?}");
    assert_eq!(output.status.code().map(|code| code.to_string()), Some(machines.inspect("tty", "State/ExitCode")));
    let log = machines.ok(&["logs", "tty"]);
    assert!(log.starts_with("ready\none two"), "{log:?}");
}

#[test]
fn the_previous_client_regains_the_console() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "tty"]);
    let mut first = machines.attach("tty");
    first.stdin.as_mut().unwrap().write_all(b"one ").unwrap();
    machines.await_log("tty", "one ");
    let mut second = machines.attach("tty");
    second.stdin.take().unwrap().write_all(b"two ").unwrap();
    machines.await_log("tty", "two ");
    first.stdin.as_mut().unwrap().write_all(b"three\x04").unwrap();
    for attached in [first, second] {
        let code = attached.wait_with_output().unwrap().status.code().unwrap();
        assert_eq!(code.to_string(), machines.inspect("tty", "State/ExitCode"));
    }
    assert!(machines.ok(&["logs", "tty"]).starts_with("ready\none two three"));
}

#[test]
fn logs_are_followed_to_the_end_and_stay_within_their_size() {
    needs_kvm!();
    let machines = Machines::new();
    // Each byte causes an exit: an emulated processor prints fewer, which do not reach the log's limit.
    let (bytes, least, most) = if !is_emulated() { (3_000_000, 400_000, 1 << 20) } else { (20_000, 20_000, 20_001) };
    // With an exit per byte it is slow enough to be followed across files.
    machines.start(guests::SERIAL, &format!("do=flood bytes={bytes}"), &["--name", "loud", "--log-max", "1M"]);
    let followed = machines.run(&["logs", "-f", "loud"]).stdout;
    assert_eq!(followed.len(), bytes);
    machines.ok(&["wait", "loud"]);
    let kept = machines.ok(&["logs", "loud"]);
    assert!((least..most).contains(&kept.len()), "{}", kept.len());
    let tail = machines.ok(&["logs", "--tail", "3", "loud"]);
    assert_eq!(tail.lines().count(), 3);
    assert!(kept.ends_with(&tail));
    let dir = machines.runtime.path().join("husk").join(&machines.dirs()[0]);
    assert!(size_of(&dir) < 1_200_000, "{}", size_of(&dir));
    let stamped = machines.ok(&["logs", "--timestamps", "-n", "1", "loud"]);
    assert!(stamped.starts_with("20") && stamped.contains("Z !"), "{stamped}");
    assert_eq!(machines.ok(&["logs", "--since", "2040-01-01T00:00:00Z", "loud"]), "");
}

fn size_of(dir: &Path) -> u64 {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// The arguments of a process that are visible to all users.
fn arguments_of(pid: &str) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

#[test]
fn environment_variables_are_hidden_from_other_users() {
    needs_kvm!();
    use std::os::unix::fs::PermissionsExt;
    let machines = Machines::new();
    let (_dir, disk) = disk_image(1 << 20);
    // With a partition table it is a disk, which runs no process of husk's init.
    std::fs::File::options().write(true).open(&disk).unwrap().write_all_at(b"\x55\xaa", 0x1fe).unwrap();
    let disk = disk.to_str().unwrap();
    let machine =
        ["--cpus", "2", "--memory", "64M", "--kernel", guests::BUSY, "-e", "KEY=hunter2=x", "--env=TWO=s3cret"];
    let words = |more: &[&'static str]| -> Vec<String> {
        ["run"].iter().chain(more).chain(&machine).chain(&[disk]).map(|word| word.to_string()).collect()
    };
    let is_told = |arguments: &str| ["hunter2", "s3cret"].iter().any(|secret| arguments.contains(secret));
    let in_background = words(&["-d", "--name", "web"]);
    // Even with an empty umask.
    let mut shell = Command::new("sh");
    shell.args(["-c", "umask 0; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_husk")]).args(&in_background);
    let id = shell.env("XDG_RUNTIME_DIR", machines.runtime.path()).stdin(Stdio::null()).output().unwrap();
    let id = String::from_utf8(id.stdout).unwrap().trim_end().to_owned();
    machines.await_log("web", "busy");
    let pid = machines.inspect("web", "State/Pid");
    assert_eq!(arguments_of(&pid), "husk run --in-background ");
    let dir = machines.runtime.path().join("husk").join(&id);
    let is_link = |entry: &std::fs::DirEntry| entry.file_type().unwrap().is_symlink();
    for entry in std::fs::read_dir(&dir).unwrap().flatten().filter(|entry| !is_link(entry)) {
        let mode = entry.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o177, 0, "{}: {mode:o}", entry.path().display());
    }
    // It is restarted with the original arguments.
    machines.ok(&["kill", "web"]);
    machines.ok(&["wait", "web"]);
    machines.ok(&["start", "web"]);
    assert_eq!(arguments_of(&machines.inspect("web", "State/Pid")), format!("husk run --in-background --again={id} "));
    let origin = std::fs::read_to_string(dir.join("origin.json")).unwrap();
    assert!(is_told(&origin), "{origin}");
    machines.ok(&["rm", "-f", "web"]);

    let in_foreground = words(&[]);
    let in_foreground: Vec<&str> = in_foreground.iter().map(String::as_str).collect();
    let mut child = machines.command(&in_foreground).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap();
    let arguments = arguments_of(&child.id().to_string());
    send_signal(child.id(), "KILL");
    child.wait().unwrap();
    assert!(!is_told(&arguments) && arguments.contains("-e KEY=********* --env=TWO=****** "), "{arguments}");
}

#[test]
fn other_users_cannot_control_a_machine() {
    needs_kvm!();
    use std::os::unix::fs::PermissionsExt;
    let machines = Machines::new();
    let id = machines.start(guests::POWER, "do=halt", &[]);
    let base = machines.runtime.path().join("husk");
    for (path, mode) in [(base.clone(), 0o700), (base.join(&id), 0o700), (base.join(&id).join("control"), 0o600)] {
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode, "{}", path.display());
    }
    // A silent client and one that sends garbage do not block others.
    let control = base.join(&id).join("control");
    let silent: Vec<_> = (0..20).map(|_| std::os::unix::net::UnixStream::connect(&control).unwrap()).collect();
    silent.first().unwrap().write_all(&[0xff; 9000]).unwrap();
    machines.ok(&["stats", "--no-stream", &id]);
    assert!(machines.ok(&["stats", "--no-stream"]).contains(&id));
    machines.ok(&["kill", &id]);
}
