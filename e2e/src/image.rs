//! The image of the scenarios' pods, made by hand, without a registry.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, Header, HeaderMode};

/// The name of the image.
pub const IMAGE: &str = "e2e.local/pod:1";

/// The image of [`write_program`].
pub const PROGRAM_IMAGE: &str = "e2e.local/program:1";

/// Writes [`PROGRAM_IMAGE`]: this program, and these arguments unless told others.
pub fn write_program(archive: &Path, program: &Path, arguments: &[&str]) -> Result<()> {
    write(archive, PROGRAM_IMAGE, program, arguments)
}

/// Writes [`IMAGE`], as an archive for `kind load image-archive`.
pub fn write_pods(archive: &Path) -> Result<()> {
    write(archive, IMAGE, &pod_program()?, &["pause"])
}

/// The program for the pods, which is built beside this one.
fn pod_program() -> Result<PathBuf> {
    let own = env::current_exe().context("looking for this very program")?;
    let program = own.with_file_name("e2e-pod");
    if program.is_file() {
        return Ok(program);
    }
    bail!("there is no {}: run cargo build -p sidestep-e2e", program.display())
}

/// Writes an image with one program and the libraries that it is linked with, as an OCI layout
/// in a tar archive. The program is the image's entrypoint, with `arguments` unless told others.
fn write(archive: &Path, name: &str, program: &Path, arguments: &[&str]) -> Result<()> {
    let file_name = program.file_name().context("a program without a name")?;
    let entrypoint = Path::new("/").join(file_name);
    let layer_file = archive.with_extension("layer");
    layer(&layer_file, program, &entrypoint)
        .with_context(|| format!("writing {}", layer_file.display()))?;
    let layer = Blob::new(fs::read(&layer_file).context("reading the layer")?);
    fs::remove_file(&layer_file).context("removing the layer")?;

    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": [entrypoint], "Cmd": arguments},
        "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
    });
    let config = Blob::new(config.to_string().into_bytes());
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": [layer.descriptor("application/vnd.oci.image.layer.v1.tar")],
    });
    let manifest = Blob::new(manifest.to_string().into_bytes());
    let mut described = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
    described["annotations"] = json!({"io.containerd.image.name": name});
    let index = json!({"schemaVersion": 2, "manifests": [described]});

    let mut tar = Builder::new(create(archive)?);
    add(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    add(&mut tar, "index.json", index.to_string().as_bytes())?;
    for blob in [&config, &manifest, &layer] {
        add(&mut tar, &format!("blobs/{}", blob.digest.replace(':', "/")), &blob.data)?;
    }
    tar.finish().with_context(|| format!("writing {}", archive.display()))
}

fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("making {}", path.display()))
}

fn layer(path: &Path, program: &Path, entrypoint: &Path) -> Result<()> {
    let mut tar = Builder::new(create(path)?);
    tar.mode(HeaderMode::Deterministic);
    // containerd has no sparse files.
    tar.sparse(false);
    let libraries = libraries(program)?;
    let files = libraries.iter().map(|library| (library.as_path(), library.as_path()));
    for (from, to) in files.chain([(program, entrypoint)]) {
        let to = to.strip_prefix("/").unwrap_or(to);
        tar.append_path_with_name(from, to)
            .with_context(|| format!("adding {}", from.display()))?;
    }
    tar.finish().context("ending the archive")
}

/// The shared libraries that a program is linked with, the dynamic linker among them; none when
/// it is static.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let out = Command::new("ldd").arg(program).output().context("running ldd")?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(said.contains("not a dynamic executable"), "ldd: {}", said.trim());
        return Ok(BTreeSet::new());
    }
    let text = String::from_utf8_lossy(&out.stdout);
    // "NAME => /PATH (ADDRESS)", "/PATH (ADDRESS)", "NAME (ADDRESS)" for what the kernel maps.
    let words = text.lines().filter_map(|line| {
        line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from)
    });
    Ok(words.collect())
}

fn add(tar: &mut Builder<File>, name: &str, data: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_size(data.len().try_into().context("the size does not fit")?);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, data).with_context(|| format!("adding {name}"))
}

/// A part of an image, and what it is called by.
struct Blob {
    data: Vec<u8>,
    digest: String,
}

impl Blob {
    fn new(data: Vec<u8>) -> Self {
        let hash = Sha256::digest(&data);
        let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { data, digest: format!("sha256:{hex}") }
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest, "size": self.data.len()})
    }
}
