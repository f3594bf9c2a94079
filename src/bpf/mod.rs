//! The only module that talks to libbpf, and the only one with `unsafe`.
//!
//! Everything that matters is pinned: maps and links outlive the agent, and the next one adopts
//! them. See ARCHITECTURE.md for the layout below the pin root.

#![allow(unsafe_code)]

mod apply;
pub mod bpffs;
mod cost;
mod filters;
mod held;
mod hooks;
mod maps;
mod order;
mod policy;
mod repair;
mod selftest;
mod splice;
mod tables;
mod wire;

#[allow(clippy::all, clippy::unwrap_used, clippy::undocumented_unsafe_blocks, missing_docs)]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/sidestep.skel.rs"));
}
#[allow(clippy::all, clippy::unwrap_used, clippy::undocumented_unsafe_blocks, missing_docs)]
mod skel_inbound {
    include!(concat!(env!("OUT_DIR"), "/inbound.skel.rs"));
}
#[allow(clippy::all, clippy::unwrap_used, clippy::undocumented_unsafe_blocks, missing_docs)]
mod skel_policy {
    include!(concat!(env!("OUT_DIR"), "/policy.skel.rs"));
}

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File},
    io::Read,
    mem::{MaybeUninit, size_of},
    net::IpAddr,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
    rc::Rc,
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use libbpf_rs::{
    AsRawLibbpf, Iter, Link, MapCore, MapFlags, MapHandle, PrintLevel, ProgramMut, ProgramType,
    RingBuffer, RingBufferBuilder,
    btf::{
        Btf,
        types::{Enum, Func, Struct},
    },
    libbpf_sys,
    query::LinkTypeInfo,
    skel::{OpenSkel, Skel, SkelBuilder},
};
use nix::{
    fcntl::{Flock, FlockArg},
    unistd::geteuid,
};
use tokio::io::unix::AsyncFd;

pub use apply::{Applied, Failure};
pub use cost::ProgramCost;
pub use order::{Ahead, ahead};
pub use policy::{Call, Decision, Policy, Question};
pub use repair::Repair;
pub use selftest::self_test;

use self::{
    filters::Filter,
    held::{Links, replace_pin},
    hooks::{Attach, HOOKS, Hook},
    tables::Held,
};
use crate::{
    mesh::{self, entries::Record, quota::Limits},
    node::{self, Cgroup, Netns, NetnsCookie},
    splice::{LegState, Reset},
};

/// Moves when the layout of a pinned map moves: a `v` and a number.
pub const LAYOUT: &str = "v5";

/// What builds before layout v5 call these maps: by that name they look for them when they are rolled
/// back to.
const FORMER_NAMES: [(&str, &str); 2] =
    [("tc_namespaces", filters::FORMER_MAP), ("splice_sockets", splice::FORMER_MAP)];

/// The names of the mesh's counters, in the order of `enum mesh_counter`.
const MESH_COUNTERS: [&str; 16] = [
    "captured_outbound",
    "captured_self",
    "captured_dns",
    "direct",
    "steered_inbound",
    "passed_inbound",
    "refused_no_listener",
    "refused_no_state",
    "refused_no_address",
    "refused_busy",
    "refused_source_route",
    "handover_full",
    "handover_missed",
    "origdst_answered",
    "dns_refused",
    "dns_forged",
];

/// The names of splicing's, in the order of `enum splice_counter`.
const SPLICE_COUNTERS: [&str; 13] = [
    "splice_sockets",
    "splice_not_safe",
    "splice_not_proxy",
    "splice_left",
    "splice_map_full",
    "splice_in_other_map",
    "splice_messages",
    "splice_bytes",
    "splice_spilled",
    "splice_bulk",
    "splice_refresh",
    "splice_unread",
    "splice_no_peer",
];

/// Slots for a pod's listeners; `LISTENER_SLOTS` of bpf/mesh/inbound.h.
const LISTENER_SLOTS: u16 = 8;

/// Routes libbpf's messages to the log: its warnings explain errors, so they are debug lines
/// beside the error that the caller reports.
pub fn log_libbpf() {
    libbpf_rs::set_print(Some((PrintLevel::Debug, |level, text| match level {
        PrintLevel::Warn => {
            if let Some(word) = last_word(&text) {
                *LAST_WORD.lock().unwrap_or_else(PoisonError::into_inner) = Some(word);
            }
            tracing::debug!(target: "libbpf", "{}", text.trim_end());
        }
        _ => tracing::trace!(target: "libbpf", "{}", text.trim_end()),
    })));
}

/// Which program a kernel's verifier refused last, and why: libbpf's error is a number alone.
static LAST_WORD: Mutex<Option<String>> = Mutex::new(None);

/// The program's name, and the verifier's last word about it, of libbpf's message with its log.
fn last_word(text: &str) -> Option<String> {
    let (head, log) = text.split_once("-- BEGIN PROG LOAD LOG --")?;
    let name = head.split('\'').nth(1)?;
    let words = log.lines().map(str::trim).filter(|line| !line.is_empty());
    let words = words.take_while(|line| !line.starts_with("processed ")).last()?;
    Some(format!("{name}: {words}"))
}

/// Where maps and links are pinned.
#[derive(Debug, Clone)]
pub struct Pins {
    root: PathBuf,
    layout: String,
}

impl Pins {
    /// Below this directory of a bpffs, with maps of this layout.
    pub fn new(root: &Path, layout: &str) -> Self {
        Self { root: root.to_owned(), layout: layout.to_owned() }
    }

