//! Pods: containers that share a machine. The first one, the sandbox, makes it, and it ends with that one; further ones name the sandbox by
//! an annotation, or by namespaces that are the sandbox's on the host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use husk_protocol::Joined;
use serde::{Deserialize, Serialize};

use super::config::{Config, Namespace};
use super::state::{Dir, Root, State, Status};

/// Annotations of containerd and CRI-O that say which container is a further container's sandbox.
const SANDBOX_IDS: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];
/// Their annotations that say whether a container is one, and what they say then.
const TYPES: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOX: &str = "sandbox";
const CONTAINER: &str = "container";
/// Namespaces of the guest that containers can share, with their flags. All of them have its network.
const SHARABLE: [(&str, i32); 4] = [
    ("pid", libc::CLONE_NEWPID),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
];

/// What a container has in common with others of a machine that exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// The ID of the container whose machine it is.
    pub sandbox: String,
    /// The namespaces of others that it shares.
    pub namespaces: Vec<Shared>,
}

/// A namespace of another container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// `ipc`
    pub kind: String,
    /// The ID of the container.
    pub container: String,
}

/// Whether `config` is that of a sandbox of Kubernetes: more containers will follow.
pub fn is_sandbox(config: &Config) -> bool {
    TYPES.iter().any(|name| config.annotations.get(*name).is_some_and(|kind| kind == SANDBOX))
}

/// The ID of the pod of Kubernetes that a container of containerd is in, which is that of its sandbox.
pub fn sandbox_id(config: &Config) -> Option<&str> {
    config.annotations.get(SANDBOX_IDS[0]).map(String::as_str)
}

/// Whether other containers run in the machine of the container `id`.
pub fn has_others(root: &Root, id: &str) -> Result<bool> {
    let is_other = |state: &State| state.pod.as_ref().is_some_and(|pod| pod.sandbox == id);
    Ok(root.list()?.iter().any(|(dir, state)| is_other(state) && state.status(dir) != Status::Stopped))
}

impl Pod {
    /// The pod that the container of `config` is to be in, if its machine is there already.
    pub fn of(root: &Root, config: &Config) -> Result<Option<Pod>> {
        let named = named_sandbox(root, config);
        let given = || config.linux.namespaces.iter().filter(|namespace| !namespace.path.as_os_str().is_empty());
        // An engine may have made it by itself, for the sandbox.
        let is_of_named = |namespace: &Namespace| {
            named.as_ref().is_some_and(|named| process_of(&namespace.path).is_none() || is_of(namespace, named))
        };
        let others = if given().all(is_of_named) { Vec::new() } else { containers(root)? };
        let owner = |namespace: &Namespace| match &named {
            Some(named) if is_of_named(namespace) => Some(named),
            _ => others.iter().find(|state| is_of(namespace, state)),
        };
        let owners: Vec<(&str, &State)> =
            given().filter_map(|namespace| Some((namespace.kind.as_str(), owner(namespace)?))).collect();
        let first = named.iter().chain(owners.iter().map(|(_, owner)| *owner)).next();
        let Some(sandbox) = first.map(|owner| sandbox_of(owner).to_owned()) else { return Ok(None) };
        if let Some((kind, other)) = owners.iter().find(|(_, owner)| sandbox_of(owner) != sandbox) {
            bail!("the {kind} namespace is that of container {}, which is not in the machine of {sandbox}", other.id);
        }
        check(root, &sandbox, config)?;
        let sharable = owners.into_iter().filter(|(kind, _)| SHARABLE.iter().any(|(name, _)| name == kind));
        let shared = |(kind, owner): (&str, &State)| Shared { kind: kind.to_owned(), container: owner.id.clone() };
        let namespaces = sharable.map(shared).collect();
        Ok(Some(Pod { sandbox, namespaces }))
    }

    /// The namespaces that it shares, as the guest is told.
    pub fn joined(&self) -> Vec<Joined> {
        let flag = |kind: &str| SHARABLE.iter().find(|(name, _)| *name == kind).map_or(0, |(_, flag)| *flag);
        let joined = |shared: &Shared| Joined {
            container: shared.container.clone(),
            namespaces: flag(&shared.kind).unsigned_abs(),
        };
        self.namespaces.iter().map(joined).collect()
    }

    /// The sandbox.
    pub fn sandbox(&self, root: &Root) -> Result<(Dir, State)> {
        root.open(&self.sandbox)
    }
}

fn sandbox_of(state: &State) -> &str {
    state.pod.as_ref().map_or(&state.id, |pod| &pod.sandbox)
}

