//! The person's side of the serial port: bytes to standard output, keys from standard input, and the terminal between.

pub mod hub;
pub mod input;
pub mod keys;
pub mod log;
pub mod output;
pub mod stream_log;
pub mod terminal;