    fn layout(&self) -> PathBuf {
        self.root.join(&self.layout)
    }

    /// Everything that is there, of any layout.
    fn layouts(&self) -> Result<Vec<Self>> {
        let layouts = children(&self.root)?;
        let names = layouts.iter().filter_map(|path| path.file_name()?.to_str());
        Ok(names.map(|name| Self::new(&self.root, name)).collect())
    }

    /// What agents of other builds left there, whose maps this build can't read.
    fn others(&self) -> Result<Vec<Self>> {
        let mut others = self.layouts()?;
        others.retain(|other| other.layout != self.layout);
        Ok(others)
    }

    /// Makes the layout's directories.
    fn create(&self) -> Result<()> {
        fs::create_dir_all(self.maps())
            .and_then(|()| fs::create_dir_all(self.links()))
            .with_context(|| format!("cannot create {}", self.layout().display()))
    }

    fn maps(&self) -> PathBuf {
        self.layout().join("maps")
    }

    fn links(&self) -> PathBuf {
        self.layout().join("links")
    }

    fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    fn link(&self, name: &str) -> PathBuf {
        self.links().join(name)
    }

    fn steer(&self, cookie: NetnsCookie) -> PathBuf {
        self.link(&steer(cookie))
    }

    /// Whether anything is installed.
    pub fn exist(&self) -> bool {
        self.map("pods").exists()
    }

    /// Keeps other agents and `unload` away for as long as the result lives.
    ///
    /// # Errors
    /// Where another process has it, or the directory can't be made.
    pub fn lock(&self) -> Result<Flock<File>> {
        let root = self.root.display();
        // Anybody may make directories in a bpffs' root.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .with_context(|| format!("cannot create {root}"))?;
        let dir = File::open(&self.root).with_context(|| format!("cannot open {root}"))?;
        let owner = dir.metadata()?.uid();
        ensure!(
            owner == geteuid().as_raw(),
            "{root} belongs to uid {owner}, not to this process: \
                                              remove it first"
        );
        Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            anyhow!(errno).context(format!(
                "another sidestep process uses {}: stop it first",
                self.root.display()
            ))
        })
    }
}

impl fmt::Display for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.layout().display())
    }
}

/// What the kernel's maps say about an enrolled pod.
#[derive(Debug, Clone)]
pub struct Enrolled {
    /// Network namespace cookie.
    pub cookie: NetnsCookie,
    /// Name, uid and namespace path.
    pub record: Record,
    /// Name of the mesh.
    pub mesh: &'static str,
    /// The addresses whose families are captured.
    pub captured: Vec<IpAddr>,
    /// Whether the inbound program is linked to a namespace that still exists.
    pub inbound: bool,
    /// Inbound listeners that are known.
    pub listeners: usize,
    /// Where DNS goes; none: it is not captured.
    pub dns_port: Option<u16>,
}

/// A hook of the node and whether it is in force.
#[derive(Debug, Clone)]
pub struct HookState {
    /// Name of the program.
    pub name: &'static str,
    /// Attached to a cgroup that still exists.
    pub attached: bool,
    /// That cgroup's id (its inode number), 0 where not attached.
    pub cgroup_id: u64,
}

/// The loaded programs and the pinned maps: what the agent writes to.
pub struct Dataplane {
    skel: skel::SidestepSkel<'static>,
    pins: Pins,
    /// Keeps others away from the pins, and what is pinned there alive where the file system is
    /// unmounted.
    lock: Flock<File>,
    /// Where the pins' file system is mounted.
    mount_point: PathBuf,
    /// The links that are in force: they outlive the loss of their pins.
    links: Links,
    /// An agent with another layout decides still.
    to_take_over: bool,
    /// What the maps of the mesh hold, once that is known for sure.
    known: Option<Held>,
    /// The pods that have a share of what counts their sockets, where no others have one.
    sharing: Option<BTreeSet<NetnsCookie>>,
    /// No pod but these has filters, or an entry that says so.
    filtering: RefCell<Option<BTreeSet<NetnsCookie>>>,
    /// When another's programs were last put behind.
    went_first: Option<Instant>,
    /// When they were last read as a whole.
    read: Instant,
    /// Up to where they were looked at: which map, and its last key.
    looked_at: (NetnsCookie, usize, Vec<u8>),
}

impl Dataplane {
    /// Loads the programs, with the pinned maps where there are any; attaches nothing. Keeps other
    /// agents and `unload` away for as long as the result lives.
    ///
    /// # Errors
    /// Where another process has the pins, the kernel refuses a program, or a pinned map has another
    /// layout.
    pub fn load(pins: &Pins, splice_refresh: Duration) -> Result<Self> {
        let lock = pins.lock()?;
        let mount_point = bpffs::mount_point(&pins.root)?;
        pins.create()?;
        let mut open = open_node()?;
        splice::set_refresh(&mut open, splice_refresh)?;
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
        Ok(Self {
            skel,
            pins: pins.clone(),
            lock,
            mount_point,
            links,
            to_take_over: false,
            known: None,
            sharing: None,
            filtering: RefCell::default(),
            read: Instant::now(),
            looked_at: Default::default(),
            went_first: None,
        })
    }

