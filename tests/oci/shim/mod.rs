//! The shim by itself, driven as containerd drives it.

mod client;
mod faults;
mod messages;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use crate::{Runtime, await_that, finish, runtime};
use client::{Events, call};
use messages::*;

const NAMESPACE: &str = "n";
const SHIM: &str = "containerd-shim-husk-v2";
/// States of containerd.v1.types.Status.
const CREATED: i32 = 1;
const RUNNING: i32 = 2;
const STOPPED: i32 = 3;

/// containerd, as far as a shim sees it.
struct Node {
    runtime: Runtime,
    events: Events,
}

impl Node {
    fn new(runtime: Runtime) -> Node {
        let events = Events::listen(&runtime.path("events"));
        Node { runtime, events }
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.runtime.path("run/tasks").join(NAMESPACE).join(id)
    }

    /// The shim's program for a container.
    fn command(&self, id: &str) -> Command {
        let mut command = Command::new(self.runtime.path(SHIM));
        command.args(["-namespace", NAMESPACE, "-address", "/none", "-publish-binary", "/none", "-id", id]);
        command.current_dir(self.bundle(id)).env("TTRPC_ADDRESS", self.runtime.path("events")).stdin(Stdio::null());
        command
    }

    /// Makes the bundle of a container that runs a shell script, and starts its shim, whose address is returned.
    fn start_shim(&self, id: &str, script: &str) -> String {
        self.start_shim_with(id, script, |_| {})
    }

    /// The same with a configuration that is changed by `edit`.
    fn start_shim_with(&self, id: &str, script: &str, edit: impl FnOnce(&mut Value)) -> String {
        self.runtime.configure(script, |config| {
            config["root"]["path"] = "rootfs".into();
            config["annotations"]["io.kubernetes.cri.sandbox-id"] = "pod".into();
            edit(config);
        });
        fs::create_dir_all(self.bundle(id)).unwrap();
        fs::copy(self.runtime.path("bundle/config.json"), self.bundle(id).join("config.json")).unwrap();
        finish(self.command(id).arg("start")).expect(0).to_owned()
    }

    fn request(&self, id: &str) -> Create {
        let options = ["rbind", "rw"].map(str::to_owned).into();
        let source = self.runtime.path("rootfs").display().to_string();
        let rootfs = vec![Mount { kind: "bind".into(), source, options }];
        Create { id: id.into(), bundle: self.bundle(id).display().to_string(), rootfs, ..Create::default() }
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.runtime.path(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        path.display().to_string()
    }
}

/// What is written to a FIFO until all writers have closed it.
fn reader(fifo: &str) -> JoinHandle<String> {
    let fifo = fifo.to_owned();
    thread::spawn(move || {
        let mut text = String::new();
        File::open(fifo).unwrap().read_to_string(&mut text).unwrap();
        text
    })
}

fn named(id: &str, exec_id: &str) -> Named {
    Named { id: id.into(), exec_id: exec_id.into() }
}

fn await_end(address: &str, id: &str, exec_id: &str) -> u32 {
    call::<Waited>(address, "Wait", &named(id, exec_id)).unwrap().exit_status
}

#[test]
fn a_shim_does_what_containerd_asks_and_tells_it() {
    let node = Node::new(runtime!());
    let script = "trap 'exit 4' TERM; read x; echo got $x; read x || echo end; while :; do sleep 0.1; done";
    let address = node.start_shim("c", script);
    refuses(&node, &address);
    let (stdin, stdout) = (node.fifo("in"), node.fifo("out"));
    let output = reader(&stdout);
    let create = Create { stdin: stdin.clone(), stdout, ..node.request("c") };
    call::<Empty>(&address, "Create", &create).unwrap();
    assert!(call::<Empty>(&address, "Create", &create).unwrap_err().contains("exists"));
    let state = || call::<State>(&address, "State", &named("c", "")).unwrap();
    assert_eq!(state().status, CREATED);
    let connected: Connected = call(&address, "Connect", &named("c", "")).unwrap();
    assert!(connected.task_pid == state().pid && connected.shim_pid != connected.task_pid);
    call::<Empty>(&address, "Start", &named("c", "")).unwrap();
    assert!(call::<Empty>(&address, "Start", &named("c", "")).unwrap_err().contains("started before"));
    assert_eq!(state().status, RUNNING);
    // The input ends when both sides have closed it.
    File::options().write(true).open(&stdin).unwrap().write_all(b"it\n").unwrap();
    call::<Empty>(&address, "CloseIO", &CloseIo { id: "c".into(), stdin: true }).unwrap();
    has_a_terminal(&node, &address);
    cannot_be_started(&node, &address);
    assert!(call::<Deleted>(&address, "Delete", &named("c", "")).unwrap_err().contains("kill it first"));
    let kill = |signal: i32| Kill { id: "c".into(), exec_id: String::new(), signal: signal.unsigned_abs() };
    call::<Empty>(&address, "Kill", &kill(libc::SIGTERM)).unwrap();
    assert_eq!(await_end(&address, "c", ""), 4);
    assert_eq!(output.join().unwrap(), "got it\nend\n");
    assert_eq!((state().status, state().exit_status), (STOPPED, 4));
    assert_eq!(call::<Empty>(&address, "Kill", &kill(libc::SIGKILL)).unwrap_err(), "the process has ended");
    // The shim stays as long as it has containers.
    call::<Empty>(&address, "Shutdown", &named("c", "")).unwrap();
    assert_eq!(call::<Deleted>(&address, "Delete", &named("c", "")).unwrap().exit_status, 4);
    let told = ["create", "start", "exec-added", "exec-started", "exit", "exec-added", "exit", "delete"];
    await_that(|| node.events.count() == told.len(), || format!("{:?}", node.events.take()));
    assert_eq!(node.events.take(), told);
    is_deleted_before_it_is_started(&node, &address);
    call::<Empty>(&address, "Shutdown", &named("c", "")).unwrap();
    leaves_nothing(&node);
}

/// What it cannot do, in one line each.
fn refuses(node: &Node, address: &str) {
    finish(&mut Command::new(node.runtime.path(SHIM))).fails_with("is started by containerd");
    finish(&mut node.command("c")).fails_with("standard input is not a socket");
    finish(node.command("c").env_remove("TTRPC_ADDRESS").arg("start")).fails_with("TTRPC_ADDRESS is not set");
    let checkpoint = call::<Empty>(address, "Checkpoint", &named("c", "")).unwrap_err();
    assert_eq!(checkpoint, "checkpoints of containers are not supported");
    let log = Create { stdout: "binary:///bin/logger".into(), ..node.request("c") };
    assert!(call::<Empty>(address, "Create", &log).unwrap_err().contains("binary:// is not supported"));
    let options = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![0x10, 1] };
    let configured = Create { options: Some(options), ..node.request("c") };
    assert!(call::<Empty>(address, "Create", &configured).unwrap_err().contains("has no options"));
    assert!(call::<State>(address, "State", &named("c", "")).unwrap_err().contains("does not exist"));
}

