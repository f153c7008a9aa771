//! The host side of the serial port: standard output, standard input and the terminal.

pub mod hub;
pub mod input;
pub mod keys;
pub mod log;
pub mod output;
pub mod stream_log;
pub mod terminal;
