//! podman of an unprivileged user, who is root in a user namespace.
//!
//! The user is the one whose ID HUSK_TEST_USER has, with subordinate IDs and access to /dev/kvm, as in the lab.

use std::fs;

use crate::podman::Podman;
use crate::{await_that, finish, runtime};

#[test]
fn a_user_runs_containers_in_machines() {
    let runtime = runtime!();
    let Some(user) = std::env::var("HUSK_TEST_USER").ok().and_then(|user| user.parse().ok()) else {
        eprintln!("SKIPPED: HUSK_TEST_USER names no user; `scripts/test guests` runs this in the lab");
        return;
    };
    let Some(podman) = Podman::new(runtime, Some(user)) else { return };
    let mut alone = podman.command(podman.runtime.path("husk-oci").to_str().unwrap());
    finish(alone.args(["run", "-b", "/", "c"])).fails_with("only root can create containers");

    // There are more users than one, and what root of the container makes is the user's own.
    let data = podman.runtime.path("data");
    fs::create_dir(&data).unwrap();
    std::os::unix::fs::chown(&data, Some(user), Some(user)).unwrap();
    let volume = format!("{}:/data", data.display());
    let script = "touch /data/root; touch /data/user; chown 1000:100 /data/user; stat -c %u:%g /data/user; cat /proc/self/uid_map";
    let ended = podman.shell(&["--rm", "-v", &volume, "-m", "100m"], script);
    assert!(ended.expect(0).starts_with("1000:100\n         0          0 4294967295"), "{}", ended.output);
    let owner = |name: &str| std::os::unix::fs::MetadataExt::uid(&fs::metadata(data.join(name)).unwrap());
    assert_eq!(owner("root"), user);
    assert!(owner("user") > 1000 && owner("user") != user, "{}", owner("user"));

    let script = "trap 'echo got; exit 4' TERM; echo up > /data/up; while :; do sleep 0.1; done";
    podman.shell(&["-d", "--name", "web", "-v", &volume, "--network", "slirp4netns"], script).expect(0);
    await_that(|| data.join("up").exists(), || "the container does not run".into());
    assert_eq!(podman.run(&["exec", "-u", "1000", "web", "sh", "-c", "id -u; exit 6"]).expect(6), "1000\n");
    assert!(podman.run(&["exec", "web", "ip", "route"]).expect(0).starts_with("default via 10.0.2.2 dev eth0"));
    podman.run(&["stop", "-t", "60", "web"]).expect(0);
    assert_eq!(podman.run(&["logs", "web"]).expect(0), "got\n");
    podman.run(&["rm", "web"]).expect(0);
    for dir in ["husk", "husk-oci"] {
        let left = fs::read_dir(podman.runtime.path("session").join(dir)).unwrap();
        let names = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(names.filter(|name| name != "events").collect::<Vec<_>>(), [""; 0], "{dir}");
    }
}