    /// Puts the loaded programs in force on the cgroup: a hook that is there already is switched
    /// over in one step, so that no connection finds it missing. What decides in an agent's place
    /// whose maps have another layout goes on until [`Dataplane::take_over`].
    ///
    /// # Errors
    /// Where the kernel refuses to attach.
    pub fn attach(&mut self, cgroup: &Cgroup) -> Result<()> {
        self.attach_redirect()?;
        let others = self.pins.others()?;
        for hook in HOOKS.iter().filter(|hook| hook.attach == Attach::Cgroup) {
            let theirs = |other: &Pins| hook.decides && other.link(hook.program).exists();
            if !self.pins.link(hook.program).exists() && others.iter().any(theirs) {
                self.to_take_over = true;
                continue;
            }
            self.attach_hook(hook, cgroup)
                .with_context(|| format!("cannot attach {} to {cgroup}", hook.program))?;
        }
        self.remove_strangers()
    }

    /// Takes away what a build with more programs attached: nobody looks after it any more.
    fn remove_strangers(&self) -> Result<()> {
        for pin in children(&self.pins.links())? {
            let name = pin.file_name().unwrap_or_default().to_string_lossy();
            let known = HOOKS.iter().any(|hook| hook.program == name);
            if !known && !name.starts_with("steer-") && !filters::is_filter(&name) {
                tracing::info!(hook = %name, "removed the link of a program that this build does \
                                              not have");
                remove_link(&pin)?;
            }
        }
        Ok(())
    }

    /// Whether an agent with another layout of the maps decides still.
    pub fn is_taking_over(&self) -> bool {
        self.to_take_over
    }

    /// How many pods that an agent with another layout enrolled, and that live, are not enrolled
    /// in this one's maps.
    ///
    /// # Errors
    /// Where the pins can't be read.
    pub fn not_taken_over(&self) -> Result<usize> {
        let mut missing = 0;
        for other in self.pins.others()? {
            let cookies = steered(&other)?;
            let lives =
                |cookie: &NetnsCookie| steer_lives(&other, *cookie) && !self.netns_lives(*cookie);
            missing += cookies.into_iter().filter(lives).count();
        }
        Ok(missing)
    }

    /// Takes over from an agent whose maps have another layout, once this one's are filled: what
    /// decides is switched over in one step. What answers about connections that were decided
    /// before stays beside, until [`Dataplane::retire`].
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn take_over(&mut self, cgroup: &Cgroup) -> Result<()> {
        if !self.to_take_over {
            return Ok(());
        }
        let others = self.pins.others()?;
        for hook in HOOKS.iter().filter(|hook| hook.decides) {
            let own = self.pins.link(hook.program);
            let theirs = others.iter().map(|other| other.link(hook.program));
            for theirs in theirs.filter(|pin| pin.exists()).collect::<Vec<_>>() {
                if own.exists() {
                    remove_link(&theirs)?;
                } else {
                    fs::rename(&theirs, &own)
                        .with_context(|| format!("cannot take over {}", theirs.display()))?;
                }
            }
            self.attach_hook(hook, cgroup)
                .with_context(|| format!("cannot take over {} on {cgroup}", hook.program))?;
        }
        for other in &others {
            for cookie in steered(other)? {
                remove_link(&other.steer(cookie))?;
            }
        }
        self.to_take_over = false;
        Ok(())
    }

