//! Services from the API server: those of the whole cluster with their endpoints, and this node.

use std::{
    fmt::Debug,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::StreamExt;
use k8s_openapi::{
    api::{core, discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource,
    runtime::watcher::{self, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::{
    errors::Failing,
    watch::{follow, relisting},
};
use crate::service::{
    Catalog,
    facts::{self, NoName, NodeFacts, SELECTOR, ServiceFacts, SliceFacts},
    object,
};

/// What the watches told that the catalog has not been told yet.
#[derive(Debug, Default)]
pub(super) struct Services {
    told: Arc<Mutex<Told>>,
}

#[derive(Debug, Default)]
struct Told {
    services: Feed<ServiceFacts>,
    slices: Feed<SliceFacts>,
    /// This node.
    node: Feed<NodeFacts>,
}

/// What one watch told.
#[derive(Debug)]
struct Feed<T> {
    /// A list that is not complete yet.
    listed: Vec<T>,
    /// In the order in which it was told.
    changes: Vec<Change<T>>,
    /// There has been a complete list.
    is_ready: bool,
}

#[derive(Debug)]
enum Change<T> {
    Set(T),
    /// By `namespace/name`.
    Gone(Arc<str>),
    /// These are all.
    All(Vec<T>),
}

impl<T> Default for Feed<T> {
    fn default() -> Self {
        Self { listed: Vec::new(), changes: Vec::new(), is_ready: false }
    }
}

impl<T> Feed<T> {
    /// Takes in what a watch told. What is of nobody's concern is as good as gone.
    fn take<K: Resource>(
        &mut self,
        event: &Event<K>,
        read: impl Fn(&K) -> Result<Option<T>, NoName>,
    ) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => self.listed.extend(read(object).ok().flatten()),
            Event::InitDone => {
                // What came before is in the list, or is gone.
                self.changes = vec![Change::All(mem::take(&mut self.listed))];
                self.is_ready = true;
            }
            Event::Apply(object) | Event::Delete(object) => {
                let is_there = matches!(event, Event::Apply(_));
                let found = read(object).ok().flatten().filter(|_| is_there);
                let gone = || Some(Change::Gone(facts::name_of(object.meta()).ok()?));
                self.changes.extend(found.map(Change::Set).or_else(gone));
            }
        }
    }
}

impl Services {
    /// Starts watching, as [`super::Kubernetes`] does.
    pub(super) fn start(
        client: &Client,
        node: &str,
        failing: &Arc<Mutex<Failing>>,
        changed: &mpsc::Sender<()>,
    ) -> Self {
        let own = Self::default();
        let ours = watcher::Config::default().labels(SELECTOR);
        own.watch("services", Api::all(client.clone()), ours.clone(), failing, changed, {
            |told: &mut Told, event| told.services.take(event, facts::service)
        });
        let name = node.to_owned();
        own.watch("endpointslices", Api::all(client.clone()), ours, failing, changed, {
            move |told: &mut Told, event| {
                told.slices.take(event, |slice| facts::slice(slice, &name));
            }
        });
        let this = watcher::Config::default().fields(&format!("metadata.name={node}"));
        own.watch("nodes", Api::all(client.clone()), this, failing, changed, {
            |told: &mut Told, event| {
                told.node.take(event, |node: &object::Node| Ok(Some(facts::node(node))));
            }
        });
        own
    }

    fn watch<K>(
        &self,
        what: &'static str,
        api: Api<K>,
        config: watcher::Config,
        failing: &Arc<Mutex<Failing>>,
        changed: &mpsc::Sender<()>,
        take: impl Fn(&mut Told, &Event<K>) + Send + 'static,
    ) where
        K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let told = Arc::clone(&self.told);
        let watch = relisting(move || watcher(api.clone(), config.clone()));
        let watch = watch.inspect(move |event| {
            if let Ok(event) = event {
                take(&mut lock(&told), event);
            }
        });
        follow(what, watch, failing, changed);
    }

    /// Tells the catalog what is new. False: not before each watch has had its first complete list.
    pub(super) fn feed(&self, catalog: &mut Catalog) -> bool {
        let mut told = lock(&self.told);
        let Told { services, slices, node } = &mut *told;
        if !(services.is_ready && slices.is_ready && node.is_ready) {
            return false;
        }
        for change in mem::take(&mut node.changes) {
            catalog.set_node(match change {
                Change::Set(node) => node,
                Change::Gone(_) => NodeFacts::default(),
                Change::All(nodes) => nodes.into_iter().next().unwrap_or_default(),
            });
        }
        for change in mem::take(&mut services.changes) {
            match change {
                Change::Set(service) => catalog.set_service(service),
                Change::Gone(name) => catalog.remove_service(&name),
                Change::All(all) => catalog.replace_services(all),
            }
        }
        for change in mem::take(&mut slices.changes) {
            match change {
                Change::Set(slice) => catalog.set_slice(slice),
                Change::Gone(name) => catalog.remove_slice(&name),
                Change::All(all) => catalog.replace_slices(all),
            }
        }
        true
    }
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [`object`] has what is read of the API's own types.
macro_rules! stands_for {
    ($($ours:ty => $api:ty;)*) => { $(
        impl k8s_openapi::Resource for $ours {
            const API_VERSION: &'static str = <$api as k8s_openapi::Resource>::API_VERSION;
            const GROUP: &'static str = <$api as k8s_openapi::Resource>::GROUP;
            const KIND: &'static str = <$api as k8s_openapi::Resource>::KIND;
            const VERSION: &'static str = <$api as k8s_openapi::Resource>::VERSION;
            const URL_PATH_SEGMENT: &'static str =
                <$api as k8s_openapi::Resource>::URL_PATH_SEGMENT;
            type Scope = <$api as k8s_openapi::Resource>::Scope;
        }

        impl k8s_openapi::Metadata for $ours {
            type Ty = ObjectMeta;

            fn metadata(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    )* };
}

stands_for! {
    object::Service => core::v1::Service;
    object::EndpointSlice => discovery::v1::EndpointSlice;
    object::Node => core::v1::Node;
}
