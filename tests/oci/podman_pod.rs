//! Pods of podman, from its command line and from a file of Kubernetes.

use std::fs;

use crate::podman::Podman;
use crate::{await_that, finish, runtime};

/// A pod whose containers talk with each other. Without an image that says where programs are, they are named by their paths.
const POD: &str = "\
apiVersion: v1
kind: Pod
metadata:
  name: kube
spec:
  containers:
  - name: server
    image: localhost/box:latest
    imagePullPolicy: Never
    command: [/bin/sh, -c, 'echo hello from the pod | nc -l -p 8000; sleep 1000']
    resources: {limits: {memory: 64Mi}}
  - name: client
    image: localhost/box:latest
    imagePullPolicy: Never
    command: [/bin/sh, -c, 'until nc 127.0.0.1 8000; do sleep 0.2; done; sleep 1000']
";

/// Makes an image for the first container of a pod.
fn import_pause(podman: &Podman) {
    let archive = podman.runtime.path("root.tar");
    let entry = r#"CMD ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]"#;
    podman.run(&["import", "--change", entry, archive.to_str().unwrap(), "pause"]).expect(0);
}

/// Without root, since podman 4.3 makes a cgroup for root's pod that allows no device without systemd.
#[test]
fn a_pod_of_kubernetes_is_a_machine_of_a_users_podman() {
    let runtime = runtime!();
    let Some(user) = std::env::var("HUSK_TEST_USER").ok().and_then(|user| user.parse().ok()) else {
        eprintln!("SKIPPED: HUSK_TEST_USER names no user; `scripts/test guests` runs this in the lab");
        return;
    };
    let Some(podman) = Podman::new(runtime, Some(user)) else { return };
    import_pause(&podman);
    let (conf, pod) = (podman.runtime.path("containers.conf"), podman.runtime.path("pod.yaml"));
    fs::write(&conf, "[engine]\ninfra_image = \"localhost/pause\"\n").unwrap();
    fs::write(&pod, POD).unwrap();
    let line = podman.line();
    let run = |words: &[&str]| {
        let mut flags = line.split(' ');
        let mut command = podman.command(flags.next().unwrap());
        finish(command.env("CONTAINERS_CONF", &conf).args(flags).args(words))
    };
    let pod = pod.to_str().unwrap();
    run(&["play", "kube", "--network", "none", pod]).expect(0);
    let said = || run(&["logs", "kube-client"]).output;
    await_that(|| said().contains("hello from the pod"), said);
    assert_eq!(run(&["exec", "kube-server", "/bin/cat", "/sys/fs/cgroup/memory.max"]).expect(0), "67108864\n");
    run(&["play", "kube", "--down", pod]).expect(0);
    assert_eq!(podman.run(&["ps", "-aq"]).expect(0), "");
}

#[test]
fn pods_of_podman_are_machines() {
    let runtime = runtime!();
    let Some(podman) = Podman::new(runtime, None) else { return };
    import_pause(&podman);
    // The cgroup that podman 4.3 makes for a pod without systemd allows no device, not even /dev/null, to any runtime.
    let words = [
        "pod",
        "create",
        "--share-parent=false",
        "--name",
        "p",
        "--network",
        "none",
        "--infra-image",
        "localhost/pause",
    ];
    podman.run(&words).expect(0);
    podman
        .run(&["run", "-d", "--pod", "p", "--name", "one", "box", "sh", "-c", "echo hi | nc -l -p 7000; sleep 1000"])
        .expect(0);
    let script = "until nc 127.0.0.1 7000; do sleep 0.2; done; hostname; exit 7";
    assert_eq!(podman.run(&["run", "--rm", "--pod", "p", "box", "sh", "-c", script]).expect(7), "hi\np\n");
    podman.run(&["pod", "pause", "p"]).expect(0);
    assert_ne!(podman.run(&["exec", "one", "true"]).code, Some(0));
    podman.run(&["pod", "unpause", "p"]).expect(0);
    assert_eq!(podman.run(&["exec", "one", "sh", "-c", "echo $0; exit 6"]).expect(6), "sh\n");
    podman.run(&["pod", "stop", "-t", "1", "p"]).expect(0);
    podman.run(&["pod", "start", "p"]).expect(0);
    podman.run(&["exec", "one", "true"]).expect(0);
    podman.run(&["pod", "rm", "-f", "-t", "0", "p"]).expect(0);
    assert_eq!(podman.run(&["ps", "-aq"]).expect(0), "");
}
