//! Decompresses blobs: gzip, zstd, xz, bzip2, or none, detected by the first bytes.
//!
//! Media types are ignored: registries and archives often have them wrong, and the digest of the result is verified.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail};
use lzma_rust2::XzReader;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use crate::decompress::Compression;
use crate::sandbox;

/// The maximum window of a decoder: that of `zstd --ultra` and `xz -9`.
const WINDOW_MAX_BYTES: u32 = 128 << 20;
const BUFFER_BYTES: usize = 256 << 10;
/// The number of buffers read ahead.
const BUFFERS_AHEAD: usize = 4;

/// A reader of the decompressed content of `packed`.
pub fn unpacked<R: Read + Send + 'static>(packed: R) -> Result<Box<dyn Read + Send>> {
    let mut packed = BufReader::with_capacity(BUFFER_BYTES, packed);
    let memory_max_kib = (WINDOW_MAX_BYTES >> 10) + 1024;
    Ok(match compression(packed.fill_buf()?) {
        None => Box::new(packed),
        Some(Compression::Gzip) => Box::new(flate2::bufread::MultiGzDecoder::new(packed)),
        Some(Compression::Bzip2) => Box::new(bzip2::bufread::MultiBzDecoder::new(packed)),
        Some(Compression::Xz) => Box::new(XzReader::new_mem_limit(packed, true, memory_max_kib)),
        Some(Compression::Zstd) => Box::new(ZstdFrames { packed: Some(packed), frame: None }),
        Some(other) => bail!("unsupported compression format {other}"),
    })
}

/// The compression of a blob. A tar archive whose first name looks like a magic number is not misdetected.
pub fn compression(start: &[u8]) -> Option<Compression> {
    match Compression::identify(start) {
        Some(Compression::Lzma) | None => None,
        Some(_) if start.get(257..262) == Some(b"ustar") => None,
        packed => packed,
    }
}

type Frame<R> = StreamingDecoder<io::Chain<io::Cursor<[u8; 4]>, R>, FrameDecoder>;

/// Concatenated Zstandard frames, including skippable ones, as written by parallel compressors.
struct ZstdFrames<R: Read> {
    /// The input at the start of the next frame, unless a frame owns it.
    packed: Option<R>,
    frame: Option<Frame<R>>,
}

impl<R: BufRead> ZstdFrames<R> {
    /// The next frame; `None` at the end.
    fn next_frame(&mut self) -> io::Result<Option<Frame<R>>> {
        let Some(mut packed) = self.packed.take() else { return Ok(None) };
        while !packed.fill_buf()?.is_empty() {
            let mut magic = [0; 4];
            packed.read_exact(&mut magic)?;
            if !matches!(magic, [0x50..=0x5f, 0x2a, 0x4d, 0x18]) {
                let packed = io::Cursor::new(magic).chain(packed);
                let frame = StreamingDecoder::new_with_max_window_size(packed, WINDOW_MAX_BYTES.into());
                return frame.map(Some).map_err(io::Error::other);
            }
            let mut len = [0; 4];
            packed.read_exact(&mut len)?;
            io::copy(&mut (&mut packed).take(u32::from_le_bytes(len).into()), &mut io::sink())?;
        }
        Ok(None)
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !buffer.is_empty() {
            if self.frame.is_none() {
                self.frame = self.next_frame()?;
            }
            let Some(frame) = &mut self.frame else { break };
            match frame.read(buffer)? {
                0 => self.packed = self.frame.take().map(|frame| frame.into_inner().into_inner().1),
                len => return Ok(len),
            }
        }
        Ok(0)
    }
}

/// Reads ahead in another thread, so that decompression and compression run in parallel.
pub struct ReadAhead {
    buffers: Option<Receiver<io::Result<Vec<u8>>>>,
    buffer: Vec<u8>,
    at: usize,
    thread: Option<JoinHandle<()>>,
}

impl ReadAhead {
    /// Starts reading from the reader returned by `open`.
    pub fn start<F>(open: F) -> Result<ReadAhead>
    where
        F: FnOnce() -> Result<Box<dyn Read + Send>> + Send + 'static,
    {
        let (sender, buffers) = sync_channel(BUFFERS_AHEAD);
        let read = move || match open() {
            Ok(mut reader) => read_all(&mut *reader, &sender),
            // If the receiver is gone, the error is not needed.
            Err(error) => drop(sender.send(Err(io::Error::other(format!("{error:#}"))))),
        };
        let thread = sandbox::spawn("unpack", read).context("start a thread")?;
        Ok(ReadAhead { buffers: Some(buffers), buffer: Vec::new(), at: 0, thread: Some(thread) })
    }
}

fn read_all(reader: &mut dyn Read, sender: &SyncSender<io::Result<Vec<u8>>>) {
    loop {
        let mut buffer = Vec::with_capacity(BUFFER_BYTES);
        let result = reader.take(BUFFER_BYTES as u64).read_to_end(&mut buffer);
        let message = match result {
            Ok(0) => return,
            Ok(_) => Ok(buffer),
            Err(error) => Err(error),
        };
        let is_last = message.is_err();
        if sender.send(message).is_err() || is_last {
            return;
        }
    }
}

impl Read for ReadAhead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.buffer.len() {
            let Some(Ok(next)) = self.buffers.as_ref().map(Receiver::recv) else { return Ok(0) };
            (self.buffer, self.at) = (next?, 0);
        }
        let len = buffer.len().min(self.buffer.len() - self.at);
        buffer[..len].copy_from_slice(&self.buffer[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        // Without a receiver the thread ends at its next buffer.
        self.buffers = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
