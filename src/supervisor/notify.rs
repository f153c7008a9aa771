//! Tells the host's service manager that the machine is running (sd_notify(3)).

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The variable with the address of the service manager's socket.
pub const SOCKET: &str = "NOTIFY_SOCKET";

/// Tells the service manager, if there is one, that the machine is running.
pub fn ready() {
    if let Some(socket) = std::env::var_os(SOCKET)
        && let Err(error) = say(&socket, b"READY=1")
    {
        log::warn!("tell the service manager that the machine is running: {error}");
    }
}

/// Sends a message to a socket that is named by its path, or by `@` and an abstract name.
fn say(socket: &OsStr, message: &[u8]) -> std::io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    sender.send_to_addr(message, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_is_told_at_either_kind_of_address() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("husk-test-{}", std::process::id());
        let at_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        for (socket, word) in [(at_path, path.into_os_string()), (by_name, format!("@{name}").into())] {
            say(&word, b"READY=1").unwrap();
            let mut bytes = [0; 16];
            let count = socket.recv(&mut bytes).unwrap();
            assert_eq!(&bytes[..count], b"READY=1");
        }
        assert!(say(OsStr::new("/nowhere/notify"), b"").is_err());
    }
}
