//! Archives, layouts and directories as sources.

use std::fs;

use crate::tools::{House, assert_same, assert_same_content, is_root, odd_tree};

#[test]
fn archives_of_all_compressions_are_unpacked() {
    if !is_root() {
        return;
    }
    let house = House::new();
    let tree = odd_tree(&house, "tree");
    house.sh("tar --xattrs --xattrs-include='*' --sparse --format=pax -C tree -cf pax.tar .");
    let root = house.load("pax.tar");
    assert_same(&tree, &root);
    for packed in ["gzip -1 -k", "zstd -q -k", "xz -0 -k", "bzip2 -1 -k"] {
        house.sh(&format!("{packed} pax.tar; rm -f other.tar; mv pax.tar.* other.tar"));
        assert_same_content(&house.load("other.tar"), &root);
    }
    // Concatenated frames, including a skippable one.
    house.sh("head -c 1000000 pax.tar | zstd -q >f.zst; printf '\\x50\\x2a\\x4d\\x18\\x03\\0\\0\\0abc' >>f.zst");
    house.sh("tail -c +1000001 pax.tar | zstd -q >>f.zst");
    assert_same_content(&house.load("f.zst"), &root);
}

#[test]
fn all_formats_of_sparse_files_and_long_names_are_supported() {
    if !is_root() {
        return;
    }
    let house = House::new();
    let tree = odd_tree(&house, "tree");
    // Formats without extended attributes and fractional timestamps.
    house.sh("cd tree; setcap -r text-8192; setfattr -x user.x text-65536; setfattr -x user.empty text-4097");
    house.sh("cd tree; setfattr -x user.big short-4020; setfattr -x user.directory many");
    house.sh("cd tree; find . -mindepth 1 -exec touch -h -d '2020-02-02 02:02:02' {} +; touch -d 2020-02-02 .");
    for options in [
        "--format=gnu --sparse",
        "--format=pax --sparse-version=0.0 --sparse",
        "--format=pax --sparse-version=0.1 --sparse",
    ] {
        house.sh(&format!("tar {options} -C tree -cf x.tar ."));
        assert_same(&tree, &house.load("x.tar"));
    }
}

#[test]
fn a_root_directory_is_read_again_when_it_changed() {
    if !is_root() {
        return;
    }
    let house = House::new();
    let tree = odd_tree(&house, "tree");
    let root = house.load("./tree");
    assert_same(&tree, &root);
    assert_eq!(house.load("./tree"), root);
    fs::write(tree.join("new"), "x").unwrap();
    let changed = house.load("./tree");
    assert_ne!(changed, root);
    assert_same(&tree, &changed);
}

/// Layers that hide, replace and link entries of lower layers, created with `umoci raw add-layer`.
fn layered_image(house: &House) {
    house.sh("umoci init --layout layout; umoci new --image layout:app");
    house.sh(
        "mkdir one; cd one; mkdir -p a/sub b c d/e keep; echo 1 >a/1; echo 2 >a/sub/2; echo 3 >b/3; echo 4 >c/4; \
        echo target >d/target; echo x >d/e/x; ln -s ../a keep/link; echo file >was-file; mkdir was-directory; \
        echo y >was-directory/y; yes | head -c 300000 >big || true; mkdir later; echo z >later/z",
    );
    house.sh("mkdir two; cd two; mkdir -p b c d was-file keep/link; touch .wh.a b/.wh..wh..opq; echo new >b/new; \
        touch c/.wh.4; echo in-place-of-4 >c/5; echo inside >was-file/inside; echo plain >was-directory; \
        echo through >keep/link/through; echo small >big; touch .wh.later");
    house.sh("mkdir three; cd three; mkdir -p a later; echo again >a/again; echo back >later/back; chmod 700 a");
    for layer in ["one", "two"] {
        house.sh(&format!("tar --numeric-owner -C {layer} -cf {layer}.tar ."));
    }
    // Through links of lower layers, as with a merged /usr, without explicit directories.
    house.sh("mkdir four; cd four; mkdir -p lib bin up; echo new >lib/new; echo 2 >bin/tool; touch lib/.wh.old; echo u >up/1");
    house.sh("cd one; mkdir -p usr/lib usr/bin; echo old >usr/lib/old; ln -s usr/lib lib; ln -s /usr/bin bin; ln -s ../../usr up");
    house.sh("tar --numeric-owner -C four -cf four.tar lib/new bin/tool lib/.wh.old up/1; tar --numeric-owner -C one -cf one.tar .");
    // A hard link to a file of a lower layer.
    house
        .sh("cp -a one/d/target target; mkdir -p three/d; cp -a one/d/target three/d/; ln three/d/target three/d/hard");
    house.sh("tar --numeric-owner -C three -cf three.tar ./d/target ./d/hard ./a ./later; tar --delete -f three.tar ./d/target");
    for layer in ["one", "two", "three", "four"] {
        house.sh(&format!("umoci raw add-layer --image layout:app {layer}.tar"));
    }
    house.sh("umoci config --image layout:app --config.cmd sh --config.cmd -c --config.env A=B --config.workingdir /a \
        --config.entrypoint /bin/x --config.user 1:2 --config.volume /v --config.exposedports 80/tcp --config.label k=v");
    house.sh("umoci unpack --image layout:app bundle");
}

