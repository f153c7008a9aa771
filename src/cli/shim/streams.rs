//! The streams of a process of a container: FIFOs of containerd, which the process on the host that stands for it gets as they are; with a
//! terminal, threads copy between them and its outer end.

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vmm_sys_util::eventfd::EventFd;

use crate::sandbox;
use crate::sys::{event, event_fd};

/// How long the last output of a terminal waits for a reader that does not read any of it.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };
/// How long it may take altogether.
const LAST_TIMEOUT: Duration = Duration::from_secs(10);

/// Where they are, as containerd says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// Opened for a process without a terminal.
pub struct Opened {
    pub streams: [Stdio; 3],
    /// As long as this is open, the process's input does not end.
    pub input: Option<File>,
}

/// Opens the streams.
pub fn open(paths: &Paths) -> Result<Opened> {
    let (stdin, input) = match input(&paths.stdin)? {
        Some((reader, writer)) => (reader.into(), Some(writer)),
        None => (Stdio::null(), None),
    };
    let out = |path: &str| Ok::<Stdio, anyhow::Error>(output(path)?.map_or_else(Stdio::null, Stdio::from));
    Ok(Opened { streams: [stdin, out(&paths.stdout)?, out(&paths.stderr)?], input })
}

/// What a terminal prints, on its way to a stream.
#[derive(Debug)]
pub struct Screen {
    last: Arc<EventFd>,
    /// Closed by the thread when it ends.
    copying: Receiver<Infallible>,
}

impl Screen {
    /// The process has ended: waits until the rest of its output is copied, unless nobody reads it.
    pub fn finish(self) {
        self.end();
        let _ = self.copying.recv_timeout(LAST_TIMEOUT);
    }

    /// No reader is waited for any more.
    fn end(&self) {
        let _ = self.last.write(1);
    }
}

/// A process that nobody deletes, because its container is, or that could not begin.
impl Drop for Screen {
    fn drop(&mut self) {
        self.end();
    }
}

/// Copies between the outer end of a terminal and the streams, until the terminal is closed. Returns what keeps its input open.
pub fn attend(outer: &File, paths: &Paths) -> Result<(Option<File>, Screen)> {
    let copy = || outer.try_clone().context("duplicate a file descriptor");
    let input = match input(&paths.stdin)? {
        Some((reader, writer)) => {
            let keys = copy()?;
            sandbox::spawn("keys", move || transfer(reader, keys)).context("start a thread")?;
            Some(writer)
        }
        None => None,
    };
    let output = output(&paths.stdout)?;
    if let Some(output) = &output {
        // Nobody may read on, which must not keep the thread from ending.
        fcntl_setfl(output, fcntl_getfl(output)? | OFlags::NONBLOCK).context("set up a stream")?;
    }
    let (mut shown, last) = (copy()?, Arc::new(event::create().context("set up a stream")?));
    let (open, copying) = mpsc::channel();
    let told = last.clone();
    let show = move || {
        let copied = match &output {
            Some(output) => io::copy(&mut shown, &mut Patient { output, last: &told }),
            None => io::copy(&mut shown, &mut io::sink()),
        };
        // A terminal ends with an error.
        log::debug!("the end of a terminal: {copied:?}");
        drop(open);
    };
    sandbox::spawn("terminal", show).context("start a thread")?;
    Ok((input, Screen { last, copying }))
}

