//! Kuma. Sources, all in kumahq/kuma: `app/cni/pkg/cni` (which pods, annotations),
//! `pkg/transparentproxy/kubernetes` and `pkg/transparentproxy/config` (the configuration of 3.0,
//! formats, ports, uid), `pkg/transparentproxy/iptables/builder` (rules and their order),
//! `pkg/plugins/runtime/k8s/metadata/annotations.go`; as 2.14.3 and master in August 2026 (3.0 to
//! come) have them.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Container, Pod};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_json::{Map, Value, json};

use super::{
    Mesh, Settings,
    annotations::{
        FactsError, Reader, annotation, container_id, digits, invalid, parse_range, port, sidecar,
        user,
    },
    policy::{Ipv6, Policy, PortRange, Ports, Protocol, Ranges, TcpDns, UidExclusion},
};

/// Kuma's row of the table of meshes.
pub const KUMA: Mesh = Mesh {
    name: "kuma",
    index: 2,
    proxy_container: "kuma-sidecar",
    init_container: "kuma-init",
    init_anywhere: false,
    chains: &["KUMA_MESH_", "MESH_"],
    rules_in_hooks: true,
    self_inbound: true,
    hbone_port: 0,
    udp_excludes: false,
    cidrs_first: true,
    reads_until_empty: true,
    inbound_exempt: &[],
    inbound_excluded: &[],
    exclude_interfaces: None,
    of_namespace: &[],
    env: &[],
    proxy_of,
    settings,
};

/// The whole configuration as YAML, where it is not empty: 3.0's injector writes it on every pod,
/// 2.9's and later where they are told to. It has the pod's other annotations in it already.
const CONFIG: &str = "traffic.kuma.io/transparent-proxy-config";
/// Names a ConfigMap that kuma-cni cannot see, and that the sidecar goes by.
const CONFIG_MAP: &str = "traffic.kuma.io/transparent-proxy-configmap-name";

// What counts where there is no configuration.
const EXCLUDE_OUTBOUND_FOR_UIDS: &str = "traffic.kuma.io/exclude-outbound-ports-for-uids";
const EXCLUDE_OUTBOUND_IPS: &str = "traffic.kuma.io/exclude-outbound-ips";
const EXCLUDE_OUTBOUND_PORTS: &str = "traffic.kuma.io/exclude-outbound-ports";
const EXCLUDE_INBOUND_IPS: &str = "traffic.kuma.io/exclude-inbound-ips";
const EXCLUDE_INBOUND_PORTS: &str = "traffic.kuma.io/exclude-inbound-ports";
const PROBE_PROXY_PORT: &str = "kuma.io/application-probe-proxy-port";
const GATEWAY: &str = "kuma.io/gateway";
const SIDECAR_UID: &str = "kuma.io/sidecar-uid";
const OUTBOUND_PORT: &str = "kuma.io/transparent-proxying-outbound-port";
const INBOUND_PORT: &str = "kuma.io/transparent-proxying-inbound-port";
const FAMILY_MODE: &str = "kuma.io/transparent-proxying-ip-family-mode";
const DNS: &str = "kuma.io/builtin-dns";
const DNS_PORT: &str = "kuma.io/builtin-dns-port";

/// What stands in for what is not said, or cannot be read.
const DEFAULT_UID: u32 = 5678;
const DEFAULT_OUTBOUND_PORT: u16 = 15001;
const DEFAULT_INBOUND_PORT: u16 = 15006;
const DEFAULT_DNS_PORT: u16 = 15053;
const DEFAULT_PROBE_PROXY_PORT: u16 = 9001;
/// Envoy's admin port: exempt in each direction that has no list of excluded ports.
const ADMIN_PORT: u16 = 9901;

fn proxy_of(pod: &Pod) -> Option<&Container> {
    let injected = annotation(pod, "kuma.io/sidecar-injected") == Some("true");
    sidecar(pod, KUMA.proxy_container).filter(|_| injected)
}

