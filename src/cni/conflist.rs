//! Adds the plugin to the node's CNI configuration, restores it, and removes it.

use std::{
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use tracing::{info, warn};

use super::{Config, PLUGIN, Settings, VERSIONS};
use crate::files;

/// The number of rewrites in a row that are not yet a fight: others install themselves at the same
/// time.
const PATIENT: u32 = 10;
/// The longest pause between rewrites while another program keeps writing the configuration.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The node's CNI directories.
#[derive(Debug)]
pub struct Installer {
    config: Config,
    fight: Fight,
}

/// The number of times that another program has rewritten the configuration after it was corrected.
#[derive(Debug, Default)]
struct Fight {
    rounds: u32,
    last: Option<Instant>,
}

impl Fight {
    /// The time for which the configuration stays as the other program wrote it.
    fn pause(&self) -> Duration {
        let doublings = self.rounds.saturating_sub(PATIENT);
        match doublings {
            0 => Duration::ZERO,
            n => LONGEST_PAUSE.min(Duration::from_secs(1 << n.min(6))),
        }
    }

    /// Whether another program fights over the configuration. A fight ends when the configuration
    /// has been left alone for a while.
    fn goes_on(&mut self, now: Instant) -> bool {
        if self.last.is_none_or(|last| now - last > 2 * LONGEST_PAUSE) {
            *self = Self::default();
        }
        self.rounds > PATIENT
    }

    /// Whether the configuration may be written now; if so, the write is counted.
    fn strikes(&mut self, now: Instant) -> bool {
        self.goes_on(now);
        if self.last.is_some_and(|last| now - last < self.pause()) {
            return false;
        }
        *self = Self { rounds: self.rounds + 1, last: Some(now) };
        true
    }
}

impl Installer {
    /// The installer for these directories and settings.
    pub fn new(config: &Config) -> Self {
        Self { config: config.clone(), fight: Fight::default() }
    }

    /// Copies the running executable to the directory of plugins, unless it is there already.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn install_plugin(&self) -> Result<()> {
        let target = self.config.bin_dir.join(PLUGIN);
        let failed = || format!("cannot install {} (--cni-bin-dir)", target.display());
        let own = fs::read("/proc/self/exe").with_context(failed)?;
        if fs::read(&target).is_ok_and(|there| there == own) {
            return Ok(());
        }
        write(&target, &own, 0o755).with_context(failed)
    }

    /// Makes sure that the configuration that the container runtime uses ends with the plugin:
    /// another agent may have rewritten it. If one does so again and again, the pauses grow to a
    /// minute.
    ///
    /// # Errors
    /// If there is no such file, or it cannot be read, parsed or written: it is left alone. If
    /// another program keeps writing it.
    pub fn ensure(&mut self) -> Result<()> {
        self.ensure_at(Instant::now())
    }

    fn ensure_at(&mut self, now: Instant) -> Result<()> {
        let dir = &self.config.conf_dir;
        let path = primary(dir)?.with_context(|| {
            format!("there is no CNI configuration in {} yet (--cni-conf-dir)", dir.display())
        })?;
        let left = || format!("CNI configuration {} was not changed", path.display());
        let conflist = path.extension().is_some_and(|extension| extension == "conflist");
        ensure!(
            conflist,
            "{}: it configures a single plugin, but chaining one needs a .conflist",
            left()
        );
        let text = files::read(&path).with_context(left)?;
        if let Some(text) = chained(&text, &self.config.settings).with_context(left)?
            && self.fight.strikes(now)
        {
            rewrite(&path, &text).with_context(left)?;
            if self.fight.rounds <= PATIENT {
                info!(path = %path.display(), "CNI plugin added to the chain");
            }
        }
        ensure!(
            !self.fight.goes_on(now),
            "CNI configuration {}: another program keeps rewriting it without {PLUGIN}, or with \
             other settings for it. Is there a second agent, or a CNI that wants the file to \
             itself? Sidestep puts its plugin back every {} seconds at most; pods that start in \
             between may not be intercepted",
            path.display(),
            LONGEST_PAUSE.as_secs()
        );
        Ok(())
    }
}

