//! The process in the guest: command, user, working directory, and exit code.

use crate::image::archive;
use crate::{Ended, finish, guests, husk_run, husk_under, shell};

fn run(guests: &std::path::Path, words: &[&str]) -> Ended {
    finish(husk_run(guests, words), Vec::new())
}

#[test]
fn the_exit_code_is_the_commands() {
    let guests = guests!();
    run(&guests, &[archive(), "true"]).expect(0);
    run(&guests, &[archive(), "false"]).expect(1);
    shell(&guests, &[], "exit 82").expect(82);
    shell(&guests, &[], "kill -KILL $$").expect(137);
}

#[test]
fn a_real_time_signal_is_reported() {
    let guests = guests!();
    shell(&guests, &[], "kill -34 $$").expect(162);
    shell(&guests, &[], "sleep 1000 & kill -64 $!; wait $!; echo $?; kill -32 $$").expect(160);
}

#[test]
fn missing_and_non_executable_commands_have_codes_and_messages() {
    let guests = guests!();
    for (command, code, word) in [
        ("frobnicate", 127, "husk: frobnicate: not found in PATH\n"),
        ("/bin/frobnicate", 127, "husk: /bin/frobnicate: no such file"),
        ("/srv/not-a-program", 126, "husk: /srv/not-a-program: permission denied\n"),
    ] {
        let ended = run(&guests, &[archive(), command]);
        assert!(ended.expect(code).errors.contains(word), "{}", ended.errors);
    }
    let ended = run(&guests, &[archive(), "--", ""]);
    assert!(ended.expect(127).errors.contains("husk: \"\": the command is empty\n"), "{}", ended.errors);
    let ended = run(&guests, &["--user", "nobody-here", archive(), "true"]);
    assert!(ended.expect(125).errors.contains("\"nobody-here\""), "{}", ended.errors);
}

#[test]
fn the_image_defines_the_command_unless_overridden() {
    let guests = guests!();
    assert_eq!(run(&guests, &[archive()]).expect(0).text(), "the image says so\n");
    assert_eq!(run(&guests, &[archive(), "--", "echo", "-n", "a b"]).expect(0).text(), "a b");
    assert_eq!(run(&guests, &["--entrypoint", "echo", archive(), "x"]).expect(0).text(), "x\n");
    let ended = shell(&guests, &[], "echo $FROM_IMAGE; pwd; id -u; echo $HOME; cat /etc/hostname; echo $HOSTNAME");
    let text = ended.expect(0).text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..4], ["yes", "/srv", "0", "/root"]);
    assert_eq!(lines[4], lines[5]);
}

#[test]
fn user_and_working_directory_are_applied() {
    let flags = ["-u", "user", "-w", "/not/there/yet", "-e", "A=b c", "-e", "FROM_IMAGE=no", "-h", "box"];
    let script = "id; pwd; echo \"$A $FROM_IMAGE $HOME\"; hostname; cat /etc/hosts; echo stdout >/dev/stdout";
    let text = shell(&guests!(), &flags, script).expect(0).text();
    assert!(text.contains("uid=1000(user) gid=1000(user) groups=10(wheel),63(audio),1000(user)"), "{text}");
    assert!(text.contains("\n/not/there/yet\nb c no /home/user\nbox\n127.0.0.1\tlocalhost\n"), "{text}");
    assert!(text.contains("127.0.1.1\tbox\n") && text.ends_with("stdout\n"), "{text}");
}

#[test]
fn environment_files_and_host_variables_are_passed_on() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("env");
    std::fs::write(&file, "# none\nA=from file\n\nHERE\nNOT_HERE\nFROM_IMAGE=file\n").unwrap();
    let file = file.to_str().unwrap();
    let words = ["--env-file", file, "-e", "FROM_IMAGE=flag", "-e", "HERE_TOO", "--name", "box", "--rm", archive()];
    let script = ["sh", "-c", "echo $A,$HERE,$HERE_TOO,${NOT_HERE-unset},$FROM_IMAGE; hostname"];
    let mut command = husk_run(&guests, &[&words[..], &script].concat());
    command.env("HERE", "here").env("HERE_TOO", "here too").env_remove("NOT_HERE");
    assert_eq!(finish(command, Vec::new()).expect(0).text(), "from file,here,here too,unset,flag\nbox\n");
}

#[test]
fn a_machine_has_the_environment_of_a_container() {
    let script = "for place in / /proc /sys /dev /dev/pts /dev/shm /dev/mqueue /sys/fs/cgroup; do
            grep \" $place \" /proc/mounts | cut -d ' ' -f 2,3; done
        mkdir /sys/fs/cgroup/x && sh -c 'echo $$ >/sys/fs/cgroup/x/cgroup.procs && cat /proc/self/cgroup'
        stat -c %a /tmp /dev/shm; echo x >/dev/null; echo fd >/dev/fd/1; ping -c 1 -q 127.0.0.1 >/dev/null && echo loopback
        nproc; sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    let text = shell(&guests!(), &["--cpus", "1.5"], script).expect(0).text();
    let (rest, memory) = text.trim_end().rsplit_once('\n').unwrap();
    let expected = "/ overlay\n/proc proc\n/sys sysfs\n/dev devtmpfs\n/dev/pts devpts\n/dev/shm tmpfs\n/dev/mqueue mqueue\n/sys/fs/cgroup cgroup2\n\
        0::/x\n1777\n1777\nfd\nloopback\n2";
    assert_eq!(rest, expected);
    // 96 MiB, minus what the kernel uses.
    assert!((64 << 10..=96 << 10).contains(&memory.parse().unwrap()), "{memory} KiB");
}

