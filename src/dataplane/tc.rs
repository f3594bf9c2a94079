//! The filters on a pod's network devices: links (tcx, Linux 6.6), pinned like others, or filters
//! of a clsact qdisc. Making or removing such a qdisc loses packets in flight, so it is made once
//! and stays with its device.

use std::{
    fs, io,
    mem::MaybeUninit,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    ptr,
};

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::{
    Link, MapCore, MapFlags, MapHandle, Program, TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHook,
    TcHookBuilder, libbpf_sys,
    query::{LinkInfo, LinkTypeInfo},
};

use super::{
    abi,
    features::kernel,
    links::{pin, remove_link},
    pins::{FORMER_TC_NAMESPACES, Pins, children},
    records::records,
    state::{Dataplane, Repair},
    table,
};
use crate::{
    mesh::entries::Record,
    node::{LO, Netns, NetnsCookie},
};

/// The layouts that have filters of their own in qdiscs, by number.
const LAYOUTS: Range<u32> = 0..16;

/// A filter, named by its program.
#[derive(Debug, Clone, Copy)]
pub(super) enum Filter {
    /// `dns_nat`: queries to the pod's DNS listener and its answers, on lo.
    Dns,
    /// `reset`: endings of spliced connections that are closed with unread bytes.
    Reset,
    /// `note_dialled`: the dialled ports of connections into a pod with NAT rules.
    Dialled,
}

impl Filter {
    const ALL: [Self; 3] = [Self::Dns, Self::Reset, Self::Dialled];

    /// The prefix of the names of its pins.
    const fn name(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Reset => "reset",
            Self::Dialled => "dialled",
        }
    }

    /// The direction of the filter: ingress or egress.
    const fn point(self) -> (TcAttachPoint, libbpf_sys::bpf_attach_type) {
        match self {
            Self::Dns | Self::Reset => (TC_EGRESS, libbpf_sys::BPF_TCX_EGRESS),
            Self::Dialled => (TC_INGRESS, libbpf_sys::BPF_TCX_INGRESS),
        }
    }

    /// The filter's handle and priority in a qdisc, plus the layout's number: behind the filters
    /// that others put first.
    const fn place(self) -> u32 {
        match self {
            Self::Dns => 0x5353,
            Self::Reset => 0x5363,
            Self::Dialled => 0x5373,
        }
    }

    fn hook(self, program: BorrowedFd<'_>, layout: u32, device: u32) -> TcHook {
        let mut builder = TcHookBuilder::new(program);
        let place = self.place() + layout;
        builder.ifindex(device.cast_signed()).replace(true).handle(place).priority(place);
        builder.hook(self.point().0)
    }
}

/// Whether the pin of this name is a filter's.
pub(super) fn is_filter(name: &str) -> bool {
    Filter::ALL.iter().any(|filter| name.starts_with(&format!("{}-", filter.name())))
}

impl Pins {
    /// This layout's number among those with filters in qdiscs.
    fn number(&self) -> u32 {
        let number = self.layout.strip_prefix('v').and_then(|number| number.parse().ok());
        number.unwrap_or(0) % LAYOUTS.end
    }

    fn filter(&self, filter: Filter, cookie: NetnsCookie, device: u32) -> PathBuf {
        self.link(&format!("{}-{cookie:x}-{device}", filter.name()))
    }
}

impl Dataplane {
    /// Attaches this build's filter for DNS to the pod's lo; an existing one is replaced in one
    /// step.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the kernel refuses.
    pub fn attach_dns(&self, cookie: NetnsCookie, netns: &Netns) -> Result<()> {
        self.filter(Filter::Dns, &self.skel.progs.dns_nat, cookie, netns, LO)
            .context("cannot attach the DNS filter to lo")
    }

    /// Attaches this build's filter for spliced connections that are closed with unread bytes to
    /// these devices of the pod, by index; existing ones are replaced.
    ///
    /// # Errors
    /// As of [`Dataplane::attach_dns`].
    pub fn attach_reset(&self, cookie: NetnsCookie, netns: &Netns, devices: &[u32]) -> Result<()> {
        devices.iter().try_for_each(|device| {
            let program = &self.skel.progs.reset;
            self.filter(Filter::Reset, program, cookie, netns, *device).with_context(|| {
                format!("cannot attach the reset filter for spliced connections to device {device}")
            })
        })
    }

    /// Attaches the program that notes the dialled ports of connections that arrive at these
    /// devices of the pod, by index; existing ones are replaced.
    ///
    /// # Errors
    /// As of [`Dataplane::attach_dns`].
    pub fn attach_dialled(
        &self,
        cookie: NetnsCookie,
        netns: &Netns,
        devices: &[u32],
    ) -> Result<()> {
        let mut storage = MaybeUninit::uninit();
        let skel = self.load_inbound(&mut storage, cookie, "note_dialled")?;
        let program = &skel.progs.note_dialled;
        devices.iter().try_for_each(|device| {
            self.filter(Filter::Dialled, program, cookie, netns, *device).with_context(|| {
                format!("cannot attach the filter that records dialled ports to device {device}")
            })
        })
    }