/// Removes the plugin from every configuration in `conf_dir` and from `bin_dir`, and the agent's
/// socket. Returns the number of changed files.
///
/// # Errors
/// If a file cannot be written or removed. Files that are not JSON are skipped.
pub fn uninstall(conf_dir: &Path, bin_dir: &Path, socket: &Path) -> Result<usize> {
    let mut changed = 0;
    for path in configurations(conf_dir)? {
        let text = files::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        match unchained(&text) {
            Ok(Some(text)) => {
                rewrite(&path, &text)?;
                changed += 1;
            }
            Ok(None) => {}
            Err(error) => warn!("CNI configuration {} was not changed: {error:#}", path.display()),
        }
    }
    for path in [&bin_dir.join(PLUGIN), socket] {
        match fs::remove_file(path) {
            Ok(()) => changed += 1,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
        }
    }
    Ok(changed)
}

/// The configuration with the plugin at its end; `None` if it needs no change.
fn chained(text: &str, settings: &Settings) -> Result<Option<String>> {
    let mut entry = Map::new();
    entry.insert("type".into(), PLUGIN.into());
    if let Value::Object(settings) = serde_json::to_value(settings)? {
        entry.extend(settings);
    }
    let (mut config, mut plugins) = parse(text)?;
    check_versions(&config)?;
    ensure!(
        !plugins.is_empty(),
        "its list of plugins is empty: {PLUGIN} needs one to be chained to"
    );
    let entry = Value::Object(entry);
    if plugins.last() == Some(&entry) && plugins.iter().filter(|p| is_ours(p)).count() == 1 {
        return Ok(None);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    ensure!(
        !plugins.is_empty(),
        "its list of plugins is empty: {PLUGIN} needs one to be chained to"
    );
    plugins.push(entry);
    config["plugins"] = plugins.into();
    Ok(Some(pretty(&config)?))
}

/// The configuration without the plugin; `None` if the plugin is not in it.
fn unchained(text: &str) -> Result<Option<String>> {
    let (mut config, mut plugins) = parse(text)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    if plugins.len() == before {
        return Ok(None);
    }
    config["plugins"] = plugins.into();
    Ok(Some(pretty(&config)?))
}

fn parse(text: &str) -> Result<(Value, Vec<Value>)> {
    let config: Value = serde_json::from_str(text).context("it is not valid JSON")?;
    let Some(plugins) = config.get("plugins").and_then(Value::as_array) else {
        bail!("it has no \"plugins\" list");
    };
    let plugins = plugins.clone();
    Ok((config, plugins))
}

/// Whether the plugin supports every version that the runtime may call it with: `cniVersion`, or
/// the newest of `cniVersions` that the runtime knows (CNI 1.1). With an unsupported version it
/// would refuse every pod of the node. No version means 0.1.0, and works.
fn check_versions(config: &Value) -> Result<()> {
    let single = config.get("cniVersion").into_iter();
    let several = match config.get("cniVersions") {
        None => &[][..],
        Some(list) => list.as_array().context("cniVersions: expected a list")?,
    };
    for version in single.chain(several) {
        let known =
            version.as_str().is_some_and(|text| text.is_empty() || VERSIONS.contains(&text));
        ensure!(known, "cniVersion {version}: expected one of {}", VERSIONS.join(", "));
    }
    Ok(())
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == PLUGIN
}

fn pretty(config: &Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(config)? + "\n")
}

/// The file that the container runtime uses: the first by name.
fn primary(dir: &Path) -> Result<Option<PathBuf>> {
    let found = files(dir)?;
    let taken = |path: &PathBuf| has_extension(path, &["conf", "conflist", "json"]);
    Ok(found.into_iter().find(taken))
}

fn configurations(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    Ok(files(dir)?.into_iter().filter(|path| has_extension(path, &["conflist"])).collect())
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|found| extensions.iter().any(|one| found == *one))
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
        .with_context(|| format!("cannot read directory {} (--cni-conf-dir)", dir.display()))?;
    found.sort();
    Ok(found)
}

/// Replaces a file's text, keeping its mode.
fn rewrite(path: &Path, text: &str) -> Result<()> {
    let mode = fs::metadata(path)?.permissions().mode() & 0o777;
    write(path, text.as_bytes(), mode)
}

