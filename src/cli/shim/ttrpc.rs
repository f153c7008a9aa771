//! ttRPC, in which containerd and its shims talk over a Unix socket: messages of protobuf behind a header of ten bytes, many calls at once
//! on a connection (github.com/containerd/ttrpc, PROTOCOL.md). No streams: neither side of a shim uses them.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use prost::Message;

use crate::sandbox;

const HEADER_BYTES: usize = 10;
/// The maximum length of a message, as of other implementations.
const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Kinds of messages.
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// How long a failure to accept a connection, such as for want of descriptors, is left alone.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

/// What kind of failure it is (google.golang.org/grpc/codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    Unknown = 2,
    InvalidArgument = 3,
    NotFound = 5,
    AlreadyExists = 6,
    FailedPrecondition = 9,
    Unimplemented = 12,
}

/// Why a call has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    pub message: String,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::new(Code::Unknown, format!("{error:#}"))
    }
}

/// Who answers a call: at once, or later.
#[derive(Debug)]
pub struct Reply {
    connection: Arc<Mutex<UnixStream>>,
    stream: u32,
    is_sent: bool,
}

impl Drop for Reply {
    /// Nobody will answer any more.
    fn drop(&mut self) {
        if !self.is_sent {
            self.answer(Err(Failure::new(Code::NotFound, "it is gone")));
        }
    }
}

impl Reply {
    /// Answers. The caller may be gone.
    pub fn send(mut self, answer: Result<Vec<u8>, Failure>) {
        self.is_sent = true;
        self.answer(answer);
    }

    fn answer(&self, answer: Result<Vec<u8>, Failure>) {
        let response = match answer {
            Ok(payload) => Response { status: None, payload },
            Err(Failure { code, message }) => {
                Response { status: Some(Status { code: code as i32, message }), payload: Vec::new() }
            }
        };
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write(&mut *connection, self.stream, RESPONSE, &response.encode_to_vec()) {
            log::debug!("answer a call: {error:#}");
        }
    }
}

/// Accepts connections for ever, and handles each call of a method of `service` on a thread of its own.
pub fn serve(
    listener: &UnixListener,
    service: &'static str,
    handle: impl Fn(&str, &[u8], Reply) + Clone + Send + 'static,
) {
    loop {
        let accepted = listener.accept().context("accept a connection");
        let served = accepted.and_then(|(stream, _)| {
            let handle = handle.clone();
            sandbox::spawn("connection", move || attend(stream, service, &handle)).context("start a thread")
        });
        if let Err(error) = served {
            log::warn!("{error:#}");
            std::thread::sleep(ACCEPT_PAUSE);
        }
    }
}

