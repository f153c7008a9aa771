//! Processes that are killed, state that is lost, disks that are full, and clients that act at the same time.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::engine::{cgroup_of, expect_no_cgroups_in};
use crate::pod::{USUAL, exec, join, start};
use crate::{Runtime, await_that, finish, runtime};

/// Starts to create a container, and kills the command after this time.
fn create_and_kill(runtime: &Runtime, id: &str, after: Duration, edit: impl FnOnce(&mut Value)) {
    runtime.configure("sleep 1000", edit);
    let mut command = runtime.command(&["create", id]);
    let output = File::create(runtime.path("output")).unwrap();
    let mut child = command.stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
    thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_creation_that_is_killed_at_any_moment_leaves_nothing() {
    let runtime = runtime!();
    start(&runtime, "pause", "while :; do sleep 0.1; done", |config| {
        config["annotations"]["io.husk.memory"] = "128".into();
    });
    for milliseconds in [0, 15, 40, 100, 250, 600, 1500] {
        let after = Duration::from_millis(milliseconds);
        create_and_kill(&runtime, "alone", after, |config| config["annotations"]["io.husk.memory"] = "64".into());
        runtime.run(&["delete", "--force", "alone"]).expect(0);
        create_and_kill(&runtime, "member", after, |config| join(&runtime, config, "pause", &USUAL));
        runtime.run(&["delete", "--force", "member"]).expect(0);
    }
    assert_eq!(exec(&runtime, "pause", "echo still here").expect(0), "still here\n");
    runtime.run(&["delete", "--force", "pause"]).expect(0);
    runtime.expect_nothing_left();
}

#[test]
fn a_container_whose_state_is_damaged_can_be_deleted() {
    let runtime = runtime!();
    start(&runtime, "damaged", "sleep 1000", |config| config["annotations"]["io.husk.memory"] = "64".into());
    fs::write(runtime.path("state/damaged/state.json"), "{").unwrap();
    runtime.run(&["delete", "damaged"]).fails_with("state.json");
    runtime.run(&["delete", "--force", "damaged"]).expect(0);
    runtime.expect_nothing_left();
}

#[test]
fn a_container_that_is_deleted_while_it_is_created_leaves_nothing() {
    let runtime = runtime!();
    for milliseconds in [0, 10, 25, 60, 150, 400, 1000] {
        runtime.configure("sleep 1000", |config| {
            config["annotations"]["io.husk.memory"] = "64".into();
            config["linux"]["cgroupsPath"] = format!("{}/c", cgroup_of(&runtime)).into();
        });
        let mut create = runtime.command(&["create", "c"]);
        let output = File::create(runtime.path("output")).unwrap();
        let mut create = create.stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
        thread::sleep(Duration::from_millis(milliseconds));
        runtime.run(&["delete", "--force", "c"]).expect(0);
        // It had not begun, or was done, or says in one line that it has failed.
        if !create.wait().unwrap().success() {
            assert_eq!(runtime.output().lines().count(), 1, "{}", runtime.output());
        }
        runtime.run(&["delete", "--force", "c"]).expect(0);
        runtime.expect_nothing_left();
        expect_no_cgroups_in(&cgroup_of(&runtime));
    }
}

/// A container in a cgroup of its own whose processes end all at once, as with the host. Returns its cgroups.
fn is_cut_off(runtime: &Runtime) -> Vec<PathBuf> {
    start(runtime, "c", "sleep 1000", |config| {
        config["annotations"]["io.husk.memory"] = "64".into();
        config["linux"]["cgroupsPath"] = format!("{}/c", cgroup_of(runtime)).into();
    });
    let below = format!("{}/c", cgroup_of(runtime).trim_start_matches('/'));
    let roots = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|entry| entry.path());
    let all = roots.chain([PathBuf::from("/sys/fs/cgroup")]).map(|root| root.join(&below));
    let cgroups: Vec<PathBuf> = all.filter(|cgroup| cgroup.is_dir()).collect();
    assert!(!cgroups.is_empty());
    let pids = || {
        let text: String = cgroups.iter().flat_map(|dir| fs::read_to_string(dir.join("cgroup.procs"))).collect();
        text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect::<Vec<_>>()
    };
    await_that(
        || {
            pids().into_iter().for_each(|pid| kill_process(pid, Signal::KILL).unwrap_or_default());
            pids().is_empty()
        },
        || format!("{:?}", pids()),
    );
    cgroups
}

