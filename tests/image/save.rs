//! Images that are saved, and loaded again by husk and by others.

use std::fs;

use crate::parts::{config, tar};
use crate::tools::{House, assert_same, is_root};

fn ok(house: &House, words: &[&str]) -> String {
    let output = house.husk(words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// An archive of two images that share a layer; the second has no name.
fn two_images(house: &House) {
    let (base, top) = (tar(&[("bin/sh", b"x")]), tar(&[("etc/motd", b"hello")]));
    let (one, two) = (config(&[&base]), config(&[&base, &top]));
    let list = r#"[{"Config":"1.json","RepoTags":["one:1","also/one:2"],"Layers":["base.tar"]},
        {"Config":"2.json","RepoTags":null,"Layers":["base.tar","top.tar"]}]"#;
    let parts = [
        ("1.json", &one[..]),
        ("2.json", &two),
        ("base.tar", &base),
        ("top.tar", &top),
        ("manifest.json", list.as_bytes()),
    ];
    fs::write(house.path("two.tar"), tar(&parts)).unwrap();
}

#[test]
fn all_images_of_an_archive_are_loaded_and_saved_unchanged() {
    let house = House::new();
    two_images(&house);
    let loaded = ok(&house, &["load", "-i", "two.tar"]);
    assert!(loaded.starts_with("Loaded image: one:1\nLoaded image: also/one:2\nLoaded image ID: sha256:"), "{loaded}");
    let two = loaded.trim().rsplit(' ').next().unwrap().to_owned();
    assert_eq!((house.files("blobs"), house.files("configs")), (2, 2));
    let refused = house.husk(&["load", "two.tar", "--name", "x"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("it has 2 images"), "{refused:?}");

    ok(&house, &["tag", &two, "two"]);
    ok(&house, &["save", "-o", "saved.tar", "one:1", "also/one:2", "two"]);
    ok(&house, &["save", "--format", "oci-archive", "-o", "oci.tar", "two", &two]);
    let ids = |house: &House| ["one:1", "also/one:2", "two"].map(|name| house.inspect(name)["Id"].to_string());
    let other = House::new();
    for archive in ["saved.tar", "oci.tar"] {
        fs::copy(house.path(archive), other.path(archive)).unwrap();
    }
    assert_eq!(ok(&other, &["load", "-i", "saved.tar"]).lines().count(), 3);
    assert_eq!(ids(&other), ids(&house));
    // A layout of one image with one name.
    ok(&other, &["rmi", "two"]);
    assert_eq!(ok(&other, &["load", "-qi", "oci.tar"]), "Loaded image: two:latest\n");
    assert_eq!(ids(&other), ids(&house));
    other.sh("skopeo inspect docker-archive:saved.tar:also/one:2 >/dev/null; skopeo copy -q docker-archive:saved.tar:two:latest oci:copy:x
        skopeo copy -q oci-archive:oci.tar oci:copy:y; umoci unpack --rootless --image copy:y bundle; grep hello bundle/rootfs/etc/motd");

    // Layers that are gone cannot be saved.
    ok(&house, &["prune", "--layers"]);
    assert_eq!((house.files("blobs"), house.files("configs")), (0, 2));
    let refused = house.husk(&["save", "-o", "saved.tar", "two"]);
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("load it with `husk load`, or pull it again"),
        "{refused:?}"
    );
    assert_eq!(
        fs::metadata(house.path("saved.tar")).unwrap().len(),
        fs::metadata(other.path("saved.tar")).unwrap().len()
    );
    assert!(!house.path("saved.tar.part").exists());
    ok(&house, &["load", "-i", "two.tar"]);
    ok(&house, &["save", "-o", "/dev/null", "two"]);
    ok(&house, &["rmi", "-f", "two", &house.inspect("one:1")["Id"].as_str().unwrap()[7..]]);
    assert_eq!((house.files("blobs"), house.files("configs"), house.files("roots")), (0, 0, 0));
}

#[test]
fn several_images_are_loaded_from_standard_input_and_from_a_layout() {
    let house = House::new();
    two_images(&house);
    house.sh("umoci init --layout layout; umoci new --image layout:a; umoci new --image layout:b; umoci config --image layout:b --config.cmd x");
    assert_eq!(ok(&house, &["load", "layout"]), "Loaded image: a:latest\nLoaded image: b:latest\n");
    let husk = env!("CARGO_BIN_EXE_husk");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &format!("gzip -c two.tar | {husk} load | wc -l; {husk} save one:1 | {husk} load")]);
    house.surround(&mut command);
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "3\nLoaded image: one:1\n", "{output:?}");
}

#[test]
fn a_root_filesystem_becomes_an_image_with_a_history() {
    let house = House::new();
    house.sh(
        "mkdir -p d/bin; echo 1 >d/bin/sh; head -c 1000000 /dev/zero >d/zeros; tar --format=pax -C d -czf d.tar.gz .; tar --format=pax -C d -cf d.tar .",
    );
    let words = ["import", "-c", "CMD [\"sh\", \"-l\"]", "--change", "ENV A=b", "-m", "mine", "d.tar.gz", "base:1"];
    let id = ok(&house, &words).trim().to_owned();
    let image = house.inspect("base:1");
    assert_eq!((image["Id"].as_str(), image["Config"]["Cmd"][1].as_str()), (Some(&*id), Some("-l")));
    assert_eq!(
        (image["Config"]["Env"][0].as_str(), image["RootFS"]["Layers"].as_array().unwrap().len()),
        (Some("A=b"), 1)
    );
    let history = ok(&house, &["history", "--format", "{{.ID}} {{.Comment}} {{.Size}}", "--no-trunc", "base:1"]);
    assert_eq!(history, format!("{id} mine 976.56 KiB\n"), "the size of its files");
    // Its root filesystem exists already.
    ok(&house, &["import", "d.tar.gz", "again:1"]);
    assert_eq!(ok(&house, &["history", "--format", "{{.Size}}", "again:1"]), "976.56 KiB\n");
    if is_root() {
        assert_same(&house.path("d"), &house.root("base:1"));
    }
    let husk = env!("CARGO_BIN_EXE_husk");
    house.sh(&format!("HUSK_DATA=data {husk} import - plain <d.tar; HUSK_DATA=data {husk} save plain | tar -t >list; grep -c blobs/sha256 list | grep 3"));
    for (words, error) in [
        (&["import", "https://example.org/x.tar"][..], "curl -L"),
        (&["import", "-c", "RUN x", "d.tar"], "invalid change"),
        (&["import", "nothing.tar"], "open nothing.tar"),
    ] {
        let refused = house.husk(words);
        assert!(String::from_utf8_lossy(&refused.stderr).contains(error), "{words:?}: {refused:?}");
    }
    // A bare root filesystem has no layers.
    house.load("d.tar");
    let refused = house.husk(&["save", "loaded"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("husk import"), "{refused:?}");
}
