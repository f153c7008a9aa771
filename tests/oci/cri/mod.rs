//! Pods of containerd, as Kubernetes asks for them.

mod client;
mod manifest;
mod messages;
mod pods;

use std::fs;
use std::path::{Path, PathBuf};

use crate::containerd::Containerd;
use crate::engine::{IMAGE, are_there, cgroup_of, expect_no_cgroups_in};
use crate::{Runtime, runtime};
use client::Client;
use messages::*;

/// The plugins of containerd's networks, which are only in the lab.
const PLUGINS: &str = "/opt/cni";

/// The runtime handler, as docs/kubernetes.md has it.
const HANDLER: &str = "husk";
/// What tells a newcomer how a node is set up.
const GUIDE: &str = include_str!("../../../docs/kubernetes.md");

/// containerd with the handler `husk`, and who asks it for pods.
struct Node {
    containerd: Containerd,
    client: Client,
}

impl Node {
    fn start(runtime: Runtime) -> Node {
        let networks = runtime.path("networks");
        fs::create_dir(&networks).unwrap();
        let network = format!(
            r#"{{ "cniVersion": "0.4.0", "name": "husk", "plugins": [{{ "type": "bridge", "bridge": "husk-cni0",
            "isGateway": true, "ipam": {{ "type": "host-local", "subnet": "10.79.0.0/24", "dataDir": {:?} }} }}] }}"#,
            runtime.path("addresses")
        );
        fs::write(networks.join("10-husk.conflist"), network).unwrap();
        let lines = format!(
            r#"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = {IMAGE:?}
stream_server_address = "127.0.0.1"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = {PLUGINS:?}
conf_dir = {networks:?}
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = {HANDLER:?}
{}
"#,
            handler(),
        );
        let client = Client::new(&runtime.path("socket"));
        Node { containerd: Containerd::start(runtime, &lines, "k8s.io"), client }
    }

    #[track_caller]
    fn call<Answer: prost::Message + Default>(&self, method: &str, request: &impl prost::Message) -> Answer {
        self.client.call(method, request).unwrap()
    }

    fn logs(&self) -> PathBuf {
        self.containerd.runtime.path("logs")
    }

    /// As Kubernetes has them by default; without plugins in the host's network.
    fn namespaces(&self) -> NamespaceOption {
        let network = if Path::new(PLUGINS).exists() { POD } else { NODE };
        NamespaceOption { network, pid: CONTAINER, ipc: POD }
    }

    fn pod(&self, name: &str) -> PodSandboxConfig {
        let namespaces = self.namespaces();
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "default".into() }),
            hostname: if namespaces.network == POD { name.into() } else { String::new() },
            log_directory: self.logs().display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: cgroup_of(&self.containerd.runtime),
                resources: None,
                security_context: Some(LinuxSandboxSecurityContext { namespace_options: Some(namespaces) }),
            }),
            ..PodSandboxConfig::default()
        }
    }

    fn run_pod(&self, config: &PodSandboxConfig) -> Id {
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: HANDLER.into() };
        self.call("RunPodSandbox", &request)
    }

    fn leaves_nothing(&self) {
        self.containerd.leaves_nothing();
        expect_no_cgroups_in(&cgroup_of(&self.containerd.runtime));
    }
}

/// The configuration of the handler in the guide.
fn handler() -> &'static str {
    GUIDE.split("```").find_map(|block| block.strip_prefix("toml\n")).unwrap()
}

/// A node, if containerd is there.
fn start(runtime: Runtime) -> Option<Node> {
    are_there(&["containerd", "containerd-shim-runc-v2", "ctr"]).then(|| Node::start(runtime))
}

#[test]
fn containerd_runs_a_pod_in_a_machine() {
    let runtime = runtime!();
    let Some(node) = start(runtime) else { return };
    let version: VersionResponse = node.call("Version", &Empty {});
    assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("containerd", "v1"));
    let unknown = RunPodSandboxRequest { config: Some(node.pod("none")), runtime_handler: "none".into() };
    let error = node.client.call::<Id>("RunPodSandbox", &unknown).unwrap_err();
    assert!(error.contains("no runtime for \"none\" is configured"), "{error}");

    let pod = node.run_pod(&node.pod("one"));
    let status: PodSandboxStatusResponse = node.call("PodSandboxStatus", &pod);
    let status = status.status.unwrap();
    assert_eq!(status.state, 0);
    if Path::new(PLUGINS).exists() {
        assert!(status.network.unwrap().ip.starts_with("10.79.0."));
    }
    let _: Empty = node.call("StopPodSandbox", &pod);
    let status: PodSandboxStatusResponse = node.call("PodSandboxStatus", &pod);
    assert_eq!(status.status.unwrap().state, 1);
    let _: Empty = node.call("RemovePodSandbox", &pod);
    node.leaves_nothing();
}
