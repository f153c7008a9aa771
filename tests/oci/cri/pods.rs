//! Pods of several containers, which are in one machine.

use std::fs;
use std::io::Read;
use std::net::TcpStream;

use super::messages::*;
use super::{Node, start};
use crate::engine::IMAGE;
use crate::{await_that, runtime};

/// A pod and the containers in it.
struct Pod<'a> {
    node: &'a Node,
    config: PodSandboxConfig,
    id: Id,
}

impl Pod<'_> {
    /// Starts a container that runs a shell script.
    #[track_caller]
    fn start(&self, name: &str, attempt: u32, script: &str, edit: impl FnOnce(&mut ContainerConfig)) -> Id {
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt }),
            image: Some(ImageSpec { image: IMAGE.into() }),
            command: ["sh", "-c", script].map(str::to_owned).into(),
            log_path: format!("{name}.{attempt}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(self.node.namespaces()),
                }),
                ..LinuxContainerConfig::default()
            }),
            ..ContainerConfig::default()
        };
        edit(&mut config);
        let id: Id = self.node.call(
            "CreateContainer",
            &CreateContainerRequest {
                pod_sandbox_id: self.id.id.clone(),
                config: Some(config),
                sandbox_config: Some(self.config.clone()),
            },
        );
        let _: Empty = self.node.call("StartContainer", &id);
        id
    }

    /// What a script prints in a container, and its exit code.
    #[track_caller]
    fn exec(&self, container: &Id, script: &str) -> (String, i32) {
        let cmd = ["sh", "-c", script].map(str::to_owned).into();
        let request = ExecSyncRequest { container_id: container.id.clone(), cmd, timeout: 60 };
        let ended: ExecSyncResponse = self.node.call("ExecSync", &request);
        (ended.stdout + &ended.stderr, ended.exit_code)
    }

    fn status(&self, container: &Id) -> ContainerStatus {
        let answer: ContainerStatusResponse = self.node.call("ContainerStatus", container);
        answer.status.unwrap()
    }

    #[track_caller]
    fn await_exit(&self, container: &Id) -> ContainerStatus {
        await_that(|| self.status(container).state == EXITED, || format!("{:?}", self.status(container)));
        self.status(container)
    }

    /// The lines that a container has printed, as `kubectl logs` shows them.
    fn log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.node.logs().join(name)).unwrap_or_default();
        text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).map(|line| format!("{line}\n")).collect()
    }
}

#[test]
fn the_containers_of_a_pod_are_in_one_machine() {
    let runtime = runtime!();
    let Some(node) = start(runtime) else { return };
    let mut config = node.pod("pair");
    let limits = LinuxContainerResources { cpu_period: 100_000, cpu_quota: 150_000, memory_limit_in_bytes: 192 << 20 };
    config.linux.as_mut().unwrap().resources = Some(limits);
    let pod = Pod { node: &node, id: node.run_pod(&config), config };
    let script = "trap 'exit 3' TERM; echo serving; while :; do echo hello | nc -l -p 8080 & wait $!; done";
    let server = pod.start("server", 0, script, |config| {
        config.envs.push(KeyValue { key: "WHO".into(), value: "server".into() });
        config.mounts.push(volume(&pod));
    });
    let client = pod.start("client", 0, "sleep 100000", |config| config.mounts.push(volume(&pod)));
    await_that(|| pod.log("server.0.log") == "serving\n", || pod.log("server.0.log"));
    let asks = "until nc -w 30 127.0.0.1 8080 </dev/null | grep hello; do sleep 0.2; done";
    assert_eq!(pod.exec(&client, asks), ("hello\n".into(), 0));
    assert_eq!(pod.exec(&server, "echo $WHO; exit 7"), ("server\n".into(), 7));
    have_their_own(&pod, &server, &client);
    is_reached(&pod);
    let list: ListContainersResponse = node.call("ListContainers", &Empty {});
    assert!(list.containers.len() == 2 && list.containers.iter().all(|container| container.state == RUNNING));

    are_counted_by_themselves(&pod, &client);
    has_its_limits_changed(&pod, &client);

    // One stops and is started again, as a kubelet does it, and the other one stays.
    let _: Empty = node.call("StopContainer", &StopContainerRequest { container_id: server.id.clone(), timeout: 60 });
    let ended = pod.await_exit(&server);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
    assert_eq!(pod.exec(&client, "true").1, 0);
    let again = pod.start("server", 1, script, |_| {});
    let _: Empty = node.call("RemoveContainer", &server);
    assert_eq!(pod.exec(&client, asks), ("hello\n".into(), 0));
    is_killed_at_its_limit(&pod);
    // Whoever ignores the signal is killed after the time that it gets.
    let _: Empty = node.call("StopContainer", &StopContainerRequest { container_id: client.id.clone(), timeout: 1 });
    let ended = pod.await_exit(&client);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "Error"));
    assert_eq!(pod.status(&again).state, RUNNING);

    let _: Empty = node.call("StopPodSandbox", &pod.id);
    assert_eq!(pod.status(&again).state, EXITED);
    let _: Empty = node.call("RemovePodSandbox", &pod.id);
    let list: ListContainersResponse = node.call("ListContainers", &Empty {});
    assert_eq!(list.containers, []);
    node.leaves_nothing();
}

