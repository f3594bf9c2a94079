#!/usr/bin/env python3
"""Compares docs/contract.md with what cites its statements: a part of `make check`."""

import re
import subprocess
import sys

CONTRACT = "docs/contract.md"
# Where a statement is shown, and where else numbers are cited.
TESTS = ("tests/", "lab/", "e2e/", "bench/", "torture/", "conformance/", "src/")
TEXTS = ("bpf/", "docs/", "scripts/mutants_table.py", "README.md", "ARCHITECTURE.md")
NUMBER = re.compile(r"\b[TILABF][0-9]{1,2}\b(?!:[0-9])")  # no time of day, as T00:00
# fn t4_t5_own_service(), row(f42_zero_length_read
NAME = re.compile(r"\b(?:fn |row\()((?:[tilabf][0-9]{1,2}_)+)")
# Its rows are runnable by their own names, so comments say which fault they are about.
ROWS = "conformance/src/rows.rs"
# A row of docs/conformance.md: | istio/OR.in.other | ...
ROW = re.compile(r"^\| (?:istio|linkerd|kuma)/([A-Z]+)[0-9.]", re.MULTILINE)


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def named(text):
    """The numbers in names of functions and rows."""
    return set(filter(None, "".join(NAME.findall(text)).upper().split("_")))


def cited(text):
    """The numbers in a text, and in names of functions."""
    return set(NUMBER.findall(text)) | named(text)


def main():
    contract = read(CONTRACT)
    numbers = re.findall(r"^\| ([TILABF][0-9]+) \|", contract, re.MULTILINE)
    groups = set(re.findall(r"`([A-Z]+)`", contract.split("## Rows of conformance")[1].split("\n## ")[0]))
    wrong = [f"{CONTRACT}: {number} is there twice" for number in set(numbers) if numbers.count(number) > 1]
    by_tests, by_name = set(), set()
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], check=True, capture_output=True, text=True)
    for path in files.stdout.split():
        is_test = path.startswith(TESTS) and path.endswith((".rs", ".py"))
        if path == CONTRACT or not (is_test or path.startswith(TEXTS)):
            continue
        found = cited(read(path))
        wrong += [f"{path} cites {number}, which {CONTRACT} does not have" for number in sorted(found - set(numbers))]
        if is_test:
            by_tests |= found
            by_name |= found if path == ROWS else named(read(path))
    wrong += [f"{CONTRACT}: no test cites {number}" for number in numbers if number not in by_tests]
    faults = [number for number in numbers if number.startswith("F")]
    wrong += [f"{CONTRACT}: no test has {number} in its name" for number in faults if number not in by_name]
    rows = {group for group in ROW.findall(read("docs/conformance.md")) if group not in "TIL"}
    wrong += [f"{CONTRACT} does not have the rows {group} of docs/conformance.md" for group in sorted(rows - groups)]
    wrong += [f"docs/conformance.md has no rows {group}" for group in sorted(groups - rows)]
    print("\n".join(f"contract: {line}" for line in wrong), end="\n" if wrong else "", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
