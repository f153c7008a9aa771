//! Malicious archives: each is rejected in one line, and leaves nothing behind.

use std::fs;
use std::process::Command;

use crate::parts::{config, descriptor, entry, header, index, tar, write_layout};
use crate::tools::{House, assert_same, is_root};

#[test]
fn invalid_archives_are_rejected() {
    let house = House::new();
    let file = || entry("etc/x", b'0', b"x", "");
    let long = "b".repeat(300);
    let long = format!("{} path={long}\n", 300 + 10);
    let endless = format!("{:?}", 0);
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("leads out of the root directory", vec![file(), entry("../x", b'0', b"x", "")]),
        ("leads out of the root directory", vec![file(), entry("a/../../x", b'5', b"", "")]),
        ("leads out of the root directory", vec![file(), entry("hard", b'1', b"", "../../etc/passwd")]),
        ("a hard link to a file that does not exist", vec![file(), entry("hard", b'1', b"", "etc/none")]),
        ("a hard link to a directory", vec![file(), entry("hard", b'1', b"", "etc")]),
        ("a device has an invalid number 4096:0", vec![file(), entry("d", b'4', b"", "0010000\x000000000\0")]),
        ("a device has an invalid number 1:1048576", vec![file(), entry("d", b'3', b"", "0000001\x004000000\0")]),
        ("a hard link to a file that does not exist", vec![file(), entry("hard", b'1', b"", "/etc/passwd")]),
        ("too many symbolic links", vec![file(), entry("s", b'2', b"", "s/x"), entry("s/y", b'0', b"", "")]),
        ("a symbolic link has an empty target", vec![file(), entry("s", b'2', b"", "")]),
        ("a name of 300 bytes is too long", vec![file(), entry("p", b'x', long.as_bytes(), ""), file()]),
        ("it ends in the middle of a file", vec![file(), header(b"x", b'0', b"00000100000\0", b"")]),
        ("it ends in the middle of a header", vec![file(), vec![1; 100]]),
        (
            "the number is too large",
            vec![file(), header(b"x", b'0', b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", b"")],
        ),
        ("an extended header of", vec![file(), header(b"x", b'x', b"77777777777\0", b"")]),
        ("an extended header of", vec![file(), header(b"x", b'L', b"77777777777\0", b"")]),
        ("a malformed extended header", vec![file(), entry("x", b'x', b"99 a=b\n", ""), file()]),
        ("a header has a wrong checksum", vec![file(), vec![b'0'; 512]]),
        ("unknown entry type", vec![file(), entry("x", b'M', b"", "")]),
        ("it ends after an extended header", vec![file(), entry("x", b'L', endless.as_bytes(), "")]),
        ("the root is not a directory", vec![file(), entry("/", b'2', b"", "x")]),
    ];
    for (words, parts) in cases {
        fs::write(house.path("x.tar"), parts.concat()).unwrap();
        house.refused(&["load", "x.tar"], words);
    }
    fs::write(house.path("x.tar"), vec![0x55; 10_000]).unwrap();
    house.refused(&["load", "x.tar"], "x.tar");
    fs::write(house.path("x.tar"), "").unwrap();
    house.refused(&["load", "x.tar"], "it is empty");
}

#[test]
fn links_cannot_leave_the_images_root() {
    if !is_root() {
        return;
    }
    let house = House::new();
    house.sh("mkdir outside; echo 1 >outside/kept");
    let outside = house.path("outside").display().to_string();
    let up = format!("{}{}", "../".repeat(20), outside.trim_start_matches('/'));
    let parts = [
        entry("etc/passwd", b'0', b"x", ""),
        entry("absolute", b'2', b"", &outside),
        entry("absolute/written", b'0', b"1", ""),
        entry("above", b'2', b"", &up),
        entry("above/kept", b'0', b"2", ""),
        entry("passwd", b'1', b"", "/etc/passwd"),
    ];
    fs::write(house.path("x.tar"), parts.concat()).unwrap();
    let root = house.load("x.tar");
    house.sh("test $(ls outside) = kept; grep -q 1 outside/kept");
    // The same result as when unpacking into a chroot.
    house.sh(&format!(
        "mkdir -p same/etc same{outside}; cd same; printf x >etc/passwd; ln etc/passwd passwd; ln -s {outside} absolute; ln -s {up} above; \
         printf 1 >.{outside}/written; printf 2 >.{outside}/kept; chmod 644 etc/passwd .{outside}/*; find . -exec touch -h -d @0 {{}} +"
    ));
    assert_same(&house.path("same"), &root);
}

/// Twenty thousand device nodes, one of which is the disk of most hosts: they cost no more than other names.
#[test]
fn device_nodes_are_only_names() {
    let house = House::new();
    let devices = (0..20_000).map(|n| entry(&format!("dev/{n}"), b'4', b"", "0000010\x000000000\0"));
    let parts: Vec<Vec<u8>> = [entry("etc/x", b'0', b"x", "")].into_iter().chain(devices).collect();
    fs::write(house.path("x.tar"), parts.concat()).unwrap();
    let root = house.load("x.tar");
    assert!(fs::metadata(root).unwrap().len() < 4 << 20);
    house.sh("! find . -type b | grep .");
}

#[test]
fn a_bomb_is_not_unpacked() {
    let house = House::new();
    house.sh("mkdir d; truncate -s 300M d/zeroes; tar -C d -c . | gzip -9 >bomb.tgz");
    house.refused(&["load", "bomb.tgz", "--max-size", "100M"], "unpacks to more than the free");
    let root = house.load("bomb.tgz");
    assert!(fs::metadata(root).unwrap().len() < 40 << 20);
}

#[test]
fn the_number_of_files_is_limited() {
    let house = House::new();
    // Forty thousand entries with 30 KiB of attributes each, which compress very well.
    let value = "v".repeat(60_000);
    let record = format!("60022 SCHILY.xattr.user.x={value}\n");
    let record = record.replacen("60022", &record.len().to_string(), 1);
    let mut parts = entry("etc/x", b'0', b"x", "");
    let bomb = [entry("p", b'x', record.as_bytes(), ""), entry("same-name", b'0', b"", "")].concat();
    for _ in 0..200 {
        parts.extend(&bomb);
    }
    fs::write(house.path("part.tar"), &parts).unwrap();
    house.sh("{ cat part.tar; for i in {1..99}; do tail -c +1025 part.tar; done; } | gzip -1 >bomb.tgz");
    house.refused(&["load", "bomb.tgz"], "too many files");
}

/// A layout with one small layer, whose parts can be modified by a shell command before digests are computed.
fn layout(house: &House, change: &str) {
    house.sh("rm -rf l; mkdir -p l/blobs/sha256 d; echo 1 >d/1; tar --mtime=@0 -C d -cf l/layer .");
    let line = r#"cd l; echo '{"imageLayoutVersion":"1.0.0"}' >oci-layout
        put() { h=$(sha256sum <$1 | cut -c1-64); s=$(stat -c %s $1); cp $1 blobs/sha256/$h; }
        put layer; diff=$h layer_hash=$h layer_size=$s arch=amd64 digest=sha256:
        CHANGE
        echo "{\"architecture\":\"$arch\",\"os\":\"linux\",\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[\"sha256:$diff\"]}}" >config
        put config
        echo "{\"config\":{\"digest\":\"sha256:$h\",\"size\":$s},\"layers\":[{\"digest\":\"$digest$layer_hash\",\"size\":$layer_size}]}" >manifest
        put manifest
        echo "{\"manifests\":[{\"digest\":\"sha256:$h\",\"size\":$s}]}" >index.json
        AFTER"#;
    let (before, after) = change.split_once("AFTER").unwrap_or((change, ""));
    house.sh(&line.replace("CHANGE", before).replace("AFTER", after));
}

#[test]
fn invalid_layouts_are_rejected() {
    let house = House::new();
    for (change, words) in [
        ("layer_size=7", "bytes, expected 7"),
        ("diff=$(echo other | sha256sum | cut -c1-64)", "it unpacks to sha256:"),
        ("diff=../../../etc/passwd", "is not a SHA-256 digest"),
        ("digest=sha512:", "is not a SHA-256 digest"),
        ("layer_hash=../../../../../etc/passwd", "is not a SHA-256 digest"),
        ("arch=arm64", "the image is for linux/arm64"),
        ("printf x | dd of=blobs/sha256/$layer_hash conv=notrunc status=none", "its digest is sha256:"),
        ("rm blobs/sha256/$layer_hash", "No such file"),
        ("AFTER { printf '{\"x\":'; printf '[%.0s' {1..200000}; } >index.json", "EOF while parsing a list"),
        ("AFTER truncate -s 5G index.json", "it is too large"),
        ("AFTER echo '{\"manifests\":[]}' >index.json", "no image"),
        ("AFTER echo x >>blobs/sha256/$h", "bytes, expected"),
        (
            "AFTER for i in {1..9}; do cp index.json i; put i; echo \"{\\\"manifests\\\":[{\\\"digest\\\":\\\"sha256:$h\\\",\\\"size\\\":$s}]}\" >index.json; done",
            "indexes are nested",
        ),
    ] {
        layout(&house, change);
        house.refused(&["load", "l"], words);
        if !change.contains("truncate") {
            house.sh("tar -C l -cf l.tar oci-layout index.json blobs");
            house.refused(&["load", "l.tar"], if words == "No such file" { "it does not exist" } else { words });
        }
    }
    layout(&house, "");
    house.load("l");
}

#[test]
fn the_image_for_this_architecture_is_chosen() {
    let house = House::new();
    layout(&house, "AFTER cp blobs/sha256/$h ../good; echo $h $s >../names");
    house.sh(r#"cd l; read h s <../names; other=$(echo '{}' | tee o | sha256sum | cut -c1-64); mv o blobs/sha256/$other
        entry() { echo "{\"digest\":\"sha256:$1\",\"size\":$2,\"platform\":{\"os\":\"linux\",\"architecture\":\"$3\"}}"; }
        echo "{\"manifests\":[$(entry $other 3 arm64),$(entry $h $s amd64),$(entry $other 3 unknown)]}" >index.json"#);
    house.load("l");
    house.sh("sed -i s/amd64/riscv64/ l/index.json; rm -r data");
    house.refused(&["load", "l"], "(available: linux/arm64, linux/riscv64)");
}

#[test]
fn a_docker_archive_that_refers_to_other_files_is_rejected() {
    let house = House::new();
    for (manifest, words) in [
        (r#"[{"Config":"/etc/passwd","Layers":[]}]"#, "it does not exist"),
        (r#"[{"Config":"../../etc/passwd","Layers":[]}]"#, "a path leads out of the root directory"),
        (r#"[{"Config":"","Layers":[]}]"#, "open \"\": it does not exist"),
        (r#"[]"#, "it has 0 images"),
        (r#"{"Config": 1}"#, "read manifest.json"),
        (r#"[{"Config":"repositories","Layers":["repositories"]}]"#, "read the image's configuration"),
    ] {
        fs::write(house.path("manifest.json"), manifest).unwrap();
        house.sh("ln -sf /etc/passwd repositories; tar -cf x.tar manifest.json repositories");
        let link = "open repositories: the link repositories points to /etc/passwd, which does not exist";
        let words = if manifest.contains("repositories") { link } else { words };
        house.refused(&["load", "x.tar"], words);
    }
}

#[test]
fn an_image_is_loaded_where_user_namespaces_are_denied() {
    let house = House::new();
    fs::write(house.path("x.tar"), tar(&[("bin/sh", b"x")])).unwrap();
    // A process without an ID in its own user namespace cannot create another one.
    let mut command = Command::new("unshare");
    command.args(["--user", env!("CARGO_BIN_EXE_husk"), "--verbose", "load", "x.tar", "--name", "x"]);
    house.surround(&mut command);
    let output = command.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{printed}");
    assert!(printed.contains("the sandbox lacks a layer that this host does not allow: namespaces"), "{printed}");
}

#[test]
fn a_directory_gives_no_file_outside_of_it() {
    let house = House::new();
    fs::write(house.path("secret.json"), "{}").unwrap();
    house.sh("mkdir -p d/blobs/sha256; ln -s .. d/up; ln -s ../secret.json d/index.json; ln -s up/secret.json d/manifest.json");
    house.sh("echo '{\"imageLayoutVersion\": \"1.0.0\"}' > d/oci-layout");
    // The list leads out, so that there is none.
    let output = house.husk(&["load", "d", "--name", "d"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("taken as a root filesystem"), "{output:?}");
}

#[test]
fn a_blob_may_be_a_link_to_elsewhere_if_it_has_its_digest() {
    let house = House::new();
    let layer = tar(&[("bin/sh", b"x")]);
    let config = config(&[&layer]);
    let manifest =
        serde_json::json!({"schemaVersion": 2, "config": descriptor(&config), "layers": [descriptor(&layer)]});
    let manifest = manifest.to_string().into_bytes();
    write_layout(&house, "layout", &index(&[descriptor(&manifest)]), &[&manifest, &config, &layer]);
    house.sh(
        "mkdir cache; cd layout/blobs/sha256; for b in *; do mv $b ../../../cache/$b; ln -s ../../../cache/$b $b; done",
    );
    house.load("layout");
    house.sh("rm -r data; for b in cache/*; do printf ' ' >> $b; done");
    let output = house.husk(&["load", "layout"]);
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && printed.contains("leads to a file with digest"), "{printed}");
}
