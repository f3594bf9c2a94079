#!/usr/bin/env python3
"""Changes one decision of the eBPF programs at a time, and sees whether a test notices.

    scripts/mutants.py              all of scripts/mutants_table.py; writes docs/mutants.md
    scripts/mutants.py PATTERN      those whose file or description contain it; writes nothing
    scripts/mutants.py --resume     all, but for those that turned out well in an earlier run with
                                    the same eBPF programs (whatever became of the tests since)
    scripts/mutants.py --list       the table, run nothing

As root. Works in a copy of the tracked files, so the sources stay as they are. Exit status 1 if
a change survives that the table does not explain, or is noticed though it is explained.
"""

import filecmp
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from mutants_table import MUTANTS, Within

REPO = Path(__file__).resolve().parent.parent
SCRATCH = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target")).resolve() / "mutants"
TREE, TARGET, OBJECTS = SCRATCH / "tree", SCRATCH / "target", SCRATCH / "objects"
# What is tried on a survivor that its own tests did not notice.
DATA_PATH = ["outbound", "inbound", "sockets", "dns", "linkerd", "kuma", "untouched"]
TEST_LIMIT, ALL_LIMIT = 90, 600

# In the copy, the agent reads its eBPF objects from files: a change takes a run of clang, not a
# build of the agent.
SKELETON = """.with_context(|| format!("cannot compile {source} with {}", clang.display()))?;"""
FROM_FILE = SKELETON + """
        let skeleton = out.join(format!("{object}.skel.rs"));
        let file = format!("OBJECTS/{object}.o");
        let text = std::fs::read_to_string(&skeleton)?.replace(
            "::new(&DATA)",
            &format!("::new(std::fs::read({file:?}).unwrap().leak())"),
        );
        std::fs::write(&skeleton, text)?;"""


def run(argv, limit, **kwargs):
    """Exit status and output; None where it took too long. Ends the whole process group."""
    process = subprocess.Popen(argv, cwd=TREE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True, env={
                                   **os.environ, "CARGO_TARGET_DIR": str(TARGET),
                                   # Nobody debugs these: they link faster.
                                   "CARGO_PROFILE_DEV_DEBUG": "0"}, **kwargs)
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def copy_tree():
    """Only what changed, so that cargo does not build the rest again."""
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                           cwd=REPO, check=True, stdout=subprocess.PIPE, text=True)
    names = {name for name in names.stdout.split("\0") if name and (REPO / name).is_file()}
    for old in [path for path in TREE.rglob("*") if path.is_file()]:
        if str(old.relative_to(TREE)) not in names:
            old.unlink()
    for name in names:
        if name == "build.rs":
            continue
        if not (TREE / name).exists() or not filecmp.cmp(REPO / name, TREE / name, shallow=False):
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, TREE / name)
    build = (REPO / "build.rs").read_text()
    if build.count(SKELETON) != 1:
        sys.exit("build.rs has changed: scripts/mutants.py does not know it any more")
    (TREE / "build.rs").write_text(build.replace(SKELETON, FROM_FILE.replace("OBJECTS", str(OBJECTS))))


def build_tests():
    """The executables of the integration tests, which start the agent's binary by its path."""
    status, output = run(["cargo", "test", "--no-run", "--message-format=json-render-diagnostics"], 1800)
    if status != 0:
        sys.exit(f"the tests do not build:\n{output}")
    found = {}
    for line in output.splitlines():
        message = json.loads(line) if line.startswith("{") else {}
        if message.get("executable") and "test" in message["target"]["kind"]:
            found[message["target"]["name"]] = message["executable"]
    status, output = run(["cargo", "build", "-q", "-p", "sidestep-lab", "--bin", "demo"], 1800)
    if status != 0:
        sys.exit(f"the lab does not build:\n{output}")
    return found