/// A script on a terminal of its own, as one more process of the container.
fn terminal(node: &Node, id: &str, script: &str) -> Option<Any> {
    let mut config: Value = serde_json::from_slice(&fs::read(node.bundle(id).join("config.json")).unwrap()).unwrap();
    config["process"]["args"] = json!(["sh", "-c", script]);
    config["process"]["terminal"] = true.into();
    Some(Any { type_url: "process".into(), value: config["process"].to_string().into() })
}

/// One more process, whose terminal has the size that containerd says, and what is typed.
fn has_a_terminal(node: &Node, address: &str) {
    let (stdin, stdout) = (node.fifo("keys"), node.fifo("screen"));
    let screen = reader(&stdout);
    let spec = terminal(node, "c", "tty; stty size; read x; stty size; echo typed $x; exit 7");
    let exec = Exec { id: "c".into(), exec_id: "e".into(), terminal: true, stdin: stdin.clone(), stdout, spec };
    call::<Empty>(address, "Exec", &exec).unwrap();
    assert!(call::<Empty>(address, "Exec", &exec).unwrap_err().contains("has a process"));
    call::<Empty>(address, "Start", &named("c", "e")).unwrap();
    let resize = Resize { id: "c".into(), exec_id: "e".into(), width: 99, height: 33 };
    call::<Empty>(address, "ResizePty", &resize).unwrap();
    // The new size passes several processes.
    thread::sleep(std::time::Duration::from_secs(2));
    File::options().write(true).open(stdin).unwrap().write_all(b"word\n").unwrap();
    assert_eq!(await_end(address, "c", "e"), 7);
    assert_eq!(call::<Deleted>(address, "Delete", &named("c", "e")).unwrap().exit_status, 7);
    let shown = screen.join().unwrap();
    assert!(shown.starts_with("/dev/pts/") && shown.contains("33 99\r\ntyped word\r\n"), "{shown:?}");
}

/// One more process whose program is missing: nobody waits for it in vain.
fn cannot_be_started(node: &Node, address: &str) {
    let mut config: Value = serde_json::from_slice(&fs::read(node.bundle("c").join("config.json")).unwrap()).unwrap();
    config["process"]["args"] = json!(["no-such-program"]);
    let spec = Some(Any { type_url: "process".into(), value: config["process"].to_string().into() });
    call::<Empty>(address, "Exec", &Exec { id: "c".into(), exec_id: "x".into(), spec, ..Exec::default() }).unwrap();
    let kill = Kill { id: "c".into(), exec_id: "x".into(), signal: 9 };
    assert_eq!(call::<Empty>(address, "Kill", &kill).unwrap_err(), "the process has not been started");
    let waiting = thread::spawn({
        let address = address.to_owned();
        move || await_end(&address, "c", "x")
    });
    assert!(call::<Empty>(address, "Start", &named("c", "x")).unwrap_err().contains("executable file not found"));
    assert_eq!(waiting.join().unwrap(), 127);
    assert_eq!(call::<Deleted>(address, "Delete", &named("c", "x")).unwrap().exit_status, 127);
}

/// A further container of the same shim, which ends with its deletion.
fn is_deleted_before_it_is_started(node: &Node, address: &str) {
    assert_eq!(node.start_shim("d", "sleep 1000"), address);
    call::<Empty>(address, "Create", &node.request("d")).unwrap();
    assert_eq!(call::<Deleted>(address, "Delete", &named("d", "")).unwrap().exit_status, 137);
    await_that(|| node.events.count() == 3, || format!("{:?}", node.events.take()));
    assert_eq!(node.events.take(), ["create", "exit", "delete"]);
}

fn leaves_nothing(node: &Node) {
    let root = node.runtime.path("run/husk");
    let sockets = || fs::read_dir(root.join(".shims")).map_or(0, Iterator::count);
    await_that(|| sockets() == 0, || "the socket is left".into());
    node.runtime.nothing_is_left_in(&root.join(NAMESPACE));
    node.runtime.nothing_is_left_in(&node.runtime.path("run/tasks/none"));
    for bundle in fs::read_dir(node.runtime.path("run/tasks").join(NAMESPACE)).unwrap() {
        let root = bundle.unwrap().path().join("rootfs");
        assert!(fs::read_dir(&root).unwrap().next().is_none(), "{} is mounted", root.display());
    }
}
