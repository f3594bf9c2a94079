//! The state that the parts of the data plane share: the loaded programs, and the known contents of
//! the maps.

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
    iter,
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

/// The loaded programs and the pinned maps that the agent writes.
pub struct Dataplane {
    pub(super) skel: SidestepSkel<'static>,
    pub(super) pins: Pins,
    /// The lock on the pins; its descriptor also keeps pinned objects alive if the file system is
    /// unmounted.
    pub(super) lock: Flock<File>,
    /// The mount point of the pins' file system.
    pub(super) mount_point: PathBuf,
    /// The attached links, which survive the loss of their pins.
    pub(super) links: Links,
    /// Whether an agent with another layout still decides.
    pub(super) to_take_over: bool,
    /// The contents of the mesh's maps, once they are known.
    pub(super) known: Option<Held>,
    /// The contents of the maps of Services, once they are known.
    pub(super) services: Option<Services>,
    /// The pods with a quota in the maps that count a pod's sockets, if no others have one.
    pub(super) sharing: Option<BTreeSet<NetnsCookie>>,
    /// The only pods that have filters or an entry in `tc_namespaces`, once that is known.
    pub(super) filtering: RefCell<Option<BTreeSet<NetnsCookie>>>,
    /// The time when Sidestep's programs were last moved to the front.
    pub(super) went_first: Option<Instant>,
    /// The time when the maps were last read completely.
    pub(super) read: Instant,
    /// The position of the last check: the pod, the map and the key.
    pub(super) looked_at: (NetnsCookie, usize, Vec<u8>),
}

impl Dataplane {
    /// Loads the programs with the pinned maps, if there are any, and attaches nothing. Locks the
    /// pins against other agents and `unload` while the result lives.
    ///
    /// # Errors
    /// If another process has the pins, the kernel refuses a program, or a pinned map has
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
        for mut program in open.open_object_mut().progs_mut() {
            let wanted = iter::is_agents(&program.name().to_string_lossy());
            program.set_autoload(wanted);
        }
        let skel = open.load().with_context(|| {
            // The directories are empty: `status` would report them as an installation.
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

    /// Tells the programs the agent's process, whose calls are not translated.
    fn note_agent(&self) -> Result<()> {
        let done = self.skel.progs.note_agent.test_run(ProgramInput::default());
        let done = done.context("cannot run program note_agent")?;
        anyhow::ensure!(done.return_value == 0, "program note_agent gave {}", done.return_value);
        Ok(())
    }

    /// The capacities of the maps.
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

    /// The pod of each namespace, by cookie.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn records(&self) -> Result<BTreeMap<NetnsCookie, Record>> {
        records(&self.skel.maps.pod_records)
    }
}

/// A part that was no longer in force.
#[derive(Debug)]
pub struct Repair {
    /// The kind of part: the label of the metric.
    pub what: &'static str,
    /// What was missing or changed, for the problem's text.
    pub text: String,
    /// Whether it is in force again.
    pub done: Result<()>,
}

impl Repair {
    pub(super) fn new(what: &'static str, text: impl Into<String>, done: Result<()>) -> Self {
        Self { what, text: text.into(), done }
    }
}
