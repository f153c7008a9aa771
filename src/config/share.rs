//! A folder of the host that the guest can mount.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Invalid;

/// The length of a tag (virtio 1.2 §5.11.4).
pub const MAX_TAG_BYTES: usize = 36;

/// A folder that the guest mounts by its tag (virtio-fs).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The folder. If it is another file, the guest finds it in a folder of its own, named [`SHARED_FILE`].
    pub path: PathBuf,
    /// What the guest mounts: `mount -t virtiofs TAG DIR`.
    pub tag: String,
    /// Whether the guest can change nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
    /// Whether a read-only folder, if it is empty, gets what the image has in its place before anything else runs in the guest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fills: bool,
    /// What the guest's kernel keeps in its memory.
    #[serde(default, skip_serializing_if = "ShareCache::is_default")]
    pub cache: ShareCache,
    /// Whether the guest also sees what is mounted in the folder later, in this process's mount namespace. The folder must be a shared
    /// mount then (mount_namespaces(7)).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub follows_mounts: bool,
}

/// The name of a file that is shared by itself.
pub const SHARED_FILE: &str = "file";

/// What a guest's kernel keeps of a folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShareCache {
    /// Names and attributes for a second, and data until the file has changed.
    #[default]
    Auto,
    /// Everything, as long as it likes: for a folder that only this guest changes.
    Always,
    /// Nothing.
    Never,
    /// Everything as well, and for some time also what it has written.
    Writeback,
}

impl FromStr for ShareCache {
    type Err = String;

    fn from_str(text: &str) -> Result<ShareCache, String> {
        match text {
            "auto" => Ok(ShareCache::Auto),
            "always" => Ok(ShareCache::Always),
            "never" => Ok(ShareCache::Never),
            "writeback" => Ok(ShareCache::Writeback),
            _ => Err(format!("unknown cache mode {text:?}: use auto, always, never or writeback")),
        }
    }
}

impl ShareCache {
    fn is_default(&self) -> bool {
        *self == ShareCache::default()
    }
}

impl ShareConfig {
    /// A writable share with the default cache.
    pub fn of(path: PathBuf, tag: String) -> ShareConfig {
        let cache = ShareCache::default();
        ShareConfig { path, tag, readonly: false, fills: false, cache, follows_mounts: false }
    }

    /// Checks the share against the `earlier` ones.
    pub(super) fn validate(&self, earlier: &[ShareConfig]) -> Result<(), Invalid> {
        if self.path.as_os_str().is_empty() {
            return Err(Invalid::NoSharePath);
        }
        let is_good = |byte: u8| byte.is_ascii_graphic() && byte != b',';
        if self.tag.is_empty() || self.tag.len() > MAX_TAG_BYTES || !self.tag.bytes().all(is_good) {
            return Err(Invalid::ShareTag(self.tag.clone()));
        }
        if earlier.iter().any(|other| other.tag == self.tag) {
            return Err(Invalid::SameShareTag(self.tag.clone()));
        }
        Ok(())
    }
}
