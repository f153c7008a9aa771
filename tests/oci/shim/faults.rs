//! Readers that are gone, memory that is short, and a monitor that is killed.

use std::fs;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::client::call;
use super::messages::*;
use super::{Node, RUNNING, STOPPED, await_end, leaves_nothing, named, terminal};
use crate::{await_that, runtime};

#[test]
fn a_shim_outlives_what_happens_to_its_containers() {
    let node = Node::new(runtime!());
    // A child of the container's process is killed, and that one stays.
    // It begins when its start has been told.
    let script = "sleep 2; (x=x; while :; do x=$x$x; done); while :; do sleep 0.1; done";
    let mask = node.runtime.path("mask").display().to_string();
    let address = node.start_shim_with("c", script, |config| {
        config["annotations"]["io.husk.memory"] = "64".into();
        let args = json!(["sh", "-c", format!("grep SigBlk /proc/self/status >{mask}")]);
        let env = json!([format!("PATH={}", std::env::var("PATH").unwrap())]);
        config["hooks"] = json!({ "createRuntime": [{ "path": "/bin/sh", "args": args, "env": env }] });
    });
    call::<Empty>(&address, "Create", &node.request("c")).unwrap();
    assert_eq!(fs::read_to_string(mask).unwrap(), "SigBlk:\t0000000000000000\n");
    call::<Empty>(&address, "Start", &named("c", "")).unwrap();
    await_that(|| node.events.count() == 3, || "it is not told that memory was short".into());
    assert_eq!(node.events.take(), ["create", "start", "oom"]);
    assert_eq!(call::<State>(&address, "State", &named("c", "")).unwrap().status, RUNNING);
    is_not_held_up_by_a_reader(&node, &address);
    has_its_monitor_killed(&node, &address);
    call::<Empty>(&address, "Shutdown", &named("c", "")).unwrap();
    leaves_nothing(&node);
}

/// One more process, whose terminal nobody reads.
fn is_not_held_up_by_a_reader(node: &Node, address: &str) {
    let stdout = node.fifo("unread");
    let spec = terminal(node, "c", "while :; do echo 0123456789012345678901234567890123456789; done");
    let exec = Exec { id: "c".into(), exec_id: "e".into(), terminal: true, stdout, spec, ..Exec::default() };
    call::<Empty>(address, "Exec", &exec).unwrap();
    call::<Empty>(address, "Start", &named("c", "e")).unwrap();
    let shim = call::<Connected>(address, "Connect", &named("c", "")).unwrap().shim_pid;
    let threads = || {
        let tasks = fs::read_dir(format!("/proc/{shim}/task")).unwrap().flatten();
        tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name == "terminal\n")).count()
    };
    await_that(|| threads() == 1, || "a terminal has no thread".into());
    // Until everything is full.
    thread::sleep(Duration::from_secs(5));
    call::<Empty>(address, "Kill", &Kill { id: "c".into(), exec_id: "e".into(), signal: 9 }).unwrap();
    assert_eq!(await_end(address, "c", "e"), 137);
    assert_eq!(call::<Deleted>(address, "Delete", &named("c", "e")).unwrap().exit_status, 137);
    await_that(|| threads() == 0, || "a thread waits for a reader".into());
    await_that(|| node.events.count() == 3, || format!("{:?}", node.events.take()));
    assert_eq!(node.events.take(), ["exec-added", "exec-started", "exit"]);
}

/// The process that runs its guest.
fn has_its_monitor_killed(node: &Node, address: &str) {
    let connected: Connected = call(address, "Connect", &named("c", "")).unwrap();
    let monitor = descendants(connected.task_pid)
        .into_iter()
        .find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("monitor")));
    let monitor = monitor.unwrap_or_else(|| panic!("{:?}", descendants(connected.task_pid)));
    kill_process(Pid::from_raw(monitor.cast_signed()).unwrap(), Signal::KILL).unwrap();
    let code = await_end(address, "c", "");
    assert_ne!(code, 0);
    let state: State = call(address, "State", &named("c", "")).unwrap();
    assert_eq!((state.status, state.exit_status), (STOPPED, code));
    assert_eq!(call::<Deleted>(address, "Delete", &named("c", "")).unwrap().exit_status, code);
    await_that(|| node.events.count() == 2, || format!("{:?}", node.events.take()));
    assert_eq!(node.events.take(), ["exit", "delete"]);
}

fn descendants(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children: Vec<u32> = children.split_whitespace().filter_map(|child| child.parse().ok()).collect();
    let below = children.iter().flat_map(|child| descendants(*child));
    below.chain(children.iter().copied()).collect()
}
