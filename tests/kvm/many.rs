//! Many machines and commands at once.

use std::thread;

use husk_guests as guests;

use crate::background::Machines;
use crate::husk::{await_none_of, is_emulated};

#[test]
fn concurrent_commands_do_not_interfere() {
    needs_kvm!();
    let machines = Machines::new();
    // A command takes a second on an emulated processor.
    let (shells, rounds) = if !is_emulated() { (20, 10) } else { (5, 1) };
    thread::scope(|scope| {
        for shell in 0..shells {
            let machines = &machines;
            scope.spawn(move || {
                let name = format!("m{shell}");
                for _ in 0..rounds {
                    machines.start(guests::POWER, "do=halt", &["--name", &name]);
                    assert!(machines.ok(&["ps"]).contains(&name));
                    assert_eq!(machines.status(&name), "running");
                    machines.ok(&["rm", "-f", &name]);
                }
            });
        }
    });
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
    await_none_of(machines.place());
}

#[test]
fn a_hundred_machines_by_twenty_shells() {
    needs_kvm!();
    let machines = Machines::new();
    // As many as an emulated processor can handle.
    let (shells, each) = if is_emulated() { (3, 4) } else { (20, 5) };
    let count = shells * each;
    // The others are only known by their IDs.
    let names: Vec<String> = (0..count).step_by(2).map(|n| format!("m{n}")).collect();
    let start = |n: usize| match names.get(n / 2).filter(|_| n.is_multiple_of(2)) {
        Some(name) => {
            machines.start(guests::POWER, "do=wait-for-button", &["--name", name]);
            name.clone()
        }
        None => machines.start(guests::POWER, "do=wait-for-button", &[]),
    };
    let by_shell: Vec<Vec<String>> = thread::scope(|scope| {
        let start = &start;
        let start_all = |shell| move || (shell * each..(shell + 1) * each).map(start).collect();
        let threads: Vec<_> = (0..shells).map(|shell| scope.spawn(start_all(shell))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let list = machines.ok(&["ps"]);
    assert_eq!((machines.dirs().len(), machines.names(), list.lines().count()), (count, names.len(), count + 1));
    assert!(by_shell.iter().flatten().all(|machine| list.split_whitespace().any(|field| field == machine)), "{list}");
    assert_eq!(machines.ok(&["stats", "--json"]).matches("cpu_percent").count(), count);
    thread::scope(|scope| {
        for started in &by_shell {
            let machines = &machines;
            scope.spawn(move || {
                for machine in started {
                    machines.ok(&["stop", "--time", "120", machine]);
                    assert_eq!(machines.ok(&["wait", machine]), "0\n");
                    machines.ok(&["rm", machine]);
                }
            });
        }
    });
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
    await_none_of(machines.place());
}
