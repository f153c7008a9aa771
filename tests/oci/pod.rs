//! Pods: further containers in the machine of the first.

use std::fs;
use std::path::PathBuf;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount};
use serde_json::{Value, json};

use crate::{Ended, Runtime, await_that, runtime};

/// A container that is in the machine of `sandbox`, whose namespaces of these types it shares.
pub fn join(runtime: &Runtime, config: &mut Value, sandbox: &str, kinds: &[&str]) {
    let pid = pid(runtime, sandbox);
    for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
        let kind = namespace["type"].as_str().unwrap().to_owned();
        if kinds.contains(&kind.as_str()) {
            let file = if kind == "network" { "net" } else { &kind };
            namespace["path"] = format!("/proc/{pid}/ns/{file}").into();
        }
    }
}

fn pid(runtime: &Runtime, id: &str) -> u64 {
    let state: Value = serde_json::from_str(runtime.run(&["state", id]).expect(0)).unwrap();
    state["pid"].as_u64().unwrap()
}

/// Creates and starts a container with a file of its own for its output.
pub fn start(runtime: &Runtime, id: &str, script: &str, edit: impl FnOnce(&mut Value)) {
    runtime.configure(script, edit);
    runtime.create_with_output(id, id).expect(0);
    runtime.run(&["start", id]).expect(0);
}

pub const USUAL: [&str; 3] = ["network", "ipc", "uts"];

pub fn exec(runtime: &Runtime, id: &str, script: &str) -> Ended {
    runtime.run(&["exec", id, "sh", "-c", script])
}

fn output(runtime: &Runtime, id: &str) -> String {
    fs::read_to_string(runtime.path(id)).unwrap()
}

#[track_caller]
fn await_output(runtime: &Runtime, id: &str, words: &str) {
    await_that(|| output(runtime, id).contains(words), || format!("{words} in {}", output(runtime, id)));
}

fn share_of(runtime: &Runtime, id: &str, part: &str) -> PathBuf {
    let state = fs::read(runtime.path("state").join(id).join("state.json")).unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    let record = fs::read(
        PathBuf::from(state["machines"].as_str().unwrap()).join(state["machine"].as_str().unwrap()).join("record.json"),
    );
    let record: Value = serde_json::from_slice(&record.unwrap()).unwrap();
    PathBuf::from(format!("/proc/{}/root{}/share/{part}", record["pid"], runtime.path("state").join(id).display()))
}

