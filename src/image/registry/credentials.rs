//! Finds the user's credentials for a registry, as stored by `docker login` and `podman login`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::image::reference::Reference;

/// Docker's name for the credentials of the default registry.
pub const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// Enough for about a thousand registries.
pub const FILE_MAX_BYTES: u64 = 4 << 20;

/// Credentials for a registry.
#[derive(Clone, Serialize, Deserialize)]
pub enum Credential {
    /// A user name and a password.
    Password {
        /// The user name.
        user: String,
        /// The password.
        password: String,
    },
    /// A token to obtain other tokens with.
    IdentityToken(String),
}

impl From<DockerCredential> for Credential {
    fn from(found: DockerCredential) -> Credential {
        match found {
            DockerCredential::UsernamePassword(user, password) => Credential::Password { user, password },
            DockerCredential::IdentityToken(token) => Credential::IdentityToken(token),
        }
    }
}

/// Returns the user's credentials from the first file that has any: `$REGISTRY_AUTH_FILE`, Docker's `config.json`, and
/// podman's `auth.json` (containers-auth.json(5)). Unreadable files are logged and ignored.
pub fn find(reference: &Reference) -> Option<Credential> {
    files(&|name| std::env::var_os(name).filter(|value| !value.is_empty())).iter().find_map(|path| {
        let found = in_file(path, reference).with_context(|| format!("use the credentials in {}", path.display()));
        let found = found.unwrap_or_else(|error| {
            log::warn!("{error:#}");
            None
        });
        found.map(Credential::from)
    })
}

