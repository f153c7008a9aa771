//! What `husk run` sets in the guest: names, kernel parameters, and what the process may do.

use crate::{guests, shell};

#[test]
fn the_guest_has_the_names_parameters_and_rights_of_the_flags() {
    let dir = tempfile::tempdir().unwrap();
    let profile = dir.path().join("profile.json");
    let rules = r#"[{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }]"#;
    std::fs::write(&profile, format!(r#"{{ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": {rules} }}"#)).unwrap();
    let filter = format!("seccomp={}", profile.display());
    let flags = [
        &["--add-host", "db:192.0.2.7", "--domainname", "example.org", "-h", "box"][..],
        &["--sysctl", "net.core.somaxconn=77", "--shm-size", "5m", "--group-add", "4242", "--pids-limit", "9"],
        &["--cap-drop", "ALL", "--cap-add", "NET_BIND_SERVICE", "--security-opt", "no-new-privileges"],
        &["--security-opt", &filter],
    ];
    let script = "cat /etc/hosts /proc/sys/net/core/somaxconn; hostname -f; df -k /dev/shm; id -G; \
        cat /proc/self/status /proc/self/cgroup; mkdir /no; for i in 1 2 3 4 5 6 7 8 9; do sleep 9 & done; echo too many";
    let guests = guests!();
    let ended = shell(&guests, &flags.concat(), script);
    let text = ended.text();
    for wanted in [
        "192.0.2.7\tdb\n77\nbox.example.org\n",
        " 5120 ",
        "0 4242\n",
        "CapBnd:\t0000000000000400\n",
        "NoNewPrivs:\t1\n",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in {text}\n{}", ended.errors);
    }
    assert!(ended.errors.contains("'/no': Operation not supported"), "{}", ended.errors);
    assert!(!text.contains("too many") && ended.errors.contains("fork"), "{text}\n{}", ended.errors);
    // For a user who may get more privileges, the filter is installed before the user is.
    let ended = shell(&guests, &["--user", "1000", "--security-opt", &filter], "id -u; mkdir /tmp/no");
    assert!(ended.text().starts_with("1000\n") && ended.errors.contains("Operation not supported"), "{}", ended.errors);
    let refused = shell(&guests, &["--sysctl", "net.nothing=1"], "true");
    let reason = "husk: set the kernel parameter net.nothing to \"1\": No such file or directory\n";
    assert!(refused.expect(125).errors.contains(reason), "{}", refused.errors);
}
