//! Images in the formats of various tools, and archives that only look like images.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::parts::{config, descriptor, docker_list, entry, hex, index, pax, tar, with, write_layout};
use crate::tools::{House, assert_same, assert_same_content, is_root};

/// Names and contents.
type Files<'a> = Vec<(&'a str, &'a [u8])>;

/// A layer of a few files.
fn layer() -> Vec<u8> {
    tar(&[("bin/cat", b"cat"), ("bin/sh", b"->cat"), ("f", b"hello\n")])
}

/// Loads an archive that must be recognized as an image, and returns its root file system.
fn load_image(house: &House, path: &str) -> PathBuf {
    let output = house.husk(&["load", path, "--name", "loaded"]);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !printed.contains("taken as"), "{path}: {output:?}");
    assert_eq!(house.inspect("loaded")["Config"]["Cmd"], json!(["/bin/sh"]), "{path}");
    house.root("loaded")
}

#[test]
fn an_archive_with_dockers_manifest_is_an_image_with_any_part_names() {
    let house = House::new();
    let layer = layer();
    let config = config(&[&layer]);
    let (config_hex, layer_hex) = (hex(&config), hex(&layer));
    let (docker_config, up) = (format!("{config_hex}.json"), format!("->../{}/layer.tar", hex(b"b")));
    let crane = (format!("sha256:{config_hex}"), format!("{layer_hex}.tar.gz"));
    let old = (format!("{}/layer.tar", hex(b"b")), format!("{}/layer.tar", hex(b"a")));
    let cases: Vec<(&str, &str, &str, Files)> = vec![
        ("crane", &crane.0, &crane.1, vec![(&crane.0, &config), (&crane.1, &layer)]),
        ("jib", "config.json", &crane.1, vec![(&crane.1, &layer), ("config.json", &config)]),
        ("plain", "c.json", "some/where/l.tar", vec![("some/where/l.tar", &layer), ("c.json", &config)]),
        ("old", &docker_config, &old.0, vec![(&old.0, &layer), (&docker_config, &config)]),
        ("dots", "./x/../c.json", "./l.tar", vec![("c.json", &config), (".//l.tar", &layer)]),
        ("link", &docker_config, &old.1, vec![(&docker_config, &config), (&old.0, &layer), (&old.1, up.as_bytes())]),
        (
            "directory-link",
            "c",
            "d/e/l",
            vec![("c", &config), ("x/y/l", &layer), ("d", b"->./x"), ("x/e", b"->/x/y/.")],
        ),
    ];
    let mut roots = Vec::new();
    for (name, config_name, layer_name, mut files) in cases {
        let list = docker_list(config_name, &[layer_name]);
        for list_first in [true, false] {
            let at = if list_first { 0 } else { files.len() };
            files.insert(at, ("manifest.json", &list));
            fs::write(house.path("x.tar"), tar(&files)).unwrap();
            files.remove(at);
            house.sh("gzip -kf x.tar; rm -rf x; mkdir x; tar -C x -xf x.tar");
            for path in ["x.tar", "x.tar.gz", "x"] {
                // An absolute link is resolved within the archive.
                if (name, path) != ("directory-link", "x") {
                    roots.push(load_image(&house, path));
                }
            }
        }
    }
    assert!(roots.windows(2).all(|pair| pair[0] == pair[1]), "{roots:#?}");
}

#[test]
fn assuming_a_root_file_system_is_announced() {
    let house = House::new();
    let list = br#"{"manifest_version": 3, "name": "an extension of a browser"}"#;
    fs::write(house.path("x.tar"), tar(&[("bin/sh", b"x"), ("manifest.json", list), ("index.json", b"{}")])).unwrap();
    house.sh("gzip -k x.tar; mkdir x; tar -C x -xf x.tar");
    for path in ["x.tar", "x.tar.gz", "x"] {
        let output = house.husk(&["load", path, "--name", "x"]);
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(printed == "Loaded image: x:latest, taken as a root filesystem\n", "{printed}");
    }
    house.sh("rm -r data");
    let run = || String::from_utf8(house.husk(&["run", "--kernel", "./none", "./x", "sh"]).stderr).unwrap();
    assert!(run().starts_with("husk: ./x has no manifest.json or index.json: taken as a root filesystem\n"));
    assert!(!run().contains("taken as"), "it is printed when the root is created");
    // More entries than any image, so that it is recognized early.
    let names: Vec<String> = (0..3000).map(|n| format!("usr/{n}")).collect();
    let files: Files = names.iter().map(|name| (name.as_str(), &b"x"[..])).collect();
    fs::write(house.path("many.tar"), tar(&files)).unwrap();
    house.sh("gzip -k many.tar");
    assert_same_content(&house.load("many.tar"), &house.load("many.tar.gz"));
}