fn attend(
    mut stream: UnixStream,
    service: &'static str,
    handle: &(impl Fn(&str, &[u8], Reply) + Clone + Send + 'static),
) {
    let Ok(connection) = stream.try_clone() else { return };
    answer_calls(&mut stream, connection, service, handle);
    // Calls that wait have the connection as well.
    let _ = stream.shutdown(Shutdown::Both);
}

/// Handles the calls of a connection until its end, or until it makes no sense any more.
fn answer_calls(
    stream: &mut UnixStream,
    connection: UnixStream,
    service: &'static str,
    handle: &(impl Fn(&str, &[u8], Reply) + Clone + Send + 'static),
) {
    let connection = Arc::new(Mutex::new(connection));
    loop {
        let (id, request) = match read(stream, REQUEST) {
            Ok(Some((id, payload))) => (id, Request::decode(&payload[..])),
            Ok(None) => return,
            Err(error) => return log::warn!("a call: {error:#}"),
        };
        let reply = Reply { connection: connection.clone(), stream: id, is_sent: false };
        match request {
            Ok(request) if request.service == service => {
                let handle = handle.clone();
                let handled = sandbox::spawn("call", move || handle(&request.method, &request.payload, reply));
                if let Err(error) = handled {
                    // Its answer is gone with the thread, and the caller is told by the end of the connection.
                    return log::warn!("start a thread: {error}");
                }
            }
            Ok(request) => {
                let what = format!("there is no service {}", request.service);
                reply.send(Err(Failure::new(Code::Unimplemented, what)));
            }
            Err(error) => reply.send(Err(Failure::new(Code::InvalidArgument, format!("decode a request: {error}")))),
        }
    }
}

/// Calls a method over a connection that has no other calls. `stream` is its number, which is odd and increases.
pub fn call(
    connection: &mut UnixStream,
    stream: u32,
    service: &str,
    method: &str,
    message: &impl Message,
) -> Result<()> {
    let request = Request { service: service.into(), method: method.into(), payload: message.encode_to_vec() };
    write(connection, stream, REQUEST, &request.encode_to_vec())?;
    loop {
        let (id, payload) = read(connection, RESPONSE)?.context("the connection has ended")?;
        if id != stream {
            continue;
        }
        return match Response::decode(&payload[..]).context("decode the response")?.status {
            Some(Status { code, message }) if code != 0 => bail!("{message} (status {code})"),
            _ => Ok(()),
        };
    }
}

fn write(to: &mut impl Write, stream: u32, kind: u8, message: &[u8]) -> Result<()> {
    ensure!(message.len() <= MESSAGE_BYTES_MAX, "a message of {} bytes is too long", message.len());
    let len_bytes = u32::try_from(message.len())?.to_be_bytes();
    let frame = [&len_bytes[..], &stream.to_be_bytes(), &[kind, 0], message].concat();
    to.write_all(&frame).context("write a message")
}

/// The next message of a kind, with the number of its stream; `None` if the connection has ended before one. Others are left out.
fn read(from: &mut impl Read, wanted: u8) -> Result<Option<(u32, Vec<u8>)>> {
    loop {
        let mut header = [0; HEADER_BYTES];
        match from.read_exact(&mut header) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            read => read.context("read a message")?,
        }
        let [a, b, c, d, e, f, g, h, kind, _] = header;
        let len_bytes = usize::try_from(u32::from_be_bytes([a, b, c, d]))?;
        ensure!(len_bytes <= MESSAGE_BYTES_MAX, "a message of {len_bytes} bytes is too long");
        let mut message = vec![0; len_bytes];
        from.read_exact(&mut message).context("read a message")?;
        if kind == wanted {
            return Ok(Some((u32::from_be_bytes([e, f, g, h]), message)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served() -> (tempfile::TempDir, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let stream = UnixStream::connect(dir.path().join("socket")).unwrap();
        std::thread::spawn(move || {
            let held = Arc::new(Mutex::new(None));
            serve(&listener, "s", move |method, payload, reply| match method {
                "hold" => *held.lock().unwrap() = Some(reply),
                "release" => {
                    held.lock().unwrap().take().unwrap().send(Ok(payload.to_vec()));
                    reply.send(Ok(Vec::new()));
                }
                _ => reply.send(Err(Failure::new(Code::NotFound, format!("no {method}")))),
            });
        });
        (dir, stream)
    }

    fn ask(stream: &mut UnixStream, id: u32, service: &str, method: &str) {
        let request = Request { service: service.into(), method: method.into(), payload: b"x".to_vec() };
        write(stream, id, REQUEST, &request.encode_to_vec()).unwrap();
    }

    fn answer(stream: &mut UnixStream) -> (u32, Response) {
        let (id, payload) = read(stream, RESPONSE).unwrap().unwrap();
        (id, Response::decode(&payload[..]).unwrap())
    }

    #[test]
    fn a_call_is_answered_when_its_answer_is_there_and_others_meanwhile() {
        let (_dir, mut stream) = served();
        ask(&mut stream, 1, "s", "hold");
        ask(&mut stream, 3, "s", "other");
        let (id, response) = answer(&mut stream);
        assert_eq!((id, response.status.unwrap().code), (3, Code::NotFound as i32));
        ask(&mut stream, 5, "none", "x");
        assert_eq!(answer(&mut stream).1.status.unwrap().code, Code::Unimplemented as i32);
        ask(&mut stream, 7, "s", "release");
        let (id, response) = answer(&mut stream);
        assert_eq!((id, response.payload, response.status), (1, b"x".to_vec(), None));
        assert_eq!(answer(&mut stream).0, 7);
    }

    #[test]
    fn a_failure_of_a_call_is_told_to_the_caller() {
        let (_dir, mut stream) = served();
        let error = call(&mut stream, 1, "s", "other", &Status::default()).unwrap_err();
        assert_eq!(error.to_string(), "no other (status 5)");
    }

    #[test]
    fn what_is_no_message_ends_the_connection() {
        for bytes in [&b"GET / HTTP/1.1\r\n"[..], &[0, 0, 0, 9, 0, 0, 0, 1, 1, 0, 7]] {
            let (_dir, mut stream) = served();
            stream.write_all(bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
            assert!(rest.is_empty());
        }
        assert!(read(&mut &[0xff; 64][..], REQUEST).is_err());
        assert_eq!(read(&mut &[][..], REQUEST).unwrap(), None);
    }

    #[test]
    fn a_request_that_cannot_be_decoded_is_answered() {
        let (_dir, mut stream) = served();
        write(&mut stream, 9, REQUEST, &[0xff; 5]).unwrap();
        let (id, response) = answer(&mut stream);
        assert_eq!((id, response.status.unwrap().code), (9, Code::InvalidArgument as i32));
    }
}
