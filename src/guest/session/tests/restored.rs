//! Sessions of machines that were restored, or that wait for their process.

use husk_protocol::frame::Reader;
use husk_protocol::{Overlay, Process};

use super::*;
use crate::console::stream_log::LogReader;

/// The next messages to the guest.
fn told(control: &mut UnixStream) -> Vec<ToGuest> {
    control.set_nonblocking(true).unwrap();
    let (mut reader, mut buffer, mut messages) = (Reader::default(), [0; 4096], Vec::new());
    while let Ok(count) = control.read(&mut buffer) {
        assert!(count > 0, "the connection is closed");
        reader.push(&buffer[..count]);
        while let Some(message) = reader.take().unwrap() {
            messages.push(message);
        }
    }
    control.set_nonblocking(false).unwrap();
    messages
}

fn resumed(on_terminal: bool) -> Host {
    resumed_as(Received::default(), on_terminal, false)
}

fn resumed_after(received: Received, on_terminal: bool) -> Host {
    resumed_as(received, on_terminal, false)
}

fn resumed_as(received: Received, on_terminal: bool, is_same: bool) -> Host {
    let identity = Identity { hostname: "copy".into(), ..Identity::default() };
    let change = Change { identity, is_same, cut: true };
    Host::with(|listener, endpoints, timings| {
        Session::resumed(listener, received, on_terminal, change, endpoints, timings)
    })
}

#[test]
fn a_resumed_process_is_renewed_once_and_ends_with_the_streams_that_it_had_left() {
    let mut host = resumed(false);
    let mut control = host.join(Role::Control);
    // A stream may arrive before the guest has said which there are.
    let stdout = host.join(Role::Stdout);
    assert!(!host.session.has_started());
    let open = ToHost::Resumed { pid: Some(2), streams: vec![Role::Stdout] };
    // What it says before it is asked has no effect.
    host.hear(&mut control, &[ToHost::Renewed(Ok(())), open.clone(), open]);
    let [ToGuest::Renew { renewal, identity, cut: true }] = &told(&mut control)[..] else {
        panic!("it is renewed once")
    };
    assert!(renewal.entropy != [0; 32] && renewal.time_ns > 1 << 60 && identity.hostname == "copy");
    assert!(!host.session.has_started() && host.session.is_double());
    host.hear(&mut control, &[ToHost::Renewed(Ok(()))]);
    assert!(host.session.has_started() && !host.session.is_double());
    host.hear(&mut control, &[ToHost::Exited(3)]);
    assert!(!host.session.is_over(), "its output may follow");
    drop(stdout);
    host.wait_until(Session::is_over);
    assert_eq!((host.session.end(), host.said()), (Some(&ToHost::Exited(3)), None));
    assert_eq!(told(&mut control), [ToGuest::Finish]);
}

#[test]
fn output_that_has_arrived_before_is_not_printed_again() {
    let mut host = resumed_after(Received { stdout: 5, stderr: 0 }, false);
    let mut control = host.join(Role::Control);
    let (mut stdout, stderr) = (host.join(Role::Stdout), host.join(Role::Stderr));
    stdout.write_all(&[&3_u64.to_le_bytes(), &b"stnext"[..]].concat()).unwrap();
    host.hear(&mut control, &[ToHost::Resumed { pid: Some(2), streams: vec![Role::Stdout, Role::Stderr] }]);
    assert_eq!(host.session.received(), Received { stdout: 9, stderr: 0 });
    drop((stdout, stderr));
    host.hear(&mut control, &[ToHost::Exited(0)]);
    host.wait_until(Session::is_over);
    let mut log = LogReader::open(&host.dir.path().join("streams.log"));
    let (_, printed) = log.read().unwrap().expect("there is output");
    assert_eq!(printed, b"next");
    assert_eq!(host.session.received(), Received { stdout: 9, stderr: 0 });
}

#[test]
fn a_process_that_ended_before_it_was_saved_has_no_streams_left() {
    let mut host = resumed(false);
    let mut control = host.join(Role::Control);
    host.hear(&mut control, &[ToHost::Resumed { pid: None, streams: Vec::new() }, ToHost::Signaled(9)]);
    assert!(host.session.is_over() && host.session.end() == Some(&ToHost::Signaled(9)));
    assert!(host.session.has_started() && host.session.is_double());
}

