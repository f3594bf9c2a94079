//! The `sidestep` command.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use sidestep::{cli::Cli, cni};

fn main() -> ExitCode {
    // A container runtime starts a CNI plugin by its file's name, with no arguments.
    let name = std::env::args_os().next().map(PathBuf::from);
    if name.as_deref().and_then(Path::file_name).is_some_and(|name| name == cni::PLUGIN) {
        return cni::plugin::main();
    }
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sidestep: {error:#}");
            ExitCode::FAILURE
        }
    }
}
