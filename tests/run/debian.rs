//! A complete distribution as an image: Debian's programs work in a machine.
//!
//! It must be prepared in the store under the name `debian`, as `scripts/test` does.

use std::path::{Path, PathBuf};

use crate::guests::provided;
use crate::{Ended, finish, guests, husk_command, husk_with};

/// The store, or `None` with a visible message.
fn store(test: &str) -> Option<PathBuf> {
    provided("HUSK_TEST_STORE", "no store with a Debian root", test)
}

/// Runs a script in Debian.
fn debian(guests: &Path, store: &Path, script: &str) -> Ended {
    debian_with(guests, store, &[], script)
}

/// The same with flags.
fn debian_with(guests: &Path, store: &Path, flags: &[&str], script: &str) -> Ended {
    let mut command = husk_with(guests, "micro", "384M", &[flags, &["debian", "sh", "-euc", script]].concat());
    command.env("HUSK_DATA", store);
    finish(command, Vec::new())
}

macro_rules! debian {
    () => {{
        let guests = guests!();
        fn here() {}
        let Some(store) = store(std::any::type_name_of_val(&here)) else { return };
        (guests, store)
    }};
}

#[test]
fn apt_installs_and_removes_packages() {
    let (guests, store) = debian!();
    let script = r#"exec 2>&1; export DEBIAN_FRONTEND=noninteractive LC_ALL=C; cd /tmp
        mkdir -p p/DEBIAN p/usr/bin
        printf 'Package: greeter\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDepends: dash\nDescription: greets\n' >p/DEBIAN/control
        printf '#!/bin/sh\necho configured >/var/lib/greeted\n' >p/DEBIAN/postinst
        printf '#!/bin/sh\necho greetings\n' >p/usr/bin/greeter; chmod 755 p/usr/bin/greeter p/DEBIAN/postinst
        dpkg-deb --build p greeter.deb >/dev/null
        apt-get -qq install -y ./greeter.deb; greeter; cat /var/lib/greeted
        dpkg-query -W -f '${Package} ${Status}\n' greeter; dpkg --verify greeter && echo verified
        apt-get -qq remove -y greeter; ! command -v greeter; echo removed; apt-get check -qq && echo whole"#;
    let text = debian(&guests, &store, script).expect(0).text();
    for line in ["greetings", "configured", "greeter install ok installed", "verified", "removed", "whole"] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
}

#[test]
fn python_computes_starts_processes_and_threads() {
    let (guests, store) = debian!();
    let script = r#"exec python3 -c '
import hashlib, os, socket, subprocess, sys, tempfile, threading
sums = []
threads = [threading.Thread(target=lambda n: sums.append(sum(range(n))), args=(n,)) for n in range(1, 6)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(sorted(sums), hashlib.sha256(b"husk").hexdigest()[:8])
print(subprocess.run(["uname", "-s"], stdout=subprocess.PIPE).stdout.decode().strip(), os.getpid() > 1)
server = socket.create_server(("127.0.0.1", 0)); client = socket.create_connection(server.getsockname())
client.sendall(b"over loopback"); print(server.accept()[0].recv(100).decode())
with tempfile.NamedTemporaryFile() as file: file.write(b"x" * 1000000); file.flush(); print(os.stat(file.name).st_size)
sys.exit(42)'"#;
    let text = debian(&guests, &store, script).expect(42).text();
    let sum = &crate::image::run(std::process::Command::new("sh").args(["-c", "printf husk | sha256sum"]))[..8];
    assert_eq!(text, format!("[0, 1, 3, 6, 10] {sum}\nLinux True\nover loopback\n1000000\n"));
}

#[test]
fn a_compiler_makes_programs_that_run() {
    let (guests, store) = debian!();
    let script = r#"cd /root; printf '#include <stdio.h>\n#include <math.h>\nint main(int n, char **a) { printf("%%s %%.3f\\n", a[1], sqrt(2)); return n; }\n' >x.c
        tcc -o x x.c -lm; ./x compiled || echo $?"#;
    assert_eq!(debian(&guests, &store, script).expect(0).text(), "compiled 1.414\n2\n");
}

#[test]
fn file_capabilities_are_applied() {
    let (guests, store) = debian!();
    let script = "grep CapEff /proc/self/status; capable /proc/self/status | grep CapEff";
    let mut command = husk_with(&guests, "micro", "384M", &["-u", "1000", "debian", "sh", "-c", script]);
    command.env("HUSK_DATA", store);
    // CAP_CHOWN is the first capability.
    assert_eq!(finish(command, Vec::new()).expect(0).text(), "CapEff:\t0000000000000000\nCapEff:\t0000000000000001\n");
}

#[test]
fn tar_and_a_compiler_work_in_a_shared_folder() {
    let (guests, store) = debian!();
    let dir = tempfile::tempdir().unwrap();
    let script = r#"cd /work; mkdir tree; for n in 1 2 3; do mkdir tree/$n; for m in 1 2 3 4 5 6; do echo $n $m >tree/$n/$m; done; done
        ln -s 3/6 tree/link; ln tree/3/6 tree/hard; chmod 750 tree/2; tar cf tree.tar tree; mkdir again; tar xf tree.tar -C again
        diff -r tree again/tree && stat -c %a again/tree/2 && readlink again/tree/link && find again -type f | wc -l
        mv again/tree moved; rm -r tree again; ls
        printf 'int main(void) { return 42; }\n' >main.c; tcc -o main main.c; code=0; ./main || code=$?; echo $code"#;
    let ended = debian_with(&guests, &store, &["-v", &format!("{}:/work", dir.path().display())], script);
    assert_eq!(ended.expect(0).text(), "750\n3/6\n19\nmoved\ntree.tar\n42\n", "{}", ended.errors);
    assert_eq!(std::fs::read_to_string(dir.path().join("moved/link")).unwrap(), "3 6\n");
}

#[test]
fn no_process_of_the_image_is_left_in_a_warm_machine() {
    let (guests, store) = debian!();
    let machine = |command: &str, words: &[&str]| {
        let words = [&["--network", "none"], words].concat();
        let mut command = husk_command(command, &guests, "micro", "256M", &words);
        command.env("HUSK_DATA", &store);
        finish(command, Vec::new())
    };
    // Their linkers were asked for their libraries, which runs them.
    machine("warm", &["debian", "sh", "python3"]).expect(0);
    let script = "for p in /proc/[0-9]*; do test ! -e $p/exe || cat $p/comm; done";
    let ended = machine("run", &["--verbose", "debian", "sh", "-c", script]);
    assert!(ended.errors.contains("the machine starts from a warm image"), "{}", ended.errors);
    assert_eq!(ended.expect(0).text(), "init\nsh\n");
}
