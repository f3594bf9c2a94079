//! The maps with the names of the namespaces' pods.

use std::collections::BTreeMap;

use anyhow::Result;
use libbpf_rs::MapCore;

use super::{abi, table};
use crate::{mesh::entries::Record, node::NetnsCookie};

pub(super) fn records(map: &impl MapCore) -> Result<BTreeMap<NetnsCookie, Record>> {
    let records = table::read_as::<NetnsCookie, abi::pod_record>(map)?;
    Ok(records.into_iter().map(|(cookie, record)| (cookie, Record::from(&record))).collect())
}