fn settings(
    pod: &Pod,
    proxy: &Container,
    read: &mut Reader,
) -> Result<Option<Settings>, FactsError> {
    if let Some(name) = annotation(pod, CONFIG_MAP).filter(|name| !name.is_empty()) {
        let why = "ignored: Sidestep does not read ConfigMaps in the pod's namespace, nor does \
                   kuma-cni";
        read.warn(CONFIG_MAP, name, why);
    }
    match annotation(pod, CONFIG).filter(|text| !text.is_empty()) {
        Some(text) => configured(text, read),
        None => annotated(pod, proxy, read),
    }
    .map(Some)
}

/// By annotations, each of which has its default.
fn annotated(pod: &Pod, proxy: &Container, read: &mut Reader) -> Result<Settings, FactsError> {
    let own_uid = read.or(container_id(proxy, "runAsUser"), None)?.unwrap_or(DEFAULT_UID);
    let uid = annotation(pod, SIDECAR_UID).map_or(Ok(own_uid), |text| parse_uid(SIDECAR_UID, text));
    let dns_port = read.or(port(pod, DNS_PORT), None)?.unwrap_or(DEFAULT_DNS_PORT);
    // Where it cannot be read, everything is captured.
    let dns = read.or(switched_on(pod, DNS), true)?;
    let mode = annotation(pod, FAMILY_MODE).unwrap_or("dualstack");
    Ok(Settings {
        proxy_uid: Some(read.or(uid, own_uid)?),
        proxy_gid: None,
        outbound_port: read.or(port(pod, OUTBOUND_PORT), None)?.unwrap_or(DEFAULT_OUTBOUND_PORT),
        inbound_port: read.or(port(pod, INBOUND_PORT), None)?.unwrap_or(DEFAULT_INBOUND_PORT),
        dns_port: dns.then_some(dns_port),
        tcp_dns: TcpDns::Direct,
        ipv6: read.or(family_mode(FAMILY_MODE, mode, &["ipv6"]), Ipv6::Always)?,
        policy: read.or(policy(pod), Policy::default())?,
    })
}

fn policy(pod: &Pod) -> Result<Policy, FactsError> {
    let ports = |key: &str| match annotation(pod, key) {
        Some(text) => parse_ports(key, text),
        None => Ok([PortRange::one(ADMIN_PORT)].into()),
    };
    let ips = |key: &str| match annotation(pod, key) {
        Some(text) => parse_ips(key, text),
        None => Ok(BTreeSet::new()),
    };
    let mut exclude_inbound_ports = ports(EXCLUDE_INBOUND_PORTS)?;
    // kubelet's probes go to it, in plain text; 0: there is none.
    let probe_proxy = annotation(pod, PROBE_PROXY_PORT).map(str::trim);
    let probe_proxy = match probe_proxy {
        None => DEFAULT_PROBE_PROXY_PORT,
        Some(text) => digits(text)
            .ok_or_else(|| invalid(PROBE_PROXY_PORT, text, "expected a port from 0 to 65535"))?,
    };
    exclude_inbound_ports.extend(Some(PortRange::one(probe_proxy)).filter(|port| port.first != 0));
    let for_uids = annotation(pod, EXCLUDE_OUTBOUND_FOR_UIDS).filter(|text| !text.is_empty());
    Ok(Policy {
        exclude_outbound_ports: ports(EXCLUDE_OUTBOUND_PORTS)?,
        exclude_outbound_ranges: ips(EXCLUDE_OUTBOUND_IPS)?,
        // A gateway takes connections itself.
        include_inbound_ports: if switched_on(pod, GATEWAY)? {
            Ports::Only(BTreeSet::new())
        } else {
            Ports::All
        },
        exclude_inbound_ports,
        exclude_inbound_ranges: ips(EXCLUDE_INBOUND_IPS)?,
        exclude_outbound_for_uids: match for_uids {
            Some(text) => parse_uid_exclusions(EXCLUDE_OUTBOUND_FOR_UIDS, text)?,
            None => Vec::new(),
        },
        ..Policy::default()
    })
}