    /// Takes away what agents with other layouts left and no socket needs any more. Says whether
    /// some is left.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn retire(&mut self) -> Result<bool> {
        if self.to_take_over {
            return Ok(true);
        }
        let mut left = false;
        for other in self.pins.others()? {
            if self.is_needed(&other)? {
                left = true;
            } else {
                remove_layout(&other, &[])?;
            }
        }
        Ok(left)
    }

    /// Whether a socket has state of that layout, or is about to.
    fn is_needed(&mut self, other: &Pins) -> Result<bool> {
        let Ok(handovers) = MapHandle::from_pinned_path(other.map("handovers")) else {
            return Ok(false);
        };
        if handovers.keys().next().is_some() {
            return Ok(true);
        }
        for name in ["origdsts", "dns_asked", "splices"] {
            let Ok(map) = MapHandle::from_pinned_path(other.map(name)) else {
                continue;
            };
            self.skel.maps.bss_data.as_mut().context("the object has no variables")?.storages = 0;
            let link = self.skel.progs.count_storages.attach_iter(map.as_fd())?;
            run(&link)?;
            let found = self.skel.maps.bss_data.as_ref().map_or(0, |variables| variables.storages);
            if found > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn attach_hook(&mut self, hook: &Hook, cgroup: &Cgroup) -> Result<()> {
        let pin = self.pins.link(hook.program);
        let program = self.program(hook)?;
        if pin.exists() {
            let mut link = Link::open(&pin).context("cannot open its pinned link")?;
            if cgroup_of(&link)? == cgroup.id() {
                link.update_prog(&program).context("cannot replace its program")?;
                return self.links.hold(hook.program, link);
            }
        }
        self.attach_anew(hook, cgroup)
    }

    /// Attaches a program, whether it is attached already or not. The new one first: two hooks for a
    /// moment do no harm, none would.
    fn attach_anew(&mut self, hook: &Hook, cgroup: &Cgroup) -> Result<()> {
        let pin = self.pins.link(hook.program);
        let program = self.program(hook)?;
        let link = order::attach(&program, cgroup.as_raw_fd(), hook)?;
        replace_pin(link.as_fd(), &pin)?;
        self.links.hold(hook.program, link)
    }

    fn program(&mut self, hook: &Hook) -> Result<ProgramMut<'_>> {
        let mut all = self.skel.object_mut().progs_mut();
        all.find(|program| program.name() == hook.program).context("no such program")
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
    /// Where the map can't be read.
    pub fn records(&self) -> Result<BTreeMap<NetnsCookie, Record>> {
        records(&self.skel.maps.pod_records)
    }

    /// Links this build's inbound program to a pod's namespace; one that is there already is
    /// switched over in one step.
    ///
    /// # Errors
    /// Where the kernel refuses to load or to attach.
    pub fn attach_inbound(&mut self, cookie: NetnsCookie, netns: &Netns) -> Result<()> {
        let mut storage = MaybeUninit::uninit();
        let skel = self.load_inbound(&mut storage, cookie, "steer")?;
        let name = steer(cookie);
        if self.netns_lives(cookie) {
            return self.links.update(&name, &skel.progs.steer);
        }
        let link = skel.progs.steer.attach_netns(netns.as_raw_fd())?;
        replace_pin(link.as_fd(), &self.pins.steer(cookie))?;
        self.links.hold(&name, link)
    }

    /// Loads one program of the object that each pod has.
    fn load_inbound<'a>(
        &self,
        storage: &'a mut MaybeUninit<libbpf_rs::OpenObject>,
        cookie: NetnsCookie,
        name: &str,
    ) -> Result<skel_inbound::InboundSkel<'a>> {
        let mut open = open_inbound(storage, cookie)?;
        for mut program in open.open_object_mut().progs_mut() {
            let wanted = program.name() == name;
            program.set_autoload(wanted);
        }
        for mut map in open.open_object_mut().maps_mut() {
            let own = self.skel.object().maps().find(|own| own.name() == map.name());
            if let Some(own) = own {
                map.reuse_fd(own.as_fd())
                    .with_context(|| format!("cannot share map {:?}", map.name()))?;
            }
        }
        open.load().with_context(|| format!("the kernel rejected program {name}"))
    }

    /// Whether the namespace with this cookie, which has an inbound program, still exists.
    pub fn netns_lives(&self, cookie: NetnsCookie) -> bool {
        self.links.get(&steer(cookie)).is_some_and(|link| netns_of(link).is_ok_and(|ino| ino != 0))
    }

    /// Records the pod's listeners on a port that the hooks did not see, at those of these
    /// addresses where none is known.
    ///
    /// # Errors
    /// Where the namespace can't be entered, or the iterator fails.
    pub fn find_listeners(
        &mut self,
        cookie: NetnsCookie,
        netns: &Netns,
        port: u16,
        at: &BTreeSet<IpAddr>,
    ) -> Result<()> {
        let known = &self.skel.maps.listeners;
        let unknown = at.iter().filter(|at| listeners(known, cookie, **at, port) == 0);
        let unknown: Vec<wire::addr> = unknown.map(|at| (*at).into()).collect();
        let variables = self.skel.maps.bss_data.as_mut().context("the object has no variables")?;
        variables.wanted_netns = cookie.0;
        variables.wanted_port = port;
        for wanted in unknown.chunks(variables.wanted_at.len()) {
            let variables =
                self.skel.maps.bss_data.as_mut().context("the object has no variables")?;
            variables.wanted_at[..wanted.len()].copy_from_slice(wanted);
            variables.wanted_count = wanted.len() as u32;
            if kernel().iterates_unlocked {
                let link = self.skel.progs.find_listeners.attach()?;
                netns.inside(|| run(&link).map(drop))??;
            } else {
                run(&self.skel.progs.find_listeners_by_file.attach()?)?;
            }
        }
        Ok(())
    }

    /// The kernel's events.
    ///
    /// # Errors
    /// Where the ring can't be mapped; panics outside a tokio runtime.
    pub fn events(&self) -> Result<Events> {
        let seen = Rc::new(RefCell::new(Seen::default()));
        let mut builder = RingBufferBuilder::new();
        let sink = Rc::clone(&seen);
        builder.add(&self.skel.maps.events, move |bytes| {
            if let Err(error) = sink.borrow_mut().add(bytes) {
                tracing::debug!("an event that this build does not read: {error:#}");
            }
            0
        })?;
        Events::new(builder.build()?, seen)
    }
}

/// What the programs had to say.
#[derive(Debug, Default)]
pub struct Seen {
    /// Pods whose proxy was looked for in vain, by cookie, and which of its listeners, by port.
    pub missed: BTreeSet<(NetnsCookie, u16)>,
    /// A spliced connection carries bulk, and is better off without.
    pub bulk: bool,
    /// Connections that are to be reset, by the cookie of the closed end's namespace.
    pub unread: BTreeMap<NetnsCookie, Vec<Reset>>,
}

impl Seen {
    /// An event: its header says what follows.
    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        let header = bytes.get(..size_of::<wire::event>()).unwrap_or(bytes);
        let head: wire::event = wire::from_bytes(header)?;
        match head.kind {
            wire::event_kind::EVENT_NO_LISTENER => {
                let event: wire::listener_event = wire::from_bytes(bytes)?;
                self.missed.insert((NetnsCookie(head.netns), event.port));
            }
            wire::event_kind::EVENT_BULK => self.bulk = true,
            wire::event_kind::EVENT_UNREAD => {
                let event: wire::unread_event = wire::from_bytes(bytes)?;
                self.unread.entry(NetnsCookie(head.netns)).or_default().push(event.into());
            }
            // Another build's program.
            _ => {}
        }
        Ok(())
    }
}

/// The programs' words to the agent.
pub struct Events {
    ring: RingBuffer<'static>,
    seen: Rc<RefCell<Seen>>,
    ready: AsyncFd<OwnedFd>,
}

