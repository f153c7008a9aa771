//! `husk oci features`: what this runtime supports (runtime-spec, features.md).

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::oci::config::VERSION;
use crate::oci::guest;
use crate::oci::machine::ANNOTATIONS;

#[derive(Debug, Args)]
pub(super) struct Features {}

impl Features {
    pub(super) fn run(self) -> Result<()> {
        let features = json!({
            "ociVersionMin": "1.0.0",
            "ociVersionMax": VERSION,
            "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
            "mountOptions": guest::mount_options(),
            "linux": {
                "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
                "capabilities": crate::guest::capability::names(),
                "cgroup": { "v1": true, "v2": true, "systemd": true, "systemdUser": true },
                "seccomp": { "enabled": true, "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X86_64"] },
                "apparmor": { "enabled": false },
                "selinux": { "enabled": false },
                "intelRdt": { "enabled": false },
            },
            "annotations": { "io.husk.version": env!("CARGO_PKG_VERSION"), "io.husk.annotations": ANNOTATIONS.join(",") },
            "potentiallyUnsafeConfigAnnotations": ANNOTATIONS,
        });
        crate::cli::print_json(&features, "what is supported")
    }
}
