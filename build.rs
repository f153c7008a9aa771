//! The guest's init, built small and static, as the file that husk carries inside: `$HUSK_INIT`.
//!
//! A cargo of its own builds it, since another profile and other flags count for it than for husk. It works in a folder
//! of its own, so that neither waits for the other, and starts only when something that it reads has changed.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// As of firmware/init, of what it is made of, and of their versions.
const SOURCES: [&str; 4] = ["firmware/init", "firmware/protocol", "Cargo.lock", "Cargo.toml"];
/// It is loaded where it was linked, so that it starts without relocating itself.
const FLAGS: [&str; 4] = ["-C", "target-feature=+crt-static", "-C", "relocation-model=static"];

fn main() {
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let built = build(&out.join("target"));
    // The path stays though the folder's layout is cargo's.
    let init = out.join("init");
    fs::copy(&built, &init).unwrap_or_else(|error| panic!("copy {}: {error}", built.display()));
    println!("cargo:rustc-env=HUSK_INIT={}", init.display());
}

fn build(folder: &std::path::Path) -> PathBuf {
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo.args(["build", "--quiet", "--locked", "--package", "husk-init", "--profile", "init", "--target", TARGET]);
    cargo.arg("--target-dir").arg(folder);
    // What clippy, a fuzzer or a user asks of husk's own compilation is not meant for the guest's.
    for variable in ["RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS"] {
        cargo.env_remove(variable);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"));
    let status = cargo.status().unwrap_or_else(|error| panic!("start {cargo:?}: {error}"));
    assert!(status.success(), "{cargo:?}: {status}");
    folder.join(TARGET).join("init/husk-init")
}