#[test]
fn a_dangling_link_is_reported_with_its_target() {
    let house = House::new();
    let layer = layer();
    let config = config(&[&layer]);
    for (target, shown) in [("none", "none"), ("../../etc/passwd", "../../etc/passwd"), ("/l.tar", "/l.tar")] {
        let link = format!("->{target}");
        let list = docker_list("c.json", &["d/l.tar"]);
        let files: [(&str, &[u8]); 3] = [("c.json", &config), ("d/l.tar", link.as_bytes()), ("manifest.json", &list)];
        fs::write(house.path("x.tar"), tar(&files)).unwrap();
        let words = format!("open d/l.tar: the link d/l.tar points to {shown}, which does not exist");
        house.refused(&["load", "x.tar"], &words);
    }
    house.sh("mkdir x; tar -C x -xf x.tar");
    house.refused(&["load", "x"], "the link x/d/l.tar leads out of x");
    house.sh("ln -sf l.tar x/d/l.tar; rm x/c.json; mkfifo x/c.json");
    house.refused(&["load", "x"], "open c.json: it is not a regular file");
    let list = docker_list("c.json", &["a"]);
    let files: [(&str, &[u8]); 4] = [("c.json", &config), ("a", b"->b"), ("b", b"->a"), ("manifest.json", &list)];
    fs::write(house.path("x.tar"), tar(&files)).unwrap();
    house.refused(&["load", "x.tar"], "open a: too many links");
}

#[test]
fn pax_headers_and_long_names_are_parsed_like_dockers() {
    if !is_root() {
        return;
    }
    let house = House::new();
    let file = |name: &str| entry(name, b'0', b"hello\n", "");
    let long = |name: &str| entry("././@LongLink", b'L', format!("{name}\0").as_bytes(), "");
    let mut parts: Vec<Vec<u8>> = Vec::new();
    for key in ["uid", "gid", "size", "mtime", "path", "linkpath", "SCHILY.xattr.user.x", "GNU.sparse.name"] {
        parts.extend([pax(&[(key, "")]), file(&format!("empty-{key}"))]);
    }
    parts.extend([
        pax(&[("path", "x-1")]),
        long("L-1"),
        file("h-1"),
        long("L-2"),
        pax(&[("path", "x-2")]),
        file("h-2"),
    ]);
    parts.extend([pax(&[("path", "x-3"), ("uid", "5")]), pax(&[("gid", "6")]), file("h-3")]);
    parts.extend([pax(&[("linkpath", "")]), entry("link", b'2', b"", "own-target")]);
    parts.extend([file("a/../b"), file("./c/d/.././/e"), entry("hard", b'1', b"", "c/../b"), vec![0; 1024]]);
    fs::write(house.path("x.tar"), parts.concat()).unwrap();
    house.sh(
        "mkdir -p x/c; cd x; for key in uid gid size mtime path linkpath SCHILY.xattr.user.x GNU.sparse.name; do \
         echo hello >empty-$key; done; for name in L-1 L-2 h-3 b c/e; do echo hello >$name; done; chgrp 6 h-3; ln b hard; \
         ln -s own-target link; find . -exec touch -h -d @0 {} +; chmod 644 [!l]* c/e; chmod 755 c .; \
         setfattr -n user.x empty-SCHILY.xattr.user.x",
    );
    let root = house.load("x.tar");
    assert_same(&house.path("x"), &root);
}

/// The parts of an image with one layer.
struct Parts {
    layer: Vec<u8>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

impl Parts {
    fn new() -> Parts {
        let layer = layer();
        let config = config(&[&layer]);
        let manifest = json!({"config": descriptor(&config), "layers": [descriptor(&layer)]}).to_string().into_bytes();
        Parts { layer, config, manifest }
    }