/// The sandbox that an annotation names, if it is a container of this runtime: other engines use the annotation for their own IDs.
fn named_sandbox(root: &Root, config: &Config) -> Option<State> {
    let is_container = TYPES.iter().any(|name| config.annotations.get(*name).is_some_and(|kind| kind == CONTAINER));
    let id = SANDBOX_IDS.iter().find_map(|name| config.annotations.get(*name)).filter(|_| is_container)?;
    root.open(id).ok().map(|(_, state)| state)
}

/// All containers. Those of a pod have its network: sandboxes come first.
fn containers(root: &Root) -> Result<Vec<State>> {
    let mut all: Vec<State> = root.list()?.into_iter().map(|(_, state)| state).collect();
    all.sort_by_key(|state| state.pod.is_some());
    Ok(all)
}

/// Whether this is a namespace of the container.
fn is_of(Namespace { kind, path }: &Namespace, state: &State) -> bool {
    let Some(owner) = state.process.filter(|owner| owner.is_alive()) else { return false };
    if Some(owner.pid) == process_of(path) {
        return true;
    }
    // Only networks are also namespaces of the host; its own belongs to no container.
    kind == "network"
        && !is_same(path, Path::new("/proc/self/ns/net"))
        && is_same(path, Path::new(&format!("/proc/{}/ns/net", owner.pid)))
}

/// The PID in `/proc/PID/ns/…`.
fn process_of(path: &Path) -> Option<u32> {
    let mut parts = path.strip_prefix("/proc").ok()?.iter();
    let pid = parts.next()?.to_str()?.parse().ok()?;
    (parts.next()? == "ns").then_some(pid)
}

fn is_same(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    id(one).is_some_and(|found| Some(found) == id(other))
}

/// Fails unless the sandbox runs, and has the network that `config` demands.
fn check(root: &Root, sandbox: &str, config: &Config) -> Result<()> {
    let what = || format!("container {sandbox}, whose machine it is to share");
    let (dir, state) = root.open(sandbox).with_context(what)?;
    match state.status(&dir) {
        Status::Created | Status::Running => {}
        status => bail!("{} is {status}", what()),
    }
    let process = state.process.with_context(|| format!("{} has no process", what()))?;
    let wanted = match config.namespace("network") {
        Some(network) if network.path.as_os_str().is_empty() => None,
        Some(network) => Some(network.path.as_path()),
        None => Some(Path::new("/proc/self/ns/net")),
    };
    let is_shared = wanted.is_some_and(|wanted| is_same(wanted, Path::new(&format!("/proc/{}/ns/net", process.pid))));
    ensure!(is_shared, "the network namespace is not that of {}: containers of a machine have one network", what());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_in_the_path_of_its_namespace() {
        assert_eq!(process_of(Path::new("/proc/17/ns/ipc")), Some(17));
        for path in ["/proc/self/ns/ipc", "/proc/17/root", "/run/netns/17", "/proc/17", "proc/17/ns/ipc", ""] {
            assert_eq!(process_of(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn a_container_without_others_namespaces_is_in_no_pod() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(Some(dir.path().join("root"))).unwrap();
        for json in [
            r#"{}"#,
            r#"{"linux":{"namespaces":[{"type":"network"},{"type":"ipc"}]}}"#,
            r#"{"linux":{"namespaces":[{"type":"network","path":"/proc/self/ns/net"}]}}"#,
            r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.SandboxID":"pod"}}"#,
            r#"{"annotations":{"io.kubernetes.cri-o.ContainerType":"container","io.kubernetes.cri-o.SandboxID":"../x"}}"#,
        ] {
            assert_eq!(Pod::of(&root, &Config::parse(json.as_bytes()).unwrap()).unwrap(), None, "{json}");
        }
    }

    #[test]
    fn shared_namespaces_are_told_by_their_flags() {
        let shared = |kind: &str| Shared { kind: kind.into(), container: "s".into() };
        let pod = Pod { sandbox: "s".into(), namespaces: vec![shared("ipc"), shared("pid")] };
        let flags: Vec<u32> = pod.joined().iter().map(|joined| joined.namespaces).collect();
        assert_eq!(flags, [libc::CLONE_NEWIPC as u32, libc::CLONE_NEWPID as u32]);
        let config = Config::parse(br#"{"annotations":{"io.kubernetes.cri.container-type":"sandbox"}}"#).unwrap();
        assert!(is_sandbox(&config) && !is_sandbox(&Config::default()));
    }
}
