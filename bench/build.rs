//! Builds the guest image, in a target directory of its own and with none of
//! the host build's flags.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the guest image is made from, relative to this crate.
const SOURCES: [&str; 14] = [
    "guest/src",
    "guest/build.rs",
    "guest/link.ld",
    "guest/Cargo.toml",
    "guest/Cargo.lock",
    "peer/src",
    "peer/Cargo.toml",
    "workload/src",
    "workload/Cargo.toml",
    "../guest-drivers/src",
    "../guest-drivers/Cargo.toml",
    "../protocol/src",
    "../protocol/Cargo.toml",
    "../Cargo.toml",
];

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    for source in SOURCES {
        println!("cargo:rerun-if-changed={}", here.join(source).display());
    }
    let target = out.join("guest");
    // First with what is there, so that a build without a network works.
    if !build(&here, &target, true) && !build(&here, &target, false) {
        println!("cargo:warning=the guest image could not be built; see the output above");
        std::process::exit(1);
    }
    let image = target.join("release/pvkit-bench-guest");
    std::fs::copy(&image, out.join("guest-image")).expect("the image was just built");
}

fn build(here: &Path, target: &Path, offline: bool) -> bool {
    let cargo = env::var_os("CARGO").expect("cargo sets it");
    let mut command = Command::new(cargo);
    command
        .current_dir(here.join("guest"))
        .args(["build", "--release", "--locked"])
        .arg("--target-dir")
        .arg(target);
    if offline {
        command.arg("--offline");
    }
    // Flags, wrappers and build settings of the host build (coverage,
    // sanitizers, clippy, another linker) do not fit a freestanding image.
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let host_only = text.contains("RUSTFLAGS")
            || text.starts_with("RUSTC")
            || text.starts_with("CARGO_BUILD_")
            || text.starts_with("CARGO_TARGET_")
            || text.starts_with("CARGO_PROFILE_");
        if host_only {
            command.env_remove(name);
        }
    }
    command.status().is_ok_and(|status| status.success())
}
