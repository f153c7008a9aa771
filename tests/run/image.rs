//! The test image: busybox, a few users, and a configuration that differs from every default.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

struct Image {
    dir: TempDir,
    archive: String,
    with_volumes: String,
}

static IMAGE: OnceLock<Image> = OnceLock::new();

/// The archive, in the format of `docker save`.
pub fn archive() -> &'static str {
    &image().archive
}

/// The archive of an image with the same files that declares volumes: `/srv` and `/tmp`, which have files or a mode, and `/new`.
pub fn with_volumes() -> &'static str {
    &image().with_volumes
}

/// The image store, shared by the tests.
pub fn store() -> PathBuf {
    image().dir.path().join("store")
}

/// The root file system in the archive.
pub fn root() -> PathBuf {
    image().dir.path().join("root")
}

fn image() -> &'static Image {
    IMAGE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        make_root(&dir.path().join("root"));
        let archive = pack(dir.path(), "box", "");
        let volumes = r#", "Volumes": {"/srv": {}, "/tmp": {}, "/new": {}}"#;
        let with_volumes = pack(dir.path(), "volumes", volumes);
        Image { dir, archive, with_volumes }
    })
}

fn make_root(root: &Path) {
    for name in ["bin", "etc", "home/user", "srv", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    fs::copy(busybox.expect("scripts/deps test installs busybox"), root.join("bin/busybox")).unwrap();
    for applet in run(Command::new(root.join("bin/busybox")).arg("--list")).lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let users = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    fs::write(root.join("etc/passwd"), users).unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nuser:x:1000:\nwheel:x:10:user\naudio:x:63:user\n").unwrap();
    fs::write(root.join("srv/not-a-program"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
}

/// Packs layer, configuration with `more`, and manifest into an archive of the image `name`.
fn pack(dir: &Path, name: &str, more: &str) -> String {
    let at = |name: &str| dir.join(name);
    let tar = |archive: &str, of: &str, names: &[&str]| {
        let mut command = Command::new(at("root/bin/busybox"));
        run(command.arg("tar").arg("-c").arg("-f").arg(at(archive)).arg("-C").arg(at(of)).args(names));
    };
    fs::create_dir_all(at("parts")).unwrap();
    tar("parts/layer.tar", "root", &["."]);
    let sum = run(Command::new("sha256sum").arg(at("parts/layer.tar")));
    let digest = sum.split_whitespace().next().unwrap();
    let layer = format!("{digest}.tar");
    fs::rename(at("parts/layer.tar"), at("parts").join(&layer)).unwrap();
    let config = format!(
        r#"{{"architecture": "amd64", "os": "linux", "rootfs": {{"type": "layers", "diff_ids": ["sha256:{digest}"]}},
        "config": {{"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["sh", "-c", "echo the image says so"],
        "WorkingDir": "/srv"{more}}}}}"#
    );
    fs::write(at("parts/config.json"), &config).unwrap();
    let sum = run(Command::new("sha256sum").arg(at("parts/config.json")));
    let json = format!("{}.json", sum.split_whitespace().next().unwrap());
    fs::rename(at("parts/config.json"), at("parts").join(&json)).unwrap();
    let manifest = format!(r#"[{{"Config": "{json}", "RepoTags": ["{name}:latest"], "Layers": ["{layer}"]}}]"#);
    fs::write(at("parts/manifest.json"), manifest).unwrap();
    let archive = format!("{name}.tar");
    tar(&archive, "parts", &["manifest.json", &json, &layer]);
    at(&archive).to_str().unwrap().to_owned()
}

/// Runs a host program and returns its output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
