//! The life of a container, as an engine drives it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::{Runtime, await_that, finish, runtime};

#[test]
fn a_container_lives_as_the_specification_says() {
    let runtime = runtime!();
    fs::create_dir(runtime.path("data")).unwrap();
    fs::set_permissions(runtime.path("data"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(runtime.path("one"), "one\n").unwrap();
    let cgroup = format!("/husk-test-{}", std::process::id());
    runtime.configure("trap 'echo term; exit 3' TERM; echo up; id -u; while :; do sleep 0.1; done", |config| {
        config["hostname"] = "box".into();
        let binds = [("/data", "data", "rw"), ("/etc/one", "one", "ro")];
        let binds = binds.map(|(to, from, mode)| {
            json!({ "destination": to, "type": "bind", "source": runtime.path(from), "options": ["rbind", mode] })
        });
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.extend(binds);
        mounts.iter_mut().find(|mount| mount["destination"] == "/dev/shm").unwrap()["source"] = "shm".into();
        config["linux"]["cgroupsPath"] = cgroup.as_str().into();
        let cpu = json!({ "quota": 150_000, "period": 100_000 });
        config["linux"]["resources"] =
            json!({ "memory": { "limit": 134_217_728 }, "cpu": cpu, "pids": { "limit": 50 } });
    });
    runtime.create("c").expect(0);
    shares_only_what_is_mounted(&runtime);
    assert_eq!(runtime.status("c"), "created");
    runtime.run(&["exec", "c", "true"]).expect(0);
    assert_eq!(runtime.output(), "", "its program has not run");
    assert!(Path::new(&format!("/proc/{}", fs::read_to_string(runtime.path("pid")).unwrap())).exists());
    runtime.run(&["create", "c"]).fails_with("already exists");
    let other = runtime.run(&["create", "other"]);
    other.fails_with("in use by other processes");
    runtime.run(&["start", "c"]).expect(0);
    runtime.await_output("up\n0\n");
    assert_eq!(runtime.status("c"), "running");
    runtime.run(&["start", "c"]).fails_with("already running");
    runtime.run(&["exec", "c", "grep", "^shm /dev/shm tmpfs ", "/proc/mounts"]).expect(0);
    runtime.run(&["delete", "c"]).fails_with("running");
    has_its_limits(&cgroup);
    runs_another_process(&runtime);
    assert_eq!(fs::read_to_string(runtime.path("data/made")).unwrap(), "by user\n");
    let pids: Value = serde_json::from_str(runtime.run(&["ps", "--format", "json", "c"]).expect(0)).unwrap();
    assert!(pids.as_array().is_some_and(|pids| !pids.is_empty()), "{pids}");
    let stats: Value = serde_json::from_str(runtime.run(&["events", "--stats", "c"]).expect(0)).unwrap();
    assert!(stats["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 10 << 20, "{stats}");
    runtime.run(&["pause", "c"]).expect(0);
    assert_eq!(runtime.status("c"), "paused");
    runtime.run(&["resume", "c"]).expect(0);
    runtime.run(&["update", "--memory", "100000000", "--cpu-quota", "50000", "c"]).expect(0);
    runtime.run(&["update", "--memory", "-1", "--cpu-quota", "-1", "c"]).expect(0);
    runtime.run(&["kill", "c", "TERM"]).expect(0);
    runtime.await_status("c", "stopped");
    assert!(runtime.output().ends_with("term\n"), "{}", runtime.output());
    runtime.run(&["kill", "c", "KILL"]).fails_with("not running");
    runtime.run(&["start", "c"]).fails_with("stopped");
    runtime.run(&["delete", "c"]).expect(0);
    runtime.run(&["state", "c"]).fails_with("does not exist");
    assert!(!Path::new("/sys/fs/cgroup").join(&cgroup[1..]).exists());
    runtime.expect_nothing_left();
}

/// The guest can make nothing beside its root file system and its mounts, which only the machine's own processes see.
fn shares_only_what_is_mounted(runtime: &Runtime) {
    let pid = fs::read_to_string(runtime.path("pid")).unwrap();
    let child = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", child.trim())).unwrap();
    let share = runtime.path("state/c/share").display().to_string();
    let share = mounts.lines().find(|line| line.split(' ').nth(4) == Some(&share)).unwrap();
    assert!(share.split(' ').nth(5).unwrap().starts_with("ro,"), "{share}");
    let own = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert!(own.lines().all(|line| !line.contains("state/c/share")), "{own}");
    let names = fs::read_dir(format!("/proc/{pid}/root")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["bin", "data", "dev", "etc", "proc", "root", "sys", "tmp"], "its root is the container's");
}

/// In version 2, which the lab has; other hosts have one directory for each controller.
fn has_its_limits(cgroup: &str) {
    let dir = Path::new("/sys/fs/cgroup").join(&cgroup[1..]);
    if dir.exists() && dir.join("memory.max").exists() {
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        assert_eq!((read("memory.max").trim(), read("cpu.max").trim()), ("201326592", "150000 100000"));
        assert!(read("cgroup.procs").lines().count() >= 3, "{}", read("cgroup.procs"));
    }
}

fn runs_another_process(runtime: &Runtime) {
    let script = "id -u; id -g; cat /etc/one; echo by user > /data/made; echo x > /etc/one; touch /etc/x; hostname; \
                  nproc; env; grep CapEff /proc/self/status; ps; exit 9";
    let process = json!({ "user": { "uid": 1000, "gid": 100 }, "args": ["sh", "-c", script], "env": ["PATH=/bin", "A=b"],
        "cwd": "/tmp" });
    fs::write(runtime.path("process.json"), process.to_string()).unwrap();
    let ended = runtime.run(&["exec", "--process", "../process.json", "c"]);
    let printed = ended.expect(9);
    assert!(printed.starts_with("1000\n100\none\nbox\n2\n"), "{printed}");
    for line in ["A=b", "HOME=/home/user", "CapEff:\t0000000000000000"] {
        assert!(printed.lines().any(|printed| printed == line), "{line} in {printed}");
    }
    // It is in the container's PID namespace.
    assert!(printed.lines().any(|line| line.trim_start().starts_with("1 ")), "{printed}");
    assert_eq!(ended.errors.lines().count(), 2, "{}", ended.errors);
    runtime.run(&["exec", "c", "no-such-program"]).fails_with("executable file not found in $PATH");
    let pid_file = runtime.path("exec-pid");
    let words =
        ["exec", "--detach", "--pid-file", pid_file.to_str().unwrap(), "c", "sh", "-c", "sleep 5; touch /data/later"];
    // The process has its streams, whose end would be waited for.
    let status = runtime.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success() && Path::new(&format!("/proc/{}", fs::read_to_string(pid_file).unwrap())).exists());
    await_that(|| runtime.path("data/later").exists(), || "the process in the background has not run".into());
}

#[test]
fn what_cannot_be_created_leaves_nothing_and_says_why() {
    let runtime = runtime!();
    runtime.configure("true", |config| config["process"]["args"] = json!(["no-such-program"]));
    let log = runtime.path("log");
    let words = ["--log", log.to_str().unwrap(), "--log-format", "json", "create", "m"];
    let ended = finish(&mut runtime.command(&words));
    ended.fails_with("exec: \"no-such-program\": executable file not found in $PATH");
    let entry: Value = serde_json::from_str(&fs::read_to_string(&log).unwrap()).unwrap();
    assert!(entry["level"] == "error" && entry["msg"].as_str().unwrap().contains("no-such-program"), "{entry}");
    runtime.expect_nothing_left();
    for (name, edit) in [
        ("/no/such/root", json!({ "root": { "path": "/no/such/root" } })),
        ("user namespaces", json!({ "linux": { "namespaces": [{ "type": "user" }] } })),
        ("io.husk.cpus", json!({ "annotations": { "io.husk.cpus": "none" } })),
        ("--console-socket", json!({ "process": { "terminal": true, "args": ["sh"], "cwd": "/" } })),
        ("/no/such/file", json!({ "mounts": [{ "destination": "/x", "type": "bind", "source": "/no/such/file" }] })),
    ] {
        runtime.configure("true", |config| {
            for (key, value) in edit.as_object().unwrap() {
                config[key] = value.clone();
            }
        });
        runtime.create("m").fails_with(name);
        runtime.expect_nothing_left();
    }
    runtime.run(&["delete", "m"]).fails_with("does not exist");
    runtime.run(&["delete", "--force", "m"]).expect(0);
}

#[test]
fn hooks_and_signals_act_at_their_moments() {
    let runtime = runtime!();
    let record = |name: &str| {
        let script = format!("cat > {}", runtime.path(name).display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"] }])
    };
    let names = ["createRuntime", "createContainer", "poststart", "poststop"];
    runtime.configure("sleep 1000", |config| {
        config["hooks"] = names.iter().map(|name| ((*name).to_owned(), record(name))).collect();
    });
    runtime.create("c").expect(0);
    let state = |name: &str| -> Option<Value> { serde_json::from_slice(&fs::read(runtime.path(name)).ok()?).ok() };
    let pid: u32 = fs::read_to_string(runtime.path("pid")).unwrap().parse().unwrap();
    let told = state("createRuntime").unwrap();
    assert_eq!((told["pid"].as_u64(), told["id"].as_str()), (Some(pid.into()), Some("c")));
    assert!(state("createContainer").is_some() && state("poststart").is_none());
    runtime.run(&["start", "c"]).expect(0);
    assert_eq!(state("poststart").unwrap()["status"], "running");
    // Whoever kills the container's process ends the machine.
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    runtime.await_status("c", "stopped");
    runtime.run(&["delete", "c"]).expect(0);
    assert_eq!(state("poststop").unwrap()["status"], "stopped");
    runtime.expect_nothing_left();

    runtime.configure("true", |config| {
        config["hooks"] = json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", "exit 3"] }] });
    });
    runtime.create("c").fails_with("createRuntime hook /bin/sh: exit status: 3");
    runtime.expect_nothing_left();

    runs_hooks_in_the_container(&runtime);

    // A signal to one that is only created ends it.
    runtime.configure("true", |_| {});
    runtime.create("c").expect(0);
    runtime.run(&["kill", "c", "TERM"]).expect(0);
    runtime.await_status("c", "stopped");
    assert_eq!(runtime.output(), "");
    runtime.run(&["delete", "c"]).expect(0);
    assert_eq!(runtime.run(&["run", "c"]).expect(0), "");
    runtime.expect_nothing_left();
}

fn runs_hooks_in_the_container(runtime: &Runtime) {
    let hook = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "A=b"] }]);
    let told = runtime.path("rootfs/told");
    let script = "cat > /told; printf \"$A $HOME\" >> /told";
    runtime.configure("cat /told; sleep 1000", |config| {
        config["hooks"] = json!({ "startContainer": hook(script) });
    });
    let output = fs::File::create(runtime.path("output")).unwrap();
    let mut command = runtime.command(&["run", "--detach", "--pid-file", "../pid", "c"]);
    // As with `create`, the streams are the container's.
    assert!(command.stdout(output.try_clone().unwrap()).stderr(output).status().unwrap().success());
    assert_eq!(runtime.status("c"), "running");
    runtime.await_output("b /root");
    assert!(runtime.output().contains("\"status\":\"created\""), "{}", runtime.output());
    assert!(Path::new(&format!("/proc/{}", fs::read_to_string(runtime.path("pid")).unwrap())).exists());
    runtime.run(&["delete", "--force", "c"]).expect(0);
    fs::remove_file(told).unwrap();

    runtime.configure("touch /told", |config| config["hooks"] = json!({ "startContainer": hook("exit 3") }));
    runtime.run(&["run", "c"]).fails_with("startContainer hook /bin/sh");
    runtime.expect_nothing_left();
    assert!(!runtime.path("rootfs/told").exists(), "its program has run");
}