def compile_objects():
    """As build.rs does, but for warnings; what the compiler said where it failed."""
    include = next((TARGET / "debug/build").glob("libbpf-sys-*/out/include/bpf")).parent
    arch = os.uname().machine
    clang = os.environ.get("CLANG") or next(
        name for name in ["clang", *(f"clang-{n}" for n in range(14, 25))] if shutil.which(name))
    OBJECTS.mkdir(exist_ok=True)
    for name in ["sidestep", "inbound", "policy"]:
        status, output = run(
            [clang, "-target", "bpf", "-g", "-O2", "-mcpu=v3", "-c", f"bpf/{name}.bpf.c",
             "-I", "bpf", "-I", f"vmlinux/{arch}", "-I", str(include), "-o", str(OBJECTS / f"{name}.o"),
             {"x86_64": "-D__TARGET_ARCH_x86", "aarch64": "-D__TARGET_ARCH_arm64"}[arch]], 60)
        if status != 0:
            return output
    return None


def failing(executable, filters, limit):
    """The tests that fail, once and again: what fails only once is the machine's doing."""
    for attempt in range(2):
        args = filters if attempt == 0 else ["--exact", *filters]
        status, output = run([executable, *args], limit)
        failed = set(re.findall(r"^test (\S+) \.\.\. FAILED$", output, re.M))
        if status is None:
            # What a killed run left would be in the way of the next.
            run([TARGET / "debug/demo", "--teardown"], 60)
            return {"the time limit"}
        if status != 0 and not failed:
            return {f"exit status {status}"}
        if not failed or attempt == 1:
            return failed
        filters = sorted(failed)


def by_binary(tests):
    """`outbound:t1_ outbound:t2_ dns` -> {outbound: [t1_, t2_], dns: []}, in that order."""
    out = {}
    for name, _, pattern in (test.partition(":") for test in tests.split()):
        out.setdefault(name, []).extend([pattern] if pattern else [])
    return out


def killers(tests, executables, limit):
    for name, filters in by_binary(tests).items():
        failed = failing(executables[name], filters, limit)
        if failed:
            return [f"{name}: {test}" for test in sorted(failed)]
    return []


def judge(mutant, site, executables):
    """What becomes of a mutant: its verdict, and what shows it."""
    path = TREE / "bpf" / site.file
    original = path.read_text()
    path.write_text(original[:site.start] + mutant.new + original[site.end:])
    try:
        errors = compile_objects()
        if errors:
            sys.exit(f"{site.file}: {mutant.what}: does not compile:\n{errors}")
        killed_by = killers(mutant.tests, executables, TEST_LIMIT)
        if not killed_by and not mutant.why:
            killed_by = killers(" ".join(n for n in DATA_PATH if n in executables), executables,
                                ALL_LIMIT)
            if killed_by:
                print(f"    not by its own tests: {mutant.tests}", flush=True)
        if killed_by and run([TARGET / "debug/sidestep", "check"], 60)[0] != 0:
            killed_by = ["the verifier"]
        return ("killed" if killed_by else "survived"), killed_by
    finally:
        path.write_text(original)


class Done:
    """What became of each mutant, kept for --resume."""

    def __init__(self):
        self.path = SCRATCH / "done.json"
        self.sources = b"".join(text.encode() for text in sources().values())
        self.all = json.loads(self.path.read_text()) if self.path.exists() else {}

    def key(self, mutant):
        return hashlib.sha256(self.sources + repr(mutant).encode()).hexdigest()

    def get(self, mutant):
        return self.all.get(self.key(mutant))

    def put(self, mutant, result):
        self.all[self.key(mutant)] = result
        self.path.write_text(json.dumps(self.all))


def is_open(mutant, verdict):
    """It survived without a reason, or was noticed in spite of one."""
    return (verdict == "killed") == bool(mutant.why)


class Site(NamedTuple):
    """Where a mutant's text is: the file below bpf/, and from where to where in it."""

    file: str
    start: int
    end: int


def sources():
    """The text of each C file, by its path below bpf/."""
    root = REPO / "bpf"
    files = sorted(path for path in root.rglob("*") if path.suffix in (".c", ".h"))
    return {str(path.relative_to(root)): path.read_text() for path in files}


