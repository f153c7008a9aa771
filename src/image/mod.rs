//! From the word that names an image to a read-only root file system that machines share.
//!
//! ```text
//! word ─ source ─> file, directory or registry ─ bundle, members, docker_archive, oci_layout ─> Image: configuration and layers
//!      ─ unpack ─> tar ─ layer ─> Tree (names in memory) and erofs::Writer (bytes on disk) ─ store ─> Prepared
//! ```
//!
//! Everything that comes in is hostile: archives, manifests, names. Nothing of an archive is ever extracted to the host's file
//! system, so a name cannot lead anywhere; what goes into memory and onto the disk is bounded; and what a digest names is
//! believed only when it has that digest.

mod bundle;
pub mod config;
pub mod digest;
mod directory;
mod docker_archive;
mod erofs;
pub mod ext4;
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod layer;
mod manage;
mod manifest;
mod members;
mod oci_layout;
pub mod on_demand;
mod prepare;
pub mod progress;
pub mod reference;
mod registry;
mod root;
pub mod scratch;
pub mod source;
pub mod store;
mod tar;
pub mod tar_copy;
pub mod tar_write;
mod tree;
mod unpack;

use std::fs::File;
use std::path::PathBuf;

use self::config::ImageConfig;
pub use self::config::ImageProcess;
pub use self::digest::Digest;
pub use self::erofs::Form;
pub use self::manage::{Listed, PruneOptions, Pruned};
pub use self::manifest::Platform;
pub use self::progress::Progress;
pub use self::registry::Pulled;
pub use self::scratch::{Kept, Scratch};
pub use self::source::Source;
pub use self::store::Store;

/// An image that a machine can be started from.
#[derive(Debug)]
pub struct Prepared {
    /// The image's own digest: that of its configuration, or of what it was made from.
    pub id: Digest,
    /// The root file system: an EROFS image that any number of machines may have as a read-only disk.
    pub root: PathBuf,
    /// What is to run in it.
    pub process: ImageProcess,
    /// Whether it is a root file system without a word of what to run: what is no image is taken for one.
    pub is_bare_root: bool,
    /// The root, with a shared lock: as long as this, or another one, is open, nobody removes it.
    pub in_use: File,
}

/// An image as it is found in an archive: not yet verified, but for its manifests.
struct Image {
    id: Digest,
    config: ImageConfig,
    layers: Vec<Layer>,
    names: Vec<String>,
}

/// A layer's archive, and what it has to be.
struct Layer {
    part: bundle::Part,
    /// The digest of it as it is.
    blob: Option<Digest>,
    /// The digest of what it unpacks to.
    diff_id: Option<Digest>,
}
