//! What is known about a running machine: its health, its processes and what has happened to it.

use std::time::{Duration, Instant};

use crate::background::Machines;
use crate::guests;

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(60), "not yet: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_health_the_processes_and_the_history_of_a_machine_are_shown() {
    let machines = Machines::new(guests!());
    let flags = ["--health-cmd", "cat /ok", "--health-interval", "200ms", "--health-retries", "2", "--stop-timeout=1"];
    machines.start("web", &flags, "trap '' TERM; sleep 1000 & wait; sleep 1000").expect(0);
    let is = |health: &str| machines.ok(&["ps", "--filter", &format!("health={health}"), "-q"]).lines().count() == 1;
    eventually("two checks have failed", || is("unhealthy"));
    assert!(machines.ok(&["ps"]).contains(" (unhealthy)"));
    let failed = machines.husk(&["healthcheck", "run", "web"]);
    assert!(failed.expect(1).errors.contains("No such file"), "{}", failed.errors);
    machines.ok(&["exec", "web", "touch", "/ok"]);
    eventually("a check has succeeded", || is("healthy"));
    machines.ok(&["healthcheck", "run", "web"]);
    assert!(machines.ok(&["inspect", "-f", "{{(index .State.Health.Log 0).Output}}", "web"]).contains("/ok"));

    let saved = machines.runtime.path().join("saved");
    machines.ok(&["snapshot", "web", saved.to_str().unwrap()]);
    let mut restore = machines.command(&["restore", "-d", "--name", "copy", saved.to_str().unwrap()]);
    restore.env("HUSK_DATA", crate::image::store());
    crate::finish(restore, Vec::new()).expect(0);
    let health = || machines.ok(&["inspect", "-f", "{{.State.Health.Status}}", "copy"]);
    eventually("the restored machine is checked", || health() == "healthy\n");
    machines.ok(&["rm", "-f", "copy"]);

    let list = machines.ok(&["top", "web"]);
    let commands: Vec<&str> = list.lines().filter(|line| line.ends_with("sleep 1000")).collect();
    assert!(list.starts_with("UID") && commands.iter().any(|line| line.starts_with("root")), "{list}");
    assert!(!list.contains("kthread") && !list.contains("list-processes"), "{list}");
    let listed = machines.ok(&["top", "web", "-o", "pid,args"]);
    assert!(listed.contains("sleep 1000") && !listed.contains("[k"), "no threads of the kernel: {listed}");

    // It ignores the signal, and is killed after the time that it was started with.
    let started = Instant::now();
    machines.ok(&["stop", "web"]);
    assert!(started.elapsed() < Duration::from_secs(9), "{:?}", started.elapsed());
    machines.ok(&["rm", "web"]);
    let words = ["events", "--since", "1h", "--until", "0s", "--filter", "container=web", "--format", "{{.Action}}"];
    let actions = machines.ok(&words);
    let expected = [
        "create",
        "start",
        "health_status: unhealthy",
        "exec_start: touch /ok",
        "health_status: healthy",
        "kill",
        "die",
        "stop",
        "destroy",
    ];
    let mut rest = actions.lines();
    assert!(expected.iter().all(|action| rest.any(|line| line == *action)), "{actions}");
}
