//! What podman does with containers besides running them.

use std::fs;

use crate::engine::are_there;
use crate::podman::Podman;
use crate::{await_that, finish, runtime};

#[test]
fn an_image_is_built_in_machines() {
    let Some(podman) = Podman::new(runtime!(), None) else { return };
    let context = podman.runtime.path("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("Containerfile"), "FROM localhost/box\nRUN cat /proc/version; id -u\nUSER 1000\n").unwrap();
    let ended = podman.run(&["build", "--network", "none", "-t", "built", context.to_str().unwrap()]);
    let version = ended.expect(0).lines().find(|line| line.starts_with("Linux version"));
    assert!(version.is_some_and(|version| version.contains("-micro ")), "{}", ended.output);
    podman.run(&["image", "exists", "built"]).expect(0);
}

#[test]
fn podman_looks_after_a_container() {
    let Some(podman) = Podman::new(runtime!(), None) else { return };
    let check = ["--health-cmd", "test -e /data/ok", "--health-interval", "disable"];
    let flags = [&["-d", "--init", "--name", "first", "-v", "kept:/data"][..], &check].concat();
    let script = "trap 'echo got' TERM; while :; do sleep 0.1; done";
    podman.shell(&flags, script).expect(0);
    assert_eq!(podman.run(&["healthcheck", "run", "first"]).expect(1), "unhealthy\n");
    podman.run(&["exec", "first", "touch", "/data/ok"]).expect(0);
    podman.run(&["healthcheck", "run", "first"]).expect(0);
    podman.run(&["rename", "first", "web"]).expect(0);
    // With options of ps(1), podman runs that in the container.
    let table = podman.run(&["top", "web", "-o", "pid,args"]);
    assert!(
        table.expect(0).lines().any(|line| line.trim_start().starts_with("1 /run/podman-init -- sh -c")),
        "{}",
        table.output
    );
    podman.run(&["update", "--memory", "300m", "--cpus", "0.5", "web"]).expect(0);
    let stats = podman.run(&["stats", "--no-stream", "--format", "{{.MemUsage}}", "web"]);
    assert!(stats.expect(0).contains("MB / "), "{}", stats.output);
    podman.run(&["kill", "-s", "TERM", "web"]).expect(0);
    await_that(|| podman.run(&["logs", "web"]).expect(0).contains("got"), || "the signal has not arrived".into());
    podman.run(&["container", "checkpoint", "web"]).fails_with("checkpoint");
    podman.run(&["rm", "-f", "-t", "0", "web"]).expect(0);
}

/// In a network namespace of this test, with a bridge of CNI's.
#[test]
fn a_published_port_leads_into_the_machine() {
    let Some(podman) = Podman::new(runtime!(), None) else { return };
    if !are_there(&["ip6tables", "/opt/ip", "/usr/lib/cni/portmap"]) {
        return;
    }
    let (line, kernel) = (podman.line(), podman.runtime.kernel.display());
    let script = format!(
        "/opt/ip link set lo up
        {line} run -d --name web -p 8080:80 --annotation io.husk.kernel={kernel} box sh -c 'echo hello | nc -l -p 80' || exit 1
        until [ $((tries += 1)) = 60 ] || curl -s --http0.9 http://127.0.0.1:8080/; do sleep 0.5; done
        {line} rm -f -t 0 web"
    );
    let ended = finish(podman.command("unshare").args(["-n", "sh", "-c", &script]));
    assert!(ended.expect(0).contains("\nhello\n"), "{}\n{}", ended.output, ended.errors);
}