#[test]
fn what_a_restart_of_the_host_leaves_is_told_and_removed() {
    let runtime = runtime!();
    // The state without the cgroup.
    let cgroups = is_cut_off(&runtime);
    cgroups.iter().for_each(|cgroup| await_that(|| fs::remove_dir(cgroup).is_ok(), || cgroup.display().to_string()));
    assert_eq!(runtime.status("c"), "stopped");
    assert!(runtime.run(&["list"]).expect(0).contains("stopped"));
    runtime.run(&["start", "c"]).fails_with("c");
    runtime.run(&["exec", "c", "true"]).fails_with("stopped container");
    runtime.create("c").fails_with("already exists");
    runtime.run(&["delete", "c"]).expect(0);
    // The cgroup without the state.
    is_cut_off(&runtime);
    fs::remove_dir_all(runtime.path("state/c")).unwrap();
    runtime.run(&["state", "c"]).fails_with("does not exist");
    assert_eq!(runtime.run(&["list", "-q"]).expect(0), "");
    runtime.run(&["delete", "c"]).fails_with("does not exist");
    runtime.run(&["delete", "--force", "c"]).expect(0);
    // Both are there again, and both end.
    is_cut_off(&runtime);
    runtime.run(&["delete", "--force", "c"]).expect(0);
    runtime.expect_nothing_left();
    expect_no_cgroups_in(&cgroup_of(&runtime));
}

#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let runtime = runtime!();
    let state = runtime.path("state");
    fs::create_dir(&state).unwrap();
    let mount = |size: &str| {
        finish(Command::new("mount").args(["-t", "tmpfs", "-o", size, "none"]).arg(&state)).expect(0);
    };
    let unmount = || finish(Command::new("umount").arg(&state)).expect(0).to_owned();
    runtime.configure("sleep 1000", |config| config["annotations"]["io.husk.memory"] = "64".into());
    let mut failures = 0;
    for blocks in [1, 2, 3, 5, 8, 12] {
        // Files are counted, or their contents: what is created first fits.
        for size in [format!("size={}k,nr_inodes=1k", 4 * blocks), format!("size=1m,nr_inodes={}", blocks + 1)] {
            mount(&size);
            let created = runtime.create("c");
            if created.code != Some(0) {
                failures += 1;
                assert_eq!(created.errors.lines().count(), 1, "{size}: {}", created.errors);
                assert_eq!(fs::read_dir(&state).unwrap().count(), 0, "{size}: {}", created.errors);
            }
            runtime.run(&["delete", "--force", "c"]).expect(0);
            assert_eq!(fs::read_dir(&state).unwrap().count(), 0, "{size}");
            unmount();
        }
    }
    assert!((2..12).contains(&failures), "{failures}");
    runtime.expect_nothing_left();
}

/// The number in an environment variable, for those who want more than usual.
fn count(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |count| count.parse().unwrap())
}

#[test]
fn pods_of_several_clients_do_not_disturb_each_other() {
    let runtime = runtime!();
    let (clients, rounds) = (count("HUSK_TEST_CLIENTS", 4), count("HUSK_TEST_ROUNDS", 2));
    let guests = runtime.kernel.parent().unwrap().parent().unwrap().to_owned();
    // They share the state directory.
    fs::create_dir(runtime.path("state")).unwrap();
    let client = |client: usize| {
        let own = Runtime::new(&guests);
        std::os::unix::fs::symlink(runtime.path("state"), own.path("state")).unwrap();
        for round in 0..rounds {
            let (pause, member) = (format!("pause-{client}-{round}"), format!("member-{client}-{round}"));
            let in_cgroup = |config: &mut Value, id: &str| {
                config["linux"]["cgroupsPath"] = format!("{}/{id}", cgroup_of(&runtime)).into();
            };
            start(&own, &pause, "while :; do sleep 0.1; done", |config| {
                config["annotations"]["io.husk.memory"] = "96".into();
                in_cgroup(config, &pause);
            });
            start(&own, &member, "sleep 1000", |config| {
                join(&own, config, &pause, &USUAL);
                in_cgroup(config, &member);
            });
            let said = exec(&own, &member, "hostname; readlink /proc/1/ns/uts");
            assert!(said.expect(0).starts_with("husk\nuts:"), "{}", said.output);
            // In either order.
            let order = if (client + round).is_multiple_of(2) { [&member, &pause] } else { [&pause, &member] };
            for id in order {
                own.run(&["delete", "--force", id]).expect(0);
            }
        }
    };
    thread::scope(|scope| {
        for number in 0..clients {
            scope.spawn(move || client(number));
        }
    });
    runtime.expect_nothing_left();
    expect_no_cgroups_in(&cgroup_of(&runtime));
    println!("{} pods", clients * rounds);
}