/// Writes a file in one step: readers see either the old or the new text, whole.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let name = path.file_name().context("no file name")?.to_string_lossy();
    // Runtimes ignore names with other extensions.
    let fresh = path.with_file_name(format!(".{name}.{PLUGIN}-new"));
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(&fresh)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&fresh, path).inspect_err(|_| {
        let _ = fs::remove_file(&fresh);
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::{super::OnAgentAway, *};

    const BRIDGE: &str = r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","bridge":"cni0"},{"type":"portmap"}]}"#;

    fn settings() -> Settings {
        Settings {
            socket: "/run/sidestep/cni.sock".into(),
            on_agent_away: OnAgentAway::Refuse,
            timeout_seconds: 30,
            exclude_namespaces: vec!["kube-system".into()],
        }
    }

    fn installer(dir: &Path) -> Installer {
        Installer::new(&Config {
            conf_dir: dir.into(),
            bin_dir: dir.into(),
            socket: "/run/sidestep/cni.sock".into(),
            settings: settings(),
        })
    }

    #[test]
    fn the_plugin_goes_last_and_the_rest_stays() {
        let text = chained(BRIDGE, &settings()).expect("chained").expect("changed");
        let config: Value = serde_json::from_str(&text).expect("json");
        let types: Vec<&str> = config["plugins"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|plugin| plugin["type"].as_str())
            .collect();
        assert_eq!(types, ["bridge", "portmap", "sidestep-cni"]);
        assert_eq!(config["plugins"][2]["onAgentAway"], "refuse");
        assert_eq!(config["plugins"][2]["timeoutSeconds"], 30);
        assert_eq!(chained(&text, &settings()).expect("read"), None, "nothing more to do");
        let back = unchained(&text).expect("read").expect("changed");
        let (back, before): (Value, Value) = (
            serde_json::from_str(&back).expect("json"),
            serde_json::from_str(BRIDGE).expect("json"),
        );
        assert_eq!(back, before);
    }

    #[test]
    fn other_settings_and_other_plugins_behind_are_put_right() {
        let text = chained(BRIDGE, &settings()).expect("chained").expect("changed");
        let other = Settings { timeout_seconds: 5, ..settings() };
        let text = chained(&text, &other).expect("chained").expect("changed");
        assert_eq!(text.matches(PLUGIN).count(), 1, "{text}");
        let mut config: Value = serde_json::from_str(&text).expect("json");
        config["plugins"].as_array_mut().expect("a list").push(serde_json::json!({"type": "late"}));
        let text = chained(&config.to_string(), &other).expect("chained").expect("changed");
        let config: Value = serde_json::from_str(&text).expect("json");
        assert_eq!(config["plugins"][3]["type"], PLUGIN);
    }

    #[test]
    fn the_first_file_by_name_is_the_one() {
        let dir = tempfile::tempdir().expect("directory");
        let mut installer = installer(dir.path());
        let error = installer.ensure().expect_err("nothing there").to_string();
        assert!(error.contains("no CNI configuration"), "{error}");
        for name in ["20-b.conflist", "10-a.conflist", "05-notes.txt"] {
            fs::write(dir.path().join(name), BRIDGE).expect("written");
        }
        installer.ensure().expect("installed");
        let has =
            |name: &str| fs::read_to_string(dir.path().join(name)).expect("read").contains(PLUGIN);
        assert!(has("10-a.conflist") && !has("20-b.conflist") && !has("05-notes.txt"));
        // Another agent writes it anew.
        fs::write(dir.path().join("10-a.conflist"), BRIDGE).expect("written");
        installer.ensure().expect("repaired");
        assert!(has("10-a.conflist"));
        installer.install_plugin().expect("copied");
        let socket = dir.path().join("cni.sock");
        fs::write(&socket, "").expect("written");
        let taken = || uninstall(dir.path(), dir.path(), &socket).expect("removed");
        assert_eq!(taken(), 3);
        assert!(!has("10-a.conflist"));
        assert_eq!(taken(), 0, "nothing to do");
        let names = files(dir.path()).expect("read");
        assert_eq!(names.len(), 3, "nothing is left behind: {names:?}");
    }

    /// F3: every version that libcni takes is chained; another one is not.
    #[test]
    fn f3_the_plugin_is_chained_where_it_takes_the_version() {
        let list = |key: &str, value: Value| {
            let mut config: Value = serde_json::from_str(BRIDGE).expect("json");
            config.as_object_mut().expect("an object").shift_remove("cniVersion");
            config[key] = value;
            chained(&config.to_string(), &settings())
        };
        for version in ["", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            list("cniVersion", version.into()).expect(version).expect("chained");
        }
        list("other", "".into()).expect("none at all").expect("chained");
        list("cniVersions", serde_json::json!(["0.4.0", "1.1.0"])).expect("read").expect("chained");
        for (key, value) in [
            ("cniVersion", serde_json::json!("2.0.0")),
            ("cniVersion", serde_json::json!("1.0")),
            ("cniVersion", serde_json::json!(1.0)),
            ("cniVersions", serde_json::json!(["1.0.0", "9.0.0"])),
            ("cniVersions", serde_json::json!("1.0.0")),
        ] {
            let error = list(key, value.clone()).expect_err("not changed").to_string();
            assert!(error.contains("cniVersion"), "{error}");
            assert!(
                value.is_string() && key == "cniVersions" || error.contains("0.3.0"),
                "{error}"
            );
        }
    }

    /// F35: two agents, each of which wants its own entry.
    #[test]
    fn f35_a_fight_over_the_configuration_is_named_and_slows_down() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("10-a.conflist");
        let mut installer = installer(dir.path());
        let (start, mut writes, mut errors) = (Instant::now(), 0, BTreeSet::new());
        for tick in 0..6000 {
            // The other one is quick: it looks ten times a second.
            fs::write(&path, BRIDGE).expect("written");
            let done = installer.ensure_at(start + Duration::from_millis(100 * tick));
            writes += u32::from(fs::read_to_string(&path).expect("read").contains(PLUGIN));
            errors.extend(done.err().map(|error| error.to_string()));
        }
        assert!((15..35).contains(&writes), "{writes} in ten minutes");
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors
                .iter()
                .all(|text| text.contains("10-a.conflist") && text.contains("second agent"))
        );
        // It gives up: the file is put right, and after a while all is well.
        let later = start + Duration::from_secs(610);
        installer.ensure_at(later).expect_err("a moment ago they fought");
        installer.ensure_at(later + 4 * LONGEST_PAUSE).expect("it is over");
        assert!(fs::read_to_string(&path).expect("read").contains(PLUGIN));
        fs::write(&path, BRIDGE).expect("written");
        installer.ensure_at(later + 5 * LONGEST_PAUSE).expect("put right at once");
    }

    #[test]
    fn a_files_mode_is_kept() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("10-a.conflist");
        fs::write(&path, BRIDGE).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("set");
        installer(dir.path()).ensure().expect("installed");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_not_understood_is_left_alone_and_named() {
        for (name, text, word) in [
            ("10-a.conflist", "{ no json", "not valid JSON"),
            ("10-a.conflist", r#"{"name":"n"}"#, "plugins"),
            ("10-a.conflist", r#"{"name":"n","plugins":[]}"#, "chained to"),
            ("10-a.conf", r#"{"name":"n","type":"bridge"}"#, "single plugin"),
        ] {
            let dir = tempfile::tempdir().expect("directory");
            let path = dir.path().join(name);
            fs::write(&path, text).expect("written");
            let error = format!("{:#}", installer(dir.path()).ensure().expect_err("refused"));
            assert!(error.contains(name) && error.contains(word), "{error}");
            uninstall(dir.path(), dir.path(), &dir.path().join("s")).expect("nothing to do");
            assert_eq!(fs::read_to_string(&path).expect("there"), text);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_chained_once_or_refused(text in "\\PC{0,40}") {
            if let Ok(Some(new)) = chained(&text, &settings()) {
                prop_assert_eq!(chained(&new, &settings()).expect("ours"), None);
            }
        }
    }
}
