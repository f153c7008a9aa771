//! The mounts of a machine, as its record has them: for `husk inspect`, `husk rm -v` and `husk run --volumes-from`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::record::Text;

/// What is mounted in a machine, apart from tmpfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// Where.
    pub target: Text,
    /// What.
    pub source: MountSource,
    /// Whether the machine can change nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountSource {
    /// A file or folder of the host.
    Bind(PathBuf),
    /// The volume with this name.
    Volume(String),
    /// An anonymous volume that is part of the machine's own writable layer, and ends with it.
    Layer,
}

impl MountRecord {
    /// The name of the volume, if it is one of the host.
    pub fn volume(&self) -> Option<&str> {
        match &self.source {
            MountSource::Volume(name) => Some(name),
            _ => None,
        }
    }
}