    fn blobs(&self) -> Vec<&[u8]> {
        vec![&self.layer, &self.config, &self.manifest]
    }
}

#[test]
fn attestations_are_not_images() {
    let house = House::new();
    let parts = Parts::new();
    let attestation = b"an attestation, which is never to be read";
    let mark = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let unknown = json!({"architecture": "unknown", "os": "unknown"});
    let attested = with(with(descriptor(attestation), "annotations", mark), "platform", unknown);
    let ours = json!({"architecture": "amd64", "os": "linux"});
    for image in [descriptor(&parts.manifest), with(descriptor(&parts.manifest), "platform", ours)] {
        let inner = index(&[attested.clone(), image.clone(), attested.clone()]);
        let outer = index(&[descriptor(&inner)]);
        let blobs = [parts.blobs(), vec![&attestation[..], &inner]].concat();
        write_layout(&house, "flat", &inner, &blobs);
        write_layout(&house, "nested", &outer, &blobs);
        for path in ["flat.tar", "flat", "nested.tar", "nested"] {
            load_image(&house, path);
        }
    }
}

#[test]
fn images_that_are_not_in_a_layout_are_skipped() {
    let house = House::new();
    let parts = Parts::new();
    let on = |architecture: &str, content: &[u8]| {
        with(descriptor(content), "platform", json!({"architecture": architecture, "os": "linux"}))
    };
    let v3 = with(descriptor(b"v3"), "platform", json!({"architecture": "amd64", "os": "linux", "variant": "v3"}));
    write_layout(&house, "x", &index(&[v3, on("amd64", b"gone"), on("amd64", &parts.manifest)]), &parts.blobs());
    for path in ["x.tar", "x"] {
        load_image(&house, path);
    }
    house.sh("rm -r data");
    write_layout(&house, "x", &index(&[on("amd64", b"gone"), on("arm64", &parts.manifest)]), &parts.blobs());
    for path in ["x.tar", "x"] {
        house.refused(&["load", path], "some of its images are missing: no image for linux/amd64");
        house.refused(&["load", path], "(available: linux/arm64)");
    }
}

#[test]
fn names_in_a_layout_are_normalized() {
    let house = House::new();
    let parts = Parts::new();
    let named = |key: &str, name: &str, content: &[u8]| with(descriptor(content), "annotations", json!({key: name}));
    let (tag, full) = ("org.opencontainers.image.ref.name", "io.containerd.image.name");
    for (key, name, typed) in [
        (tag, "app", "app:latest"),
        (tag, "docker.io/library/app:1", "app:1"),
        (tag, "1", "1"),
        (full, "docker.io/library/app:1", "app:1"),
        (full, "localhost/app:1", "localhost/app:1"),
    ] {
        write_layout(
            &house,
            "x",
            &index(&[named(tag, "other", b"gone"), named(key, name, &parts.manifest)]),
            &parts.blobs(),
        );
        for prefix in ["oci:x", "oci-archive:x.tar"] {
            load_image(&house, &format!("{prefix}:{typed}"));
        }
    }
    house.sh("rm -r data");
    house.refused(
        &["load", "oci:x:none"],
        "it has no image \"none\": choose one with oci:PATH:NAME (other, localhost/app:1)",
    );
    let platform = json!({"architecture": "amd64", "os": "linux"});
    let images = [named(tag, "a", &parts.manifest), named(tag, "b", &parts.config)];
    write_layout(&house, "x", &index(&images.map(|image| with(image, "platform", platform.clone()))), &parts.blobs());
    house.refused(&["load", "x", "--name", "y"], "it has 2 images: choose one with oci:PATH:NAME (a, b)");
}

#[test]
fn an_oversized_configuration_is_rejected() {
    let house = House::new();
    let layer = layer();
    let mut config: serde_json::Value = serde_json::from_slice(&config(&[&layer])).unwrap();
    config["config"]["Env"] = json!(vec![""; 300_000]);
    let (config, list) = (config.to_string().into_bytes(), docker_list("c.json", &["l.tar"]));
    fs::write(house.path("x.tar"), tar(&[("c.json", &config), ("l.tar", &layer), ("manifest.json", &list)])).unwrap();
    house.refused(&["load", "x.tar"], "the process configuration of the image is too large");
}