#[test]
fn a_guest_that_cannot_change_goes_on_without_a_network() {
    for is_same in [false, true] {
        let mut host = resumed_as(Received::default(), false, is_same);
        let mut control = host.join(Role::Control);
        let no = ToHost::Renewed(Err("no\ninterface".into()));
        host.hear(&mut control, &[ToHost::Resumed { pid: Some(2), streams: Vec::new() }, no, ToHost::Renewed(Ok(()))]);
        assert_eq!((host.session.has_started(), host.session.is_double()), (true, !is_same));
    }
}

#[test]
fn only_a_restored_guest_is_renewed() {
    let mut host = Host::new();
    let mut control = host.join(Role::Control);
    host.hear(&mut control, &[ToHost::Resumed { pid: None, streams: Vec::new() }, ToHost::Waiting]);
    assert!(!host.session.has_started());
    assert_eq!(told(&mut control), []);
    // Nor is one twice that makes up streams.
    let mut host = resumed(true);
    let mut control = host.join(Role::Control);
    let flood = ToHost::Resumed { pid: None, streams: vec![Role::Control; 1000] };
    host.hear(&mut control, &[flood.clone(), flood]);
    let renewals = told(&mut control).iter().filter(|message| matches!(message, ToGuest::Renew { .. })).count();
    assert_eq!((renewals, host.session.expected.len()), (1, 0));
}

#[test]
fn a_machine_waits_until_its_run_begins() {
    let mut host = Host::with(|listener, _, timings| Session::waiting(listener, timings));
    let mut control = host.join(Role::Control);
    assert!(!host.session.is_waiting());
    host.hear(&mut control, &[ToHost::Waiting]);
    assert!(host.session.is_waiting() && !host.session.has_started());
    assert_eq!(told(&mut control), []);
    // One that cannot be prepared.
    let mut host = Host::with(|listener, _, timings| Session::waiting(listener, timings));
    let mut control = host.join(Role::Control);
    host.hear(&mut control, &[ToHost::Failed { message: "no".into(), code: 125 }]);
    assert!(host.session.is_over() && !host.session.is_waiting());
}

#[test]
fn a_run_begins_once_in_a_machine_that_waits() {
    let process = Process { args: vec![vec![b'x'; 100_000]], ..Process::default() };
    let run = Run { process, ..Run::default() };
    let mut host = Host::with(|listener, endpoints, timings| {
        let disk = Overlay::Disk("/dev/vdb".into());
        Session::beginning(listener, disk, Box::new(run.clone()), endpoints, timings)
    });
    let mut control = host.join(Role::Control);
    host.hear(&mut control, &[ToHost::Waiting, ToHost::Waiting]);
    let [ToGuest::Begin(renewal, Overlay::Disk(device), begun)] = &told(&mut control)[..] else {
        panic!("it begins once")
    };
    assert!(renewal.entropy != [0; 32] && device == "/dev/vdb" && **begun == run);
    assert!(!host.session.has_started() && !host.session.is_waiting());
    let outputs = [Role::Stdout, Role::Stderr].map(|role| host.join(role));
    host.hear(&mut control, &[ToHost::Started(2), ToHost::Exited(0)]);
    assert!(host.session.has_started() && !host.session.is_over());
    drop(outputs);
    host.wait_until(Session::is_over);
}

#[test]
fn a_run_that_no_message_can_hold_is_refused() {
    let process = Process { args: vec![vec![b'x'; ToGuest::MAX_BYTES]], ..Process::default() };
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vsock_1024")).unwrap();
    let timings = Arc::new(Timings::new(Instant::now()));
    let run = Run { process, ..Run::default() };
    let session =
        Session::beginning(listener, Overlay::Memory, Box::new(run), Endpoints::Stdio(Attached::default()), timings);
    let error = format!("{:#}", session.err().unwrap());
    assert!(error.starts_with("the command is too long: "), "{error}");
}
