//! The image store under kills, concurrency and cleanup.

use std::fs::{self, File};
use std::process::Stdio;
use std::time::Duration;

use crate::parts::{config, tar};
use crate::tools::{House, assert_same, is_root, odd_tree};

/// An archive that takes some tenths of a second to load.
fn archive(house: &House) {
    house.sh(
        "mkdir -p big; for i in {1..20}; do head -c 3M /dev/urandom | base64 >big/$i; done; tar --format=pax -C big -cf big.tar .",
    );
}

#[test]
fn a_killed_process_leaves_a_usable_store() {
    let house = House::new();
    archive(&house);
    for delay_ms in [1, 5, 20, 50, 80, 120, 180, 250, 350, 500] {
        let mut child =
            house.command(&["load", "big.tar", "-n", "x"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        let _ = child.kill();
        child.wait().unwrap();
        assert!(house.husk(&["images"]).status.success());
    }
    let root = house.load("big.tar");
    assert!(house.husk(&["prune"]).status.success());
    assert_eq!((house.files("tmp"), house.files("roots")), (0, 1));
    if is_root() {
        assert_same(&house.path("big"), &root);
    }
}

#[test]
fn concurrent_processes_build_an_image_once() {
    let house = House::new();
    archive(&house);
    let name = |i: usize| format!("name-{i}");
    let children: Vec<_> = (0..4)
        .map(|i| house.command(&["load", "big.tar", "--name", &name(i)]).stdout(Stdio::null()).spawn().unwrap())
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!((house.files("tmp"), house.files("roots")), (0, 1));
    let roots: Vec<_> = (0..4).map(|i| house.root(&name(i))).collect();
    assert!(roots.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn an_image_in_use_is_kept_until_its_last_name_is_removed() {
    let house = House::new();
    house.sh("mkdir d; echo 1 >d/1; tar -C d -cf d.tar .");
    let root = house.load("d.tar");
    assert!(house.husk(&["load", "d.tar", "--name", "other"]).status.success());
    // Simulates a running machine.
    let in_use = File::open(&root).unwrap();
    in_use.lock_shared().unwrap();
    let output = house.husk(&["rmi", "loaded"]);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("Untagged"), "{output:?}");
    let output = house.husk(&["rmi", "other"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is in use by a running machine"), "{output:?}");
    assert!(house.husk(&["prune"]).status.success());
    assert!(root.exists());
    drop(in_use);
    assert!(house.husk(&["rmi", "other"]).status.success());
    assert_eq!(house.files("roots"), 0);
}

#[test]
fn an_image_with_several_names_is_removed_name_by_name_or_by_force() {
    let house = House::new();
    house.sh("mkdir d; echo 1 >d/1; tar -C d -cf d.tar .");
    house.load("d.tar");
    let id = String::from_utf8(house.husk(&["images", "--quiet"]).stdout).unwrap().trim().to_owned();
    let done = |words: &[&str]| {
        let output = house.husk(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for (source, target) in [("loaded", "localhost:5000/a/b:1"), (&id, "two"), (&id[..5], "three"), ("./d.tar", "four")]
    {
        assert_eq!(done(&["tag", source, target]), "");
    }
    let refused = house.husk(&["rmi", &id]);
    assert_eq!((refused.status.code(), refused.stdout.len()), (Some(1), 0));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("two:latest, localhost:5000/a/b:1"), "{refused:?}");
    assert_eq!(done(&["rmi", "two"]), "Untagged: two:latest\n");
    assert_eq!(house.husk(&["tag", "two", "five"]).status.code(), Some(1));
    assert_eq!(house.husk(&["tag", "three", &format!("x@sha256:{}", "0".repeat(64))]).status.code(), Some(1));
    let removed = done(&["rmi", "-f", &id]);
    assert!(removed.starts_with("Untagged: ") && removed.contains(&format!("\nDeleted: sha256:{id}")), "{removed}");
    assert_eq!((removed.lines().count(), house.files("roots")), (5, 0), "{removed}");
}

#[test]
fn a_loaded_archive_is_not_read_again() {
    let house = House::new();
    archive(&house);
    std::thread::sleep(Duration::from_millis(1100));
    let root = house.load("big.tar");
    let loaded = fs::metadata(house.path("data/index.json")).unwrap().modified().unwrap();
    assert_eq!(house.load("big.tar"), root);
    assert_eq!(fs::metadata(house.path("data/index.json")).unwrap().modified().unwrap(), loaded, "nothing was new");
    fs::write(house.path("big.tar"), "no archive").unwrap();
    assert_eq!(house.husk(&["load", "big.tar"]).status.code(), Some(1));
}

#[test]
fn a_tree_with_all_file_types_survives_two_round_trips() {
    if !is_root() {
        return;
    }
    let house = House::new();
    let tree = odd_tree(&house, "tree");
    house.sh("tar --xattrs --xattrs-include='*' --format=pax -C tree -cf a.tar .; mkdir copy; tar --xattrs --xattrs-include='*' -C copy -xf a.tar");
    assert_same(&tree, &house.load("./copy"));
}

#[test]
fn images_are_listed_and_pruned_with_their_sizes() {
    let house = House::new();
    house.sh("mkdir d; head -c 3M /dev/urandom >d/1; tar -C d -cf d.tar .; cp d.tar nameless.tar; head -c 1M /dev/urandom >d/2; tar -C d -cf d.tar .");
    house.load("d.tar");
    assert_eq!(
        house.command(&["run", "--kernel", "./none", "./nameless.tar", "x"]).output().unwrap().status.code(),
        Some(125)
    );
    let list = String::from_utf8(house.husk(&["images"]).stdout).unwrap();
    let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE", "LAYERS", "WARM"]);
    let row = |name: &str| list.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name}: {list}"));
    assert!(row("loaded ").contains(" 4.0") && row("nameless.tar>").contains(" 3.0"), "{list}");
    let json: serde_json::Value = serde_json::from_slice(&house.husk(&["images", "--json"]).stdout).unwrap();
    let sizes: Vec<u64> =
        json.as_array().unwrap().iter().map(|image| image["Husk"]["RootBytes"].as_u64().unwrap()).collect();
    assert!(sizes.iter().all(|size| (3 << 20..5 << 20).contains(size)), "{sizes:?}");

    assert_eq!(house.husk(&["images", "-a"]).stdout, list.as_bytes());
    let printed = String::from_utf8(house.husk(&["prune", "-f"]).stdout).unwrap();
    assert!(printed.starts_with("Removed 1 images and 1 files, reclaimed 3.0"), "{printed}");
    assert!(house.husk(&["rmi", "loaded"]).status.success());
    assert_eq!(house.husk(&["images", "--quiet"]).stdout, b"");
    assert_eq!(house.files("roots"), 0);
}

#[test]
fn images_are_filtered_and_formatted_as_by_docker() {
    let house = House::new();
    let (layer, list) =
        (tar(&[("bin/sh", b"x")]), r#"[{"Config":"c.json","RepoTags":["a/web:1","db:2"],"Layers":["l.tar"]}]"#);
    let config = String::from_utf8(config(&[&layer])).unwrap();
    let config = config.replace(r#"{"Cmd":["/bin/sh"]}"#, r#"{"Cmd":["a","b"],"Labels":{"k":"v\u001b"}}"#);
    let archive = tar(&[("c.json", config.as_bytes()), ("l.tar", &layer), ("manifest.json", list.as_bytes())]);
    fs::write(house.path("x.tar"), archive).unwrap();
    house.sh("mkdir d; echo 1 >d/1; tar -C d -cf d.tar .");
    assert!(house.husk(&["load", "-i", "x.tar"]).status.success());
    house.load("d.tar");
    let printed = |words: &[&str]| {
        let output = house.husk(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let names = |words: &[&str]| {
        let mut names: Vec<String> = printed(&[&["images", "--format", "{{.Repository}}:{{.Tag}}"], words].concat())
            .lines()
            .map(str::to_owned)
            .collect();
        names.sort();
        names.join(" ")
    };
    assert_eq!(names(&[]), "a/web:1 db:2 loaded:latest");
    assert_eq!((names(&["db"]), names(&["--filter", "reference=*/web:?"])), ("db:2".into(), "a/web:1".into()));
    assert_eq!((names(&["-f", "label=k"]), names(&["-f", "label=k=x"])), ("a/web:1 db:2".into(), String::new()));
    assert_eq!((names(&["-f", "dangling=true"]), names(&["-f", "dangling=false"]).len()), (String::new(), 26));
    let table = printed(&["images", "db", "--format", "table {{.Repository}}\\t{{.Tag}}\\t{{.Label \"k\"}}"]);
    assert_eq!(table, "REPOSITORY  TAG  LABEL\ndb          2    v\u{fffd}\n");
    let line = printed(&["images", "db", "--format", "{{json .}}"]);
    assert!(
        line.lines().count() == 1 && line.contains(r#""Labels":"k=v\u001b""#) && line.contains(r#""Tag":"2""#),
        "{line}"
    );
    // Once for all of its names.
    assert_eq!(printed(&["images", "-q", "-f", "label=k"]).lines().count(), 1);
    let whole = printed(&["images", "-q", "--no-trunc", "db"]);
    assert!(whole.starts_with("sha256:") && whole.len() == 72, "{whole}");
    let format = "{{.Id}} {{join .RepoTags \",\"}} {{index .Config.Labels \"k\"}} {{range .Config.Cmd}}<{{.}}>{{end}} {{len .RootFS.Layers}}";
    assert_eq!(
        printed(&["inspect", "-f", format, "db:2"]),
        format!("{} a/web:1,db:2 v\u{fffd} <a><b> 1\n", whole.trim())
    );
    assert_eq!(house.husk(&["inspect", "--type", "volume", "db:2"]).status.code(), Some(1));
    assert_eq!(house.husk(&["inspect", "-f", "{{.No}}", "db:2"]).status.code(), Some(1));
    for wrong in [&["images", "-f", "color=red"][..], &["images", "-f", "x"], &["images", "--format", "{{.ID"]] {
        assert_eq!(house.husk(wrong).status.code(), Some(2), "{wrong:?}");
    }

    assert_eq!(printed(&["volume", "create", "data", "other"]), "data\nother\n");
    assert_eq!(printed(&["volume", "ls", "-q", "--filter", "name=da"]), "data\n");
    assert_eq!(printed(&["inspect", "-f", "{{.Driver}} {{.Husk.InUse}}", "other"]), "local false\n");
    printed(&["import", "d.tar"]);
    assert_eq!(names(&["-f", "dangling=true"]), "<none>:<none>");
}

#[test]
fn progress_is_shown_only_on_a_terminal() {
    let house = House::new();
    // Large enough that the progress bar appears on any processor.
    house.sh("mkdir d; head -c 200M /dev/urandom >d/1; tar -C d -cf d.tar .");
    let husk = env!("CARGO_BIN_EXE_husk");
    let mut command = std::process::Command::new("script");
    command.args(["--quiet", "--return", "--command", &format!("{husk} load d.tar --name x"), "/dev/null"]);
    house.surround(&mut command);
    let shown = command.env("TERM", "xterm").output().unwrap();
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.status.success() && text.contains("MiB/200.") && text.contains("MiB/s"), "{text}");
    house.sh("rm -r data");
    assert_eq!(house.husk(&["load", "d.tar"]).stderr, b"");
}

#[test]
fn an_archive_is_loaded_with_its_names_whatever_was_loaded_before() {
    let house = House::new();
    let layer = tar(&[("bin/sh", b"x")]);
    let config = config(&[&layer]);
    let archive = |name: &str| {
        let list = format!(r#"[{{"Config":"c.json","RepoTags":["{name}"],"Layers":["l.tar"]}}]"#);
        tar(&[("c.json", &config), ("l.tar", &layer), ("manifest.json", list.as_bytes())])
    };
    for name in ["one", "two"] {
        fs::write(house.path(&format!("{name}.tar")), archive(&format!("{name}:1"))).unwrap();
    }
    // A file is recognized only some time after its last change.
    std::thread::sleep(Duration::from_millis(1100));
    for name in ["one", "two", "one", "two", "two"] {
        let output = house.husk(&["load", &format!("{name}.tar")]);
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(printed.starts_with(&format!("Loaded image: {name}:1\n")), "{printed}");
        assert!(house.husk(&["rmi", &format!("{name}:1")]).status.success());
    }
}

#[test]
fn images_are_removed_from_a_full_disk() {
    if !is_root() {
        return;
    }
    let house = House::new();
    house.sh("mkdir data; mount -t tmpfs -o size=4m none data");
    fs::write(house.path("x.tar"), tar(&[("bin/sh", &[b'x'; 300_000])])).unwrap();
    house.load("x.tar");
    house.sh("cat /dev/zero > data/filler 2>/dev/null || true");
    let output = house.husk(&["rmi", "loaded"]);
    let left = (house.files("roots"), house.path("data/index.part").exists());
    house.sh("umount data");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(left, (0, false));
}