/// A folder of the node.
fn volume(pod: &Pod) -> Mount {
    let folder = pod.node.containerd.runtime.path("volume");
    fs::create_dir_all(&folder).unwrap();
    Mount { container_path: "/data".into(), host_path: folder.display().to_string() }
}

/// Files and processes are a container's; volumes, the network, the host name and the machine are the pod's.
fn have_their_own(pod: &Pod, server: &Id, client: &Id) {
    assert_eq!(pod.exec(server, "touch /mine; echo shared >/data/file").1, 0);
    assert_eq!(pod.exec(client, "test -e /mine; echo $?; cat /data/file").0, "1\nshared\n");
    assert!(!pod.exec(client, "ps").0.contains("nc -l"));
    assert_eq!(pod.exec(client, "hostname").0, pod.exec(server, "hostname").0);
    let boot = "/proc/sys/kernel/random/boot_id";
    let (machine, _) = pod.exec(client, &format!("cat {boot}"));
    assert_eq!(pod.exec(server, &format!("cat {boot}")).0, machine);
    assert_ne!(fs::read_to_string(boot).unwrap(), machine);
    // The sum of the limits, and what the guest's kernel takes.
    let (size, _) = pod.exec(client, "nproc; grep MemTotal /proc/meminfo");
    let (cpus, memory) = size.split_once('\n').unwrap();
    let memory: u32 = memory.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(cpus == "2" && (192 << 10..224 << 10).contains(&memory), "{size}");
}

/// What a container uses is not counted as another one's.
fn are_counted_by_themselves(pod: &Pod, idle: &Id) {
    let script = "x=0123456789abcdef; for i in 0 1 2 3 4 5 6 7 8 9 a b c d e f 0 1 2; do x=$x$x; done; echo ${#x}; sleep 100000; true";
    let large = pod.start("large", 0, script, |_| {});
    await_that(|| pod.log("large.0.log") == "8388608\n", || pod.log("large.0.log"));
    let used = |id: &Id| {
        let answer: ContainerStatsResponse = pod.node.call("ContainerStats", id);
        let stats = answer.stats.unwrap();
        (stats.memory.unwrap().working_set.unwrap().value, stats.cpu.unwrap().used_ns.unwrap().value)
    };
    let (one, other) = (used(&large), used(idle));
    assert!(one.0 > 8 << 20 && (1..8 << 20).contains(&other.0), "{one:?} {other:?}");
    assert!(one.1 > 0 && other.1 > 0, "{one:?} {other:?}");
    let _: Empty = pod.node.call("StopContainer", &StopContainerRequest { container_id: large.id.clone(), timeout: 0 });
    let _: Empty = pod.node.call("RemoveContainer", &large);
}

/// A container's limits change while it runs, as a kubelet resizes a pod or assigns CPUs.
fn has_its_limits_changed(pod: &Pod, client: &Id) {
    let linux = LinuxContainerResources { cpu_period: 100_000, cpu_quota: 50_000, memory_limit_in_bytes: 48 << 20 };
    let request = UpdateContainerResourcesRequest { container_id: client.id.clone(), linux: Some(linux) };
    let _: Empty = pod.node.call("UpdateContainerResources", &request);
    let (limits, _) = pod.exec(client, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max");
    assert_eq!(limits, "50331648\n50000 100000\n");
}

/// The node reaches a port of the pod's address, as probes do.
fn is_reached(pod: &Pod) {
    let status: PodSandboxStatusResponse = pod.node.call("PodSandboxStatus", &pod.id);
    let address = status.status.unwrap().network.unwrap().ip;
    if !address.is_empty() {
        let mut heard = String::new();
        await_that(
            || {
                TcpStream::connect((address.as_str(), 8080))
                    .is_ok_and(|mut peer| peer.read_to_string(&mut heard).is_ok())
            },
            || format!("no answer of {address}"),
        );
        assert_eq!(heard, "hello\n");
    }
}

/// Its memory limit is its own, and the other containers stay.
fn is_killed_at_its_limit(pod: &Pod) {
    let hungry = pod.start("hungry", 0, "x=x; while :; do x=$x$x; done", |config| {
        config.linux.as_mut().unwrap().resources =
            Some(LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..LinuxContainerResources::default() });
    });
    let ended = pod.await_exit(&hungry);
    assert_eq!((ended.exit_code, ended.reason.as_str()), (137, "OOMKilled"));
    let _: Empty = pod.node.call("RemoveContainer", &hungry);
}
