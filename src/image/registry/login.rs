//! Keeps the user's credentials where docker and podman find them: in `config.json`, or by a credential helper.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::auth::base64;
use super::credentials::{Credential, DOCKER_HUB, FILE_MAX_BYTES};
use super::push;
use crate::image::reference::Reference;

/// Where credentials were kept, or removed from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A file, in which they can be read.
    File(PathBuf),
    /// A credential helper.
    Helper(String),
}

/// The file that credentials are written to: `$REGISTRY_AUTH_FILE`, or Docker's.
fn file() -> Result<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let docker = || variable("DOCKER_CONFIG").or_else(|| variable("HOME").map(|home| home.join(".docker")));
    let file = variable("REGISTRY_AUTH_FILE").or_else(|| docker().map(|dir| dir.join("config.json")));
    file.context("there is no place for credentials: neither $DOCKER_CONFIG nor $HOME is set")
}

/// Fails unless the registry of `server` (see [`Reference::of_registry`]) accepts a user name and a password.
pub fn check(server: &Reference, user: &str, password: &str) -> Result<()> {
    let credential = Credential::Password { user: user.to_owned(), password: password.to_owned() };
    push::check_login(server, credential, true)
}

/// Keeps a user name and a password for a registry.
pub fn keep(registry: &str, user: &str, password: &str) -> Result<Place> {
    let path = file()?;
    let keep = || -> Result<Place> {
        let mut config = read(&path)?;
        let key = key_of(registry);
        if let Some(helper) = helper(&config, &key) {
            let secret = json!({ "ServerURL": key, "Username": user, "Secret": password });
            ask_helper(&helper, "store", &secret.to_string())?;
            // Docker lists the registries of its helper, without their secrets.
            set(&mut config, &key, Some(json!({})));
            write(&path, &config)?;
            return Ok(Place::Helper(helper));
        }
        let auth = base64(format!("{user}:{password}").as_bytes());
        set(&mut config, &key, Some(json!({ "auth": auth })));
        write(&path, &config)?;
        Ok(Place::File(path.clone()))
    };
    keep().with_context(|| format!("keep the credentials in {}", path.display()))
}

/// Removes the credentials for a registry. Returns whether there were any.
pub fn forget(registry: &str) -> Result<bool> {
    let path = file()?;
    let forget = || -> Result<bool> {
        let mut config = read(&path)?;
        let key = key_of(registry);
        if let Some(helper) = helper(&config, &key) {
            ask_helper(&helper, "erase", &key)?;
        }
        let found = set(&mut config, &key, None);
        if found {
            write(&path, &config)?;
        }
        Ok(found)
    };
    forget().with_context(|| format!("remove the credentials from {}", path.display()))
}

fn key_of(registry: &str) -> String {
    if registry == "docker.io" { DOCKER_HUB.to_owned() } else { registry.to_owned() }
}

/// Sets the entry of a registry, and returns whether there was one; without a value it is removed.
fn set(config: &mut Map<String, Value>, key: &str, value: Option<Value>) -> bool {
    let known = config.remove("auths");
    let mut auths = if let Some(Value::Object(auths)) = known { auths } else { Map::new() };
    let had_one = match value {
        Some(value) => auths.insert(key.to_owned(), value).is_some(),
        None => auths.remove(key).is_some(),
    };
    config.insert("auths".to_owned(), Value::Object(auths));
    had_one
}

/// The helper for a registry.
fn helper(config: &Map<String, Value>, key: &str) -> Option<String> {
    let own = config.get("credHelpers").and_then(|helpers| helpers.get(key)).and_then(Value::as_str);
    own.or_else(|| config.get("credsStore").and_then(Value::as_str)).filter(|name| !name.is_empty()).map(str::to_owned)
}

/// Runs `docker-credential-NAME`.
fn ask_helper(name: &str, verb: &str, input: &str) -> Result<()> {
    let program = format!("docker-credential-{name}");
    let run = || -> Result<()> {
        let mut command = Command::new(&program);
        let mut child =
            command.arg(verb).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stdout).trim());
        }
        Ok(())
    };
    run().with_context(|| format!("run {program} {verb}"))
}

fn read(path: &Path) -> Result<Map<String, Value>> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Map::new()),
        found => ensure!(found?.len() <= FILE_MAX_BYTES, "it is too long"),
    }
    let text = fs::read_to_string(path)?;
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    serde_json::from_str(&text).context("it is not a JSON object")
}

/// Replaces the file; what it had is kept if that fails. A link stays one.
fn write(path: &Path, config: &Map<String, Value>) -> Result<()> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let dir = path.parent().context("no directory")?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = path.with_extension("husk-new");
    let put = || -> Result<()> {
        // One that exists may be another user's, who waits for the credentials.
        let _ = fs::remove_file(&new);
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
        serde_json::to_writer_pretty(&mut file, config)?;
        file.sync_all()?;
        Ok(fs::rename(&new, &path)?)
    };
    put().inspect_err(|_| drop(fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn credentials_are_written_to_no_file_of_others() {
        let dir = tempfile::tempdir().unwrap();
        let (path, theirs) = (dir.path().join("auth.json"), dir.path().join("theirs"));
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        fs::write(&theirs, "").unwrap();
        symlink(&theirs, path.with_extension("husk-new")).unwrap();
        write(&path, &Map::new()).unwrap();
        assert_eq!((fs::read_to_string(&theirs).unwrap(), mode()), (String::new(), 0o600));
        fs::write(path.with_extension("husk-new"), "").unwrap();
        fs::set_permissions(path.with_extension("husk-new"), fs::Permissions::from_mode(0o666)).unwrap();
        write(&path, &Map::new()).unwrap();
        assert_eq!(mode(), 0o600);
    }
}
