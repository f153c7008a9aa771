//! The host side of a vsock device: a listening socket at a path, and connections to sockets next to it.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::attendant;
use crate::config::VsockConfig;
use crate::sys::socket;

/// Accessible only to the owner.
const MODE: u32 = 0o600;

/// A listening socket.
#[derive(Debug)]
pub struct VsockSocket {
    /// Accepts connections from host programs to the guest. Non-blocking.
    pub listener: UnixListener,
    /// The guest's CID.
    pub cid: u32,
    path: VsockPath,
    /// `None` if it belongs to the supervisor.
    name: Option<VsockName>,
}

/// Where a machine's socket is.
#[derive(Debug, Clone)]
pub struct VsockPath {
    path: PathBuf,
    /// Device and inode of the socket at `path`, so that no other file is removed.
    identity: (u64, u64),
}

/// The name of a machine's socket. Dropping it removes the socket.
#[derive(Debug)]
pub struct VsockName(VsockPath);

impl VsockName {
    /// Where it is.
    pub fn path(&self) -> &VsockPath {
        &self.0
    }
}

/// Binds the socket that `config` names. A stale one, on which no process listens, is replaced.
///
/// Fails if a process is listening on it, or if the path is not a socket.
pub fn open(config: &VsockConfig) -> Result<VsockSocket> {
    let path = &config.socket;
    let name = path.display();
    if is_dead(path)? {
        fs::remove_file(path).with_context(|| format!("remove the stale socket {name}"))?;
    }
    let listener = socket::listen(path, MODE).with_context(|| format!("listen on the vsock socket {name}"))?;
    let identity = identity(path).with_context(|| format!("access the vsock socket {name}"))?;
    let path = VsockPath { path: path.clone(), identity };
    Ok(VsockSocket { listener, cid: config.cid, name: Some(VsockName(path.clone())), path })
}

/// Whether the socket at `path` exists without a listening process.
fn is_dead(path: &Path) -> Result<bool> {
    let name = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("access the vsock socket {name}")),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!(
                "the vsock socket {name} cannot be created: the path already exists, remove it or choose another path"
            )
        }
        Ok(_) => {}
    }
    match socket::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        // A full backlog also means that a process is listening.
        Err(error) if error.kind() != ErrorKind::WouldBlock => {
            Err(error).with_context(|| format!("check for a listener on the vsock socket {name}"))
        }
        _ => bail!("the vsock socket {name} is in use by another process: use --vsock with another path"),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl VsockSocket {
    /// Takes the socket's name, which otherwise is removed with it.
    pub fn take_name(&mut self) -> Option<VsockName> {
        self.name.take()
    }

    /// Connects to the program that handles the guest's connections to `port`: its socket has the path of ours with `_`
    /// and the port appended. Fails if there is none or its backlog is full. Neither this call nor the returned stream
    /// blocks.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        attendant::connect(port).unwrap_or_else(|| self.path.connect(port))
    }
}

impl VsockPath {
    /// See [`VsockSocket::connect`].
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut name = OsString::from(&self.path);
        name.push(format!("_{port}"));
        socket::connect(Path::new(&name))
    }
}

impl Drop for VsockName {
    fn drop(&mut self) {
        let VsockPath { path, identity: ours } = &self.0;
        if identity(path).is_ok_and(|identity| identity == *ours) {
            // The next process finds a stale socket and replaces it.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn config(path: &Path) -> VsockConfig {
        VsockConfig { socket: path.to_owned(), cid: 3 }
    }

    fn refusal(path: &Path) -> String {
        format!("{:#}", open(&config(path)).unwrap_err())
    }

    #[test]
    fn a_socket_is_private_and_removed_with_the_machine() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let socket = open(&config(&path)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_in_use_is_rejected_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let first = open(&config(&path)).unwrap();
        assert_eq!(
            refusal(&path),
            format!("the vsock socket {} is in use by another process: use --vsock with another path", path.display())
        );
        drop(first);
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(open(&config(&path)).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn other_files_are_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        fs::write(&path, "precious").unwrap();
        assert!(refusal(&path).contains("the path already exists"), "{}", refusal(&path));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let missing = dir.path().join("none/v.sock");
        assert!(refusal(&missing).starts_with(&format!("listen on the vsock socket {}: ", missing.display())));
    }

    #[test]
    fn the_socket_of_another_process_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let first = open(&config(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = open(&config(&path)).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[test]
    fn connecting_never_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let ours = open(&config(&dir.path().join("v.sock"))).unwrap();
        assert_eq!(ours.connect(7).unwrap_err().kind(), ErrorKind::NotFound);
        let _service = socket::listen(&dir.path().join("v.sock_7"), MODE).unwrap();
        let mut waiting = Vec::new();
        let full = loop {
            match ours.connect(7) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error.kind(),
            }
        };
        assert_eq!(full, ErrorKind::WouldBlock);
        assert!(waiting.len() >= 128, "{}", waiting.len());
    }
}