/// The annotation [`CONFIG`]; fields that are not named here change nothing in what is captured.
/// Names are [`folded`], here and in what it has.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    #[serde(rename = "kumadpuser", deserialize_with = "text")]
    kuma_dp_user: Option<String>,
    #[serde(rename = "ipfamilymode", deserialize_with = "text")]
    ip_family_mode: Option<String>,
    #[serde(deserialize_with = "object")]
    redirect: Option<Redirect>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Redirect {
    #[serde(deserialize_with = "object")]
    inbound: Option<Flow>,
    #[serde(deserialize_with = "object")]
    outbound: Option<Flow>,
    #[serde(deserialize_with = "object")]
    dns: Option<Dns>,
    #[serde(deserialize_with = "object")]
    vnet: Option<Vnet>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Flow {
    enabled: Option<bool>,
    port: Option<Value>,
    #[serde(rename = "includeports")]
    include_ports: Option<Value>,
    #[serde(rename = "excludeports")]
    exclude_ports: Option<Value>,
    #[serde(rename = "excludeportsforips", deserialize_with = "texts")]
    exclude_ports_for_ips: Option<Vec<String>>,
    #[serde(rename = "excludeportsforuids", deserialize_with = "texts")]
    exclude_ports_for_uids: Option<Vec<String>>,
    #[serde(rename = "insertredirectinsteadofappend")]
    insert_redirect_instead_of_append: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Dns {
    enabled: Option<bool>,
    port: Option<Value>,
    #[serde(rename = "captureall")]
    capture_all: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Vnet {
    #[serde(deserialize_with = "texts")]
    networks: Option<Vec<String>>,
}

/// An object, for which no list is taken, as serde's structs alone would.
fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(value: D) -> Result<Option<T>, D::Error> {
    let Some(fields) = Option::<Map<String, Value>>::deserialize(value)? else {
        return Ok(None);
    };
    serde_path_to_error::deserialize(Value::Object(fields)).map(Some).map_err(D::Error::custom)
}

/// A text, for which a number or a switch without quotes is taken too.
fn text<'de, D: Deserializer<'de>>(value: D) -> Result<Option<String>, D::Error> {
    Option::<Value>::deserialize(value)?.map(scalar).transpose()
}

fn texts<'de, D: Deserializer<'de>>(list: D) -> Result<Option<Vec<String>>, D::Error> {
    let list = Option::<Vec<Value>>::deserialize(list)?;
    list.map(|list| list.into_iter().map(scalar).collect()).transpose()
}

fn scalar<E: Error>(value: Value) -> Result<String, E> {
    match value {
        Value::Null => Ok(String::new()),
        Value::Array(_) | Value::Object(_) => Err(E::custom("expected a text")),
        value => Ok(scalar_text(&value)),
    }
}

/// Reads the configuration as Kuma does, by sigs.k8s.io/yaml: the first YAML document becomes JSON,
/// whose keys are sorted, and `encoding/json` finds a field by its name in any letter case. A field
/// that is named more than once has every value read: those are returned as well.
fn parse_config(text: &str) -> Result<(Config, Vec<Config>), String> {
    let mut options = serde_saphyr::options! { legacy_octal_numbers: true };
    options.duplicate_keys = serde_saphyr::DuplicateKeyPolicy::LastWins;
    let text = first_document(text);
    let value = serde_saphyr::from_str_with_options::<Value>(text, options).map_err(|error| {
        // The first line names the place; the others quote the text.
        error.to_string().lines().next().unwrap_or_default().to_owned()
    })?;
    let config = |value| -> Result<Config, String> {
        let config: Result<_, serde_json::Error> = object(value);
        config.map(Option::unwrap_or_default).map_err(|error| error.to_string())
    };
    let mut again = Vec::new();
    let all = config(with_field_names(value, &mut again))?;
    Ok((all, again.into_iter().map(config).collect::<Result<_, _>>()?))
}

/// Kuma looks at nothing behind it. A line that begins with a marker ends any scalar.
fn first_document(text: &str) -> &str {
    let (mut end, mut begun) = (0, false);
    for line in text.split_inclusive('\n') {
        let marks = |marker| {
            let rest = line.strip_prefix(marker);
            rest.is_some_and(|rest: &str| rest.is_empty() || rest.starts_with(char::is_whitespace))
        };
        if begun && (marks("---") || marks("...")) {
            break;
        }
        let before = line.trim().is_empty() || line.starts_with(['#', '%']);
        begun |= !before;
        end += line.len();
    }
    &text[..end]
}

/// The same with folded keys. Of several that are one field the last in the order of their bytes wins;
/// objects become one. `again` gets each of their values.
fn with_field_names(value: Value, again: &mut Vec<Value>) -> Value {
    let Value::Object(fields) = value else { return value };
    let mut fields: Vec<_> = fields.into_iter().collect();
    fields.sort_by(|(one, _), (other, _)| one.cmp(other));
    let mut times = BTreeMap::<String, u32>::new();
    for (key, _) in &fields {
        *times.entry(folded(key)).or_default() += 1;
    }
    let mut named = Map::new();
    for (key, value) in fields {
        let field = folded(&key);
        let mut values = Vec::new();
        let value = with_field_names(value, &mut values);
        if times.get(&field).is_some_and(|times| *times > 1) {
            values.push(value.clone());
        }
        again.extend(values.into_iter().map(|value| json!({ field.as_str(): value })));
        overlay(named.entry(field).or_insert(Value::Null), value);
    }
    Value::Object(named)
}

fn overlay(onto: &mut Value, value: Value) {
    match (onto, value) {
        // A list is emptied, and all else left as it is.
        (onto @ Value::Array(_), Value::Null) => *onto = Value::Null,
        (_, Value::Null) => {}
        (Value::Object(onto), Value::Object(fields)) => {
            for (key, value) in fields {
                overlay(onto.entry(key).or_insert(Value::Null), value);
            }
        }
        (onto, value) => *onto = value,
    }
}

/// As Go's Unicode case folding has it for the letters of the fields' names.
fn folded(name: &str) -> String {
    name.chars().map(|c| if c == 'ſ' { 's' } else { c }).flat_map(char::to_lowercase).collect()
}

/// By the configuration alone.
fn configured(text: &str, read: &mut Reader) -> Result<Settings, FactsError> {
    let config = parse_config(text).map_err(|why| invalid(CONFIG, text, &why));
    let unreadable = config.is_err();
    let (config, again) = read.or(config, Default::default())?;
    let rest = text[first_document(text).len()..].trim();
    if !["", "---", "..."].contains(&rest) {
        read.warn(CONFIG, rest, "Kuma reads the first YAML document alone, and so does Sidestep");
    }
    for value in again {
        let mut alone = Reader::default();
        let settings = settings_of(value, false, &mut alone);
        read.or(settings.and(alone.error.map_or(Ok(()), Err)), ())?;
    }
    settings_of(config, unreadable, read)
}

fn settings_of(
    config: Config,
    unreadable: bool,
    read: &mut Reader,
) -> Result<Settings, FactsError> {
    let redirect = config.redirect.unwrap_or_default();
    if let Some(networks) = redirect.vnet.and_then(|vnet| vnet.networks)
        && !networks.is_empty()
    {
        let key = format!("{CONFIG}: redirect.vnet.networks");
        return Err(FactsError::Unsupported { key, text: networks.join(", ") });
    }
    let inbound = redirect.inbound.unwrap_or_default();
    let outbound = redirect.outbound.unwrap_or_default();
    let dns = redirect.dns.unwrap_or_default();
    let user = config.kuma_dp_user.filter(|user| !user.is_empty());
    let user =
        user.map_or(Ok(DEFAULT_UID), |user| parse_uid(&format!("{CONFIG}: kumaDPUser"), &user));
    let mode = config.ip_family_mode.unwrap_or_default();
    let mode = family_mode(&format!("{CONFIG}: ipFamilyMode"), &mode, &[""]);
    // Where nothing can be read, everything is captured.
    let captures_dns = dns.enabled.unwrap_or(unreadable);
    if captures_dns && !dns.capture_all.unwrap_or(unreadable) {
        let why = "DNS is captured to every server: the agent cannot see the resolv.conf from \
                   which Kuma takes the servers";
        read.warn(&format!("{CONFIG}: redirect.dns.captureAll"), "false", why);
    }
    // Kuma's injector writes 0 where it has DNS switched off.
    let dns_port = dns.port.filter(|port| captures_dns || *port != json!(0));
    let dns_port = read.or(flow_port("dns", dns_port, DEFAULT_DNS_PORT), DEFAULT_DNS_PORT)?;
    let policy = configured_policy(&inbound, &outbound, read);
    Ok(Settings {
        proxy_uid: Some(read.or(user, DEFAULT_UID)?),
        proxy_gid: None,
        outbound_port: read.or(
            flow_port("outbound", outbound.port, DEFAULT_OUTBOUND_PORT),
            DEFAULT_OUTBOUND_PORT,
        )?,
        inbound_port: read
            .or(flow_port("inbound", inbound.port, DEFAULT_INBOUND_PORT), DEFAULT_INBOUND_PORT)?,
        dns_port: captures_dns.then_some(dns_port),
        // The rule for DNS over TCP is appended: a jump that is inserted comes before it.
        tcp_dns: match outbound.insert_redirect_instead_of_append {
            Some(true) => TcpDns::AsAnyPort,
            _ => TcpDns::Direct,
        },
        ipv6: read.or(mode, Ipv6::Always)?,
        policy: read.or(policy, Policy::default())?,
    })
}

fn configured_policy(
    inbound: &Flow,
    outbound: &Flow,
    read: &mut Reader,
) -> Result<Policy, FactsError> {
    let ports = |field: &str, value: &Option<Value>| match value {
        Some(value) => parse_ports(&format!("{CONFIG}: redirect.{field}"), &port_text(value)),
        None => Ok(BTreeSet::new()),
    };
    let ips = |flow: &str, list: &Option<Vec<String>>| {
        let key = format!("{CONFIG}: redirect.{flow}.excludePortsForIPs");
        let lists = list.iter().flatten().map(|item| parse_ips(&key, item));
        lists.collect::<Result<Vec<_>, _>>().map(|lists| lists.into_iter().flatten().collect())
    };
    let uids = |flow: &str, list: &Option<Vec<String>>| {
        let key = format!("{CONFIG}: redirect.{flow}.excludePortsForUIDs");
        let items = list.iter().flatten().map(|item| parse_uid_exclusion(&key, item, item));
        items.collect::<Result<Vec<_>, _>>()
    };

    let mut policy = Policy {
        exclude_inbound_ports: ports("inbound.excludePorts", &inbound.exclude_ports)?,
        exclude_outbound_ports: ports("outbound.excludePorts", &outbound.exclude_ports)?,
        exclude_inbound_ranges: ips("inbound", &inbound.exclude_ports_for_ips)?,
        exclude_outbound_ranges: ips("outbound", &outbound.exclude_ports_for_ips)?,
        exclude_outbound_for_uids: uids("outbound", &outbound.exclude_ports_for_uids)?,
        ..Policy::default()
    };
    let included = ports("inbound.includePorts", &inbound.include_ports)?;
    if !included.is_empty() {
        policy.include_inbound_ports = Ports::Only(included);
    }
    let included = ports("outbound.includePorts", &outbound.include_ports)?;
    if !included.is_empty() {
        policy.exclude_outbound_ports.clear();
        policy.include_outbound_ports = included;
        policy.include_outbound_ranges = Ranges::Only(BTreeSet::new());
    }
    // Kuma makes a rule without any condition of an inbound one: nothing is redirected.
    let for_uids = uids("inbound", &inbound.exclude_ports_for_uids)?;
    if !for_uids.is_empty() {
        let list = inbound.exclude_ports_for_uids.iter().flatten().cloned().collect::<Vec<_>>();
        let why = "Kuma redirects no inbound connections of a pod with this setting, and neither \
                   does Sidestep";
        let key = format!("{CONFIG}: redirect.inbound.excludePortsForUIDs");
        read.warn(&key, &list.join(", "), why);
    }
    if inbound.enabled == Some(false) || !for_uids.is_empty() {
        policy.include_inbound_ports = Ports::Only(BTreeSet::new());
    }
    // Before the way back to the pod itself; DNS over UDP is another rule.
    if outbound.enabled == Some(false) {
        policy.exclude_outbound_ports = [PortRange::ALL].into();
    }
    Ok(policy)
}

/// A `port` of the configuration. Kuma's `Port` refuses zero as it is read, so also where another
/// spelling of the field overrides it.
fn flow_port(flow: &str, value: Option<Value>, default: u16) -> Result<u16, FactsError> {
    let Some(value) = value else {
        return Ok(default);
    };
    let port = value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
    port.ok_or_else(|| {
        let key = format!("{CONFIG}: redirect.{flow}.port");
        invalid(&key, &scalar_text(&value), "expected a number from 1 to 65535")
    })
}

/// A list of ports as one text, separated by commas; what is neither number nor text in a list
/// does not count.
fn port_text(value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items = items.iter().filter(|item| item.is_string() || item.is_number());
            items.map(scalar_text).collect::<Vec<_>>().join(",")
        }
        value => scalar_text(value),
    }
}

fn scalar_text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn parse_uid(key: &str, text: &str) -> Result<u32, FactsError> {
    user(text).ok_or_else(|| invalid(key, text, "expected a numeric uid"))
}

fn family_mode(key: &str, text: &str, also_both: &[&str]) -> Result<Ipv6, FactsError> {
    match text.to_ascii_lowercase().as_str() {
        "ipv4" => Ok(Ipv6::Never),
        "dualstack" => Ok(Ipv6::Always),
        mode if also_both.contains(&mode) => Ok(Ipv6::Always),
        _ => Err(invalid(key, text, "expected dualstack or ipv4")),
    }
}

/// What Kuma takes for a switch, in any case; off where the pod does not have it.
fn switched_on(pod: &Pod, key: &str) -> Result<bool, FactsError> {
    let text = annotation(pod, key).unwrap_or("disabled");
    match text.to_ascii_lowercase().as_str() {
        "enabled" | "true" | "yes" => Ok(true),
        "disabled" | "false" | "no" => Ok(false),
        _ => Err(invalid(key, text, "expected enabled or disabled")),
    }
}

/// `80, 443`: ports separated by commas; blanks around them and empty items do not count, and
/// there are no ranges.
///
/// # Errors
/// Names the item that is no port.
pub fn parse_ports(key: &str, text: &str) -> Result<BTreeSet<PortRange>, FactsError> {
    let port = |item: &str| match digits(item) {
        Some(port) if port != 0 => Ok(PortRange::one(port)),
        _ => Err(invalid(key, text, &format!("{item:?} is not a port from 1 to 65535"))),
    };
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(port).collect()
}

/// `10.0.0.0/8, fd00::1`: ranges and addresses separated by commas, at least one.
///
/// # Errors
/// Names the item that is neither.
pub fn parse_ips(key: &str, text: &str) -> Result<BTreeSet<IpNet>, FactsError> {
    let range = |item: &str| {
        let bad = || {
            invalid(
                key,
                text,
                &format!(
                    "{item:?} is neither an IP address nor a CIDR \
                                                  range"
                ),
            )
        };
        parse_range(item.trim()).ok_or_else(bad)
    };
    text.split(',').map(range).collect()
}

/// `[[tcp|udp:]PORTS:]UIDS;...`, where PORTS is `*`, or ports and ranges `a-b` separated by commas,
/// and UIDS a user or a range `a-b`, of 16 bits; the protocol may be `*` or both, separated by a
/// comma, and in capitals; no protocol: both; no ports: all.
///
/// # Errors
/// Names the item that is nothing of the kind.
pub fn parse_uid_exclusions(key: &str, text: &str) -> Result<Vec<UidExclusion>, FactsError> {
    text.split(';').map(|item| parse_uid_exclusion(key, text, item)).collect()
}

fn parse_uid_exclusion(key: &str, text: &str, item: &str) -> Result<UidExclusion, FactsError> {
    let bad = |why: &str| invalid(key, text, &format!("{item:?}: {why}"));
    let fields: Vec<&str> = item.split(':').collect();
    let (protocols, ports, uids) = match fields[..] {
        [uids] => ("*", "*", uids),
        [ports, uids] => ("*", ports, uids),
        [protocols, ports, uids] => (protocols, ports, uids),
        _ => return Err(bad("expected [[tcp|udp:]PORTS:]UIDS")),
    };
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (digits::<u16>(first)?, digits::<u16>(last)?);
        (first <= last).then_some(PortRange { first, last })
    };
    let ports = match ports {
        "" | "*" => [PortRange::ALL].into(),
        ports => ports
            .split(',')
            .map(|part| {
                range(part).ok_or_else(|| {
                    bad(&format!(
                        "{part:?} is neither a port nor a \
                                                                port range"
                    ))
                })
            })
            .collect::<Result<_, _>>()?,
    };
    let users = range(uids).ok_or_else(|| bad("expected a uid or a range of uids, up to 65535"))?;
    Ok(UidExclusion {
        protocol: parse_protocols(protocols)
            .ok_or_else(|| bad("expected the protocol tcp or udp"))?,
        ports,
        first_uid: users.first.into(),
        last_uid: users.last.into(),
    })
}

