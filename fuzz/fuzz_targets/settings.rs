//! Parses JSON that a user, Docker, a container engine or an earlier husk has written: a machine's configuration and record, credentials,
//! profiles of system calls, and configurations of containers. What is accepted is written and read again unchanged.
//!
//! Covers: guest/seccomp.rs oci/config.rs oci/guest.rs oci/machine.rs config.rs config state_dir/record.rs image/registry/credentials.rs
#![no_main]

use std::fs;
use std::path::Path;

use husk::config::{MacAddress, MachineConfig};
use husk::guest::seccomp::Profile;
use husk::image::fuzzing;
use husk::oci::{self, config::Config};
use husk::state_dir::record::Record;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    fuzzing::credentials(bytes);
    if let Ok(filter) = Profile::parse(bytes).and_then(|profile| profile.compile(1 << 21)) {
        // What the kernel takes has at most 4096 instructions of 8 bytes.
        assert!(filter.program.len() % 8 == 0 && filter.program.len() <= 4096 * 8);
    }
    if let Ok(record) = serde_json::from_slice::<Record>(bytes) {
        let text = serde_json::to_vec(&record).expect("it can be written");
        assert_eq!(serde_json::from_slice::<Record>(&text).ok(), Some(record));
    }
    if let Ok(config) = Config::parse(bytes) {
        let process = config.process.as_ref().map(|process| oci::guest::process(process, config.linux.seccomp.as_ref()));
        let container = oci::guest::container("c", &config, Path::new("/nonexistent"), None);
        let shape = oci::machine::Shape::of(&config);
        // What is accepted is on its way to the guest.
        if let (Some(Ok(process)), Ok((container, binds)), Ok(shape)) = (process, container, shape) {
            assert!(process.args.len() > 0 && container.mounts.len() >= binds.len() && shape.cpus > 0);
        }
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(mac) = text.parse::<MacAddress>() {
        assert_eq!(mac.to_string().parse::<MacAddress>().ok(), Some(mac));
    }
    let Ok(config) = MachineConfig::from_json(text) else { return };
    if config.validate().is_ok() {
        // Whatever is valid has a bus and a command line.
        let _ = (config.virtio_bus(), config.full_cmdline("", config.initrd.is_some()));
    }
    let text = serde_json::to_string(&config).expect("it can be written");
    assert_eq!(MachineConfig::from_json(&text).ok(), Some(config));
});

/// Writes the initial corpus: a configuration with one of everything, and the files of Docker and podman.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/settings"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let machine = r#"{"kernel":"k","memory_mib":512,"balloon":true,"cpus":2,"transport":"pci",
        "disks":[{"path":"d","readonly":true}],"vsock":{"socket":"s","cid":3},"networks":[]}"#;
    let docker = r#"{"auths":{"registry.example":{"auth":"dXNlcjpwYXNzd29yZA=="},"https://index.docker.io/v1/":{}},
        "credsStore":"none"}"#;
    let podman = r#"{"auths":{"registry.example/team/app":{"auth":"dXNlcjpwYXNzd29yZA=="}}}"#;
    let profile = r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],"syscalls":[{"names":["read"],
        "action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"valueTwo":1,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#;
    let container = r#"{"process":{"args":["a"],"cwd":"/","user":{"uid":1},"capabilities":{"bounding":["CAP_KILL"]},
        "rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2}]},"root":{"path":"r"},"annotations":{"io.husk.cpus":"2"},
        "mounts":[{"destination":"/proc","type":"proc","options":["nosuid","x=y"]}],"linux":{"namespaces":[{"type":"pid"}],
        "resources":{"memory":{"limit":1},"cpu":{"quota":1,"period":1,"cpus":"0-2"}},"devices":[{"path":"/d","type":"c"}]}}"#;
    for (name, text) in
        [("container", container), ("machine", machine), ("docker", docker), ("podman", podman), ("profile", profile)]
    {
        fs::write(corpus.join(name), text).expect("the corpus can be written");
    }
}