impl Events {
    fn new(ring: RingBuffer<'static>, seen: Rc<RefCell<Seen>>) -> Result<Self> {
        // SAFETY: the ring owns the descriptor and outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(ring.epoll_fd()) };
        let fd = fd.try_clone_to_owned().context("cannot duplicate the ring's descriptor")?;
        // SAFETY: the descriptor is owned by the result, which closes it only when dropped.
        let ready = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { ring, seen, ready })
    }

    /// Waits for events.
    ///
    /// # Errors
    /// Where the ring can't be read.
    pub async fn next(&self) -> Result<Seen> {
        self.ready.readable().await?.clear_ready();
        self.ring.consume()?;
        Ok(self.seen.take())
    }
}

/// What not every kernel can do, by its own types.
struct Kernel {
    /// A program is told from which interface a new connection comes (Linux 5.17).
    tells_interface: bool,
    /// iter/tcp holds no spin lock while a program looks at a socket. The function that is asked for
    /// came with that, in Linux 6.5; kernels with the correction alone are taken for older.
    iterates_unlocked: bool,
    /// Filters can be links to devices (tcx, Linux 6.6).
    links_filters: bool,
    /// A program may say with which error connect() fails (Linux 6.1).
    sets_error: bool,
}

fn kernel() -> &'static Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    KERNEL.get_or_init(|| {
        let types = Btf::from_vmlinux().ok();
        let types = types.as_ref();
        let context = types.and_then(|types| types.type_by_name::<Struct<'_>>("bpf_sk_lookup"));
        let tcx = types.and_then(|types| types.type_by_name::<Struct<'_>>("tcx_link"));
        let destroy = types.and_then(|types| types.type_by_name::<Func<'_>>("bpf_sock_destroy"));
        Kernel {
            tells_interface: context.is_some_and(|context| {
                context.iter().any(|field| field.name == Some("ingress_ifindex".as_ref()))
            }),
            iterates_unlocked: destroy.is_some(),
            links_filters: tcx.is_some(),
            sets_error: ProgramType::CgroupSockAddr
                .is_helper_supported(libbpf_sys::BPF_FUNC_set_retval)
                .unwrap_or(false),
        }
    })
}

/// The program for the namespace with this cookie.
fn open_inbound(
    storage: &mut MaybeUninit<libbpf_rs::OpenObject>,
    cookie: NetnsCookie,
) -> Result<skel_inbound::OpenInboundSkel<'_>> {
    let mut open = skel_inbound::InboundSkelBuilder::default().open(storage)?;
    let constants = open.maps.rodata_data.as_mut().context("the inbound object has no rodata")?;
    constants.netns_cookie = cookie.0;
    constants.tells_interface = u8::from(kernel().tells_interface);
    Ok(open)
}

fn open_node() -> Result<skel::OpenSidestepSkel<'static>> {
    // A skeleton borrows its object; there is one for the life of the process.
    open_node_in(Box::leak(Box::new(MaybeUninit::uninit())))
}

fn open_node_in(
    storage: &mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<skel::OpenSidestepSkel<'_>> {
    let mut open = skel::SidestepSkelBuilder::default().open(storage)?;
    let constants = open.maps.rodata_data.as_mut().context("the object has no rodata")?;
    constants.sets_error = u8::from(kernel().sets_error);
    Ok(open)
}

