//! Trusted certificates: those of this host, and those configured in Docker and podman for a registry.

use std::fs;
use std::path::PathBuf;

use ureq::tls::{Certificate, RootCerts};

/// Directories with CA certificates for a registry, `*.crt` each (containers-certs.d(5), and Docker's own).
const DIRS: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];
/// The same within a user's configuration directory.
const USER_DIRS: [&str; 2] = ["containers/certs.d", "docker/certs.d"];

/// The host's CA certificates (`$SSL_CERT_FILE` and `$SSL_CERT_DIR` override them), so that private registries work;
/// without any, Mozilla's. Those configured for the registry are added.
pub fn roots(registry: &str) -> RootCerts {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        log::debug!("the host's certificates: {error}");
    }
    let own: Vec<_> = files(registry).into_iter().flat_map(|path| read(&path)).collect();
    if found.certs.is_empty() && own.is_empty() {
        return RootCerts::WebPki;
    }
    let host = found.certs.into_iter().map(|found| found.to_vec());
    let certificates: Vec<_> = host.chain(own).map(|der| Certificate::from_der(&der).to_owned()).collect();
    RootCerts::new_with_certs(&certificates)
}

fn files(registry: &str) -> Vec<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = absolute("XDG_CONFIG_HOME").or_else(|| absolute("HOME").map(|home| home.join(".config")));
    let of_user = USER_DIRS.iter().filter_map(|dir| Some(config.as_ref()?.join(dir)));
    // A host name contains no `/` and is not `..`.
    let dirs = of_user.chain(DIRS.iter().map(PathBuf::from)).map(|dir| dir.join(registry));
    let entries = dirs.filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "crt"));
    files.sort();
    files
}

fn read(path: &std::path::Path) -> Vec<Vec<u8>> {
    let found = rustls_native_certs::load_certs_from_paths(Some(path), None);
    for error in &found.errors {
        log::warn!("{}: {error}", path.display());
    }
    found.certs.into_iter().map(|found| found.to_vec()).collect()
}
