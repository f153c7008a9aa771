//! The server for network tasks. The first byte of a connection selects the mode.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread::Builder;

use nix::poll::PollTimeout;

use crate::life::Ends;
use crate::say;

const BUFFER_BYTES: usize = 128 << 10;
const STACK_BYTES: usize = 64 << 10;
/// The maximum length of a request.
const REQUEST_MAX: u64 = 4096;
const ANSWER: [u8; 128] = [b'.'; 128];

/// Serves until it is terminated.
pub fn run(port: u16) -> u8 {
    let ends = Ends::listen();
    let listener = match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
        Ok(listener) => listener,
        Err(error) => {
            say::line(format_args!("fail serve listen to port {port}: {error}"));
            return 1;
        }
    };
    say::line(format_args!("ready"));
    match Builder::new().spawn(move || accept(&listener)) {
        Ok(_) => {
            ends.wait(PollTimeout::NONE);
            0
        }
        Err(error) => {
            say::line(format_args!("fail serve start a thread: {error}"));
            1
        }
    }
}

fn accept(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        // A connection that fails is ignored.
        let _ = Builder::new().stack_size(STACK_BYTES).spawn(move || serve(stream));
    }
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    match kind {
        [b'k'] => sink(&mut stream),
        [b'r'] => source(&mut stream),
        [b'e'] => echo(&mut stream),
        [b'q'] => answer(stream),
        _ => Ok(()),
    }
}

/// Reads to the end, and confirms that.
fn sink(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    while stream.read(&mut buffer)? > 0 {}
    stream.write_all(b"k")
}

/// Sends the requested number of bytes.
fn source(stream: &mut TcpStream) -> io::Result<()> {
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    let mut left = u64::from_le_bytes(count);
    let buffer = vec![0x5a; BUFFER_BYTES];
    while left > 0 {
        let next = buffer.get(..left.min(BUFFER_BYTES as u64) as usize).unwrap_or(&buffer);
        stream.write_all(next)?;
        left -= next.len() as u64;
    }
    Ok(())
}

fn echo(stream: &mut TcpStream) -> io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// Answers a single line.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut request = Vec::new();
    BufReader::new((&stream).take(REQUEST_MAX)).read_until(b'\n', &mut request)?;
    stream.write_all(&ANSWER)?;
    stream.shutdown(Shutdown::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The response to data sent on a connection.
    fn exchange(sent: &[u8]) -> Vec<u8> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
        client.write_all(sent).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut came = Vec::new();
        client.read_to_end(&mut came).unwrap();
        let _ = server.join().unwrap();
        came
    }

    #[test]
    fn the_first_byte_selects_the_mode() {
        assert_eq!(exchange(&[b"k".as_slice(), &[7; 300_000]].concat()), b"k");
        assert_eq!(exchange(&[b"r".as_slice(), &300_001_u64.to_le_bytes()].concat()).len(), 300_001);
        assert_eq!(exchange(b"eabc"), b"abc");
        assert_eq!(exchange(b"qGET\n"), ANSWER);
        assert_eq!(exchange(b"x"), b"");
        assert_eq!(exchange(b""), b"");
        assert_eq!(exchange(b"r123"), b"", "a count that is cut short");
    }
}