/// The names of an enum's values in an object, in small letters and without their prefix; in order,
/// as they count from 0.
///
/// # Errors
/// Where the object has no such enum.
fn names_of(
    object: &impl AsRawLibbpf<LibbpfType = libbpf_sys::bpf_object>,
    of: &str,
    prefix: &str,
) -> Result<Vec<String>> {
    // SAFETY: the object lives at least as long as the borrow that its types are read with.
    let types = Btf::from_bpf_object(unsafe { object.as_libbpf_object().as_ref() })?;
    let found = types.as_ref().and_then(|types| types.type_by_name::<Enum<'_>>(of));
    let found = found.with_context(|| format!("the object has no enum {of}"))?;
    found
        .iter()
        .map(|value| {
            let name = value.name.and_then(|name| name.to_str()).context("a value has no name")?;
            Ok(name.strip_prefix(prefix).unwrap_or(name).to_lowercase())
        })
        .collect()
}

/// What the kernel says about programs that it took.
pub struct Loaded {
    /// What each cost its verifier.
    pub costs: Vec<ProgramCost>,
    /// Whether those that decide can come before all others' at their hooks.
    pub can_be_first: bool,
}

/// Loads every program and map once, unpinned and unattached, and drops them: the kernel's own
/// word on whether it can run this build.
///
/// # Errors
/// The kernel's refusal.
pub fn try_load() -> Result<Loaded> {
    load_all().map_err(|error| {
        let word = LAST_WORD.lock().unwrap_or_else(PoisonError::into_inner).take();
        match word {
            Some(word) => error.context(word),
            None => error,
        }
    })
}

fn load_all() -> Result<Loaded> {
    let mut storage = MaybeUninit::uninit();
    let node = open_node_in(&mut storage)?.load()?;
    let mut storage = MaybeUninit::uninit();
    let pod = open_inbound(&mut storage, NetnsCookie::NONE)?.load()?;
    let programs = node.object().progs().chain(pod.object().progs());
    let costs = programs.map(|program| cost::of(&program)).collect::<Result<_>>()?;
    Ok(Loaded { costs, can_be_first: order::can_be_first(&node.progs.connect4) })
}

/// Attaches the filters to the lo of a network namespace that is made for that and goes at once.
///
/// # Errors
/// Where the kernel refuses: what it takes may be in modules that are not there.
pub fn try_filters() -> Result<()> {
    let mut storage = MaybeUninit::uninit();
    let node = open_node_in(&mut storage)?.load()?;
    let mut storage = MaybeUninit::uninit();
    let pod = open_inbound(&mut storage, NetnsCookie::NONE)?.load()?;
    let (dns, reset) = (node.progs.dns_nat.as_fd(), node.progs.reset.as_fd());
    let dialled = pod.progs.note_dialled.as_fd();
    node::in_new(|| {
        filters::try_on_lo(Filter::Dns, dns)?;
        filters::try_on_lo(Filter::Reset, reset)?;
        filters::try_on_lo(Filter::Dialled, dialled)
    })?
}

/// What may have made the kernel refuse the programs.
fn refusal() -> String {
    let lacks: Vec<String> =
        probe().into_iter().filter(|(_, there)| !there).map(|(what, _)| what).collect();
    let refused = "the kernel rejected the BPF programs or maps";
    match lacks[..] {
        [] => format!("{refused} (`sidestep check` may say more)"),
        _ => format!("{refused}: it lacks {} (see `sidestep check`)", lacks.join(", ")),
    }
}

/// Asks the kernel for each program type, map type and helper that the programs need:
/// `(what, whether it is there)`.
pub fn probe() -> Vec<(String, bool)> {
    let mut found = Vec::new();
    let mut kinds: Vec<String> = Vec::new();
    // The library's probe for tracing programs needs a right that iterators don't: loading tells.
    for hook in HOOKS.iter().filter(|hook| hook.attach != Attach::Iterator) {
        let kind = format!("{:?}", hook.kind);
        if !kinds.contains(&kind) {
            found.push((format!("program type {kind}"), hook.kind.is_supported().unwrap_or(false)));
            kinds.push(kind);
        }
    }
    for (kind, name) in hooks::MAP_TYPES {
        found.push((format!("map type {name}"), kind.is_supported().unwrap_or(false)));
    }
    for hook in HOOKS {
        for (id, name) in hook.helpers {
            let what = format!("helper {name} in {:?} programs", hook.kind);
            if !found.iter().any(|(known, _)| *known == what) {
                found.push((what, hook.kind.is_helper_supported(*id).unwrap_or(false)));
            }
        }
    }
    found
}

/// The enrolled pods, from the pins alone: no agent is needed.
///
/// # Errors
/// Where a pinned map can't be read.
pub fn enrolled(pins: &Pins) -> Result<Vec<Enrolled>> {
    let open = |name: &str| {
        MapHandle::from_pinned_path(pins.map(name))
            .with_context(|| format!("cannot open map {}", pins.map(name).display()))
    };
    let (pods, listening) = (open("pods")?, open("listeners")?);
    let mut landings: BTreeMap<NetnsCookie, BTreeSet<IpAddr>> = BTreeMap::new();
    for (key, ip) in maps::read_as::<wire::device_key, wire::addr>(&open("device_addrs")?)? {
        landings.entry(NetnsCookie(key.netns)).or_default().insert(ip.into());
    }
    let records = records(&open("pod_records")?)?;
    let rows = maps::read_as::<NetnsCookie, wire::pod>(&pods)?;
    Ok(rows
        .into_iter()
        .map(|(cookie, row)| Enrolled {
            cookie,
            record: records.get(&cookie).cloned().unwrap_or_default(),
            mesh: mesh::by_index(row.mesh).map_or("unknown", |mesh| mesh.name),
            captured: [
                (row.ip4, wire::pod_flag::POD_CAPTURE_V4),
                (row.ip6, wire::pod_flag::POD_CAPTURE_V6),
            ]
            .into_iter()
            .filter(|(address, family)| address.w != [0; 4] && row.flags.0 & family.0 != 0)
            .map(|(address, _)| IpAddr::from(address))
            .collect(),
            inbound: steer_lives(pins, cookie),
            listeners: landings
                .remove(&cookie)
                .unwrap_or_default()
                .into_iter()
                .chain(node::ANY)
                .map(|at| listeners(&listening, cookie, at, row.in_port))
                .sum(),
            dns_port: (row.dns_port != 0).then_some(row.dns_port),
        })
        .collect())
}

/// Which legs are spliced and why not, and how many sockets are, from the pins alone.
///
/// # Errors
/// Where a pinned map can't be read.
pub fn spliced(pins: &Pins) -> Result<(Vec<LegState>, usize)> {
    splice::state(pins)
}

/// The node's hooks, from the pins alone.
pub fn hook_states(pins: &Pins) -> Vec<HookState> {
    HOOKS
        .iter()
        .filter(|hook| hook.attach == Attach::Cgroup)
        .map(|hook| {
            let link = Link::open(pins.link(hook.program)).map_err(anyhow::Error::from);
            let cgroup_id = link.and_then(|link| cgroup_of(&link)).unwrap_or(0);
            HookState { name: hook.program, attached: cgroup_id != 0, cgroup_id }
        })
        .collect()
}

/// The kernel's counters, by mesh and name, summed over the processors.
///
/// # Errors
/// Where the pinned map can't be read.
pub fn counters(pins: &Pins) -> Result<BTreeMap<&'static str, BTreeMap<&'static str, u64>>> {
    let mut all: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
    for (map, names) in
        [("mesh_counters", &MESH_COUNTERS[..]), ("splice_counters", &SPLICE_COUNTERS[..])]
    {
        let at = MapHandle::from_pinned_path(pins.map(map)).with_context(|| format!("no {map}"))?;
        for mesh in mesh::MESHES {
            let of_mesh = all.entry(mesh.name).or_default();
            for (n, name) in names.iter().enumerate() {
                let index = u32::from(mesh.index) * names.len() as u32 + n as u32;
                let values = at
                    .lookup_percpu(&index.to_ne_bytes(), MapFlags::ANY)?
                    .with_context(|| format!("no counter {name}"))?;
                let sum = values.iter().map(|v| wire::from_bytes::<u64>(v)).sum::<Result<u64>>()?;
                of_mesh.insert(*name, sum);
            }
        }
    }
    Ok(all)
}

/// What `unload` did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unloaded {
    /// Pins that were removed.
    pub removed: usize,
    /// Spliced sockets with bytes that are not read yet and would be lost with the maps: these
    /// stay, with no program, until the next `unload`.
    pub unread: u32,
}

