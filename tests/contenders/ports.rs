//! Ports of instances, reached from the host.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use husk::bench::contender::{Contender, Job, Unsupported};
use husk::bench::fixture::Fixture;

use crate::{
    cannot_run_machines, clean_up, is_not_root, leftovers, log, prepare_lab, present, start, uplink, wait_for,
};

#[test]
fn a_server_in_a_container_is_reachable() {
    if is_not_root() {
        return;
    }
    let lab = prepare_lab();
    for mut contender in present(&lab.fixture, false) {
        let before = interfaces();
        contender.prepare(&lab.fixture).unwrap();
        is_reached(&*contender, &lab.fixture);
        contender.clean_up(&lab.fixture).unwrap();
        assert_eq!(interfaces(), before, "{}", contender.name());
    }
}

/// Lists the host's network interfaces.
fn interfaces() -> BTreeSet<OsString> {
    fs::read_dir("/sys/class/net").unwrap().flatten().map(|entry| entry.file_name()).collect()
}

#[test]
fn a_server_in_a_machine_is_reachable() {
    if cannot_run_machines() {
        return;
    }
    if uplink::host().is_none() {
        return;
    }
    let lab = prepare_lab();
    for mut contender in present(&lab.fixture, true) {
        contender.prepare(&lab.fixture).unwrap();
        is_reached(&*contender, &lab.fixture);
        contender.clean_up(&lab.fixture).unwrap();
    }
}

fn is_reached(contender: &dyn Contender, fixture: &Fixture) {
    let name = contender.name();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let command = ["/.husk-bench/work", "serve", &port.to_string()].map(str::to_owned).to_vec();
    let job = Job { command, scratch_mib: None, port: Some(port), instance: 9 };
    let mut launch = match contender.launch(fixture, &job) {
        Err(error) if error.is::<Unsupported>() => return log(&format!("SKIPPED: {name}: {error}")),
        launch => launch.unwrap(),
    };
    let address = launch.address.unwrap();
    let mut child = start(&mut launch);
    // The workload program's server echoes what follows an `e`. Forwarded ports accept connections before it listens.
    let echoes = || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"ex").ok()?;
        let mut byte = [0];
        stream.read_exact(&mut byte).ok().filter(|()| byte == *b"x")
    };
    wait_for(&format!("{name}'s port"), || {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{name}: {ended:?}");
        echoes()
    });
    log(&format!("{name} is reached at {address}"));
    child.kill().unwrap();
    child.wait().unwrap();
    clean_up(&mut launch);
    assert_eq!(leftovers(fixture), Vec::<String>::new(), "{name}");
}
