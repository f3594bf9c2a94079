#!/usr/bin/env python3
"""Packs the static binary as a container image FROM scratch, and checks the archive.

    image.py BINARY DIRECTORY

Writes DIRECTORY/sidestep-VERSION-ARCH.tar: an OCI image layout that `docker load`,
`ctr image import` and `kind load image-archive` take. The same binary gives the
same bytes: times are SOURCE_DATE_EPOCH (default 0), the owner is root.

Needs nothing but Python; the binary has to run here.
"""

import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

NAME = "sidestep"
# By ELF's e_machine: how OCI calls it.
ARCHITECTURES = {62: "amd64", 183: "arm64"}
PT_INTERP = 3

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def fail(message):
    sys.exit(f"image: {message}")


def architecture(binary):
    """OCI's name for what the static ELF binary runs on."""
    if binary[:6] != b"\x7fELF\x02\x01":
        fail("the binary is not a 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", binary, 18)
    (headers,) = struct.unpack_from("<Q", binary, 32)
    size, count = struct.unpack_from("<HH", binary, 54)
    types = [struct.unpack_from("<I", binary, headers + i * size)[0] for i in range(count)]
    if PT_INTERP in types:
        fail("the binary is not static: an image from scratch has no dynamic linker")
    if machine not in ARCHITECTURES:
        fail(f"no image for ELF machine {machine}")
    return ARCHITECTURES[machine]


def version_of(path):
    """What the binary says of itself."""
    out = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    name, _, version = out.strip().partition(" ")
    if name != NAME or not version:
        fail(f"{path} --version says {out[:60]!r}, not '{NAME} VERSION'")
    return version


def tar(files, epoch):
    """A tar archive of {name: (mode, bytes)}, sorted, with the directories that they are in."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        seen = set()
        for name, (mode, data) in sorted(files.items()):
            for parent in reversed(Path(name).parents[:-1]):
                if parent not in seen:
                    seen.add(parent)
                    entry = tarfile.TarInfo(str(parent))
                    entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, epoch
                    archive.addfile(entry)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(data), mode, epoch
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def to_json(value):
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def build(binary, version, arch, epoch):
    """The archive's bytes."""
    blobs = {}

    def blob(media_type, data):
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = (0o644, data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    # Not compressed: a gzip's bytes vary with zlib. Whoever pushes it compresses it.
    layer = blob(LAYER, tar({NAME: (0o755, binary)}, epoch))
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
    config = blob(CONFIG, to_json({
        "architecture": arch,
        "os": "linux",
        "created": created,
        "config": {
            "Entrypoint": [f"/{NAME}"],
            "User": "0:0",
            "WorkingDir": "/",
            "Labels": {
                "org.opencontainers.image.title": NAME,
                "org.opencontainers.image.version": version,
                "org.opencontainers.image.licenses": "Apache-2.0",
            },
        },
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        "history": [{"created": created, "created_by": "scripts/image.py"}],
    }))
    manifest = blob(MANIFEST, to_json({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]}))
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [{
        **manifest,
        "platform": {"architecture": arch, "os": "linux"},
        # containerd takes its name from the first, other tools their tag from the second.
        "annotations": {
            "io.containerd.image.name": f"docker.io/library/{NAME}:{version}",
            "org.opencontainers.image.ref.name": version,
        },
    }]}

    def path(descriptor):
        return "blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")

    # What `docker load` reads where it has no containerd store.
    docker = [{"Config": path(config), "RepoTags": [f"{NAME}:{version}"], "Layers": [path(layer)]}]
    return tar({
        **blobs,
        "oci-layout": (0o644, to_json({"imageLayoutVersion": "1.0.0"})),
        "index.json": (0o644, to_json(index)),
        "manifest.json": (0o644, to_json(docker)),
    }, epoch)


def verify(path, version, arch):
    """Reads the archive as a container engine does, and runs what is in it."""
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()}

    def read(descriptor):
        algorithm, digest = descriptor["digest"].split(":")
        data = files[f"blobs/{algorithm}/{digest}"]
        assert hashlib.new(algorithm, data).hexdigest() == digest, f"{digest} does not match"
        assert len(data) == descriptor["size"], f"size of {digest}"
        return data

    assert json.loads(files["oci-layout"])["imageLayoutVersion"] == "1.0.0"
    (entry,) = json.loads(files["index.json"])["manifests"]
    assert entry["annotations"]["io.containerd.image.name"].endswith(f"/{NAME}:{version}")
    manifest = json.loads(read(entry))
    config = json.loads(read(manifest["config"]))
    assert (config["architecture"], config["os"]) == (arch, "linux"), "platform"
    assert config["config"]["Entrypoint"] == [f"/{NAME}"], "entrypoint"
    (layer,) = [read(layer) for layer in manifest["layers"]]
    assert config["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(layer).hexdigest()], "diff_ids"
    (docker,) = json.loads(files["manifest.json"])
    assert files[docker["Config"]] == read(manifest["config"]), "docker's config"
    assert [files[name] for name in docker["Layers"]] == [layer], "docker's layers"

    with tarfile.open(fileobj=io.BytesIO(layer)) as root:
        (member,) = root.getmembers()
        assert (member.name, member.mode, member.uid, member.gid) == (NAME, 0o755, 0, 0), "the only file"
        with tempfile.TemporaryDirectory() as directory:
            binary = Path(directory, NAME)
            binary.write_bytes(root.extractfile(member).read())
            binary.chmod(stat.S_IRWXU)
            assert version_of(binary) == version, "version"


def main():
    if len(sys.argv) != 3:
        fail("usage: image.py BINARY DIRECTORY")
    source, directory = map(Path, sys.argv[1:])
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "0")
    if not epoch.isdecimal():
        fail(f"SOURCE_DATE_EPOCH={epoch} is not a number of seconds")
    binary = source.read_bytes()
    arch, version = architecture(binary), version_of(source)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{NAME}-{version}-{arch}.tar"
    new = path.with_suffix(".new")
    new.write_bytes(build(binary, version, arch, int(epoch)))
    verify(new, version, arch)
    new.rename(path)
    print(f"built {path}: {NAME}:{version}, {path.stat().st_size} bytes")


main()
