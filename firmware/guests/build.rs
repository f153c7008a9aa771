//! Builds an ELF kernel for each guest from `lib/` and `guests/`, with the system's C compiler.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// No host libraries, no vector registers (KVM may emulate code at CPL 0), no position-independent code.
const FLAGS: &[&str] = &[
    "-std=gnu17",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffreestanding",
    "-fno-pic",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns",
    "-fcf-protection=none",
    "-mno-red-zone",
    "-mgeneral-regs-only",
];
const LINK_FLAGS: &[&str] =
    &["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,--no-warn-rwx-segments"];

/// Has the version of the protocol.
const PROTOCOL: &str = "../protocol/src/lib.rs";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for dir in ["lib", "guests"] {
        println!("cargo:rerun-if-changed={dir}");
    }
    println!("cargo:rerun-if-changed={PROTOCOL}");
    println!("cargo:rerun-if-env-changed=CC");
    let library: Vec<PathBuf> = sources("lib").iter().map(|source| compile(source, &out)).collect();
    for source in sources("guests") {
        let guest = out.join(source.file_stem().expect("a source has a name")).with_extension("elf");
        // Assembly guests do not use the library, and are as small as possible.
        let standalone = source.extension().is_some_and(|extension| extension == "S");
        let mut link = compiler();
        link.args(LINK_FLAGS).arg("-Wl,-T,lib/guest.ld").arg("-o").arg(&guest).arg(compile(&source, &out));
        run(link.args(if standalone { &[][..] } else { &library }));
    }
}

/// The version of the protocol of husk's init, for guests that speak it. Read from its source: as a dependency, its features would
/// decide where the guests are.
fn protocol_version() -> u16 {
    let text = fs::read_to_string(PROTOCOL).unwrap_or_else(|error| panic!("read {PROTOCOL}: {error}"));
    let version = text.lines().find_map(|line| line.strip_prefix("pub const VERSION: u16 = ")?.strip_suffix(';'));
    version.and_then(|version| version.parse().ok()).expect("the protocol has a version")
}

/// The C and assembly files of `dir`, in a stable order.
fn sources(dir: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("read {dir}: {error}"));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap_or_else(|error| panic!("read {dir}: {error}")).path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "c" || extension == "S"))
        .collect();
    files.sort();
    files
}

fn compile(source: &Path, out: &Path) -> PathBuf {
    let object = out.join(format!("{}.o", source.display()));
    fs::create_dir_all(object.parent().expect("an object has a directory")).expect("create the objects' directory");
    let version = format!("-DPROTOCOL_VERSION={}", protocol_version());
    run(compiler().args(FLAGS).arg(version).args(["-I", "lib", "-c", "-o"]).arg(&object).arg(source));
    object
}

fn compiler() -> Command {
    Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()))
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|error| panic!("start {command:?}: {error}"));
    assert!(status.success(), "{command:?}: {status}");
}
