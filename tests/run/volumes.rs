//! Volumes: of the image, anonymous and named ones, and those of other machines.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::image::{store, with_volumes};
use crate::{Ended, finish, guests, husk_run};

/// Machines of their own.
struct House {
    runtime: TempDir,
    guests: std::path::PathBuf,
    /// A volume with a name.
    volume: &'static str,
}

impl House {
    fn husk(&self, words: &[&str]) -> Ended {
        let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
        command.args(words).env("HUSK_DATA", store()).env("XDG_RUNTIME_DIR", self.runtime.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command, Vec::new())
    }

    fn run(&self, flags: &[&str], script: &str) -> Ended {
        let mut command = husk_run(&self.guests, &[flags, &[with_volumes(), "sh", "-c", script]].concat());
        command.env("XDG_RUNTIME_DIR", self.runtime.path());
        finish(command, Vec::new())
    }

    /// The names of volumes, without those of other tests.
    fn volumes(&self) -> Vec<String> {
        let text = self.husk(&["volume", "ls", "-q"]).expect(0).text();
        text.lines().filter(|name| *name == "tests-srv" || name.len() == 64).map(String::from).collect()
    }

    fn await_log(&self, wanted: &str) {
        let started = Instant::now();
        loop {
            let log = self.husk(&["logs", "one"]).text();
            if log.ends_with(wanted) {
                return;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "{log}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.husk(&["rm", "-f", "-v", "one"]);
        self.husk(&["volume", "rm", self.volume]);
    }
}

#[test]
fn volumes_begin_with_the_images_content_and_stay_with_their_machine() {
    let house = House { guests: guests::guests!(), runtime: tempfile::tempdir().unwrap(), volume: "tests-srv" };
    let script = "ls /srv; stat -c %a /tmp; cat /new/f 2>/dev/null; echo kept >/srv/f; echo anonymous >/new/f; echo .; sleep 1000";
    let flags = ["-d", "--name", "one", "-v", "tests-srv:/srv"];
    house.run(&flags, script).expect(0);
    house.await_log("not-a-program\n1777\n.\n");
    assert_eq!(house.volumes().len(), 3, "{:?}", house.volumes());
    let refused = house.husk(&["volume", "rm", "tests-srv"]);
    assert!(refused.expect(1).errors.contains("in use by machine one"), "{}", refused.errors);

    // Another machine mounts the same, and has a volume of its own, even with a read-only root.
    let script = "cat /srv/f /new/f; echo x >/srv/g; echo own >/own/f && cat /own/f; touch /x; stat -c %a /tmp";
    let flags = ["--rm", "--read-only", "--volumes-from", "one:ro", "-v", "/own", "--tmpfs", "/tmp:mode=711"];
    let other = house.run(&flags, script);
    assert_eq!(other.expect(0).text(), "kept\nanonymous\nown\n711\n");
    assert_eq!(other.errors.matches("Read-only file system").count(), 2, "{}", other.errors);

    // Its own volumes come back with it.
    house.husk(&["stop", "-t", "1", "one"]).expect(0);
    house.husk(&["volume", "prune", "-f", "--all"]);
    assert_eq!(house.volumes().len(), 3, "{:?}", house.volumes());
    house.husk(&["start", "one"]).expect(0);
    house.await_log("f\nnot-a-program\n1777\nanonymous\n.\n");
    house.husk(&["rm", "-f", "-v", "one"]).expect(0);
    assert_eq!(house.volumes(), ["tests-srv"]);
    house.husk(&["volume", "prune", "-f"]).expect(0);
    assert_eq!(house.volumes(), ["tests-srv"], "it has a name");
    a_volume_hides_part_of_a_folder_and_can_be_given_to_a_user(&house);
}

fn a_volume_hides_part_of_a_folder_and_can_be_given_to_a_user(house: &House) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(dir.path().join("modules")).unwrap();
    fs::write(dir.path().join("modules/of-the-host"), "").unwrap();
    let app = format!("{}:/srv", dir.path().display());
    // The image's content is not that of the folder which is mounted above it.
    let flags = ["--user", "user", "-v", &app, "-v", "/srv/modules", "-v", "tests-srv:/data:U,nocopy"];
    let script = "ls /srv/modules; touch /data/f; stat -c %U /data /data/f; ls /srv; grep -q ' /new ' /proc/mounts && echo mounted";
    assert_eq!(house.run(&flags, script).expect(0).text(), "user\nuser\nmodules\nmounted\n");
    assert_eq!(fs::read_dir(dir.path().join("modules")).unwrap().count(), 1);
    assert_eq!(house.volumes(), ["tests-srv"]);
}

#[test]
fn a_readonly_volume_begins_with_the_images_content() {
    let house = House { guests: guests::guests!(), runtime: tempfile::tempdir().unwrap(), volume: "tests-ro" };
    let script = "ls /srv; touch /srv/x; mount -o remount,rw /srv && touch /srv/x
        cd /; umount /srv; mount -t virtiofs husk0 /srv && touch /srv/x; ls /srv";
    for _ in 0..2 {
        let ended = house.run(&["--rm", "-v", "tests-ro:/srv:ro"], script);
        assert_eq!(ended.text(), "not-a-program\nnot-a-program\n", "{}", ended.errors);
        assert_eq!(ended.errors.matches("Read-only file system").count(), 3, "{}", ended.errors);
    }
    assert_eq!(house.run(&["--rm", "-v", "tests-ro:/srv"], "touch /srv/x; ls /srv").text(), "not-a-program\nx\n");
    // Also an anonymous one, of a machine that stays.
    house.run(&["--name", "one", "--mount", "type=volume,target=/srv,readonly"], script).expect(0);
    assert_eq!(house.husk(&["logs", "one"]).text(), "not-a-program\nnot-a-program\n");
    house.husk(&["volume", "rm", "tests-ro"]).expect(0);
    // With nothing to copy.
    assert_eq!(
        house.run(&["--rm", "-v", "tests-ro:/srv:ro,nocopy"], "ls /srv; touch /srv/x || echo no").text(),
        "no\n"
    );
}

#[test]
fn a_restart_leaves_volumes_as_they_are() {
    let house = House { guests: guests::guests!(), runtime: tempfile::tempdir().unwrap(), volume: "tests-again" };
    let flags = ["-d", "--name", "one", "--restart", "on-failure:1", "-v", "tests-again:/srv"];
    let flags = [&flags[..], &["--mount", "type=volume,target=/bin,readonly"]].concat();
    house.run(&flags, "grep -c changed /srv/not-a-program; echo changed >/srv/not-a-program; exit 1").expect(0);
    house.await_log("0\n1\n");
}

/// The numbers in a file, one per line, without an incomplete last one.
fn numbers(path: &std::path::Path) -> Vec<u32> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |at| &text[..at]);
    complete.lines().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn a_saved_machine_goes_on_in_its_folders() {
    let house = House { guests: guests::guests!(), runtime: tempfile::tempdir().unwrap(), volume: "tests-saved" };
    let dir = tempfile::tempdir().unwrap();
    let (work, away) = (dir.path().join("work"), dir.path().join("away"));
    fs::create_dir_all(work.join("deep")).unwrap();
    let log = work.join("deep/log");
    let await_more = || {
        let (before, started) = (numbers(&log).len(), Instant::now());
        while numbers(&log).len() < before + 3 {
            let waits = started.elapsed() < Duration::from_secs(60) && !house.husk(&["ps", "-q"]).text().is_empty();
            assert!(waits, "{}", house.husk(&["logs", "one"]).text());
            std::thread::sleep(Duration::from_millis(100));
        }
        let found = numbers(&log);
        assert!(found.iter().zip(1..).all(|(number, wanted)| *number == wanted), "{found:?}");
    };
    // An open file, a working directory in the folder, and a file that is looked up again and again. It can be saved between
    // a write and the read after it, and then reads what the host has written.
    let script = "cd /work/deep; exec 3>>log; echo 0 >last; n=0
        while :; do n=$((n + 1)); echo $n >&3; echo $n >last; read m <./last; [ \"$m\" = $n -o \"$m\" = host ] || exit 9; sleep 0.1; done";
    let shared = format!("{}:/work", work.display());
    house.run(&["-d", "--name", "one", "-v", &shared, "-v", "tests-saved:/srv"], script).expect(0);
    await_more();
    house.husk(&["suspend", "one"]).expect(0);
    let stopped = numbers(&log).len();
    fs::write(work.join("deep/last"), "host\n").unwrap();
    assert!(house.husk(&["volume", "rm", "tests-saved"]).expect(1).errors.contains("in use by machine one"));
    house.husk(&["start", "one"]).expect(0);
    await_more();
    assert!(numbers(&log).len() > stopped);
    // Into files, and back where the folder is.
    let snapshot = dir.path().join("snapshot");
    house.husk(&["snapshot", "--stop", "one", snapshot.to_str().unwrap()]).expect(0);
    house.husk(&["rm", "-f", "one"]);
    fs::rename(&work, &away).unwrap();
    let restore = ["restore", "-d", "--name", "one", snapshot.to_str().unwrap()];
    let missing = house.husk(&restore);
    assert!(missing.errors.contains("No such file or directory"), "{}", missing.errors);
    fs::create_dir(&work).unwrap();
    let other = house.husk(&restore);
    assert!(other.errors.contains("another one has taken its place"), "{}", other.errors);
    assert_eq!(other.errors.lines().count(), 1, "{}", other.errors);
    fs::remove_dir(&work).unwrap();
    fs::rename(&away, &work).unwrap();
    house.husk(&restore).expect(0);
    await_more();
}
