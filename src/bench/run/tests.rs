//! Shell scripts that misbehave in the ways that contenders may.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::Pid;

use super::*;

static CLEANED: AtomicUsize = AtomicUsize::new(0);

fn script(text: &str) -> Launch {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", text]);
    let clean_up = || {
        CLEANED.fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    Launch { command, passes_exit_code: true, address: None, clean_up: Some(Box::new(clean_up)) }
}

fn within(deadline_ms: u64) -> RunOptions {
    RunOptions { cpus: None, timeout: Duration::from_millis(deadline_ms) }
}

fn expect(code: i32, work: &[(&str, u64)]) -> Expected {
    Expected { code, work: work.iter().map(|(name, amount)| ((*name).to_owned(), *amount)).collect() }
}

/// Returns processes with this argument.
fn processes_with(word: &str) -> Vec<String> {
    let lines = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        line.split('\0').any(|argument| argument == word).then_some(line)
    });
    lines.collect()
}

#[test]
fn work_is_timed_from_outside() {
    let text = "echo work: ready; sleep 0.1; echo work: begin fork; sleep 0.2; echo work: end fork 12; sleep 0.1";
    let run = run(script(text), &expect(0, &[("fork", 12)]), &within(10_000));
    assert_eq!(run.failures, [""; 0]);
    assert_eq!(run.end, Termination::Exited(0));
    let [TaskTiming { ref name, amount: 12, seconds }] = run.timings[..] else { panic!("{run:?}") };
    assert_eq!(name, "fork");
    assert!((0.2..5.0).contains(&seconds), "{seconds}");
    assert!(run.exited >= Duration::from_millis(400) && run.ready.unwrap() < run.exited);
    assert_eq!(run.ready, run.first_output);
}

#[test]
fn a_hanging_instance_is_killed_with_its_children() {
    // It ignores SIGTERM, and so does its child.
    let text = "trap '' TERM; echo work: begin fork; sh -c 'trap \"\" TERM; sleep 71234; true' & sleep 71234; true";
    let run = run(script(text), &expect(0, &[("fork", 1)]), &within(200));
    assert_eq!(run.end, Termination::TimedOut);
    assert!(run.failures.iter().any(|failure| failure.starts_with("timed out")), "{:?}", run.failures);
    assert!(run.failures.contains(&"fork: did not run".to_owned()), "{:?}", run.failures);
    assert!(run.exited < Duration::from_secs(30));
    assert_eq!(processes_with("71234"), [""; 0]);
}

#[test]
fn an_unexpected_exit_code_is_a_failure() {
    let failures = |launch, code| run(launch, &expect(code, &[]), &within(10_000)).failures;
    assert_eq!(failures(script("exit 7"), 7), [""; 0]);
    assert_eq!(failures(script("echo why; exit 3"), 0), ["exit code 3 instead of 0: why"]);
    assert_eq!(failures(script("exit 0"), 7), ["exit code 0 instead of 7: no output"]);
    assert_eq!(failures(script("kill -9 $$"), 0), ["killed by signal 9: no output"]);
    let machine = |text: &str| Launch { passes_exit_code: false, ..script(text) };
    assert_eq!(failures(machine("printf 'work: exit 7\\r\\n'; exit 0"), 7), [""; 0]);
    let silent = failures(machine("exit 7"), 7);
    assert_eq!(silent, ["exited with code 7 without reporting the command's exit code: no output"]);
    assert_eq!(failures(machine("echo work: exit 0"), 7).len(), 1);
}

#[test]
fn missing_work_is_a_failure() {
    let failures = |text: &str| run(script(text), &expect(0, &[("fork", 2)]), &within(10_000)).failures;
    assert_eq!(failures("true"), ["fork: did not run"]);
    let printed = failures("echo work: fail fork there is no memory");
    assert_eq!(printed, ["fork there is no memory", "fork: did not run"]);
    let less = failures("echo work: begin fork; sleep 0.05; echo work: end fork 1");
    assert_eq!(less, ["fork: did 1 of 2"]);
    let fast = failures("printf 'work: begin fork\\nwork: end fork 2\\n'");
    assert_eq!(fast, ["fork: too short to be timed"]);
    let half = failures("echo work: begin fork");
    assert_eq!(half, ["fork: did not finish", "fork: did not run"]);
}

#[test]
fn endless_output_without_a_line_ends_at_the_deadline() {
    for text in ["yes | tr -d '\\n'", "yes | tr -d '\\n' >&2", "exec cat /dev/zero"] {
        let run = run(script(text), &Expected::default(), &within(300));
        assert_eq!(run.end, Termination::TimedOut, "{text}");
        assert!(run.exited < Duration::from_secs(10), "{text}: {:?}", run.exited);
        assert!(run.tail.len() <= 256 << 10, "{text}: {}", run.tail.len());
    }
}