fn files(variable: &dyn Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let dir = |name: &str| variable(name).map(PathBuf::from);
    let home = dir("HOME");
    let in_home = |name: &str| home.as_ref().map(|home| home.join(name));
    // Without a session, podman stores them per user.
    let of_user = || Some(format!("/run/containers/{}", fs::metadata("/proc/self").ok()?.uid()).into());
    let runtime = dir("XDG_RUNTIME_DIR").map(|dir| dir.join("containers")).or_else(of_user);
    let config = dir("XDG_CONFIG_HOME").or_else(|| in_home(".config")).map(|dir| dir.join("containers"));
    let docker = dir("DOCKER_CONFIG").or_else(|| in_home(".docker"));
    let in_dir = |dir: Option<PathBuf>, name: &str| dir.map(|dir| dir.join(name));
    [
        dir("REGISTRY_AUTH_FILE"),
        in_dir(docker, "config.json"),
        in_dir(runtime, "auth.json"),
        in_dir(config, "auth.json"),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn in_file(path: &Path, reference: &Reference) -> Result<Option<DockerCredential>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut json = Vec::new();
    file.take(FILE_MAX_BYTES + 1).read_to_end(&mut json)?;
    ensure!(json.len() as u64 <= FILE_MAX_BYTES, "it is too long");
    in_json(&json, reference)
}

/// Parses a file of credentials without running a helper: for fuzzing.
pub fn parse(json: &[u8], reference: &Reference) {
    let needs_helper = |config: &Value| ["credHelpers", "credsStore"].iter().any(|name| config.get(name).is_some());
    match serde_json::from_slice::<Value>(json) {
        Ok(config) if needs_helper(&config) => drop(key(&config, reference)),
        _ => drop(in_json(json, reference)),
    }
}

fn in_json(json: &[u8], reference: &Reference) -> Result<Option<DockerCredential>> {
    let mut config: Value = serde_json::from_slice(json)?;
    let Some(key) = key(&config, reference) else { return Ok(None) };
    // The parser would mistake another repository's credentials for those of the whole registry.
    if let Some(Value::Object(auths)) = config.get_mut("auths") {
        auths.retain(|name, _| *name == key);
    }
    match get_credential_from_reader(config.to_string().as_bytes(), &key) {
        Ok(credential) => Ok(Some(credential)),
        Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(None),
        // A helper also fails if it has no credentials.
        Err(error) => Err(error.into()),
    }
}

/// The key of the credentials in a file, or for a helper.
fn key(config: &Value, reference: &Reference) -> Option<String> {
    let registry = reference.registry.as_str();
    let is_hub = registry == "docker.io";
    let server = if is_hub { DOCKER_HUB } else { registry };
    let section = |name: &str| config.get(name).and_then(Value::as_object);
    if let Some(helpers) = section("credHelpers")
        && let Some(name) = [server, registry].into_iter().find(|&name| helpers.contains_key(name))
    {
        return Some(name.to_owned());
    }
    if let Some(auths) = section("auths") {
        // Podman's may apply to a repository or a namespace.
        let mut name = format!("{registry}/{}", reference.repository);
        loop {
            if auths.contains_key(&name) {
                return Some(name);
            }
            let Some((shorter, _)) = name.rsplit_once('/') else { break };
            name.truncate(shorter.len());
        }
        // As written by old versions of Docker.
        let host = if is_hub { "index.docker.io" } else { registry };
        let is_url_of_it = |key: &&String| {
            let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
            rest.is_some_and(|rest| rest.split('/').next() == Some(host))
        };
        if let Some(url) = auths.keys().find(is_url_of_it) {
            return Some(url.clone());
        }
    }
    config.get("credsStore").is_some().then(|| server.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(json: &str, name: &str) -> Option<String> {
        let found = in_json(json.as_bytes(), &name.parse().unwrap()).unwrap()?;
        Some(match found {
            DockerCredential::UsernamePassword(name, password) => format!("{name}:{password}"),
            DockerCredential::IdentityToken(token) => format!("token {token}"),
        })
    }

    #[test]
    fn the_most_specific_credentials_are_used() {
        // `a:1`, `b:2`, `c:3`
        let json = r#"{"auths": {"host:5000": {"auth": "YToxCg=="}, "host:5000/team": {"auth": "YjoyCg=="},
            "host:5000/team/app": {"auth": "YzozCg=="}, "only.here/team": {"auth": "YToxCg=="}}}"#;
        let find = |name| find_in(json, name).map(|found| found.trim().to_owned());
        assert_eq!(find("host:5000/team/app").as_deref(), Some("c:3"));
        assert_eq!(find("host:5000/team/other").as_deref(), Some("b:2"));
        assert_eq!(find("host:5000/teams").as_deref(), Some("a:1"));
        assert_eq!(find("only.here/team/x").as_deref(), Some("a:1"));
        assert_eq!(find("only.here/other"), None, "it is another's");
        assert_eq!(find("host:5001/team/app"), None);
    }

    #[test]
    fn the_default_registry_has_several_names() {
        for key in ["https://index.docker.io/v1/", "docker.io", "https://index.docker.io/v2/", "docker.io/library"] {
            let json = format!(r#"{{"auths": {{"{key}": {{"auth": "YTox"}}}}}}"#);
            assert_eq!(find_in(&json, "debian").as_deref(), Some("a:1"), "{key}");
            assert_eq!(find_in(&json, "quay.io/debian"), None, "{key}");
        }
        let json = r#"{"auths": {"https://host/v1/": {"username": "a", "password": "1"}}}"#;
        assert_eq!(find_in(json, "host.example/x").or(find_in(json, "localhost/x")), None);
    }

    #[test]
    fn a_token_replaces_a_password() {
        let json = r#"{"auths": {"host.io": {"auth": "MDAwOg==", "identitytoken": "abc"}}}"#;
        assert_eq!(find_in(json, "host.io/x").as_deref(), Some("token abc"));
    }

    #[test]
    fn a_file_without_credentials_is_skipped() {
        assert_eq!(find_in("{}", "host.io/x"), None);
        assert_eq!(find_in(r#"{"auths": {"host.io": {}}}"#, "host.io/x"), None);
        assert!(in_json(b"[", &"x".parse().unwrap()).is_err());
        assert!(in_json(br#"{"auths": {"host.io": {"auth": "?"}}}"#, &"host.io/x".parse().unwrap()).is_err());
    }

    #[test]
    fn credential_files_are_found_in_standard_locations() {
        let none = files(&|name| (name == "XDG_RUNTIME_DIR").then(|| "/run/user/1".into()));
        assert_eq!(none, [PathBuf::from("/run/user/1/containers/auth.json")]);
        let all = files(&|name| Some(format!("/{name}").into()));
        let names = ["/REGISTRY_AUTH_FILE", "/DOCKER_CONFIG/config.json", "/XDG_RUNTIME_DIR/containers/auth.json"];
        assert_eq!(all[..3], names.map(PathBuf::from));
        assert_eq!(all[3], PathBuf::from("/XDG_CONFIG_HOME/containers/auth.json"));
    }
}