impl fmt::Display for Unloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pins removed", self.removed)?;
        match self.unread {
            0 => Ok(()),
            n => write!(
                f,
                "; {n} sockets hold spliced data that their processes have not read: the maps with \
                 this data were kept, run `sidestep unload` again later"
            ),
        }
    }
}

/// Takes every link, program and map of any layout away.
///
/// # Errors
/// Where a pin can't be removed.
pub fn unload(pins: &Pins) -> Result<Unloaded> {
    let unread = splice::drain(pins)?;
    let mut removed = 0;
    let keep: &[&str] = if unread > 0 { &splice::MAPS } else { &[] };
    for layout in pins.layouts()? {
        removed += remove_layout(&layout, keep)?;
    }
    if pins.root.exists() && unread == 0 {
        fs::remove_dir(&pins.root)
            .with_context(|| format!("cannot remove {}", pins.root.display()))?;
    }
    Ok(Unloaded { removed, unread })
}

/// Takes a layout's filters, links and maps away, but for the maps in `keep`. Says how many pins
/// there were.
fn remove_layout(pins: &Pins, keep: &[&str]) -> Result<usize> {
    let mut removed = 0;
    let mut kept = false;
    filters::empty_qdiscs(pins);
    // Links before maps: a program without its map's contents would decide wrongly.
    for link in children(&pins.links())? {
        remove_link(&link)?;
        removed += 1;
    }
    for map in children(&pins.maps())? {
        if map.file_name().is_some_and(|name| keep.iter().any(|kept| name == *kept)) {
            kept = true;
            continue;
        }
        fs::remove_file(&map).with_context(|| format!("cannot remove {}", map.display()))?;
        removed += 1;
    }
    for dir in [pins.links(), pins.maps(), pins.layout()] {
        if dir.exists() && !kept {
            fs::remove_dir(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    Ok(removed)
}

/// Runs an iterator's program over all that it sees; what it wrote.
fn run(link: &Link) -> Result<Vec<u8>> {
    let mut written = Vec::new();
    // Reading it to the end is what runs the program.
    Iter::new(link)?.read_to_end(&mut written)?;
    Ok(written)
}

/// A directory's entries; none where there is no directory.
fn children(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|e| e.path())).collect())
        .with_context(|| format!("cannot read {}", dir.display()))
}