#[test]
fn layers_merge_as_umoci_unpacks_them() {
    if !is_root() {
        return;
    }
    let house = House::new();
    layered_image(&house);
    let root = house.load("layout");
    assert_same(&house.path("bundle/rootfs"), &root);
    let process = &house.inspect("loaded")["Config"];
    assert_eq!(process["Cmd"], serde_json::json!(["sh", "-c"]));
    assert_eq!(process["Entrypoint"], serde_json::json!(["/bin/x"]));
    assert_eq!((&process["User"], &process["WorkingDir"]), (&"1:2".into(), &"/a".into()));
    assert!(process["Env"].as_array().unwrap().contains(&"A=B".into()));
    assert!(process["Volumes"]["/v"].is_object() && process["ExposedPorts"]["80/tcp"].is_object(), "{process}");
    assert_eq!(process["Labels"]["k"], "v");

    for (command, path) in [
        ("skopeo copy -q oci:layout:app docker-archive:docker.tar:team/app:1", "docker.tar"),
        ("gzip -1 <docker.tar >docker.tgz", "docker.tgz"),
        ("skopeo copy -q oci:layout:app oci-archive:oci.tar:app", "oci.tar"),
        (
            "skopeo copy -q --dest-decompress oci:layout:app dir:plain; skopeo copy -q --dest-compress-format zstd dir:plain oci:zstd:app; \
             grep -q 'layer.v1.tar+zstd' zstd/blobs/sha256/*",
            "zstd",
        ),
        ("true", "oci:layout:app"),
        ("true", "docker-archive:docker.tar:team/app:1"),
    ] {
        house.sh(command);
        assert_eq!(house.load(path), root, "{path}");
    }
    let output = house.husk(&["load", "-i", "docker.tar"]);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("Loaded image: team/app:1\n"), "{output:?}");
    // From a pipe, from a file, and empty input.
    let husk = env!("CARGO_BIN_EXE_husk");
    house.sh(&format!("export HUSK_DATA=$PWD/data; cat docker.tgz | {husk} load --name piped; {husk} load --name read <oci.tar; cat oci.tar | {husk} load -n dash -"));
    for name in ["piped", "read", "dash"] {
        assert_eq!(house.root(name), root, "{name}");
    }
    let output = house.husk(&["load"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("standard input: it is empty"), "{output:?}");
    house.sh(&format!(
        "export HUSK_DATA=$PWD/data; ! yes | {husk} load --max-size 1M 2>errors; grep -q 'larger than the 1 MiB' errors"
    ));
    assert_eq!(house.files("tmp"), 0);
    house.sh("mkdir -p old; tar -C old -xf docker.tar");
    // The format of docker save before version 25: a directory per layer, and duplicate layers as links.
    house.sh("cd old; rm -r */; rm -f repositories; a=$(tar xOf ../docker.tar manifest.json | grep -o '[0-9a-f]*\\.tar' | head -1); \
        mkdir 0a 0b; mv $a 0a/layer.tar; ln -s ../0a/layer.tar 0b/layer.tar; chmod u+w manifest.json; sed -i s,$a,0b/layer.tar, manifest.json; \
        for d in 0a 0b; do n=$(echo $d | sha256sum | cut -c1-64); mv $d $n; sed -i s,$d/,$n/, manifest.json; done; \
        ln -sf ../$(echo 0a | sha256sum | cut -c1-64)/layer.tar $(echo 0b | sha256sum | cut -c1-64)/layer.tar; tar cf ../old.tar *");
    assert_eq!(house.load("old.tar"), root);
}

#[test]
fn ten_thousand_files_are_preserved() {
    if !is_root() {
        return;
    }
    let house = House::new();
    house.sh(
        "mkdir tree; cd tree; mkdir -p {0..99}; for i in {0..9999}; do echo $i >$((i % 100))/file-$i; done; cd ..; \
        tar --format=pax -C tree -cf tree.tar .",
    );
    for source in ["tree.tar", "./tree"] {
        assert_same(&house.path("tree"), &house.load(source));
    }
}

#[test]
fn a_distribution_matches_tars_result() {
    let Some(archive) = std::env::var_os("HUSK_TEST_DEBIAN") else {
        println!("SKIPPED: HUSK_TEST_DEBIAN names no archive of a Debian root; `scripts/test cargo` does");
        return;
    };
    if !is_root() {
        return;
    }
    let house = House::new();
    std::os::unix::fs::symlink(archive, house.path("debian.tar")).unwrap();
    house.sh("mkdir tree; tar --xattrs --xattrs-include='*' --numeric-owner -C tree -xpf debian.tar");
    assert_same(&house.path("tree"), &house.load("debian.tar"));
}