/// Writes to a stream that does not block, and waits for its reader.
struct Patient<'a> {
    output: &'a File,
    /// Readable when the process has ended, and the reader may be gone.
    last: &'a EventFd,
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.output.write(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.await_room()?,
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Patient<'_> {
    fn await_room(&self) -> io::Result<()> {
        let room = || PollFd::new(self.output, PollFlags::OUT);
        let last = event_fd(self.last);
        let mut fds = [room(), PollFd::new(&last, PollFlags::IN)];
        poll(&mut fds, None)?;
        let [first, _] = fds;
        if first.revents().is_empty() && poll(&mut [room()], Some(&PATIENCE))? == 0 {
            return Err(ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

/// Fails if streams are of a kind that cannot be opened, before anything is done for their process.
pub fn check(paths: &Paths) -> Result<()> {
    for path in [&paths.stdin, &paths.stdout, &paths.stderr] {
        match path.split_once("://") {
            None | Some(("file" | "fifo", _)) => {}
            Some((kind, _)) => bail!("output to {kind}:// is not supported: use FIFOs, or file:// with a path"),
        }
    }
    Ok(())
}

/// Ends with either side.
fn transfer(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 8192];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(buffer.get(..count).unwrap_or_default()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The reading end of a FIFO, and a writing end of it.
fn input(path: &str) -> Result<Option<(File, File)>> {
    if path.is_empty() {
        return Ok(None);
    }
    let what = || format!("open {path}");
    // Without waiting for the other side, which may come late.
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NONBLOCK);
    let reader = options.clone().read(true).open(path).with_context(what)?;
    let writer = options.write(true).open(path).with_context(what)?;
    wait_for_data(&reader).with_context(what)?;
    Ok(Some((reader, writer)))
}

fn wait_for_data(file: impl AsFd) -> io::Result<()> {
    Ok(fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?)
}

/// Output to a FIFO or a file. A FIFO is opened for reading as well: it keeps what is written while containerd is being restarted.
fn output(path: &str) -> Result<Option<File>> {
    if path.is_empty() {
        return Ok(None);
    }
    let what = || format!("open {path}");
    let opened = match path.strip_prefix("file://") {
        Some(path) => {
            let dir = Path::new(path).parent().unwrap_or(Path::new("/"));
            std::fs::create_dir_all(dir).with_context(what)?;
            File::options().append(true).create(true).open(path)
        }
        None => File::options().read(true).write(true).open(path.strip_prefix("fifo://").unwrap_or(path)),
    };
    opened.map(Some).with_context(what)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileTypeExt;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    fn fifo(path: &Path) -> String {
        mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(path.metadata().unwrap().file_type().is_fifo());
        path.display().to_string()
    }

    #[test]
    fn fifos_are_the_streams_of_a_process_and_its_input_ends_when_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| fifo(&dir.path().join(name));
        let paths = Paths { stdin: path("in"), stdout: path("out"), stderr: String::new(), terminal: false };
        let Opened { streams: [stdin, stdout, stderr], input } = open(&paths).unwrap();
        let mut command = std::process::Command::new("cat");
        let mut child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().unwrap();
        drop(command);
        // containerd's side, which opens it late, and is closed first.
        let mut shown = File::open(&paths.stdout).unwrap();
        File::options().write(true).open(&paths.stdin).unwrap().write_all(b"hello").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none());
        drop(input);
        assert!(child.wait().unwrap().success());
        let mut text = String::new();
        shown.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn a_terminal_whose_output_nobody_reads_ends_with_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let stdout = fifo(&dir.path().join("out"));
        let (mut inner, outer) = std::os::unix::net::UnixStream::pair().unwrap();
        let paths = Paths { stdout: stdout.clone(), terminal: true, ..Paths::default() };
        let (_, screen) = attend(&File::from(std::os::fd::OwnedFd::from(outer)), &paths).unwrap();
        // More than a FIFO takes.
        let text = vec![b'x'; 80 << 10];
        inner.write_all(&text).unwrap();
        drop(inner);
        // It waits for a reader as long as its process is there, and a moment longer.
        std::thread::sleep(Duration::from_millis(100));
        assert!(screen.copying.try_recv() == Err(mpsc::TryRecvError::Empty));
        let reader = std::thread::spawn({
            let stdout = stdout.clone();
            move || std::io::copy(&mut File::open(stdout).unwrap(), &mut io::sink()).unwrap()
        });
        screen.finish();
        assert_eq!(reader.join().unwrap(), text.len() as u64);

        let (mut inner, outer) = std::os::unix::net::UnixStream::pair().unwrap();
        let (_, screen) = attend(&File::from(std::os::fd::OwnedFd::from(outer)), &paths).unwrap();
        inner.write_all(&text).unwrap();
        let begun = std::time::Instant::now();
        screen.finish();
        assert!(begun.elapsed() < LAST_TIMEOUT, "it waits for a reader that does not come");
    }

    #[test]
    fn other_kinds_of_streams_are_files_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("logs/log");
        let url = format!("file://{}", place.display());
        for text in ["a", "b"] {
            output(&url).unwrap().unwrap().write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&place).unwrap(), "ab");
        let paths = Paths { stdout: "binary:///usr/bin/logger".into(), ..Paths::default() };
        assert!(check(&paths).unwrap_err().to_string().starts_with("output to binary:// is not supported"));
        check(&Paths { stdout: url, stdin: "/run/fifo".into(), ..Paths::default() }).unwrap();
        assert!(format!("{:#}", output("/none/fifo").unwrap_err()).starts_with("open /none/fifo: "));
    }
}