def find(mutant, texts):
    """Its site; ends the run where there is not exactly one."""
    place, text = mutant.old if isinstance(mutant.old, Within) else ("", mutant.old)
    function = re.compile(rf"^\w[^\n;]*\b{re.escape(place)}\([^;{{]*\)\n{{\n.*?^}}\n", re.M | re.S)
    sites = []
    for file, source in texts.items():
        spans = [(0, len(source))]
        if place and Path(file).name != place:
            spans = [match.span() for match in function.finditer(source)]
        for start, end in spans:
            while (start := source.find(text, start, end)) >= 0:
                sites.append(Site(file, start, start + len(text)))
                start += len(text)
    if len(sites) != 1:
        places = ", ".join(site.file for site in sites) or "nowhere"
        sys.exit(f"{mutant.what}: its text is to be there once, and is in: {places}\n{text}")
    return sites[0]


def report(results):
    killed = [r for r in results if r[2] == "killed"]
    explained = [r for r in results if r[2] == "survived" and r[0].why]
    lines = [
        "# What the tests notice", "",
        "Made by `make mutants` (`scripts/mutants.py`, changes in `scripts/mutants_table.py`): one",
        "decision of the eBPF programs is changed, the programs are built and loaded, and the tests",
        "run until one fails. *The verifier*: the kernel refuses the changed program. Every change",
        "that no test notices is explained here, or the run fails.", "",
        f"{len(results)} changes: {len(killed)} noticed, {len(explained)} explained, "
        f"{len(results) - len(killed) - len(explained)} open.", "",
    ]
    for file in dict.fromkeys(site.file for _, site, _, _ in results):
        lines += [f"## {file}", "", "| what if | noticed by |", "|---|---|"]
        for mutant, site, verdict, by in results:
            if site.file == file:
                shown = "; ".join(by[:2]) + (f" and {len(by) - 2} more" if len(by) > 2 else "")
                shown = shown if verdict == "killed" else \
                    f"nothing: {mutant.why}" if mutant.why else "**nothing: open**"
                lines.append(f"| {mutant.what} | {shown.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def main(args):
    texts = sources()
    every = [(mutant, find(mutant, texts)) for mutant in MUTANTS]
    option = args[0] if args else ""
    if option == "--list":
        print("\n".join(f"{site.file}: {mutant.what}" for mutant, site in every))
        return
    pattern = "" if option == "--resume" else option
    chosen = [(m, site) for m, site in every if pattern in f"{site.file}: {m.what}"]
    if os.geteuid() != 0:
        sys.exit("mutants: needs root: the tests load eBPF programs and make network namespaces")
    if not chosen:
        sys.exit(f"mutants: none matches {pattern!r}")
    TREE.mkdir(parents=True, exist_ok=True)
    copy_tree()
    print(f"mutants: building the tests in {SCRATCH}", flush=True)
    executables = build_tests()
    errors = compile_objects()
    if errors:
        sys.exit(f"the eBPF programs do not compile:\n{errors}")
    for name, filters in by_binary(" ".join(m.tests for m, _ in chosen)).items():
        # Of other files, a survivor meets no more than the tests that it names.
        failed = failing(executables[name], [] if name in DATA_PATH else filters, ALL_LIMIT)
        if failed:
            sys.exit(f"mutants: {name} fails with no change at all: {sorted(failed)}")
    results, wrong, done = [], 0, Done()
    for number, (mutant, site) in enumerate(chosen, 1):
        start = time.monotonic()
        before = done.get(mutant) if option == "--resume" else None
        if not before or is_open(mutant, before[0]):
            before = judge(mutant, site, executables)
        verdict, by = before
        done.put(mutant, (verdict, by))
        results.append((mutant, site, verdict, by))
        wrong += is_open(mutant, verdict)
        note = "; ".join(by) or (f"explained: {mutant.why}" if mutant.why else "NOT EXPLAINED")
        print(f"[{number}/{len(chosen)}] {site.file}: {mutant.what}: {verdict}: {note} "
              f"({time.monotonic() - start:.0f} s)", flush=True)
    if not pattern:
        (REPO / "docs/mutants.md").write_text(report(results))
    if wrong:
        sys.exit(f"mutants: {wrong} of {len(chosen)} survive without a reason, or were noticed "
                 "in spite of one")


if __name__ == "__main__":
    main(sys.argv[1:])
