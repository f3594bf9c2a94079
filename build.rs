//! Compiles the C programs in `bpf/` and generates their Rust skeletons.

use std::{env, ffi::OsString, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use libbpf_cargo::SkeletonBuilder;

/// The object of the node's programs, the one that is loaded for each pod, and the one that is
/// asked what the policy says.
const OBJECTS: [&str; 3] = ["sidestep", "inbound", "policy"];

fn main() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH").context("CARGO_CFG_TARGET_ARCH is not set")?;
    let vmlinux = PathBuf::from("vmlinux").join(&arch);
    if !vmlinux.join("vmlinux.h").exists() {
        bail!("no {}/vmlinux.h: see vmlinux/README.md for how to make one", vmlinux.display());
    }
    let clang = find_clang()?;
    for object in OBJECTS {
        let source = format!("bpf/{object}.bpf.c");
        SkeletonBuilder::new()
            .source(&source)
            .clang(&clang)
            .clang_args([
                OsString::from("-I"),
                "bpf".into(),
                "-I".into(),
                vmlinux.clone().into(),
                "-mcpu=v3".into(),
                "-Wall".into(),
                "-Wextra".into(),
                "-Wshadow".into(),
                "-Werror".into(),
            ])
            .build_and_generate(out.join(format!("{object}.skel.rs")))
            .with_context(|| format!("cannot compile {source} with {}", clang.display()))?;
    }
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-changed=vmlinux");
    println!("cargo:rerun-if-env-changed=CLANG");
    Ok(())
}

/// `$CLANG`, or `clang`, or the oldest of Debian's versioned names that is installed.
fn find_clang() -> Result<PathBuf> {
    if let Some(clang) = env::var_os("CLANG") {
        if runs(&clang) {
            return Ok(clang.into());
        }
        bail!("CLANG={} does not run", clang.to_string_lossy());
    }
    std::iter::once("clang".into())
        .chain((14..=24).map(|version| format!("clang-{version}")))
        .find(|name| runs(&OsString::from(name)))
        .map(PathBuf::from)
        .context(
            "clang is needed to compile the eBPF programs in bpf/, and neither clang nor clang-14 \
             to clang-24 was found in PATH: run `make deps`, or name one with CLANG=/path/to/clang",
        )
}

fn runs(clang: &OsString) -> bool {
    Command::new(clang).arg("--version").output().is_ok_and(|output| output.status.success())
}
