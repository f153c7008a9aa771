//! Processes that are killed, and clients that act at the same time.

use std::fs::{self, File};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::pod::{USUAL, exec, join, start};
use crate::{Runtime, runtime};

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
fn pods_of_several_clients_do_not_disturb_each_other() {
    let runtime = runtime!();
    let guests = runtime.kernel.parent().unwrap().parent().unwrap().to_owned();
    // They share the state directory.
    fs::create_dir(runtime.path("state")).unwrap();
    let client = |client: usize| {
        let own = Runtime::new(&guests);
        std::os::unix::fs::symlink(runtime.path("state"), own.path("state")).unwrap();
        for round in 0..2 {
            let (pause, member) = (format!("pause-{client}-{round}"), format!("member-{client}-{round}"));
            start(&own, &pause, "while :; do sleep 0.1; done", |config| {
                config["annotations"]["io.husk.memory"] = "96".into();
            });
            start(&own, &member, "sleep 1000", |config| join(&own, config, &pause, &USUAL));
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
        for number in 0..4 {
            scope.spawn(move || client(number));
        }
    });
    runtime.expect_nothing_left();
}
