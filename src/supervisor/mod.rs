//! What supervises a machine while it runs, on the process's first thread: its end, signals, keys, and what other commands ask of it
//! over its control socket.

mod control;
mod drain;
mod endpoint;
mod requests;

pub use control::{Stdio, block_signals, run};
pub use endpoint::ControlEndpoint;
