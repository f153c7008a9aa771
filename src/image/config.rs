//! Parses image configurations (OCI image specification, config.md).

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::digest::Digest;
use crate::config::HealthCheck;

/// The maximum size of a configuration or manifest; typically they have tens of KiB.
pub const JSON_MAX_BYTES: u64 = 4 << 20;
/// The maximum size of a configuration in the store's index.
const KEPT_MAX_BYTES: usize = 1 << 20;
/// Docker's limit is 127.
pub const MAX_LAYERS: usize = 512;

/// The process configuration of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageProcess {
    /// The program, and its first arguments.
    pub entrypoint: Vec<String>,
    /// The arguments after the entrypoint, or the command if there is no entrypoint.
    pub cmd: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// The working directory; empty for `/`.
    pub working_dir: String,
    /// The user name or ID, optionally with `:` and a group; empty for root.
    pub user: String,
    /// The stop signal, such as `SIGTERM` or `15`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Directories whose content should outlive the machine.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
    /// `PORT/tcp` or `PORT/udp`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub exposed_ports: Vec<String>,
    /// How the health of a machine is checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<HealthCheck>,
    /// Labels set by the image's author.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// The relevant parts of an image's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// The process configuration.
    pub process: ImageProcess,
    /// The architecture in Go's terms (`amd64`).
    pub architecture: String,
    /// The operating system (`linux`).
    pub os: String,
    /// The creation time in RFC 3339 format.
    pub created: Option<String>,
    /// The digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
}

impl ImageConfig {
    /// Parses a configuration.
    pub fn parse(json: &[u8]) -> Result<ImageConfig> {
        let file: File = serde_json::from_slice(json).context("read the image's configuration")?;
        let kind = file.rootfs.kind.unwrap_or_else(|| "layers".into());
        ensure!(kind == "layers", "the image has an unsupported rootfs type {kind:?}");
        let diff_ids = file.rootfs.diff_ids.unwrap_or_default();
        let process = ImageProcess::from(file.config.unwrap_or_default());
        let created = file.created.filter(|created| !created.is_empty());
        let (architecture, os) = (file.architecture.unwrap_or_default(), file.os.unwrap_or_default());
        let config = ImageConfig { process, architecture, os, created, diff_ids };
        config.check_size().map(|()| config)
    }

    /// Rejects more layers, or more text, than the store's index keeps.
    pub fn check_size(&self) -> Result<()> {
        let layers = self.diff_ids.len();
        ensure!(layers <= MAX_LAYERS, "the image has {layers} layers, the maximum is {MAX_LAYERS}");
        let kept_bytes = serde_json::to_vec_pretty(&(&self.process, &self.created, &self.architecture))?.len();
        ensure!(
            kept_bytes <= KEPT_MAX_BYTES,
            "the process configuration of the image is too large: {} KiB, the maximum is {}",
            kept_bytes >> 10,
            KEPT_MAX_BYTES >> 10
        );
        Ok(())
    }

    /// The configuration of a root file system that has none.
    pub fn of_root() -> ImageConfig {
        ImageConfig { architecture: "amd64".into(), os: "linux".into(), ..ImageConfig::default() }
    }

    /// Rejects images for another architecture or operating system.
    pub fn check_platform(&self) -> Result<()> {
        let (os, architecture) = (self.os.as_str(), self.architecture.as_str());
        let is_ours = matches!(os, "" | "linux") && matches!(architecture, "" | "amd64" | "386");
        ensure!(is_ours, "the image is for {os}/{architecture}, but machines are linux/amd64");
        Ok(())
    }
}

#[derive(Deserialize)]
struct File {
    architecture: Option<String>,
    os: Option<String>,
    created: Option<String>,
    config: Option<Process>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: Option<String>,
    diff_ids: Option<Vec<Digest>>,
}

/// Go writes `null` for empty values.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Process {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    labels: Option<BTreeMap<String, String>>,
    healthcheck: Option<Healthcheck>,
}

/// Times are in nanoseconds, and 0 stands for the default.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Healthcheck {
    test: Option<Vec<String>>,
    interval: u64,
    timeout: u64,
    start_period: u64,
    start_interval: u64,
    retries: u32,
}

impl Healthcheck {
    /// The check, if it has a command.
    fn check(self) -> Option<HealthCheck> {
        let command = HealthCheck::command_of(&self.test?).filter(|command| !command.is_empty())?;
        let default = HealthCheck::default();
        let ms = |ns: u64, default_ms| if ns == 0 { default_ms } else { (ns / 1_000_000).max(1) };
        Some(HealthCheck {
            command,
            interval_ms: ms(self.interval, default.interval_ms),
            timeout_ms: ms(self.timeout, default.timeout_ms),
            start_period_ms: ms(self.start_period, default.start_period_ms),
            start_interval_ms: ms(self.start_interval, default.start_interval_ms),
            retries: if self.retries == 0 { default.retries } else { self.retries },
        })
    }
}

