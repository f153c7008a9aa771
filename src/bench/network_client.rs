//! The host's side of the network benchmark: talks to the server in an instance (`work serve`) and measures time.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// The results for one server.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NetworkResults {
    /// Throughput to the instance, until it has confirmed that it received everything.
    pub to_mib_per_s: f64,
    /// Throughput from the instance.
    pub from_mib_per_s: f64,
    /// The median round-trip time of one byte.
    pub round_trip_us: f64,
    /// Sequential connections per second, each with one request and response.
    pub requests_per_s: f64,
}

/// How much traffic is generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Bytes in each direction.
    pub bytes: u64,
    /// Round trips of one byte.
    pub round_trips: usize,
    /// Connections.
    pub requests: usize,
}

/// The first byte of a connection selects the service.
const SINK: u8 = b'k';
const SOURCE: u8 = b'r';
const ECHO: u8 = b'e';
const REQUEST: u8 = b'q';

const BLOCK: usize = 128 << 10;

/// Measures the server at `address`. `timeout` applies to every response.
pub fn measure(address: SocketAddr, workload: Workload, timeout: Duration) -> Result<NetworkResults> {
    wait_for_server(address, timeout).with_context(|| format!("connect to the instance's server at {address}"))?;
    Ok(NetworkResults {
        to_mib_per_s: mib_per_s(
            workload.bytes,
            send(address, workload.bytes, timeout).context("send to the instance")?,
        ),
        from_mib_per_s: mib_per_s(
            workload.bytes,
            receive(address, workload.bytes, timeout).context("receive from the instance")?,
        ),
        round_trip_us: round_trip(address, workload.round_trips, timeout)
            .context("measure the round trip")?
            .as_secs_f64()
            * 1e6,
        requests_per_s: workload.requests as f64
            / requests(address, workload.requests, timeout).context("send requests")?.as_secs_f64(),
    })
}

fn mib_per_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / time.as_secs_f64()
}

/// A forwarded port may accept connections before the server listens, so wait for a response.
fn wait_for_server(address: SocketAddr, timeout: Duration) -> io::Result<()> {
    const PAUSE: Duration = Duration::from_millis(20);
    let started = Instant::now();
    loop {
        match requests(address, 1, Duration::from_secs(1)) {
            Err(error) if started.elapsed() > timeout => return Err(error),
            Err(_) => std::thread::sleep(PAUSE),
            Ok(_) => return Ok(()),
        }
    }
}

fn connect(address: SocketAddr, what: u8, timeout: Duration) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(&[what])?;
    Ok(stream)
}

/// Stops the clock when the server confirms that it has read everything, not when the data is in local buffers.
fn send(address: SocketAddr, bytes: u64, timeout: Duration) -> io::Result<Duration> {
    let mut stream = connect(address, SINK, timeout)?;
    let block = vec![0x5a; BLOCK];
    let started = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let part = left.min(BLOCK as u64) as usize;
        stream.write_all(&block[..part])?;
        left -= part as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    Ok(started.elapsed())
}

fn receive(address: SocketAddr, bytes: u64, timeout: Duration) -> io::Result<Duration> {
    let mut stream = connect(address, SOURCE, timeout)?;
    let mut block = vec![0; BLOCK];
    let started = Instant::now();
    stream.write_all(&bytes.to_le_bytes())?;
    let mut left = bytes;
    while left > 0 {
        let part = left.min(BLOCK as u64) as usize;
        match stream.read(&mut block[..part])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            read => left -= read as u64,
        }
    }
    Ok(started.elapsed())
}

fn round_trip(address: SocketAddr, times: usize, timeout: Duration) -> Result<Duration> {
    let mut stream = connect(address, ECHO, timeout)?;
    let mut all = Vec::with_capacity(times);
    for _ in 0..times {
        let started = Instant::now();
        let mut byte = [0x5a];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        all.push(started.elapsed());
    }
    ensure!(!all.is_empty(), "no round trips were requested");
    all.sort_unstable();
    Ok(all[all.len() / 2])
}

fn requests(address: SocketAddr, times: usize, timeout: Duration) -> io::Result<Duration> {
    let started = Instant::now();
    let mut answer = Vec::new();
    for _ in 0..times {
        let mut stream = connect(address, REQUEST, timeout)?;
        stream.write_all(b"GET / HTTP/1.0\r\n")?;
        answer.clear();
        stream.read_to_end(&mut answer)?;
        if answer.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(started.elapsed())
}
