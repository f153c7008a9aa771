//! The guest of all VMMs, saved while its shell waits for a line, and restored until it has answered one.

use std::fs;
use std::io::{BufRead, BufReader, PipeWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::vmms::{self, Kind, Vmm, vmm, words};
use crate::{PID1, Parts, setting};

/// What the guest prints when its shell waits.
const READY: &str = "obeys=yes";
/// How long it takes until it really does.
const SETTLED: Duration = Duration::from_millis(100);
/// How long a VMM may take to listen.
const LISTENS: Duration = Duration::from_secs(20);
/// How often that is tried.
const AGAIN: Duration = Duration::from_micros(100);

/// How a restored guest is made to answer.
pub struct Answers {
    /// The command that ends it.
    end: &'static str,
    /// What the VMM is asked first.
    pub request: Option<Request>,
}

impl Answers {
    /// The standard input of a VMM that is about to be started, with all that the guest is told, and the other end of it.
    pub fn input(&self) -> Result<(Stdio, Option<PipeWriter>), String> {
        if let Some(request) = &self.request {
            // That of an earlier run.
            let _ = fs::remove_file(&request.socket);
        }
        let text = format!("echo {PID1}; {}\n", self.end);
        let piped = || -> std::io::Result<(Stdio, PipeWriter)> {
            let (reader, mut writer) = std::io::pipe()?;
            writer.write_all(text.as_bytes())?;
            Ok((reader.into(), writer))
        };
        piped().map(|(stdin, end)| (stdin, Some(end))).map_err(|error| error.to_string())
    }
}

/// A request to a VMM that is being started.
pub struct Request {
    socket: PathBuf,
    method: &'static str,
    path: &'static str,
    body: String,
}

impl Request {
    /// Sends it as soon as the VMM listens, and waits until it has succeeded.
    pub fn send(&self) -> Result<(), String> {
        let Request { socket, method, path, body } = self;
        let since = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if since.elapsed() > LISTENS => return Err(format!("{}: {error}", socket.display())),
                Err(_) => thread::sleep(AGAIN),
            }
        };
        let length = body.len();
        let text = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        );
        let mut reply = [0; 1024];
        let count = stream.write_all(text.as_bytes()).and_then(|()| stream.read(&mut reply));
        let count = count.map_err(|error| format!("{path}: {error}"))?;
        let reply = String::from_utf8_lossy(reply.get(..count).unwrap_or_default()).into_owned();
        if reply.starts_with("HTTP/1.1 2") { Ok(()) } else { Err(format!("{path}: {reply}")) }
    }
}

/// Saves the guest in husk, and in Firecracker if its program was given.
pub fn all(parts: &Parts, husk_program: &str) -> Result<Vec<Vmm>, String> {
    let mut vmms = vec![husk(parts, husk_program)?];
    if let Ok(program) = setting("VERSUS_FIRECRACKER") {
        vmms.push(firecracker(parts, &program)?);
    }
    Ok(vmms)
}

/// A name in the directory for temporary files, where there is nothing.
fn free(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("versus-{name}"));
    let _ = fs::remove_dir_all(&path);
    let _ = fs::remove_file(&path);
    path
}

fn restored(name: &'static str, program: &str, command: Vec<String>, answers: Answers) -> Vmm {
    Vmm { kind: Kind::Restore, answers: Some(answers), ..vmm(name, program, command) }
}

/// The command with a guest that obeys instead of ending.
fn obeying(command: Vec<String>) -> Vec<String> {
    command.into_iter().map(|word| word.replace("-- none", "-- obey")).collect()
}

/// Runs a VMM until its guest waits, then `save`, and ends it.
fn saved(command: &[String], save: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let [program, arguments @ ..] = command else { return Err("no program".to_owned()) };
    let mut running = Command::new(program);
    running.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = running.spawn().map_err(|error| format!("{program}: {error}"))?;
    // Its output stays open until it is saved.
    let ready = wait_ready(&mut child);
    let done = ready.and_then(|_output| save());
    let _ = child.kill();
    let _ = child.wait();
    done.map_err(|error| format!("{program}: {error}"))
}

fn wait_ready(child: &mut Child) -> Result<BufReader<ChildStdout>, String> {
    let mut output = BufReader::new(child.stdout.take().ok_or("no standard output")?);
    if !output.by_ref().lines().map_while(Result::ok).any(|line| line.trim() == READY) {
        return Err("the guest does not wait for commands".to_owned());
    }
    thread::sleep(SETTLED);
    Ok(output)
}

fn husk(parts: &Parts, program: &str) -> Result<Vmm, String> {
    const NAME: &str = "versus";
    let dir = free("snapshot").display().to_string();
    let mut command = obeying(vmms::husk(parts, program));
    command.extend(words(&["--name", NAME, "--rm"]));
    saved(&command, || {
        let status = Command::new(program).args(["snapshot", "--stop", NAME, &dir]).stdout(Stdio::null()).status();
        let status = status.map_err(|error| error.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("husk snapshot: {status}")) }
    })?;
    let answers = Answers { end: "poweroff -f", request: None };
    Ok(restored("husk restore", program, words(&[program, "restore", &dir]), answers))
}

fn firecracker(parts: &Parts, program: &str) -> Result<Vmm, String> {
    let [state, memory] = ["firecracker-state", "firecracker-memory"].map(|name| free(name).display().to_string());
    let socket = free("firecracker-socket");
    let place = socket.display().to_string();
    let ask = |method, path, body: String| Request { socket: socket.clone(), method, path, body };
    let config = vmms::firecracker_config(parts, "obey")?;
    let command = words(&[program, "--api-sock", &place, "--config-file", &config]);
    let files = format!(r#""snapshot_path": "{state}", "mem_file_path": "{memory}""#);
    saved(&command, || {
        ask("PATCH", "/vm", r#"{"state": "Paused"}"#.to_owned()).send()?;
        ask("PUT", "/snapshot/create", format!(r#"{{"snapshot_type": "Full", {files}}}"#)).send()
    })?;
    let load = format!(
        r#"{{"snapshot_path": "{state}", "mem_backend": {{"backend_path": "{memory}", "backend_type": "File"}}, "resume_vm": true}}"#
    );
    let request = Some(ask("PUT", "/snapshot/load", load));
    let answers = Answers { end: "reboot -f", request };
    Ok(restored("Firecracker, restored", program, words(&[program, "--api-sock", &place]), answers))
}
