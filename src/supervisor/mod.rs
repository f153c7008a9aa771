//! Supervises a running machine on the process's first thread: handles its end, signals, keys and the requests of other
//! commands on its control socket.

mod control;
mod drain;
mod endpoint;
mod health;
mod job;
pub mod notify;
mod requests;
mod snapshot;

pub use control::{Stdio, block_all_signals, block_signals, run};
pub use endpoint::ControlEndpoint;
pub use health::probe;
pub use snapshot::Save;