impl From<Process> for ImageProcess {
    fn from(process: Process) -> ImageProcess {
        ImageProcess {
            entrypoint: process.entrypoint.unwrap_or_default(),
            cmd: process.cmd.unwrap_or_default(),
            env: process.env.unwrap_or_default(),
            working_dir: process.working_dir.unwrap_or_default(),
            user: process.user.unwrap_or_default(),
            stop_signal: process.stop_signal.filter(|signal| !signal.is_empty()),
            volumes: process.volumes.unwrap_or_default().into_keys().collect(),
            exposed_ports: process.exposed_ports.unwrap_or_default().into_keys().collect(),
            labels: process.labels.unwrap_or_default(),
            healthcheck: process.healthcheck.and_then(Healthcheck::check),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_configuration_may_say_null_for_anything() {
        let json = format!(
            r#"{{"architecture": "amd64", "os": "linux", "config": {{"Env": null, "Cmd": ["sh"], "Entrypoint": null,
                "Volumes": {{"/data": {{}}}}, "StopSignal": "", "User": "1:2", "Labels": null}},
                "rootfs": {{"type": "layers", "diff_ids": ["{DIGEST}"]}}, "history": [{{"x": 1}}]}}"#
        );
        let config = ImageConfig::parse(json.as_bytes()).unwrap();
        assert_eq!((config.process.cmd, config.process.user), (vec!["sh".to_owned()], "1:2".to_owned()));
        assert_eq!((config.process.volumes, config.process.stop_signal), (vec!["/data".to_owned()], None));
        assert_eq!(config.diff_ids, [DIGEST.parse().unwrap()]);
        let bare = ImageConfig::parse(br#"{"rootfs": {"type": "layers", "diff_ids": null}, "config": null}"#).unwrap();
        assert_eq!(bare, ImageConfig::default());
    }

    #[test]
    fn a_health_check_has_a_command_and_defaults() {
        let check = |json: &str| {
            let json = format!(r#"{{"rootfs": {{}}, "config": {{"Healthcheck": {json}}}}}"#);
            ImageConfig::parse(json.as_bytes()).unwrap().process.healthcheck
        };
        let found = check(r#"{"Test": ["CMD-SHELL", "curl -f x"], "Interval": 5000000000, "Retries": 2}"#).unwrap();
        assert_eq!(found.command, ["/bin/sh", "-c", "curl -f x"]);
        assert_eq!((found.interval_ms, found.timeout_ms, found.retries), (5000, 30_000, 2));
        assert_eq!(check(r#"{"Test": ["CMD", "probe", "-v"]}"#).unwrap().command, ["probe", "-v"]);
        for none in ["null", "{}", r#"{"Test": ["NONE"]}"#, r#"{"Test": []}"#, r#"{"Test": ["OTHER", "x"]}"#] {
            assert_eq!(check(none), None, "{none}");
        }
    }

    #[test]
    fn malicious_configurations_are_rejected() {
        let many = vec![format!("\"{DIGEST}\""); MAX_LAYERS + 1].join(",");
        for json in [
            "".to_owned(),
            "[]".into(),
            "{}".into(),
            "[".repeat(100_000),
            r#"{"rootfs": {"diff_ids": ["sha256:../../x"]}}"#.into(),
            r#"{"rootfs": {"type": "magic", "diff_ids": []}}"#.into(),
            format!(r#"{{"rootfs": {{"diff_ids": [{many}]}}}}"#),
            format!(r#"{{"rootfs": {{}}, "config": {{"Env": [{}""]}}}}"#, r#""","#.repeat(300_000)),
            format!(r#"{{"rootfs": {{}}, "created": "{}"}}"#, "x".repeat(2 << 20)),
        ] {
            assert!(ImageConfig::parse(json.as_bytes()).is_err(), "{}", &json[..json.len().min(100)]);
        }
    }

    #[test]
    fn an_image_for_another_architecture_is_rejected() {
        let config = ImageConfig { architecture: "arm64".into(), os: "linux".into(), ..ImageConfig::default() };
        let error = config.check_platform().unwrap_err().to_string();
        assert_eq!(error, "the image is for linux/arm64, but machines are linux/amd64");
        assert!(ImageConfig::default().check_platform().is_ok());
    }
}
