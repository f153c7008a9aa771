//! The guest's PID 1: from the kernel's hand-over to a running process, its streams, and the machine's end.
//!
//! [`Spec`] ─ devices, modules ─ connections to the host ─ root file system ─ process ─ `agent`.
//!
//! There is one thread. It waits in one place (`agent`) for children, connections and pipes, never blocks on any one
//! of them, and holds no more of a stream than one buffer. Inside the machine the process may do as it likes, so nothing
//! is hidden from it as in a container: the wall is around the machine.

mod agent;
mod boot;
mod clock;
mod connection;
pub mod copy;
mod disk;
pub mod errors;
mod identity;
pub mod network;
mod process;
mod pump;
mod report;
pub mod root;
mod session;
mod sys;

use errors::Failure;
use husk_protocol::{Process, Spec, Start};
use session::Session;

/// Carries the machine from here to its end.
pub fn run() -> ! {
    report::running();
    let failure = match boot::prepare() {
        Ok(spec) => serve(&spec),
        Err(failure) => failure,
    };
    report::say(&failure.message);
    report::end(failure.code)
}

/// Mounts the root and runs what is to run in it. Returns only what went wrong before the host could be told.
fn serve(spec: &Spec) -> Failure {
    match &spec.start {
        Start::Init(args) => match root::mount(spec).and_then(|_| root::enter(spec)) {
            Ok(()) => boot::become_init(args),
            Err(failure) => failure,
        },
        Start::Process(process) => match Session::connect(process) {
            Ok(session) => run_process(spec, process, session),
            Err(failure) => failure,
        },
    }
}

/// The connections are in the making while the root is mounted.
fn run_process(spec: &Spec, process: &Process, mut session: Session) -> Failure {
    let root = root::mount(spec).and_then(|kept| root::enter(spec).map(|()| kept));
    if let Err(failure) = session.complete_connections() {
        return root.err().unwrap_or(failure);
    }
    let listener = agent::listen();
    match root {
        Ok(kept) => {
            session.start(process, &spec.hostname);
            agent::run(session, &spec.hostname, kept, listener)
        }
        Err(failure) => {
            session.fail(failure);
            agent::run(session, &spec.hostname, None, listener)
        }
    }
}
