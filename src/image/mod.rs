//! Container images: from a name or path to a read-only root file system shared by machines.
//!
//! ```text
//! word ─ source ─> file, directory or registry
//!      ─ bundle, members, docker_archive, oci_layout ─> Image: configuration and layers
//!      ─ unpack ─> tar ─ layer ─> Tree (names in memory) and erofs::Writer (bytes on disk) ─ store ─> Prepared
//! ```
//!
//! What reads foreign data runs in confined processes: `import.rs` starts the one that reads archives, `registry/pull.rs` the
//! one that talks to a registry. They get files by `outside.rs` and `registry/outside.rs`; names are given here.
//!
//! All input is untrusted: archives, manifests, names. Archives are never extracted to the host's file system, so names
//! cannot refer to host files; memory and disk usage is bounded; and content is used only after its digest was
//! verified.

mod bundle;
pub mod changes;
pub mod commit;
pub mod config;
pub mod digest;
mod directory;
mod docker_archive;
mod erofs;
pub mod ext4;
#[doc(hidden)]
pub mod fuzzing;
mod import;
mod index;
mod layer;
pub mod load;
pub mod make;
mod manage;
mod manifest;
mod members;
mod oci_layout;
pub mod on_demand;
mod outside;
mod pinned;
mod prepare;
pub mod progress;
pub mod reference;
mod registry;
mod root;
pub mod save;
pub mod scratch;
pub mod source;
pub mod store;
mod tar;
pub mod tar_copy;
pub mod tar_stream;
pub mod tar_write;
mod tree;
mod unpack;
pub mod volumes;

use std::fs::File;
use std::path::PathBuf;

use self::config::ImageConfig;
pub use self::config::ImageProcess;
pub use self::digest::Digest;
pub use self::erofs::Form;
pub use self::manage::{Listed, PruneOptions, Pruned, Removed};
pub use self::manifest::Platform;
pub use self::progress::Progress;
pub use self::registry::{Pulled, Pushed, login};
pub use self::scratch::{Kept, Scratch};
pub use self::source::Source;
pub use self::store::Store;

/// An image that a machine can run.
#[derive(Debug)]
pub struct Prepared {
    /// The digest of the image's configuration, or of the source that it was made from.
    pub id: Digest,
    /// The root file system: an EROFS image, which any number of machines may use as a read-only disk.
    pub root: PathBuf,
    /// The process configuration.
    pub process: ImageProcess,
    /// Whether it is a bare root file system without a configuration, as archives without an image list are assumed to
    /// be.
    pub is_bare_root: bool,
    /// The root file system's file with a shared lock, which prevents its removal.
    pub in_use: File,
}

/// An image found in an archive, not verified yet except for its manifests.
struct Image {
    config: ImageConfig,
    /// The configuration as it was read. Its digest identifies the image.
    config_json: String,
    layers: Vec<Layer>,
    names: Vec<String>,
    /// The names of all images beside which it was found.
    beside: Vec<String>,
}

/// A layer's archive, and its expected digests.
struct Layer {
    part: bundle::Part,
    /// The digest of the compressed blob.
    blob: Option<Digest>,
    /// The digest of the uncompressed content.
    diff_id: Option<Digest>,
}
