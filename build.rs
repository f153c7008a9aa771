//! Builds the programs embedded in husk, small and static: the guest's init as the file `$HUSK_INIT`, and the workload
//! of `husk bench` as `$HUSK_WORKLOAD`.
//!
//! They are built by a separate cargo process, since their profile and flags differ from husk's. It uses a separate
//! target directory, so that the two do not block each other, and runs only when one of its inputs has changed.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The package, and the environment variable for its path when husk is compiled.
const CARRIED: [(&str, &str); 2] = [("husk-init", "HUSK_INIT"), ("husk-workload", "HUSK_WORKLOAD")];
/// Their sources, including dependency versions.
const SOURCES: [&str; 5] = ["firmware/init", "firmware/protocol", "firmware/workload", "Cargo.lock", "Cargo.toml"];
/// They are loaded at their link address, so that they start without relocation.
const FLAGS: [&str; 4] = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];

fn main() {
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
    }
    // Thirteen thousand relocations of a position-independent program: 3 KiB instead of 300. The start code of static
    // programs applies them since glibc 2.36.
    if libc_minor().is_some_and(|minor| minor >= 36) {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let built = build(&out.join("target"));
    for (package, variable) in CARRIED {
        // A fixed path, independent of cargo's layout.
        let program = out.join(package);
        let from = built.join(package);
        fs::copy(&from, &program).unwrap_or_else(|error| panic!("copy {}: {error}", from.display()));
        println!("cargo:rustc-env={variable}={}", program.display());
    }
}

/// The minor version of the host's glibc 2.
fn libc_minor() -> Option<u32> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().strip_prefix("glibc 2.")?.split('.').next()?.parse().ok()
}

/// Returns the directory of the built programs.
fn build(dir: &std::path::Path) -> PathBuf {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.args(["build", "--quiet", "--locked", "--bins", "--profile", "carried", "--target", TARGET]);
    for (package, _) in CARRIED {
        cargo.args(["--package", package]);
    }
    cargo.arg("--target-dir").arg(dir);
    // Settings for husk's own build by clippy, a fuzzer or the user do not apply to these programs.
    for variable in ["RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS"] {
        cargo.env_remove(variable);
    }
    let mut flags: Vec<String> = FLAGS.map(str::to_owned).to_vec();
    // What hides this machine's paths in husk (scripts/build) does so in these programs, too.
    let own = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    flags.extend(own.split('\u{1f}').filter(|flag| flag.starts_with("--remap-path-prefix=")).map(str::to_owned));
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    let status = cargo.status().unwrap_or_else(|error| panic!("start {cargo:?}: {error}"));
    assert!(status.success(), "{cargo:?}: {status}");
    dir.join(TARGET).join("carried")
}
