//! Containers of container engines, as the OCI's runtime specification describes them: a container is a process in a machine.
//!
//! ```text
//! bundle ─ config.json ─ config ─> guest (what the container is in the guest), machine (what the machine is like)
//! root and mounts ─ share ─> one shared folder of the machine, assembled in a mount namespace of its own
//! create ─ supervise ─> the process that is the container's on the host: it has the network namespace, the cgroup and the streams
//! namespaces of another container ─ pod ─> whose machine it becomes part of
//! ROOT/ID ─ state ─> what other commands know of the container;   gate: where a further one of a machine waits to be started
//! ```

pub mod cgroup;
pub mod config;
pub mod gate;
pub mod guest;
pub mod hooks;
pub mod machine;
pub mod oom;
pub mod pod;
pub mod share;
pub mod state;
pub mod warm;