    fn filter(
        &self,
        filter: Filter,
        program: &Program<'_>,
        cookie: NetnsCookie,
        netns: &Netns,
        device: u32,
    ) -> Result<()> {
        let fd = program.as_fd();
        let record = Record { netns: netns.path().to_owned(), ..Record::default() };
        let (key, value) = table::entry(&cookie, &abi::record_of(&record)?);
        self.skel.maps.tc_namespaces.update(&key, &value, MapFlags::ANY)?;
        // A pod that is not enrolled after all loses the entry again.
        self.filtering.take();
        if !kernel().links_filters {
            let layout = self.pins.number();
            return netns.inside(|| put(filter, fd, layout, device))?;
        }
        let at = self.pins.filter(filter, cookie, device);
        if at.exists() {
            let mut link = Link::open(&at)?;
            if device_of(&link.info()?)? == device {
                return Ok(link.update_prog(program)?);
            }
            fs::remove_file(&at)?;
        }
        let link = netns.inside(|| link(filter, fd, device))??;
        pin(link.as_fd(), &at)
    }

    /// Checks the filters of a pod, for DNS answers if `dns` is set, and for spliced connections on
    /// these devices; restores those that are missing.
    pub fn repair_filters(
        &self,
        cookie: NetnsCookie,
        netns: &Path,
        dns: bool,
        devices: &[u32],
    ) -> Vec<Repair> {
        let dns = dns.then_some((Filter::Dns, LO)).into_iter();
        let all = dns.chain(devices.iter().map(|device| (Filter::Reset, *device)));
        all.filter_map(|(filter, device)| self.repair_filter(filter, cookie, netns, device))
            .collect()
    }

    fn repair_filter(
        &self,
        filter: Filter,
        cookie: NetnsCookie,
        netns: &Path,
        device: u32,
    ) -> Option<Repair> {
        let program: &Program = match filter {
            Filter::Dns => &self.skel.progs.dns_nat,
            Filter::Reset => &self.skel.progs.reset,
            Filter::Dialled => return None, // each pod has its own program: see repair_dialled
        };
        let open = || Netns::open_as(netns, cookie);
        let own = Program::id_from_fd(program.as_fd()).ok()?;
        let found = if kernel().links_filters {
            self.linked(filter, cookie, device).map(|info| info.prog_id)
        } else {
            let (program, layout) = (program.as_fd(), self.pins.number());
            let ask = || filter.hook(program, layout, device).query().ok();
            open().ok()?.inside(ask).ok()?
        };
        if found == Some(own) {
            return None;
        }
        // The device is gone, and its filters with it.
        let netns = open().ok()?;
        let text = format!("the {} filter was removed from device {device}", filter.name());
        Some(Repair::new("filter", text, self.filter(filter, program, cookie, &netns, device)))
    }

    /// Checks that dialled ports are noted on these devices of a pod, and restores missing filters.
    pub fn repair_dialled(
        &self,
        cookie: NetnsCookie,
        netns: &Path,
        devices: &[u32],
    ) -> Vec<Repair> {
        let is_gone = |device: &&u32| {
            kernel().links_filters && self.linked(Filter::Dialled, cookie, **device).is_none()
        };
        let repair = |device: &u32| {
            // The device is gone, and its filters with it.
            let netns = Netns::open_as(netns, cookie).ok()?;
            let text =
                format!("the {} filter was removed from device {device}", Filter::Dialled.name());
            Some(Repair::new("filter", text, self.attach_dialled(cookie, &netns, &[*device])))
        };
        devices.iter().filter(is_gone).filter_map(repair).collect()
    }

    /// The kernel's information about a filter's link; `None` if there is no link, or its device is
    /// gone.
    fn linked(&self, filter: Filter, cookie: NetnsCookie, device: u32) -> Option<LinkInfo> {
        let link = Link::open(self.pins.filter(filter, cookie, device)).ok()?;
        link.info().ok().filter(|info| device_of(info).is_ok_and(|at| at == device))
    }

    /// Removes the filter for DNS from a pod's lo, if there is one.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or the kernel refuses.
    pub fn detach_dns(&self, cookie: NetnsCookie, netns: &Netns) -> Result<()> {
        let pin = self.pins.filter(Filter::Dns, cookie, LO);
        if pin.exists() {
            remove_link(&pin)?;
        }
        if kernel().links_filters {
            return Ok(());
        }
        netns.inside(|| remove(Filter::Dns, LAYOUTS, LO))
    }

