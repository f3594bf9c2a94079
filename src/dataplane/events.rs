//! Events from the programs, through the ring buffer.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    mem::size_of,
    os::fd::{BorrowedFd, OwnedFd},
    rc::Rc,
};

use anyhow::{Context, Result};
use libbpf_rs::{RingBuffer, RingBufferBuilder};
use tokio::io::unix::AsyncFd;

use super::{abi, state::Dataplane};
use crate::{node::NetnsCookie, splice::Reset};

/// The events since the last read.
#[derive(Debug, Default)]
pub struct Seen {
    /// Pods whose connections found no listener, by cookie, and the ports of these listeners.
    pub missed: BTreeSet<(NetnsCookie, u16)>,
    /// Whether a spliced connection carries bulk, which is faster without splicing.
    pub bulk: bool,
    /// Connections to reset, by the cookie of the closed end's namespace.
    pub unread: BTreeMap<NetnsCookie, Vec<Reset>>,
}

impl Seen {
    /// An event: its header names the kind of the following fields.
    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        let header = bytes.get(..size_of::<abi::event>()).unwrap_or(bytes);
        let head: abi::event = abi::from_bytes(header)?;
        match head.kind {
            abi::event_kind::EVENT_NO_LISTENER => {
                let event: abi::listener_event = abi::from_bytes(bytes)?;
                self.missed.insert((NetnsCookie(head.netns), event.port));
            }
            abi::event_kind::EVENT_BULK => self.bulk = true,
            abi::event_kind::EVENT_UNREAD => {
                let event: abi::unread_event = abi::from_bytes(bytes)?;
                self.unread.entry(NetnsCookie(head.netns)).or_default().push(event.into());
            }
            // Events of another build's program are ignored.
            _ => {}
        }
        Ok(())
    }
}

/// The reader of the ring buffer.
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
    /// If the ring cannot be read.
    pub async fn next(&self) -> Result<Seen> {
        self.ready.readable().await?.clear_ready();
        self.ring.consume()?;
        Ok(self.seen.take())
    }
}

impl Dataplane {
    /// The kernel's events.
    ///
    /// # Errors
    /// If the ring cannot be mapped; panics outside a tokio runtime.
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
