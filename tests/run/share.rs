//! Folders shared with the host: `-v`, `--mount` and volumes.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::guests::guests;
use crate::image::archive;
use crate::{finish, husk_run, husk_under, shell};

fn volume(source: &Path, rest: &str) -> String {
    format!("{}:{rest}", source.display())
}

/// `husk` with these words.
fn husk(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    command.args(words).env("HUSK_DATA", crate::image::store());
    command
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

#[test]
fn both_sides_see_what_the_other_writes() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("host"), "from the host\n").unwrap();
    let script = "cat /work/host; mkdir -p /work/a/b; echo from the guest >/work/a/b/guest; ln -s a/b /work/link
        cat /work/link/guest; ln /work/host /work/hard; mkfifo /work/fifo; mv /work/a/b/guest /work/moved; rm /work/host
        ls /work | tr '\\n' ' '";
    for (kernel, transport) in [("micro", "mmio"), ("micro", "pci"), ("stock", "mmio")] {
        let work = volume(dir.path(), "/work");
        let words = ["--transport", transport, "-v", &work, archive(), "sh", "-c", script];
        let text = finish(husk_under(&guests, kernel, &words), Vec::new()).expect(0).text();
        let expected = "from the host\nfrom the guest\na fifo hard link moved ";
        assert_eq!(text, expected, "{kernel}, {transport}");
        let at = |name: &str| dir.path().join(name);
        assert_eq!(fs::read_to_string(at("moved")).unwrap(), "from the guest\n");
        assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("a/b"));
        assert!(fs::metadata(at("fifo")).unwrap().file_type().is_fifo());
        fs::rename(at("hard"), at("host")).unwrap();
        for name in ["link", "fifo", "moved"] {
            fs::remove_file(at(name)).unwrap();
        }
        fs::remove_dir_all(at("a")).unwrap();
    }
}

#[test]
fn a_readonly_share_is_not_written_to() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "kept\n").unwrap();
    let script =
        "cat /work/f; echo x >/work/f; touch /work/new; rm /work/f; mount -o remount,rw /work && touch /work/new; true";
    let ended = shell(&guests, &["-v", &volume(dir.path(), "/work:ro")], script);
    assert_eq!(ended.expect(0).text(), "kept\n");
    assert!(ended.errors.contains("Read-only file system"), "{}", ended.errors);
    assert_eq!(fs::read_to_string(dir.path().join("f")).unwrap(), "kept\n");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn what_users_of_the_machine_make_is_theirs_on_the_host() {
    let guests = guests!();
    if !is_root() {
        return eprintln!("skipped: not root");
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let work = volume(dir.path(), "/work");
    let script = "umask 027; echo x >/work/f; mkdir /work/d; id -u";
    let text = shell(&guests, &["--user", "1234:2345", "-v", &work], script).expect(0).text();
    assert_eq!(text, "1234\n");
    let of = |name: &str| {
        let found = fs::metadata(dir.path().join(name)).unwrap();
        (found.uid(), found.gid(), found.mode() & 0o777)
    };
    assert_eq!((of("f"), of("d")), ((1234, 2345, 0o640), (1234, 2345, 0o750)));
    let script = "chown 7:8 /work/f; chmod 4711 /work/f; stat -c %u:%g:%a /work/f; cat /work/f";
    assert_eq!(shell(&guests, &["-v", &work], script).expect(0).text(), "7:8:4711\nx\n");
    assert_eq!(of("f"), (7, 8, 0o711));
}

#[test]
fn files_relative_paths_and_several_mounts_are_shared() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("conf"), "setting\n").unwrap();
    fs::write(dir.path().join("secret"), "secret\n").unwrap();
    let script = "cat /etc/conf; echo changed >/etc/conf; ls /etc | grep -c secret; echo new >/made/f
        echo cached >/made/cache/f; ls /made/cache; grep -c virtiofs /proc/mounts";
    let mut command = husk_run(
        &guests,
        &["-v", "./conf:/etc/conf", "-v", "./made/deep:/made", "--tmpfs", "/made/cache", archive(), "sh", "-c", script],
    );
    command.current_dir(dir.path());
    assert_eq!(finish(command, Vec::new()).text(), "setting\n0\nf\n2\n");
    assert_eq!(fs::read_to_string(dir.path().join("conf")).unwrap(), "changed\n");
    assert_eq!(fs::read_to_string(dir.path().join("made/deep/f")).unwrap(), "new\n");
    assert!(fs::read_dir(dir.path().join("made/deep/cache")).unwrap().next().is_none(), "it is the tmpfs's");
    let missing = format!("type=bind,source={},target=/x", dir.path().join("none").display());
    let ended = shell(&guests, &["--mount", &missing], "true");
    ended.expect(125);
    assert!(ended.errors.contains("No such file or directory"), "{}", ended.errors);
}

