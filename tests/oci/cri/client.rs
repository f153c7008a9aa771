//! A client of the Container Runtime Interface: gRPC without what this does not need, such as streams of messages.

use std::error::Error;
use std::path::{Path, PathBuf};

use http::{HeaderMap, Request};
use prost::Message;
use tokio::net::UnixStream;

/// In front of a message: that it is not compressed, and its length.
const PREFIX: usize = 5;

/// Who calls an engine by its socket.
pub struct Client {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    pub fn new(socket: &Path) -> Client {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        Client { socket: socket.to_owned(), runtime }
    }

    /// What `method` of the service answers, or its error.
    pub fn call<Answer: Message + Default>(&self, method: &str, request: &impl Message) -> Result<Answer, String> {
        let answer = self.runtime.block_on(exchange(&self.socket, method, frame(request)));
        answer.map_err(|error| format!("{method}: {error}"))
    }
}

fn frame(message: &impl Message) -> Vec<u8> {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    message.encode(&mut frame).unwrap();
    frame
}

async fn exchange<Answer: Message + Default>(
    socket: &Path,
    method: &str,
    frame: Vec<u8>,
) -> Result<Answer, Box<dyn Error>> {
    let (sender, connection) = h2::client::handshake(UnixStream::connect(socket).await?).await?;
    tokio::spawn(connection);
    let request = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, mut body) = sender.ready().await?.send_request(request, false)?;
    body.send_data(frame.into(), true)?;
    let (head, mut body) = response.await?.into_parts();
    let mut answer = Vec::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        answer.extend(part);
    }
    // Without a message, the status is in the only headers.
    expect_success(&body.trailers().await?.unwrap_or(head.headers))?;
    Ok(Answer::decode(answer.get(PREFIX..).ok_or("no message")?)?)
}

fn expect_success(trailers: &HeaderMap) -> Result<(), String> {
    let value = |name: &str| trailers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    match value("grpc-status").as_deref() {
        Some("0") => Ok(()),
        status => Err(format!("{} (status {status:?})", value("grpc-message").unwrap_or_default())),
    }
}
