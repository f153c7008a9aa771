//! The guest's PID 1: starts the process, transfers its streams, and ends the machine.
//!
//! [`Spec`] ─ devices, modules ─ connections to the host ─ root file system ─ process ─ `agent`.
//!
//! One thread does all of this. It waits in one place (`agent`) for children, connections and pipes, never blocks on
//! any one of them, and buffers a limited amount of each stream. A second thread waits for memory pressure
//! (`pressure`). Nothing is hidden from the process as in a container, because the machine itself is the security
//! boundary.

mod agent;
mod boot;
mod clock;
mod connection;
pub mod copy;
mod disk;
pub mod errors;
mod identity;
pub mod network;
mod pressure;
mod process;
mod pump;
mod report;
pub mod root;
mod session;
mod sys;

use errors::Failure;
use husk_protocol::{Process, Spec, Start};
use session::Session;

/// Runs the machine until its end.
pub fn run() -> ! {
    report::running();
    let failure = match boot::prepare() {
        Ok(spec) => serve(&spec),
        Err(failure) => failure,
    };
    report::say(&failure.message);
    report::end(failure.code)
}

/// Mounts the root file system and runs the process. Returns only errors from before the host could be notified.
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

/// The connections are established while the root file system is mounted.
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
