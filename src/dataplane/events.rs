//! What the programs tell the agent, by the ring buffer.

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
    /// Where the ring cannot be read.
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
    /// Where the ring cannot be mapped; panics outside a tokio runtime.
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
