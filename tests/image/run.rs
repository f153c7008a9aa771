//! Image preparation by `husk run`, in a child process.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::line::Line;
use crate::server::{Asks, Registry, image, push};
use crate::tools::House;

/// A machine that will not be: there is no such kernel. What comes before has been done by then.
const NO_KERNEL: [&str; 3] = ["run", "--kernel", "./none"];

fn run<'a>(words: &[&'a str]) -> Vec<&'a str> {
    [&NO_KERNEL[..], words].concat()
}

#[test]
fn an_image_is_prepared_before_its_machine_is_created() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Nothing, false);
    push(&house, &registry, "app:1", false);
    let name = registry.name("app:1");
    for word in [name.as_str(), "./two.tar", "./one"] {
        let output = house.command(&run(&[word, "x"])).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125));
        assert!(error.ends_with("husk: open kernel ./none: No such file or directory\n"), "{error}");
    }
    assert_eq!(house.files("roots"), 3);
    house.root(&name);
}

#[test]
fn an_image_that_cannot_be_prepared_is_reported_once() {
    let house = House::new();
    house.sh("mkdir d; truncate -s 300M d/zeroes; tar -C d -c . | gzip -9 >bomb.tgz");
    let refused = |words: &[&str], why: &str| {
        let output = house.command(&run(words)).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{error}");
        assert!(error.lines().count() == 1 && error.contains(why), "{error}");
        assert_eq!(house.files("roots") + house.files("tmp"), 0);
    };
    refused(&["--max-size", "100M", "./bomb.tgz"], "unpacks to more than the free");
    refused(&["./none.tar"], "husk: prepare ./none.tar: No such file");
    refused(&["127.0.0.1:1/none"], "husk: pull 127.0.0.1:1/none:latest: ");
    refused(&["0123456789ab"], "no such image: 0123456789ab");
}

