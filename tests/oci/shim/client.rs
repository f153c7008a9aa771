//! containerd's side of ttRPC: calls of a shim, and what it tells.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use prost::Message;

use super::messages::{Envelope, Forward, Request, Response};

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

fn write(stream: &mut UnixStream, id: u32, kind: u8, message: &impl Message) {
    let len_bytes = u32::try_from(message.encoded_len()).unwrap().to_be_bytes();
    let frame = [&len_bytes[..], &id.to_be_bytes(), &[kind, 0], &message.encode_to_vec()].concat();
    stream.write_all(&frame).unwrap();
}

fn read(stream: &mut UnixStream) -> Option<(u32, Vec<u8>)> {
    let mut header = [0; 10];
    stream.read_exact(&mut header).ok()?;
    let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut message = vec![0; number(0) as usize];
    stream.read_exact(&mut message).ok()?;
    Some((number(4), message))
}

/// What a method of the shim at `address` answers, or its error.
pub fn call<Answer: Message + Default>(address: &str, method: &str, request: &impl Message) -> Result<Answer, String> {
    let mut stream = UnixStream::connect(address.strip_prefix("unix://").unwrap()).unwrap();
    let service = "containerd.task.v2.Task".to_owned();
    write(&mut stream, 1, REQUEST, &Request { service, method: method.into(), payload: request.encode_to_vec() });
    let (_, payload) = read(&mut stream).ok_or("the connection has ended")?;
    let response = Response::decode(&payload[..]).unwrap();
    match response.status {
        Some(status) => Err(status.message),
        None => Ok(Answer::decode(&response.payload[..]).unwrap()),
    }
}

/// The topics of events in the order in which they arrive.
#[derive(Clone, Default)]
pub struct Events(Arc<Mutex<Vec<String>>>);

impl Events {
    /// Listens at `path`.
    pub fn listen(path: &Path) -> Events {
        let events = Events::default();
        let (noted, listener) = (events.clone(), UnixListener::bind(path).unwrap());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, noted) = (stream.unwrap(), noted.clone());
                thread::spawn(move || {
                    while let Some((id, payload)) = read(&mut stream) {
                        let request = Request::decode(&payload[..]).unwrap();
                        let Envelope { namespace, topic } =
                            Forward::decode(&request.payload[..]).unwrap().envelope.unwrap();
                        assert_eq!(namespace, super::NAMESPACE);
                        noted.0.lock().unwrap().push(topic.strip_prefix("/tasks/").unwrap().to_owned());
                        write(&mut stream, id, RESPONSE, &Response::default());
                    }
                });
            }
        });
        events
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    pub fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}
