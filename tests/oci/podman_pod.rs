//! Pods of podman.

use crate::podman::Podman;
use crate::runtime;

#[test]
fn pods_of_podman_are_machines() {
    let runtime = runtime!();
    let Some(podman) = Podman::new(runtime, None) else { return };
    let archive = podman.runtime.path("root.tar");
    let entry = r#"CMD ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]"#;
    podman.run(&["import", "--change", entry, archive.to_str().unwrap(), "pause"]).expect(0);
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
