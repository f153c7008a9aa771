//! The programs that husk carries inside, built small and static: the guest's init as the file `$HUSK_INIT`, what `husk
//! bench` works with as `$HUSK_WORKLOAD`.
//!
//! A cargo of its own builds them, since another profile and other flags count for them than for husk. It works in a
//! directory of its own, so that neither waits for the other, and starts only when something that it reads has changed.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The package, and the variable that names its program when husk is compiled.
const CARRIED: [(&str, &str); 2] = [("husk-init", "HUSK_INIT"), ("husk-workload", "HUSK_WORKLOAD")];
/// What they are made of, and of which versions.
const SOURCES: [&str; 5] = ["firmware/init", "firmware/protocol", "firmware/workload", "Cargo.lock", "Cargo.toml"];
/// They are loaded where they were linked, so that they start without relocating themselves.
const FLAGS: [&str; 4] = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];

fn main() {
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let built = build(&out.join("target"));
    for (package, variable) in CARRIED {
        // The path stays though the directory's layout is cargo's.
        let program = out.join(package);
        let from = built.join(package);
        fs::copy(&from, &program).unwrap_or_else(|error| panic!("copy {}: {error}", from.display()));
        println!("cargo:rustc-env={variable}={}", program.display());
    }
}

/// Returns the directory in which the programs are.
fn build(dir: &std::path::Path) -> PathBuf {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.args(["build", "--quiet", "--locked", "--bins", "--profile", "carried", "--target", TARGET]);
    for (package, _) in CARRIED {
        cargo.args(["--package", package]);
    }
    cargo.arg("--target-dir").arg(dir);
    // What clippy, a fuzzer or a user asks of husk's own compilation is not meant for theirs.
    for variable in ["RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS"] {
        cargo.env_remove(variable);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"));
    let status = cargo.status().unwrap_or_else(|error| panic!("start {cargo:?}: {error}"));
    assert!(status.success(), "{cargo:?}: {status}");
    dir.join(TARGET).join("carried")
}