fn remove_link(pin: &Path) -> Result<()> {
    let link = Link::open(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    // Detached at once, whoever else still holds it; fails where its target is gone already.
    let _ = link.detach();
    fs::remove_file(pin).with_context(|| format!("cannot remove {}", pin.display()))
}

/// The name of the pin of a namespace's inbound link.
fn steer(cookie: NetnsCookie) -> String {
    format!("steer-{cookie:x}")
}

/// The cookie of the namespace whose inbound link has a pin of this name.
fn steered_by(pin: &str) -> Option<NetnsCookie> {
    u64::from_str_radix(pin.strip_prefix("steer-")?, 16).ok().map(NetnsCookie)
}

fn remove_inbound(links: &mut Links, pins: &Pins, cookie: NetnsCookie) -> Result<()> {
    if let Some(link) = links.release(&steer(cookie)) {
        // Fails where its namespace is gone.
        let _ = link.detach();
    }
    let pin = pins.steer(cookie);
    if pin.exists() { remove_link(&pin) } else { Ok(()) }
}

/// The cookies of the namespaces with a pinned inbound link.
fn steered(pins: &Pins) -> Result<Vec<NetnsCookie>> {
    let links = children(&pins.links())?;
    Ok(links.iter().filter_map(|path| steered_by(path.file_name()?.to_str()?)).collect())
}

fn steer_lives(pins: &Pins, cookie: NetnsCookie) -> bool {
    let link = Link::open(pins.steer(cookie)).map_err(anyhow::Error::from);
    link.and_then(|link| netns_of(&link)).is_ok_and(|ino| ino != 0)
}

fn records(map: &impl MapCore) -> Result<BTreeMap<NetnsCookie, Record>> {
    let records = maps::read_as::<NetnsCookie, wire::pod_record>(map)?;
    Ok(records.into_iter().map(|(cookie, record)| (cookie, Record::from(&record))).collect())
}

/// How many of a pod's listeners at an address are recorded.
fn listeners(map: &impl MapCore, cookie: NetnsCookie, at: IpAddr, port: u16) -> usize {
    (0..LISTENER_SLOTS)
        .filter(|slot| {
            let key = wire::listener_of(cookie, at, port, *slot);
            matches!(map.lookup(wire::as_bytes(&key), MapFlags::ANY), Ok(Some(_)))
        })
        .count()
}

/// The id of the cgroup that a link is attached to; 0: that cgroup is gone.
fn cgroup_of(link: &Link) -> Result<u64> {
    match link.info()?.info {
        LinkTypeInfo::Cgroup(info) => Ok(info.cgroup_id),
        other => bail!("the pin is a link of another type: {other:?}"),
    }
}

/// The inode of the network namespace that a link is attached to; 0: it is gone.
fn netns_of(link: &Link) -> Result<u32> {
    match link.info()?.info {
        LinkTypeInfo::NetNs(info) => Ok(info.ino),
        other => bail!("the pin is a link of another type: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mesh::desired,
        node::{ANY, LOCALHOST, lo},
    };

    #[test]
    fn a_refusal_names_the_program_and_the_verifiers_last_word() {
        let text = "libbpf: prog 'steer': -- BEGIN PROG LOAD LOG --\n0: (b7) r0 = 1\n\
                    invalid bpf_context access off=64 size=4\nprocessed 2 insns (limit 1000000)\n\
                    -- END PROG LOAD LOG --\n";
        let found = last_word(text).expect("a refusal");
        assert_eq!(found, "steer: invalid bpf_context access off=64 size=4");
        assert_eq!(last_word("libbpf: prog 'steer': failed to load: -13\n"), None);
    }

    #[test]
    fn every_program_has_its_row_and_every_row_its_program() {
        let mut storage = MaybeUninit::uninit();
        let node = skel::SidestepSkelBuilder::default().open(&mut storage).expect("opens");
        let mut storage = MaybeUninit::uninit();
        let pod = skel_inbound::InboundSkelBuilder::default().open(&mut storage).expect("opens");
        let programs = |object: &libbpf_rs::OpenObject| -> BTreeSet<String> {
            object.progs().map(|p| p.name().to_string_lossy().into_owned()).collect()
        };
        let rows = |netns: bool| -> BTreeSet<String> {
            let of_pod = |attach| matches!(attach, Attach::Netns | Attach::DevicesIn);
            let hooks = HOOKS.iter().filter(|hook| of_pod(hook.attach) == netns);
            hooks.map(|hook| hook.program.to_owned()).collect()
        };
        assert_eq!(programs(node.open_object()), rows(false));
        assert_eq!(programs(pod.open_object()), rows(true));
    }

    #[test]
    fn map_names_are_what_the_kernel_keeps() {
        let mut storage = MaybeUninit::uninit();
        let open = skel::SidestepSkelBuilder::default().open(&mut storage).expect("opens");
        for map in open.open_object().maps() {
            assert!(map.name().len() <= 15, "{:?} is cut at 15 bytes", map.name());
        }
    }

    #[test]
    fn a_pods_object_carries_the_maps_that_it_uses() {
        let mut storage = MaybeUninit::uninit();
        let open = skel_inbound::InboundSkelBuilder::default().open(&mut storage).expect("opens");
        let maps = open.open_object().maps().map(|map| map.name().to_string_lossy().into_owned());
        let maps: BTreeSet<String> = maps.filter(|name| !name.contains('.')).collect();
        let used = [
            "cidr_rules",
            "device_addrs",
            "dialled",
            "events",
            "excluded_ifs",
            "handovers",
            "listeners",
            "locals",
            "mesh_counters",
            "pods",
            "port_rules",
        ];
        assert_eq!(maps, used.map(str::to_owned).into());
    }

    #[test]
    fn constants_and_names_are_the_programs_own() {
        let mut storage = MaybeUninit::uninit();
        let open = skel::SidestepSkelBuilder::default().open(&mut storage).expect("opens");
        let shared = &open.maps.rodata_data.as_ref().expect("rodata").shared;
        let counters = |name, how_many: u32| {
            let names = names_of(open.open_object(), name, "").expect("an enum");
            assert_eq!(names.len(), how_many as usize + 1, "and one that counts them");
            names.into_iter().take(how_many as usize).collect::<Vec<_>>()
        };
        assert_eq!(counters("mesh_counter", shared.mesh_counters.0), MESH_COUNTERS);
        assert_eq!(counters("splice_counter", shared.splice_counters.0), SPLICE_COUNTERS);
        assert!(shared.max_meshes as usize >= mesh::MESHES.len());
        assert_eq!(
            [tables::LOCAL_OWN, tables::LOCAL_LANDING].map(u32::from),
            [1, shared.local_landing.0]
        );
        assert_eq!(shared.listener_slots, u32::from(LISTENER_SLOTS));
        let landings = desired::MAX_LANDINGS + ANY.len() + LOCALHOST.len();
        assert_eq!(shared.landings as usize, landings);
        assert_eq!(shared.uid_class_shift, wire::UID_CLASS_SHIFT);
        assert_eq!(shared.cidr_v6, wire::CIDR_V6);
        let mask = |bits: u8| u32::MAX << (32 - bits);
        let v4 = [
            (lo::VIA4, shared.via4_net, shared.via4_mask),
            (lo::DNS4, shared.dns4_net, shared.dns4_mask),
        ];
        for ((ip, bits), net, netmask) in v4 {
            assert_eq!((u32::from(ip), mask(bits)), (net, netmask));
        }
        let via6 = u128::from(shared.via6_hi) << 96 | u128::from(shared.via6_lo) << 64;
        assert_eq!((u128::from(lo::VIA6.0), lo::VIA6.1), (via6, 64));
        let dns6 = via6 | u128::from(shared.dns6_subnet) << 32;
        assert_eq!((u128::from(lo::DNS6.0), lo::DNS6.1), (dns6, 96));
        assert_eq!(shared.splice_large as usize, selftest::LARGE);
        assert_eq!(shared.splice_limit as usize, selftest::LIMIT);
    }
}
