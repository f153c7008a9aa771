//! The host's side of a stream of datagrams (`firmware/guests/lib/datagrams.h`): it sends the next number when it has the answer.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::husk::is_emulated;
use crate::own_network::{GUEST, HOST};

const PORT: u16 = 4000;

/// Talks to a guest until it is ended.
pub struct Datagrams {
    over: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Datagrams {
    /// Starts in the network namespace of this thread.
    pub fn start() -> Datagrams {
        let over = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let over = over.clone();
            move || converse(&over)
        });
        Datagrams { over, thread }
    }

    /// Returns the number of answers when the guest has answered the last question.
    pub fn end(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn converse(over: &AtomicBool) -> u64 {
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.connect((GUEST, PORT)).unwrap();
    // There is no machine for as long.
    let patience = Duration::from_millis(if is_emulated() { 2000 } else { 50 });
    socket.set_read_timeout(Some(patience)).unwrap();
    let mut last = 0_u64;
    let mut is_answered = true;
    while !(is_answered && over.load(Ordering::Relaxed)) {
        is_answered = false;
        // Fails while there is no machine.
        let _ = socket.send(&(last + 1).to_le_bytes());
        let mut answer = [0; 8];
        match socket.recv(&mut answer) {
            Ok(8) => match u64::from_le_bytes(answer) {
                // To a question that was asked again.
                old if old == last => {}
                number => {
                    assert_eq!(number, last + 1);
                    (last, is_answered) = (number, true);
                }
            },
            Ok(len) => panic!("an answer of {len} bytes"),
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::ConnectionRefused].contains(&error.kind()) => {}
            Err(error) => panic!("{error}"),
        }
    }
    last
}
