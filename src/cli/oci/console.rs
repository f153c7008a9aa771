//! The terminal of a container on the host: its outer end goes to the engine, its inner end to the process that passes keys and
//! output on to the terminal in the guest.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::oci::config::ConsoleSize;
use crate::sys::socket;

/// Opens a terminal, sends its outer end to the socket, and returns its inner end.
pub fn open(socket: &Path, size: Option<ConsoleSize>) -> Result<File> {
    let what = || format!("send the terminal to {}", socket.display());
    let outer = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context("open a terminal")?;
    grantpt(&outer).and_then(|()| unlockpt(&outer)).context("open a terminal")?;
    if let Some(ConsoleSize { height, width }) = size {
        let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&outer, size).context("set the size of the terminal")?;
    }
    let name = ptsname(&outer, Vec::new()).context("name the terminal")?;
    let inner: OwnedFd =
        rustix::fs::open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
            .context("open the terminal")?;
    let stream = UnixStream::connect(socket).with_context(what)?;
    socket::send_with_fd_over(&stream, name.as_bytes(), outer.as_fd()).with_context(what)?;
    Ok(inner.into())
}

/// The streams of a process that this one starts: the terminal, or this process's own.
pub fn streams(terminal: Option<File>) -> Result<[std::process::Stdio; 3]> {
    use std::process::Stdio;
    let Some(terminal) = terminal else { return Ok([Stdio::inherit(), Stdio::inherit(), Stdio::inherit()]) };
    let copy = || terminal.try_clone().context("duplicate a file descriptor");
    Ok([copy()?.into(), copy()?.into(), terminal.into()])
}

/// Makes this process the leader of a session of its own, which standard input controls if it is a terminal that was opened for it.
pub fn lead_session(owns_terminal: bool) -> Result<()> {
    rustix::process::setsid().context("leave the session")?;
    if owns_terminal {
        rustix::process::ioctl_tiocsctty(std::io::stdin()).context("control the terminal")?;
    }
    Ok(())
}