    /// Removes filters from devices of pods that are not enrolled. A pod's open connections are
    /// spliced until they end, even if the pod has left the mesh: their filter goes with its
    /// device. Returns whether no such pod has any left.
    pub(super) fn remove_filters(&self, enrolled: impl Fn(NetnsCookie) -> bool) -> Result<bool> {
        let namespaces = &self.skel.maps.tc_namespaces;
        let mut none_left = true;
        for (cookie, record) in records(namespaces)? {
            if enrolled(cookie) {
                continue;
            }
            match Netns::open_as(&record.netns, cookie) {
                Ok(_) if kernel().links_filters => none_left = false,
                Ok(netns) => {
                    none_left = false;
                    let devices = netns.facts()?.interfaces;
                    netns.inside(|| {
                        remove(Filter::Dns, LAYOUTS, LO);
                        devices.values().for_each(|at| remove(Filter::Dialled, LAYOUTS, *at));
                    })?;
                }
                // A namespace that is gone took its filters along.
                Err(_) => namespaces.delete(&cookie.0.to_ne_bytes())?,
            }
        }
        for pin in children(&self.pins.links())? {
            let name = pin.file_name().unwrap_or_default().to_string_lossy();
            let mut parts = name.split('-').skip(1);
            let cookie = parts
                .next()
                .and_then(|cookie| u64::from_str_radix(cookie, 16).ok().map(NetnsCookie));
            if !is_filter(&name) || cookie.is_some_and(&enrolled) {
                continue;
            }
            let stays = name.starts_with(Filter::Reset.name())
                && Link::open(&pin)
                    .map_err(Into::into)
                    .and_then(|link| device_of(&link.info()?))?
                    != 0;
            none_left &= !stays;
            if !stays {
                remove_link(&pin)?;
            }
        }
        Ok(none_left)
    }

    /// Opens a namespace whose devices have or had filters, also if its pod is no longer enrolled.
    ///
    /// # Errors
    /// If it is not known, or gone.
    pub fn filtered_netns(&self, cookie: NetnsCookie) -> Result<Netns> {
        let value = self.skel.maps.tc_namespaces.lookup(&cookie.0.to_ne_bytes(), MapFlags::ANY)?;
        let value = value.with_context(|| {
            format!(
                "the path of network namespace {cookie} is \
                                                   unknown"
            )
        })?;
        let record = Record::from(&abi::from_bytes::<abi::pod_record>(&value)?);
        Netns::open_as(&record.netns, cookie)
    }
}

/// The device of a filter's link; 0 if it is gone.
fn device_of(link: &LinkInfo) -> Result<u32> {
    match &link.info {
        LinkTypeInfo::Tcx(info) => Ok(info.ifindex),
        other => bail!("the pin is a link of another type: {other:?}"),
    }
}

/// Links a filter to a device of the calling thread's namespace, behind the filters of others.
fn link(filter: Filter, program: BorrowedFd<'_>, device: u32) -> Result<OwnedFd> {
    // SAFETY: the program's descriptor is open, and options may be none.
    let fd = unsafe {
        libbpf_sys::bpf_link_create(
            program.as_raw_fd(),
            device.cast_signed(),
            filter.point().1,
            ptr::null(),
        )
    };
    ensure!(fd >= 0, "tcx link: {}", io::Error::from_raw_os_error(-fd));
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds a filter to a device's qdisc in the calling thread's namespace.
fn put(filter: Filter, program: BorrowedFd<'_>, layout: u32, device: u32) -> Result<()> {
    let mut hook = filter.hook(program, layout, device);
    hook.create().context("clsact qdisc (module sch_ingress)")?;
    hook.attach().context("eBPF filter (module cls_bpf)")?;
    Ok(())
}

/// Tries a filter on lo of the calling thread's namespace.
pub(super) fn try_on_lo(filter: Filter, program: BorrowedFd<'_>) -> Result<()> {
    if kernel().links_filters {
        link(filter, program, LO).map(drop)
    } else {
        put(filter, program, 0, LO)
    }
}

/// Removes a layout's filters from the qdiscs of all pods' devices, including pods that have left.
pub(super) fn empty_qdiscs(pins: &Pins) {
    if kernel().links_filters {
        return;
    }
    // Of any layout.
    let Ok(namespaces) = MapHandle::from_pinned_path(pins.map(FORMER_TC_NAMESPACES)) else {
        return;
    };
    let layouts = pins.number()..pins.number() + 1;
    let found = records(&namespaces).unwrap_or_else(|error| {
        tracing::warn!("cannot remove the tc filters of {pins} from their devices: {error:#}");
        Default::default()
    });
    for (cookie, record) in found {
        // A namespace that is gone took its filters along.
        let _ = Netns::open_as(&record.netns, cookie).and_then(|netns| {
            let devices = netns.facts()?.interfaces;
            netns.inside(|| {
                for device in devices.values() {
                    for filter in Filter::ALL {
                        remove(filter, layouts.clone(), *device);
                    }
                }
            })
        });
    }
}

fn remove(filter: Filter, layouts: Range<u32>, device: u32) {
    for layout in layouts {
        // The kernel finds the filter by its place and ignores the descriptor.
        let mut hook = filter.hook(io::stderr().as_fd(), layout, device);
        // The filter may not exist.
        let _ = hook.detach();
    }
}