/// `tcp`, `udp`, or both.
fn parse_protocols(text: &str) -> Option<Protocol> {
    if matches!(text, "" | "*") {
        return Some(Protocol::Both);
    }
    let one = |text: &str| match text.trim().to_ascii_lowercase().as_str() {
        "tcp" => Some(Protocol::Tcp),
        "udp" => Some(Protocol::Udp),
        _ => None,
    };
    let all = text.split(',').map(one).collect::<Option<Vec<_>>>()?;
    let first = *all.first()?;
    Some(if all.iter().all(|other| *other == first) { first } else { Protocol::Both })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f67_ports_of_users() {
        let key = EXCLUDE_OUTBOUND_FOR_UIDS;
        let one = |protocol, ports: &[(u16, u16)], first_uid, last_uid| UidExclusion {
            protocol,
            ports: ports
                .iter()
                .map(|(first, last)| PortRange { first: *first, last: *last })
                .collect(),
            first_uid,
            last_uid,
        };
        let all = [(PortRange::ALL.first, PortRange::ALL.last)];
        let text = "tcp:22,80-90:1000;UDP:53:1000-1001;*:7;8; Tcp ,udp:1:9;::10;tcp,TCP:*:11";
        assert_eq!(
            parse_uid_exclusions(key, text),
            Ok(vec![
                one(Protocol::Tcp, &[(22, 22), (80, 90)], 1000, 1000),
                one(Protocol::Udp, &[(53, 53)], 1000, 1001),
                one(Protocol::Both, &all, 7, 7),
                one(Protocol::Both, &all, 8, 8),
                one(Protocol::Both, &[(1, 1)], 9, 9),
                one(Protocol::Both, &all, 10, 10),
                one(Protocol::Tcp, &all, 11, 11),
            ]),
            "F67"
        );
        for text in [
            "icmp:1:2",
            "tcp:x:2",
            "tcp:1:b",
            "tcp:1:3-2",
            "1:2:3:4",
            ";",
            "1;",
            "1:+2",
            "*",
            "1,2",
            " 7",
            "65536",
            "tcp,:1:2",
            "tcp: 1:2",
        ] {
            assert!(parse_uid_exclusions(key, text).is_err(), "{text}");
        }
    }

    #[test]
    fn ports_and_addresses() {
        let ports = parse_ports("key", " 80 ,, 443,").expect("ports");
        assert_eq!(ports, [80, 443].map(PortRange::one).into());
        assert_eq!(parse_ports("key", " "), Ok(BTreeSet::new()));
        for text in ["0", "80-90", "65536", "x", "+1"] {
            assert!(parse_ports("key", text).is_err(), "{text}");
        }
        assert_eq!(parse_ips("key", " 10.0.0.0/08, fd00::1").expect("ranges").len(), 2);
        for text in ["", "10.0.0.0/8,", "x", "10.0.0.0/33", "010.0.0.1", "fe80::1%eth0"] {
            assert!(parse_ips("key", text).is_err(), "{text}");
        }
    }
}