#[test]
fn ulimits_and_tmpfs_mounts_are_applied() {
    let flags = ["--ulimit", "nofile=64:128", "--tmpfs", "/cache:size=1m,mode=1750", "--tmpfs", "/opt/x"];
    let script = "ulimit -n; ulimit -Hn; stat -c %a /cache; df -k /cache | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2
        dd if=/dev/zero of=/cache/big bs=64k count=32 2>/dev/null || echo full; touch /opt/x/y && echo made";
    assert_eq!(shell(&guests!(), &flags, script).expect(0).text(), "64\n128\n1750\n1024\nfull\nmade\n");
}

#[test]
fn changes_are_discarded_and_a_read_only_root_rejects_them() {
    let guests = guests!();
    let script = "for n in $(seq 10000); do : >/srv/$n || exit 9; done; ls /srv | wc -l; rm /bin/vi; ls /bin/vi";
    let ended = shell(&guests, &[], script);
    assert_eq!(ended.expect(1).text(), "10001\n");
    let script = "ls /srv /bin/vi; touch /srv/x; touch /dev/shm/x && echo memory; cat /etc/hostname";
    let ended = shell(&guests, &["--read-only", "-h", "box"], script);
    assert_eq!(ended.expect(0).text(), "/bin/vi\n\n/srv:\nnot-a-program\nmemory\nbox\n");
    assert!(ended.errors.contains("Read-only file system"), "{}", ended.errors);
}

#[test]
fn changes_are_stored_on_scratch_and_persistent_disks() {
    let guests = guests!();
    let script = "dd if=/dev/zero of=/srv/big bs=1M count=96 2>/dev/null && rm /srv/not-a-program && ls /srv";
    assert_eq!(shell(&guests, &["--scratch", "256M"], script).expect(0).text(), "big\n");
    let keep = ["--keep", "work", "--scratch", "64M"];
    shell(&guests, &keep, "echo once >>/srv/log; chmod 700 /srv; exit 3").expect(3);
    run(&guests, &["--keep", "work", archive(), "sh", "-c", "echo twice >>/srv/log"]).expect(0);
    let text = shell(&guests, &["--keep", "work"], "cat /srv/log; stat -c %a /srv; ls /srv").expect(0).text();
    assert_eq!(text, "once\ntwice\n700\nlog\nnot-a-program\n");
    let disk = crate::image::store().join("disks/work.ext4");
    // Consistent, without a journal to replay.
    let state = crate::image::run(std::process::Command::new("e2fsck").args(["-f", "-n"]).arg(disk));
    assert!(!state.contains("recover"), "{state}");
}

#[test]
fn a_full_disk_is_reported_to_the_command_and_stays_intact() {
    let guests = guests!();
    let script =
        "dd if=/dev/zero of=/srv/big bs=1M; rm /srv/big && echo more >/srv/log && sync && cat /srv/log; exit 5";
    let ended = shell(&guests, &["--keep", "full", "--scratch", "32M"], script);
    ended.expect(5);
    assert!(ended.errors.contains("No space left on device") && ended.text() == "more\n", "{}", ended.errors);
    run(&guests, &["--keep", "full", archive(), "cat", "/srv/log"]).expect(0);
    let disk = crate::image::store().join("disks/full.ext4");
    crate::image::run(std::process::Command::new("e2fsck").args(["-f", "-n"]).arg(disk));
}

#[test]
fn a_stock_kernel_gets_the_modules_it_needs() {
    let guests = guests!();
    let words = ["-i", archive(), "sh", "-c", "uname -r; wc -c; echo to stderr >&2; exit 3"];
    let ended = finish(husk_under(&guests, "stock", &words), vec![7; 1 << 20]);
    let text = ended.expect(3).text();
    assert!(text.contains("-cloud-") && text.ends_with("\n1048576\n"), "{text}");
    assert!(ended.errors.ends_with("to stderr\n"), "{}", ended.errors);
}

#[test]
fn the_hosts_own_kernel_and_its_packed_modules_are_found() {
    let guests = guests!();
    let release = crate::image::run(std::process::Command::new("uname").arg("-r"));
    let kernel = format!("/boot/vmlinuz-{}", release.trim());
    if std::fs::File::open(&kernel).is_err() {
        eprintln!("SKIPPED: there is no {kernel} to read; in the lab there is");
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    for _ in 0..2 {
        let mut command = husk_under(&guests, "host", &[archive(), "uname", "-r"]);
        let ended = {
            command.env("XDG_CACHE_HOME", cache.path());
            finish(command, Vec::new())
        };
        assert_eq!(ended.expect(0).text(), release);
    }
}
