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

#[cfg(test)]
mod tests {
    use super::*;

    fn head(kind: abi::event_kind) -> abi::event {
        abi::event { netns: 7, kind, ..Default::default() }
    }

    #[test]
    fn events_are_told_apart_by_their_kind() {
        let mut seen = Seen::default();
        let missed = head(abi::event_kind::EVENT_NO_LISTENER);
        let missed = abi::listener_event { head: missed, port: 15006, ..Default::default() };
        let unread = head(abi::event_kind::EVENT_UNREAD);
        let unread = abi::unread_event { head: unread, sent: 3, received: 4, ..Default::default() };
        seen.add(abi::as_bytes(&missed)).expect("added");
        seen.add(abi::as_bytes(&missed)).expect("added");
        assert_eq!(seen.missed, BTreeSet::from([(NetnsCookie(7), 15006)]), "once");
        assert!(!seen.bulk && seen.unread.is_empty());
        seen.add(abi::as_bytes(&head(abi::event_kind::EVENT_BULK))).expect("added");
        seen.add(abi::as_bytes(&unread)).expect("added");
        assert!(seen.bulk);
        let [reset] = &seen.unread[&NetnsCookie(7)][..] else { panic!("{:?}", seen.unread) };
        assert_eq!((reset.sent, reset.received), (3, 4));
    }

    #[test]
    fn an_event_of_another_build_is_ignored_and_a_short_one_is_an_error() {
        let mut seen = Seen::default();
        seen.add(abi::as_bytes(&head(abi::event_kind(1000)))).expect("ignored");
        assert!(seen.missed.is_empty() && !seen.bulk && seen.unread.is_empty());
        let short = head(abi::event_kind::EVENT_NO_LISTENER);
        assert!(seen.add(abi::as_bytes(&short)).is_err(), "no port");
        assert!(seen.add(&[0; 3]).is_err());
    }
}