#[test]
fn containers_of_a_pod_are_one_machine_and_have_files_processes_and_limits_of_their_own() {
    let runtime = runtime!();
    start(&runtime, "pause", "trap 'exit 0' TERM; while :; do sleep 0.1; done", |config| {
        config["annotations"]["io.husk.memory"] = "256".into();
        config["hostname"] = "pod".into();
    });
    let data = runtime.path("data");
    fs::create_dir(&data).unwrap();
    // As everything is where systemd runs.
    mount_bind(&data, &data).unwrap();
    mount_change(&data, MountPropagationFlags::SHARED).unwrap();
    fs::write(data.join("file"), "on the host").unwrap();
    let script = "trap 'echo ended; exit 3' TERM; trap 'echo real-time' 37; trap 'echo too long' XCPU; hostname; cat /data/file; ls /proc/1/fd/0; echo hello | nc -l -p 7000; \
                  echo served; i=0; while :; do i=$((i+1)); echo $i > /data/count; sleep 0.05; done";
    start(&runtime, "web", script, |config| {
        join(&runtime, config, "pause", &USUAL);
        let mount = json!({ "destination": "/data", "type": "bind", "source": data, "options": ["rbind", "rw"] });
        config["mounts"].as_array_mut().unwrap().push(mount);
        config["linux"]["resources"] = json!({ "pids": { "limit": 40 }, "memory": { "limit": 64 << 20 } });
    });
    // It has its own files, and the network, the host name and the semaphores of the pod.
    start(&runtime, "client", "until nc 127.0.0.1 7000; do sleep 0.1; done; sleep 1000", |config| {
        join(&runtime, config, "pause", &USUAL);
    });
    await_output(&runtime, "client", "hello");
    await_output(&runtime, "web", "served");
    let printed = output(&runtime, "web");
    assert!(printed.starts_with("pod\non the host"), "{printed}");
    let namespaces = |id: &str| {
        let names = ["ipc", "uts", "net", "pid", "mnt"].map(|name| format!("readlink /proc/1/ns/{name}"));
        let ended = exec(&runtime, id, &names.join(";"));
        ended.expect(0).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let (pause, web) = (namespaces("pause"), namespaces("web"));
    assert_eq!(pause[..3], web[..3]);
    assert!(pause[3] != web[3] && pause[4] != web[4], "{pause:?} {web:?}");
    assert_ne!(exec(&runtime, "client", "cat /data/file").code, Some(0));
    // Each is listed, counted and limited by itself.
    assert!(!runtime.run(&["ps", "client"]).expect(0).contains("count"), "{}", runtime.run(&["ps", "client"]).output);
    let stats: Value = serde_json::from_str(runtime.run(&["events", "--stats", "web"]).expect(0)).unwrap();
    let (memory, pids) = (&stats["data"]["memory"]["usage"], &stats["data"]["pids"]["current"]);
    assert!(memory["limit"] == 64 << 20 && memory["usage"].as_u64() < Some(64 << 20), "{stats}");
    assert!((1..=5).contains(&pids.as_u64().unwrap()), "{stats}");
    assert_eq!(
        exec(&runtime, "web", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max").expect(0),
        "67108864\n40\n"
    );
    runtime.run(&["update", "--memory", "33554432", "web"]).expect(0);
    assert_eq!(exec(&runtime, "web", "cat /sys/fs/cgroup/memory.max").expect(0), "33554432\n");
    // One is paused, and the others go on.
    runtime.run(&["pause", "web"]).expect(0);
    assert_eq!((runtime.status("web"), runtime.status("client")), ("paused".into(), "running".into()));
    let count = || fs::read_to_string(data.join("count")).unwrap();
    let before = count();
    exec(&runtime, "client", "sleep 0.5").expect(0);
    assert_eq!(count(), before);
    assert_ne!(exec(&runtime, "web", "true").code, Some(0));
    runtime.run(&["resume", "web"]).expect(0);
    await_that(|| count() != before, || "it does not go on".into());
    // What the host mounts later is the host's alone.
    let later = data.join("later");
    fs::create_dir(&later).unwrap();
    mount("x", &later, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(later.join("secret"), "").unwrap();
    assert_eq!(exec(&runtime, "web", "ls /data/later").expect(0), "");
    unmount(&later, UnmountFlags::empty()).unwrap();
    // One ends, and leaves nothing in the machine.
    runtime.run(&["kill", "web", "37"]).expect(0);
    await_output(&runtime, "web", "real-time");
    runtime.run(&["kill", "web", "XCPU"]).expect(0);
    await_output(&runtime, "web", "too long");
    runtime.run(&["kill", "web", "TERM"]).expect(0);
    await_output(&runtime, "web", "ended");
    runtime.await_status("web", "stopped");
    assert!(share_of(&runtime, "pause", "web").exists() && share_of(&runtime, "pause", "client").exists());
    runtime.run(&["delete", "web"]).expect(0);
    assert!(!share_of(&runtime, "pause", "web").exists() && share_of(&runtime, "pause", "client").exists());
    let left = exec(&runtime, "pause", "ls /sys/fs/cgroup");
    assert!(!left.expect(0).contains("web"), "{}", left.output);
    // Its name is free again, and it shares the processes of the pod this time.
    start(&runtime, "web", "ps; echo listed; sleep 1000", |config| {
        join(&runtime, config, "pause", &["network", "ipc", "uts", "pid"]);
    });
    await_output(&runtime, "web", "listed");
    assert!(output(&runtime, "web").contains("trap 'exit 0' TERM"), "{}", output(&runtime, "web"));
    runtime.run(&["delete", "--force", "web"]).expect(0);
    assert!(!runtime.run(&["ps", "pause"]).expect(0).contains("sleep 1000"), "its processes are left");
    // The machine ends with the first, and all with it.
    assert_eq!(runtime.status("client"), "running");
    runtime.run(&["kill", "pause", "TERM"]).expect(0);
    runtime.await_status("pause", "stopped");
    runtime.await_status("client", "stopped");
    for id in ["client", "pause"] {
        runtime.run(&["delete", id]).expect(0);
    }
    unmount(&data, UnmountFlags::empty()).unwrap();
    runtime.expect_nothing_left();
}

#[test]
fn a_container_of_a_pod_fails_by_itself() {
    let runtime = runtime!();
    start(&runtime, "pause", "while :; do sleep 0.1; done", |config| {
        config["annotations"]["io.husk.memory"] = "256".into();
    });
    let pod = |config: &mut Value| join(&runtime, config, "pause", &USUAL);
    // It takes more memory than it may.
    start(&runtime, "greedy", "x=aaaaaaaa; while :; do x=$x$x; done", |config| {
        pod(config);
        config["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20 } });
    });
    runtime.await_status("greedy", "stopped");
    runtime.run(&["delete", "greedy"]).expect(0);
    // Its program is missing.
    runtime.configure("", |config| {
        pod(config);
        config["process"]["args"] = json!(["no-such-program"]);
    });
    runtime.create_with_output("none", "none").fails_with("executable file not found in $PATH");
    // It waits to be started, once.
    runtime.configure("echo started; sleep 1000", pod);
    runtime.create_with_output("late", "late").expect(0);
    assert_eq!((runtime.status("late"), output(&runtime, "late")), ("created".into(), String::new()));
    runtime.run(&["start", "late"]).expect(0);
    await_output(&runtime, "late", "started");
    runtime.run(&["start", "late"]).fails_with("already running");
    runtime.create_with_output("late", "again").fails_with("already exists");
    // One that is created and never started is deleted; one whose process on the host is killed has no processes left.
    runtime.create_with_output("unused", "unused").expect(0);
    runtime.run(&["delete", "unused"]).expect(0);
    let killed = rustix::process::Pid::from_raw(i32::try_from(pid(&runtime, "late")).unwrap()).unwrap();
    rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
    runtime.await_status("late", "stopped");
    await_that(|| !runtime.run(&["ps", "pause"]).output.contains("sleep 1000"), || "its processes are left".into());
    let processes = exec(&runtime, "pause", "cat /sys/fs/cgroup/container-late/cgroup.procs");
    assert_eq!(processes.output, "");
    runtime.run(&["delete", "late"]).expect(0);
    // Killing the process on the host that stands for a further one kills that.
    let mut entered = runtime.command(&["exec", "pause", "sleep", "7777"]).spawn().unwrap();
    let is_there = || runtime.run(&["ps", "pause"]).output.contains("sleep 7777");
    await_that(is_there, || "it does not start".into());
    entered.kill().unwrap();
    entered.wait().unwrap();
    await_that(|| !is_there(), || "it is left in the guest".into());
    // It stops whoever is to enter it, which is nobody else's loss.
    start(&runtime, "stopper", "while :; do kill -STOP -1; done", pod);
    let mut held_up = runtime.command(&["exec", "stopper", "sleep", "1000"]).spawn().unwrap();
    assert_eq!(exec(&runtime, "pause", "echo served").expect(0), "served\n");
    assert!(held_up.try_wait().unwrap().is_none(), "the other was served after it");
    runtime.run(&["delete", "--force", "stopper"]).expect(0);
    assert!(!held_up.wait().unwrap().success());
    // A machine has one network, and a container that has ended has no machine.
    runtime.configure("", |config| join(&runtime, config, "pause", &["ipc"]));
    runtime.run(&["create", "other"]).fails_with("containers of a machine have one network");
    runtime.configure("", pod);
    runtime.run(&["kill", "pause", "KILL"]).expect(0);
    runtime.await_status("pause", "stopped");
    runtime.run(&["create", "orphan"]).fails_with("");
    runtime.run(&["delete", "pause"]).expect(0);
    runtime.expect_nothing_left();
}
