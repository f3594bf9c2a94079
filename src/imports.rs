//! Unit tests of the rules that the source text itself shows: which module imports which, and where
//! `unsafe` may be. ARCHITECTURE.md has the picture.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The only module with libbpf and `unsafe`.
const DATAPLANE: &str = "dataplane";
/// Modules of one concern each, which import neither each other nor the data plane.
const DOMAINS: [&str; 3] = ["mesh", "service", "splice"];

/// The layers of modules, from the lowest: a module imports only from the lines above its own in
/// this table.
const LAYERS: [&[&str]; 9] = [
    &["files", "pace", "problem", "splice", "text"],
    &["node", "service", "watches"],
    &["mesh"],
    &["dataplane", "source"],
    &["cni"],
    &["ops"],
    &["controller"],
    &["agent"],
    &["cli"],
];

/// A source file: its room, the top-level module that it belongs to, and its text without comments
/// and unit tests.
struct Source {
    path: PathBuf,
    room: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut dirs = vec![root.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("listed") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let below = path.strip_prefix(&root).expect("below src").to_owned();
            let first = below.components().next().expect("a name").as_os_str();
            let room = Path::new(first).file_stem().expect("a name").to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).expect("read");
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
            let text = code.collect::<Vec<_>>().join("\n");
            // `main` and `lib` only join the modules, and this file is about them.
            if !["main", "lib", "imports"].contains(&room.as_str()) {
                found.push(Source { path, room, text });
            }
        }
    }
    found
}

/// The modules that a file names behind `prefix`, alone or in braces.
fn imports(text: &str, prefix: &str) -> BTreeSet<String> {
    let name = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut found = BTreeSet::new();
    for rest in text.split(prefix).skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            found.insert(name(rest));
            continue;
        };
        let (mut depth, mut start) = (1, 0);
        for (at, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 || (depth == 1 && c == ',') {
                found.insert(name(&list[start..at]));
                start = at + 1;
            }
            if depth == 0 {
                break;
            }
        }
    }
    found.remove("");
    found
}

/// The modules that each module imports.
type Knows = BTreeMap<String, BTreeSet<String>>;

fn rooms() -> Knows {
    let mut rooms = Knows::new();
    for Source { room, text, .. } in sources() {
        let knows = rooms.entry(room.clone()).or_default();
        knows.extend(imports(&text, "crate::").into_iter().filter(|other| *other != room));
    }
    rooms
}

#[test]
fn names_are_found_alone_and_in_braces() {
    let text = "use crate::{\n  a::{self, b::{C, D}}, e,\n  f::g,\n};\nuse crate::h;\nlet x = crate::i::j();";
    let all = ["a", "e", "f", "h", "i"].map(str::to_owned);
    assert_eq!(imports(text, "crate::"), BTreeSet::from(all));
}

#[test]
fn domains_know_neither_each_other_nor_the_data_plane() {
    let rooms = rooms();
    for domain in DOMAINS {
        let Some(knows) = rooms.get(domain) else {
            continue;
        };
        for other in DOMAINS.into_iter().chain([DATAPLANE]).filter(|other| *other != domain) {
            assert!(!knows.contains(other), "src/{domain} imports {other}");
        }
    }
    assert!(rooms["mesh"].iter().all(|room| room == "node"), "{:?}", rooms["mesh"]);
    assert!(rooms["service"].iter().all(|room| room == "problem"), "{:?}", rooms["service"]);
    let node = &rooms["node"];
    assert!(!node.contains("mesh") && !node.contains(DATAPLANE), "{node:?}");
}

/// The modules in an import cycle, and those that import them.
fn in_circles(modules: &Knows) -> Knows {
    // Repeatedly removes modules that import none of the rest; those that remain are in a cycle.
    let mut left = modules.clone();
    while let Some(ground) = {
        let knows_none = |knows: &BTreeSet<String>| !knows.iter().any(|one| left.contains_key(one));
        left.iter().find(|(_, knows)| knows_none(knows)).map(|(name, _)| name.clone())
    } {
        left.remove(&ground);
    }
    left
}

#[test]
fn rooms_are_in_layers() {
    let layer = |room: &str| LAYERS.iter().position(|rooms| rooms.contains(&room));
    for (room, knows) in rooms() {
        let own = layer(&room).unwrap_or_else(|| panic!("src/{room} has no layer"));
        for other in knows {
            let is_below = layer(&other).is_some_and(|layer| layer < own);
            assert!(is_below, "src/{room} imports {other}, which is not below it");
        }
    }
}

#[test]
fn the_data_planes_files_are_in_layers() {
    let of_dataplane = sources().into_iter().filter(|source| source.room == DATAPLANE);
    let files: Knows = of_dataplane
        .filter_map(|Source { path, text, .. }| {
            let name = path.file_stem()?.to_string_lossy().into_owned();
            (name != "mod").then(|| (name, imports(&text, "super::")))
        })
        .collect();
    for (file, knows) in &files {
        // The re-exports of `mod.rs` are for other modules.
        let strangers: Vec<_> = knows.iter().filter(|one| !files.contains_key(*one)).collect();
        assert!(
            strangers.is_empty(),
            "{file} imports {strangers:?}, which are not files beside it"
        );
    }
    let left = in_circles(&files);
    assert!(left.is_empty(), "in circles, or above one: {left:?}");
}

#[test]
fn unsafe_and_libbpf_are_the_data_planes() {
    for Source { path, room, text } in sources() {
        let is_dataplane = room == DATAPLANE;
        assert!(is_dataplane || !text.contains("unsafe {"), "{}", path.display());
        let names = ["libbpf_rs", "libbpf_sys"];
        assert!(is_dataplane || !names.iter().any(|n| text.contains(n)), "{}", path.display());
    }
}
