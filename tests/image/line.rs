//! A slow or unreliable connection to a registry.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Forwards connections to a local port, counts bytes, and breaks connections after a given number of bytes.
pub struct Line {
    pub port: u16,
    bytes: Arc<AtomicU64>,
}

impl Line {
    pub fn to(port: u16, breaks_after: i64) -> Line {
        Line::start(port, breaks_after, Duration::ZERO)
    }

    pub fn start(port: u16, breaks_after: i64, pause: Duration) -> Line {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let line = Line { port: listener.local_addr().unwrap().port(), bytes: Arc::default() };
        let bytes = line.bytes.clone();
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, bytes) = (near.unwrap(), bytes.clone());
                std::thread::spawn(move || connect(near, port, &bytes, breaks_after, pause));
            }
        });
        line
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

fn connect(near: TcpStream, port: u16, bytes: &AtomicU64, breaks_after: i64, pause: Duration) {
    let mut far = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut from, mut to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    std::thread::spawn(move || std::io::copy(&mut from, &mut to));
    let left = AtomicI64::new(breaks_after);
    let mut buffer = [0; 64 << 10];
    while let Ok(len @ 1..) = far.read(&mut buffer) {
        if left.fetch_sub(len as i64, Ordering::Relaxed) < len as i64 || (&near).write_all(&buffer[..len]).is_err() {
            break;
        }
        bytes.fetch_add(len as u64, Ordering::Relaxed);
        std::thread::sleep(pause);
    }
    let _ = near.shutdown(Shutdown::Both);
    let _ = far.shutdown(Shutdown::Both);
}
