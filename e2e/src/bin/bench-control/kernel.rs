//! The kernel's pinned maps, as the agent's programs see them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use sidestep_lab::interrupted;

/// Between two looks at a map: the resolution of what is measured so.
pub const LOOK: Duration = Duration::from_micros(250);
/// A change that takes longer is a failure.
pub const LONGEST: Duration = Duration::from_secs(10);

/// The maps that hold what belongs to pods.
const OF_PODS: [&str; 8] = [
    "pods",
    "pod_records",
    "locals",
    "port_rules",
    "cidr_rules",
    "uid_rules",
    "excluded_ifs",
    "listeners",
];

/// `struct pod_record` of bpf/lib/records.h: where the uid is.
const UID: std::ops::Range<usize> = 320..384;

/// The agent's pins.
pub struct Kernel {
    layout: PathBuf,
    maps: BTreeMap<&'static str, MapHandle>,
}

impl Kernel {
    /// Below the agent's directory of a bpffs.
    pub fn open(bpffs: &Path) -> Result<Self> {
        let mut layouts = fs::read_dir(bpffs).with_context(|| format!("{}", bpffs.display()))?;
        let layout = layouts.next().with_context(|| format!("{} is empty", bpffs.display()))??;
        let layout = layout.path();
        let open = |name| {
            let path = layout.join("maps").join(name);
            let map = MapHandle::from_pinned_path(&path);
            Ok((name, map.with_context(|| format!("opening {}", path.display()))?))
        };
        let maps = OF_PODS.into_iter().map(open).collect::<Result<_>>()?;
        Ok(Self { layout, maps })
    }

    fn map(&self, name: &str) -> Result<&MapHandle> {
        self.maps.get(name).with_context(|| format!("no map {name}"))
    }

    /// The cookie of the pod with this uid, if all that intercepts it is there: its record, its
    /// row, and its link.
    pub fn enrolled(&self, uid: &str) -> Result<Option<u64>> {
        let records = self.map("pod_records")?;
        for key in records.keys() {
            let Some(record) = records.lookup(&key, MapFlags::ANY)? else { continue };
            ensure!(record.len() == 640, "a record of {} bytes", record.len());
            if record[UID].strip_prefix(uid.as_bytes()).is_none_or(|rest| rest[0] != 0) {
                continue;
            }
            let row = self.map("pods")?.lookup(&key, MapFlags::ANY)?;
            let cookie = u64::from_ne_bytes(key[..].try_into().context("a key of 8 bytes")?);
            let link = self.layout.join(format!("links/steer-{cookie:x}"));
            return Ok((row.is_some() && link.exists()).then_some(cookie));
        }
        Ok(None)
    }

    /// Waits until this port is excluded for the pod.
    pub fn wait_excluded(&self, cookie: u64, port: u16) -> Result<()> {
        // `struct port_rule_key` of bpf/mesh/rules.h; OUT_EXCLUDE_PORTS is 0.
        let mut key = [0; 20];
        key[..4].copy_from_slice(&(96u32 + 16).to_ne_bytes());
        key[8..16].copy_from_slice(&cookie.to_ne_bytes());
        key[16..18].copy_from_slice(&port.to_be_bytes());
        let (rules, start) = (self.map("port_rules")?, Instant::now());
        while rules.lookup(&key, MapFlags::ANY)?.is_none() {
            ensure!(start.elapsed() < LONGEST, "port {port} is not excluded after {LONGEST:?}");
            if interrupted() {
                bail!("interrupted");
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// How many entries each map has, and how many pods have a link.
    pub fn entries(&self) -> Result<BTreeMap<String, usize>> {
        let mut all: BTreeMap<String, usize> =
            self.maps.iter().map(|(name, map)| ((*name).to_owned(), map.keys().count())).collect();
        let links = self.layout.join("links").read_dir()?.flatten();
        let links = links.filter(|link| link.file_name().as_encoded_bytes().starts_with(b"steer-"));
        all.insert("links".into(), links.count());
        Ok(all)
    }
}
