//! Where a shim and the containers of its containerd are: below containerd's directory for what ends with the host, which bundles are in.
//!
//! ```text
//! STATE/io.containerd.runtime.v2.task/NAMESPACE/ID/    the bundle of a container
//! STATE/husk/NAMESPACE/ID/                             what is known of it (`husk oci --root STATE/husk/NAMESPACE`)
//! STATE/husk/.shims/HASH                               the socket of the shim of a pod, or of a container by itself
//! ```

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::image::Digest;
use crate::oci::config::{self, Config};
use crate::oci::pod;
use crate::sys::socket;

const SHIMS: &str = ".shims";
/// Enough of a digest: the path of a socket is short.
const HASH_DIGITS: usize = 24;

/// The paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The runtime's root.
    pub root: PathBuf,
    /// The socket of the shim.
    pub socket: PathBuf,
}

impl Place {
    /// Those of the container `id`, whose bundle is `bundle`. Containers of a pod have one shim.
    pub fn of(bundle: &Path, namespace: &str, id: &str) -> Result<Place> {
        let config = Config::read(&bundle.join(config::FILE))?;
        let group = pod::sandbox_id(&config).unwrap_or(id);
        let state = bundle.ancestors().nth(3).with_context(|| {
            format!(
                "{} is not the bundle of a container of containerd: it is to be STATE/TASKS/NAMESPACE/ID",
                bundle.display()
            )
        })?;
        let husk = state.join("husk");
        let mut hash = Digest::of(format!("{namespace}/{group}").as_bytes()).hex();
        hash.truncate(HASH_DIGITS);
        Ok(Place { root: husk.join(namespace), socket: husk.join(SHIMS).join(hash) })
    }

    /// Whether a shim listens.
    pub fn is_served(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    /// Listens in place of a shim that is gone.
    pub fn listen(&self) -> Result<UnixListener> {
        if let Some(dir) = self.socket.parent() {
            let made = DirBuilder::new().recursive(true).mode(0o711).create(dir);
            made.with_context(|| format!("create {}", dir.display()))?;
        }
        self.leave();
        let listener = socket::listen(&self.socket, 0o600);
        listener
            .with_context(|| format!("listen at {} (at most {} bytes)", self.socket.display(), socket::PATH_BYTES_MAX))
    }

    /// Removes the socket.
    pub fn leave(&self) {
        let _ = std::fs::remove_file(&self.socket);
    }

    /// The socket's address as containerd takes it.
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// The path of one more socket of the shim.
    pub fn further(&self, number: u64) -> PathBuf {
        self.socket.with_extension(number.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_containers_of_a_pod_have_one_shim() {
        let dir = tempfile::tempdir().unwrap();
        let place = |id: &str, json: &str| {
            let bundle = dir.path().join("io.containerd.runtime.v2.task/n").join(id);
            std::fs::create_dir_all(&bundle).unwrap();
            std::fs::write(bundle.join(config::FILE), json).unwrap();
            Place::of(&bundle, "n", id).unwrap()
        };
        let sandbox = place(
            "s",
            r#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"s"}}"#,
        );
        let member = place(
            "m",
            r#"{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"s"}}"#,
        );
        assert_eq!(sandbox, member);
        assert_eq!(sandbox.root, dir.path().join("husk/n"));
        let alone = place("a", "{}");
        assert_ne!(alone.socket, sandbox.socket);
        assert!(!alone.is_served());
        let listener = alone.listen().unwrap();
        assert!(alone.is_served() && alone.address().starts_with("unix:///"));
        drop(listener);
        assert!(!alone.is_served());
        drop(alone.listen().unwrap());
        alone.leave();
        assert!(!alone.socket.exists());
        assert!(Place::of(Path::new("/"), "n", "x").is_err());
    }
}
