//! What the parts of the data plane share: the loaded programs, and what is known of the maps.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use libbpf_rs::{
    MapCore, ProgramInput,
    skel::{OpenSkel, Skel},
};
use nix::fcntl::Flock;

use super::{
    bpffs,
    features::{kernel, refusal},
    links::{Links, replace_pin},
    pins::{FORMER_NAMES, Pins},
    records::records,
    services::Services,
    skel::{open_node, set_refresh, set_services, sidestep::SidestepSkel},
    tables::Held,
};
use crate::{
    mesh::{entries::Record, quota::Limits},
    node::NetnsCookie,
};

/// The loaded programs and the pinned maps: what the agent writes to.
pub struct Dataplane {
    pub(super) skel: SidestepSkel<'static>,
    pub(super) pins: Pins,
    /// Keeps others away from the pins, and what is pinned there alive where the file system is
    /// unmounted.
    pub(super) lock: Flock<File>,
    /// Where the pins' file system is mounted.
    pub(super) mount_point: PathBuf,
    /// The links that are in force: they outlive the loss of their pins.
    pub(super) links: Links,
    /// An agent with another layout decides still.
    pub(super) to_take_over: bool,
    /// What the maps of the mesh hold, once that is known for sure.
    pub(super) known: Option<Held>,
    /// What the maps of Services hold, once that is known for sure.
    pub(super) services: Option<Services>,
    /// The pods that have a share of what counts their sockets, where no others have one.
    pub(super) sharing: Option<BTreeSet<NetnsCookie>>,
    /// No pod but these has filters, or an entry that says so.
    pub(super) filtering: RefCell<Option<BTreeSet<NetnsCookie>>>,
    /// When another's programs were last put behind.
    pub(super) went_first: Option<Instant>,
    /// When they were last read as a whole.
    pub(super) read: Instant,
    /// Up to where they were looked at: which map, and its last key.
    pub(super) looked_at: (NetnsCookie, usize, Vec<u8>),
}

impl Dataplane {
    /// Loads the programs, with the pinned maps where there are any; attaches nothing. Keeps other
    /// agents and `unload` away for as long as the result lives.
    ///
    /// # Errors
    /// Where another process has the pins, the kernel refuses a program, or a pinned map has
    /// another layout.
    pub fn load(pins: &Pins, splice_refresh: Duration, with_services: bool) -> Result<Self> {
        let lock = pins.lock()?;
        let mount_point = bpffs::mount_point(&pins.root)?;
        pins.create()?;
        let mut open = open_node()?;
        set_refresh(&mut open, splice_refresh)?;
        set_services(&mut open, with_services)?;
        for mut map in open.open_object_mut().maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            if !name.contains('.') {
                map.set_pin_path(pins.map(&name))
                    .with_context(|| format!("cannot pin map {name}"))?;
            }
        }
        let skel = open.load().with_context(|| {
            // Those that were just made hold nothing: `status` should not take them for more.
            for dir in [pins.links(), pins.maps(), pins.layout()] {
                let _ = fs::remove_dir(dir);
            }
            refusal()
        })?;
        for (name, former) in FORMER_NAMES {
            let map = skel.object().maps().find(|map| map.name() == name);
            let map = map.with_context(|| format!("the object has no map {name}"))?;
            replace_pin(map.as_fd(), &pins.map(former))?;
        }
        let links = Links::adopt(pins)?;
        let dataplane = Self {
            skel,
            pins: pins.clone(),
            lock,
            mount_point,
            links,
            to_take_over: false,
            known: None,
            services: None,
            sharing: None,
            filtering: RefCell::default(),
            read: Instant::now(),
            looked_at: Default::default(),
            went_first: None,
        };
        dataplane.note_agent()?;
        Ok(dataplane)
    }

    /// Tells the programs which process is the agent: its own calls are not translated.
    fn note_agent(&self) -> Result<()> {
        let done = self.skel.progs.note_agent.test_run(ProgramInput::default());
        let done = done.context("cannot run program note_agent")?;
        anyhow::ensure!(done.return_value == 0, "program note_agent gave {}", done.return_value);
        Ok(())
    }

    /// The sizes of the maps.
    pub fn limits(&self) -> Limits {
        let maps = &self.skel.maps;
        Limits {
            pods: maps.pods.max_entries() as usize,
            locals: maps.locals.max_entries() as usize,
            port_rules: maps.port_rules.max_entries() as usize,
            cidr_rules: maps.cidr_rules.max_entries() as usize,
            uid_rules: maps.uid_rules.max_entries() as usize,
            excluded_ifs: maps.excluded_ifs.max_entries() as usize,
            tells_interface: kernel().tells_interface,
        }
    }

    /// Which pod has which namespace, by cookie.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn records(&self) -> Result<BTreeMap<NetnsCookie, Record>> {
        records(&self.skel.maps.pod_records)
    }
}

/// Something that was not in force any more.
#[derive(Debug)]
pub struct Repair {
    /// Of which kind: the label of the metric.
    pub what: &'static str,
    /// What was missing or changed.
    pub text: String,
    /// Whether it is in force again.
    pub done: Result<()>,
}

impl Repair {
    pub(super) fn new(what: &'static str, text: impl Into<String>, done: Result<()>) -> Self {
        Self { what, text: text.into(), done }
    }
}