#[test]
fn an_instance_continues_after_closing_its_output() {
    let run = run(script("exec >&- 2>&-; sleep 0.4; exit 5"), &expect(5, &[]), &within(10_000));
    assert_eq!(run.failures, [""; 0]);
    assert!(run.exited >= Duration::from_millis(400), "{:?}", run.exited);
}

#[test]
fn a_process_that_keeps_the_output_open_does_not_delay_the_end() {
    // The first is in the process group and is killed; the second has left it and is not.
    for (text, number) in [("sleep 71235 & echo work: ready", "71235"), ("setsid sleep 7.1236 & sleep 0.2", "7.1236")] {
        let run = run(script(text), &Expected::default(), &within(6_000));
        assert_eq!((&run.end, &run.failures[..]), (&Termination::Exited(0), &[][..]), "{text}");
        assert!(run.exited < Duration::from_secs(5), "{text}: {:?}", run.exited);
        assert_eq!(processes_with(number).is_empty(), number == "71235");
    }
}

#[test]
fn an_instance_has_empty_input() {
    let run = run(script("cat; exit 4"), &expect(4, &[]), &within(10_000));
    assert_eq!(run.failures, [""; 0]);
}

#[test]
fn a_failed_start_is_cleaned_up() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let clean_up: Box<dyn FnOnce() -> Result<()> + Send> = Box::new(move || {
        sender.send(()).unwrap();
        bail!("it is still there")
    });
    let mut launch = script("");
    (launch.command, launch.clean_up) = (Command::new("/nonexistent/contender"), Some(clean_up));
    let run = run(launch, &Expected::default(), &within(1000));
    receiver.try_recv().expect("it was cleaned up");
    assert!(
        matches!(&run.end, Termination::FailedToStart(reason) if reason.contains("start /nonexistent/contender")),
        "{run:?}"
    );
    assert_eq!(run.failures.len(), 1);
}

#[test]
fn leftovers_are_a_failure() {
    let mut launch = script("true");
    launch.clean_up = Some(Box::new(|| bail!("the directory is busy")));
    assert_eq!(run(launch, &Expected::default(), &within(10_000)).failures, ["clean up: the directory is busy"]);
}

#[test]
fn only_the_instance_is_pinned() {
    let mask = |text: &str| text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t").map(str::to_owned));
    let ours = || mask(&std::fs::read_to_string("/proc/thread-self/status").unwrap()).unwrap();
    let before = ours();
    let first: u32 = before.split(['-', ',']).next().unwrap().parse().unwrap();
    let options = RunOptions { cpus: Some(vec![first]), ..within(10_000) };
    let run = run(script("cat /proc/self/status"), &Expected::default(), &options);
    assert_eq!(mask(&run.tail), Some(first.to_string()));
    assert_eq!(ours(), before);
}

#[test]
fn a_service_is_started_monitored_and_stopped() {
    let text = "sleep 0.1; echo work: ready; while true; do echo work: tick; sleep 0.05; done";
    let before = CLEANED.load(Ordering::SeqCst);
    let running = Running::start(script(text), &within(60_000)).unwrap();
    assert!(running.wait_ready(Duration::from_secs(10)).unwrap() >= Duration::from_millis(100));
    std::thread::sleep(Duration::from_millis(500));
    assert!(running.ticks() > 2 && running.is_running());
    let pid = Pid::from_raw(running.pid() as i32).unwrap();
    running.reset_stall();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert!(running.longest_stall() >= Duration::from_millis(500), "{:?}", running.longest_stall());
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    let run = running.end();
    assert_eq!((&run.end, &run.failures[..]), (&Termination::Signaled(15), &[][..]));
    assert!(CLEANED.load(Ordering::SeqCst) > before);
    assert!(!std::path::Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists());
}

#[test]
fn waiting_for_a_failed_service_is_an_error() {
    let start = Instant::now();
    for (text, expected) in [
        ("echo oh no", "exited before it was ready: oh no"),
        ("echo work: fail idle no memory; sleep 60", "failed before it was ready: idle no memory"),
        ("sleep 60", "not ready after 300 ms: no output"),
    ] {
        let running = Running::start(script(text), &within(60_000)).unwrap();
        let error = running.wait_ready(Duration::from_millis(300)).unwrap_err().to_string();
        assert_eq!(error, expected);
        // Dropping it stops the instance.
    }
    assert!(start.elapsed() < Duration::from_secs(30));
}
