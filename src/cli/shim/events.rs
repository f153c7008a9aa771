//! What containerd is told of containers: events, in order, by a thread that has the connection to it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use prost::Message;

use super::messages::{Any, Mount, Timestamp};
use super::ttrpc;
use crate::sandbox;

const SERVICE: &str = "containerd.services.events.ttrpc.v1.Events";
/// How often an event is sent while containerd does not answer, with a pause that gets a second longer each time. When it has been
/// restarted, it asks for the state of all containers by itself.
const ATTEMPTS: u32 = 5;
const TIMEOUT: Duration = Duration::from_secs(10);

/// What has happened to a container.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    Exit(TaskExit),
    Delete(TaskDelete),
    ExecAdded(TaskExec),
    ExecStarted(TaskExec),
    Paused(TaskNamed),
    Resumed(TaskNamed),
    OutOfMemory(TaskNamed),
}

#[derive(Clone, PartialEq, Message)]
pub struct TaskCreate {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub bundle: String,
    #[prost(message, repeated, tag = "3")]
    pub rootfs: Vec<Mount>,
    #[prost(message, optional, tag = "4")]
    pub io: Option<TaskIo>,
    #[prost(uint32, tag = "6")]
    pub pid: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct TaskIo {
    #[prost(string, tag = "1")]
    pub stdin: String,
    #[prost(string, tag = "2")]
    pub stdout: String,
    #[prost(string, tag = "3")]
    pub stderr: String,
    #[prost(bool, tag = "4")]
    pub terminal: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct TaskStart {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(uint32, tag = "2")]
    pub pid: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct TaskExit {
    #[prost(string, tag = "1")]
    pub container_id: String,
    /// The process: the container itself for its first.
    #[prost(string, tag = "2")]
    pub id: String,
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    #[prost(uint32, tag = "4")]
    pub exit_status: u32,
    #[prost(message, optional, tag = "5")]
    pub exited_at: Option<Timestamp>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TaskDelete {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(uint32, tag = "2")]
    pub pid: u32,
    #[prost(uint32, tag = "3")]
    pub exit_status: u32,
    #[prost(message, optional, tag = "4")]
    pub exited_at: Option<Timestamp>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TaskExec {
    #[prost(string, tag = "1")]
    pub container_id: String,
    #[prost(string, tag = "2")]
    pub exec_id: String,
    /// Only of one that has started.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct TaskNamed {
    #[prost(string, tag = "1")]
    pub container_id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Forward {
    #[prost(message, optional, tag = "1")]
    envelope: Option<Envelope>,
}

#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(message, optional, tag = "1")]
    timestamp: Option<Timestamp>,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(string, tag = "3")]
    topic: String,
    #[prost(message, optional, tag = "4")]
    event: Option<Any>,
}

impl Event {
    /// Its topic, and its message.
    fn pack(&self) -> (&'static str, Any) {
        let (topic, name, value) = match self {
            Event::Create(event) => ("/tasks/create", "TaskCreate", event.encode_to_vec()),
            Event::Start(event) => ("/tasks/start", "TaskStart", event.encode_to_vec()),
            Event::Exit(event) => ("/tasks/exit", "TaskExit", event.encode_to_vec()),
            Event::Delete(event) => ("/tasks/delete", "TaskDelete", event.encode_to_vec()),
            Event::ExecAdded(event) => ("/tasks/exec-added", "TaskExecAdded", event.encode_to_vec()),
            Event::ExecStarted(event) => ("/tasks/exec-started", "TaskExecStarted", event.encode_to_vec()),
            Event::Paused(event) => ("/tasks/paused", "TaskPaused", event.encode_to_vec()),
            Event::Resumed(event) => ("/tasks/resumed", "TaskResumed", event.encode_to_vec()),
            Event::OutOfMemory(event) => ("/tasks/oom", "TaskOOM", event.encode_to_vec()),
        };
        (topic, Any { type_url: format!("containerd.events.{name}"), value })
    }
}

/// Who tells containerd.
#[derive(Debug)]
pub struct Publisher {
    namespace: String,
    queue: Mutex<Sender<Envelope>>,
    waiting: Arc<Waiting>,
}

/// The number of events that are on their way.
#[derive(Debug, Default)]
struct Waiting {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Publisher {
    /// Starts the thread, for the socket `address` of containerd.
    pub fn start(namespace: &str, address: PathBuf) -> Result<Publisher> {
        let (queue, events) = mpsc::channel();
        let waiting = Arc::new(Waiting::default());
        let noted = waiting.clone();
        sandbox::spawn("events", move || forward_all(&address, &events, &noted)).context("start a thread")?;
        Ok(Publisher { namespace: namespace.to_owned(), queue: Mutex::new(queue), waiting })
    }

    /// Tells containerd of `event`, after all that it is told before.
    pub fn publish(&self, event: &Event) {
        let (topic, event) = event.pack();
        let (timestamp, namespace) = (Some(Timestamp::now()), self.namespace.clone());
        let envelope = Envelope { timestamp, namespace, topic: topic.into(), event: Some(event) };
        *self.waiting.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        // The thread ends with the process.
        let _ = self.queue.lock().unwrap_or_else(PoisonError::into_inner).send(envelope);
    }

    /// Waits until containerd has been told everything, for `timeout` at most.
    pub fn flush(&self, timeout: Duration) {
        let count = self.waiting.count.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.waiting.changed.wait_timeout_while(count, timeout, |count| *count > 0);
    }
}

fn forward_all(address: &Path, events: &Receiver<Envelope>, waiting: &Waiting) {
    let mut connection = None;
    for envelope in events {
        let message = Forward { envelope: Some(envelope) };
        for attempt in 1..=ATTEMPTS {
            match forward(address, &mut connection, &message) {
                Ok(()) => break,
                Err(error) => {
                    connection = None;
                    log::warn!("tell containerd of an event: {error:#}");
                    std::thread::sleep(Duration::from_secs(attempt.into()));
                }
            }
        }
        *waiting.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        waiting.changed.notify_all();
    }
}

/// Sends an event over a connection and its number of calls, which is made if there is none.
fn forward(address: &Path, connection: &mut Option<(UnixStream, u32)>, message: &Forward) -> Result<()> {
    let (stream, number) = match connection {
        Some(connection) => connection,
        None => {
            let stream = UnixStream::connect(address).with_context(|| format!("connect to {}", address.display()))?;
            stream.set_read_timeout(Some(TIMEOUT)).and_then(|()| stream.set_write_timeout(Some(TIMEOUT)))?;
            connection.insert((stream, 1))
        }
    };
    ttrpc::call(stream, *number, SERVICE, "Forward", message)?;
    *number = number.wrapping_add(2);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn events_arrive_in_order_and_are_sent_again_when_containerd_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("socket");
        let publisher = Publisher::start("n", address.clone()).unwrap();
        let named = |id: &str| TaskNamed { container_id: id.into() };
        publisher.publish(&Event::Paused(named("a")));
        publisher.publish(&Event::Resumed(named("b")));
        publisher.flush(Duration::from_millis(200));
        let listener = UnixListener::bind(&address).unwrap();
        let (heard, told) = mpsc::channel();
        std::thread::spawn(move || {
            ttrpc::serve(&listener, SERVICE, move |method, payload, reply| {
                assert_eq!(method, "Forward");
                let envelope = Forward::decode(payload).unwrap().envelope.unwrap();
                let event = envelope.event.unwrap();
                heard.send((envelope.namespace, envelope.topic, event.type_url)).unwrap();
                reply.send(Ok(Vec::new()));
            });
        });
        publisher.flush(Duration::from_secs(60));
        let of = |topic: &str, kind: &str| ("n".to_owned(), topic.to_owned(), format!("containerd.events.{kind}"));
        let all: Vec<_> = told.try_iter().collect();
        assert_eq!(all, [of("/tasks/paused", "TaskPaused"), of("/tasks/resumed", "TaskResumed")]);
    }
}