#[test]
fn two_machines_work_in_one_folder() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let work = volume(dir.path(), "/work");
    let script = "touch /work/$0.ready; until [ -e /work/a.ready -a -e /work/b.ready ]; do sleep 0.1; done
        for n in $(seq 50); do echo $0 $n >>/work/log; done; touch /work/$0.done
        until [ -e /work/a.done -a -e /work/b.done ]; do sleep 0.1; done; sleep 1.5; wc -l </work/log";
    let run = |name| {
        let words = ["-v", &work, archive(), "sh", "-c", script, name];
        finish(husk_run(&guests, &words), Vec::new())
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| run("b"));
        let outputs = [run("a").expect(0).text(), other.join().unwrap().expect(0).text()];
        assert_eq!(outputs, ["100\n", "100\n"], "appended lines of both");
    });
}

#[test]
fn what_is_written_later_is_on_the_host_when_the_file_is_closed() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("host"), "0123456789").unwrap();
    let script = "cd /work; echo one >log; echo two >>log; printf xy | dd of=host bs=1 seek=3 conv=notrunc 2>/dev/null
        i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done >many; touch done; read line; cat log host; wc -l <many";
    let work = volume(dir.path(), "/work:cache=writeback");
    let mut husk = husk_run(&guests, &["-i", "-v", &work, archive(), "sh", "-c", script]);
    let mut child = husk.stdin(std::process::Stdio::piped()).spawn().unwrap();
    let deadline = std::time::Instant::now() + crate::TIMEOUT;
    while !dir.path().join("done").exists() {
        assert!(std::time::Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!((read("log").as_str(), read("host").as_str()), ("one\ntwo\n", "012xy56789"));
    assert!(read("many").ends_with("line 299\n") && read("many").lines().count() == 300);
    drop(child.stdin.take());
    assert_eq!(crate::wait(child).expect(0).text(), "one\ntwo\n012xy56789300\n");
}

#[test]
fn what_processes_in_the_background_have_written_is_on_the_host_when_the_machine_ends() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let work = volume(dir.path(), "/work:cache=writeback");
    let script =
        "cd /work; (exec 3>late; head -c 9000000 /dev/zero >&3; echo end >&3; touch written; exec sleep 1000) &
        until [ -e written ]; do sleep 0.1; done";
    shell(&guests, &["-v", &work], script).expect(0);
    let late = fs::read(dir.path().join("late")).unwrap();
    assert!(late.len() == 9_000_004 && late.ends_with(b"\0end\n"), "{} bytes", late.len());
}

#[test]
fn a_volume_keeps_its_files_until_it_is_removed() {
    let guests = guests!();
    shell(&guests, &["-v", "tests-data:/data"], "echo kept >/data/f").expect(0);
    let text =
        shell(&guests, &["--mount", "source=tests-data,target=/d,readonly"], "cat /d/f; touch /d/g").expect(1).text();
    assert_eq!(text, "kept\n");
    let listed = finish(piped(husk(&["volume", "ls", "-q"])), Vec::new()).expect(0).text();
    assert!(listed.lines().any(|line| line == "tests-data"), "{listed}");
    finish(piped(husk(&["volume", "rm", "tests-data"])), Vec::new()).expect(0);
    let text = shell(&guests, &["-v", "tests-data:/data"], "ls /data | wc -l").expect(0).text();
    assert_eq!(text, "0\n");
    finish(piped(husk(&["volume", "rm", "tests-data"])), Vec::new()).expect(0);
}

fn piped(mut command: Command) -> Command {
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    command
}