#[test]
fn a_file_does_not_shadow_an_image_name() {
    let house = House::new();
    house.sh("mkdir d; echo 1 >d/1; tar -C d -cf d.tar .");
    for name in ["debian:12", "team/app"] {
        assert!(house.husk(&["load", "d.tar", "--name", name]).status.success());
    }
    let root = house.root("debian:12");
    // A root, and a disk with a system of its own.
    house.sh("mkdir -p debian:12 team; echo planted >debian:12/x; truncate -s 1M team/app; printf '\\x55\\xaa' | dd of=team/app bs=1 seek=510 conv=notrunc");
    let failed = |word: &str| {
        let mut command = house.command(&run(&[word, "x"]));
        // Nobody is asked for what is not there.
        let output = command.env("HTTPS_PROXY", "http://127.0.0.1:1").output().unwrap();
        assert_eq!(output.status.code(), Some(125), "{word}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    for name in ["debian:12", "team/app"] {
        let error = failed(name);
        assert!(error.ends_with("husk: open kernel ./none: No such file or directory\n"), "{error}");
        assert_eq!(house.root(name), root);
    }
    assert_eq!(house.files("roots"), 1);
    house.sh("cp d.tar none.tar; mkdir -p sub/dir; echo 2 >sub/dir/2");
    let error = failed("none.tar");
    assert!(error.starts_with("husk: none.tar is taken as an image name; use ./none.tar for the file\n"), "{error}");
    assert!(error.contains("husk: pull none.tar:latest: ") && error.lines().count() == 2, "{error}");
    assert!(house.husk(&["inspect", "none.tar"]).stdout.is_empty());
    assert_eq!(house.files("roots"), 1);
    for path in ["./none.tar", "sub/dir", "."] {
        assert!(failed(path).ends_with("open kernel ./none: No such file or directory\n"), "{path}");
    }
}

#[test]
fn a_volume_is_not_mistaken_for_an_image() {
    let house = House::new();
    for (arguments, words) in [
        (&["-v", "a"][..], "no path in the machine"),
        (&["-itv", "name:b:ro"], "not a mount point"),
        (&["-v", "./a:/b:rox"], "unknown option"),
        (&["-v/a:/"], "not a mount point"),
        (&["-v=/a:b"], "not a mount point"),
        (&["--volume", "a b:/b"], "invalid volume name"),
        (&["--volume=:/b"], "no source"),
        (&["--mount", "type=bind,src=/a"], "no target"),
        (&["--mount", "type=bind,src=/a,dst=/b", "-v", "x"], "no path in the machine"),
        (&["--volumes-from", "x"], "no such machine"),
        (&["--volumes-from", "x:rox"], "unknown option"),
    ] {
        let output = house.command(&[&["run"], arguments, &["image", "command"]].concat()).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{arguments:?}: {error}");
        assert!(error.lines().count() == 1 && error.contains(words), "{arguments:?}: {error}");
    }
    // Others of Docker's that husk does not have are none of the image either.
    for option in ["--add-host", "--device", "--cap-add", "--gpus", "--link"] {
        let output = house.husk(&["run", option, "value", "image"]);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{option}: {error}");
        assert!(error.lines().count() == 1 && error.contains(option), "{option}: {error}");
    }
}

#[test]
fn unsupported_docker_options_are_reported_before_a_machine_starts() {
    let house = House::new();
    house.sh("mkdir one; echo 1 >one/1; echo '=x' >names");
    for (flags, words) in [
        (["-e", "=x"], "NAME=VALUE"),
        (["-e", ""], "NAME=VALUE"),
        (["--env-file", "names"], "NAME=VALUE"),
        (["--network", "host"], "use --network user"),
    ] {
        let output = house.command(&run(&[&flags[..], &["./one", "x"]].concat())).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{flags:?}: {error}");
        assert!(error.lines().last().is_some_and(|line| line.contains(words)), "{flags:?}: {error}");
    }
}

#[test]
fn a_persistent_disk_belongs_to_one_image() {
    let house = House::new();
    house.sh("mkdir one two; echo 1 >one/1; echo 2 >two/2");
    let keep = |name: &str, image: &str| {
        let output = house.command(&run(&["--keep", name, "--scratch", "64M", image, "x"])).output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    for (name, image, words) in [
        ("work", "./one", "open kernel ./none"),
        ("work", "./one", "open kernel ./none"),
        (
            "work",
            "./two",
            "disk work belongs to another image: use another name, or remove it with `husk disks --remove work`",
        ),
        ("more", "./two", "open kernel ./none"),
    ] {
        let error = keep(name, image);
        assert!(error.contains(words), "{name} {image}: {error}");
    }
    assert_eq!(house.files("disks"), 2);
}

/// The process that another one has started, when there is one.
fn child_of(parent: u32) -> u32 {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        let children = fs::read_to_string(&path).unwrap();
        if let Some(child) = children.split_whitespace().next() {
            return child.parse().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it starts no other");
}

#[test]
fn a_pull_by_run_is_a_child_process_that_ends_with_it() {
    let house = House::new();
    image(&house);
    let registry = Registry::start(&house, Asks::Nothing, false);
    push(&house, &registry, "app:1", false);
    let slow = Line::start(registry.port, i64::MAX, Duration::from_millis(100));
    let name = format!("127.0.0.1:{}/app:1", slow.port);
    let mut husk = house.command(&run(&[&name])).stderr(Stdio::null()).spawn().unwrap();
    let child = child_of(husk.id());
    while slow.bytes() < 1 << 20 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let threads = |process: u32| fs::read_dir(format!("/proc/{process}/task")).map_or(0, Iterator::count);
    let copy = child_of(child);
    let confined = child_of(copy);
    assert_eq!([husk.id(), child, copy].map(threads), [1; 3], "they read nothing from the registry");
    assert!(threads(confined) > 1, "it downloads");
    let status = fs::read_to_string(format!("/proc/{confined}/status")).unwrap();
    assert!(status.contains("Seccomp:\t2\n") && status.contains("NoNewPrivs:\t1\n"), "{status}");
    husk.kill().unwrap();
    husk.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let is_gone =
        |process| fs::read_to_string(format!("/proc/{process}/stat")).map_or(true, |stat| stat.contains(") Z "));
    while ![child, copy, confined].into_iter().all(is_gone) {
        assert!(Instant::now() < deadline, "it goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}
