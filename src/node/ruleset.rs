//! What a network namespace's own rules do to addresses: the chains of its NAT tables, and what each
//! of their rules leads to. Whose rules these are is not known here.

use std::{collections::BTreeMap, fs, io};

use anyhow::{Context, Result, bail, ensure};

use super::netfilter::{
    self, NFT_MSG_GETCHAIN, NFT_MSG_NEWCHAIN, NFTA_CHAIN_HOOK, NFTA_CHAIN_TYPE, NFTA_HOOK_HOOKNUM,
    TABLES, attributes, number,
};

/// Which packets a chain sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both: nftables' `inet`.
    Both,
}

/// Which of the kernel's two kinds of tables a chain is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// nf_tables: nft, and iptables where it says `nf_tables`.
    Nft,
    /// The older tables of iptables, where it says `legacy`.
    Legacy,
}

/// Where the kernel enters a chain that translates destinations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// For what comes in.
    Prerouting,
    /// For what the namespace's own processes send.
    Output,
}

/// What a rule does with the packets that it matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Goes back to the chain before, or ends a chain of the kernel's.
    Return,
    /// Goes on in the chain of this name.
    Jump(String),
    /// Sends them to this port of the namespace itself.
    Redirect(u16),
    /// Something else, by the kernel's name.
    Other(String),
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The kind of its table.
    pub backend: Backend,
    /// What it sees.
    pub family: Family,
    /// The name of its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Where it is entered to translate destinations, if it is.
    pub hook: Option<Hook>,
    /// What its rules do, in order; those that only count are left out.
    pub rules: Vec<Action>,
}

/// A namespace's chains.
pub type Ruleset = Vec<Chain>;

/// Reads a `nat` table of iptables' older kind, of IPv6 or IPv4: what the kernel answers to
/// `IPT_SO_GET_INFO` and to `IPT_SO_GET_ENTRIES`.
pub type ReadLegacy = fn(v6: bool) -> io::Result<(Vec<u8>, Vec<u8>)>;

/// How often the rules are read if they change meanwhile.
const TRIES: usize = 5;

/// The rules of the calling thread's namespace.
///
/// # Errors
/// If the kernel does not tell, or they keep changing.
pub fn ruleset(read: ReadLegacy) -> Result<Ruleset> {
    if !netfilter::tracks() {
        return Ok(Vec::new());
    }
    let mut all = nft()?;
    for (path, v6) in TABLES.into_iter().zip([false, true]) {
        let tables = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            read => read.with_context(|| format!("cannot read {path}"))?,
        };
        if tables.lines().any(|table| table == "nat") {
            let read = read(v6).and_then(|(info, entries)| {
                legacy(&info, &entries, v6).map_err(|error| io::Error::other(format!("{error:#}")))
            });
            all.extend(read.context("cannot read iptables' table nat (legacy)")?);
        }
    }
    Ok(all)
}

// From linux/netfilter/nf_tables.h.
const NFT_MSG_NEWRULE: u16 = (10 << 8) | 6;
const NFT_MSG_GETRULE: u16 = (10 << 8) | 7;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NFTA_REDIR_REG_PROTO_MIN: u16 = 1;
const NFTA_TARGET_NAME: u16 = 1;
const NFTA_TARGET_INFO: u16 = 3;
const NFTA_LOOKUP_DREG: u16 = 3;
const NFT_REG_VERDICT: u32 = 0;
const NFT_CONTINUE: i32 = -1;
const NFT_JUMP: i32 = -3;
const NFT_GOTO: i32 = -4;
const NFT_RETURN: i32 = -5;
/// Expressions that only match or count.
const CONDITIONS: [&str; 13] = [
    "bitwise",
    "byteorder",
    "cmp",
    "counter",
    "ct",
    "fib",
    "limit",
    "log",
    "match",
    "meta",
    "payload",
    "range",
    "rt",
];

fn nft() -> Result<Ruleset> {
    for _ in 0..TRIES {
        let Some(chains) = netfilter::dump(NFT_MSG_GETCHAIN)? else { continue };
        let mut all: Ruleset = chains
            .iter()
            .filter(|one| one.kind == NFT_MSG_NEWCHAIN)
            .filter_map(|one| chain(one.family, &one.payload))
            .collect();
        if all.is_empty() {
            return Ok(all);
        }
        let Some(rules) = netfilter::dump(NFT_MSG_GETRULE)? else { continue };
        if rules
            .iter()
            .filter(|one| one.kind == NFT_MSG_NEWRULE)
            .all(|one| add_rule(&mut all, one.family, &one.payload))
        {
            return Ok(all);
        }
    }
    bail!("the rules of nftables change all the time")
}

/// The families in which translation is looked at; others have no sockets of pods.
fn family_of(number: u8) -> Option<Family> {
    match i32::from(number) {
        1 => Some(Family::Both), // NFPROTO_INET
        libc::AF_INET => Some(Family::V4),
        libc::AF_INET6 => Some(Family::V6),
        _ => None,
    }
}

fn text(value: Option<&Vec<u8>>) -> Option<String> {
    Some(String::from_utf8_lossy(value?.strip_suffix(&[0])?).into_owned())
}

fn chain(family: u8, payload: &[u8]) -> Option<Chain> {
    let chain = attributes(payload);
    let hook = chain.get(&NFTA_CHAIN_HOOK).map(|hook| attributes(hook)).unwrap_or_default();
    let is_nat = text(chain.get(&NFTA_CHAIN_TYPE)).as_deref() == Some("nat");
    let hook = match number(hook.get(&NFTA_HOOK_HOOKNUM)).filter(|_| is_nat) {
        Some(netfilter::NF_INET_PRE_ROUTING) => Some(Hook::Prerouting),
        Some(netfilter::NF_INET_LOCAL_OUT) => Some(Hook::Output),
        _ => None,
    };
    Some(Chain {
        backend: Backend::Nft,
        family: family_of(family)?,
        table: text(chain.get(&NFTA_CHAIN_TABLE))?,
        name: text(chain.get(&NFTA_CHAIN_NAME))?,
        hook,
        rules: Vec::new(),
    })
}

/// Adds a rule to its chain. False: it is of a chain that was not there a moment ago.
fn add_rule(all: &mut Ruleset, family: u8, payload: &[u8]) -> bool {
    let Some(family) = family_of(family) else { return true };
    let rule = attributes(payload);
    let (table, name) = (text(rule.get(&NFTA_RULE_TABLE)), text(rule.get(&NFTA_RULE_CHAIN)));
    let chain = all.iter_mut().find(|chain| {
        chain.family == family
            && Some(&chain.table) == table.as_ref()
            && Some(&chain.name) == name.as_ref()
    });
    let Some(chain) = chain else { return false };
    let expressions = rule.get(&NFTA_RULE_EXPRESSIONS).map(Vec::as_slice).unwrap_or_default();
    chain.rules.extend(action(expressions));
    true
}

/// What a rule does, by its expressions: the first that does more than match or count.
fn action(expressions: &[u8]) -> Option<Action> {
    let mut registers: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for (_, element) in netfilter::list(expressions) {
        let element = attributes(&element);
        let name = text(element.get(&NFTA_EXPR_NAME)).unwrap_or_default();
        let data = element.get(&NFTA_EXPR_DATA).map(|data| attributes(data)).unwrap_or_default();
        match name.as_str() {
            "immediate" => {
                let register = number(data.get(&NFTA_IMMEDIATE_DREG)).unwrap_or(NFT_REG_VERDICT);
                let value = data.get(&NFTA_IMMEDIATE_DATA).map(|data| attributes(data));
                let value = value.unwrap_or_default();
                if register != NFT_REG_VERDICT {
                    registers.insert(register, value.get(&NFTA_DATA_VALUE).cloned()?);
                    continue;
                }
                let verdict = value.get(&NFTA_DATA_VERDICT).map(|data| attributes(data));
                let verdict = verdict.unwrap_or_default();
                let code =
                    number(verdict.get(&NFTA_VERDICT_CODE)).unwrap_or_default().cast_signed();
                match (code, text(verdict.get(&NFTA_VERDICT_CHAIN))) {
                    (NFT_CONTINUE, _) => {}
                    (NFT_RETURN, _) => return Some(Action::Return),
                    (NFT_JUMP | NFT_GOTO, Some(chain)) => return Some(Action::Jump(chain)),
                    (0, _) => return Some(Action::Other("drop".into())),
                    (1, _) => return Some(Action::Other("accept".into())),
                    (code, _) => return Some(Action::Other(format!("verdict {code}"))),
                }
            }
            "redir" => {
                let register = number(data.get(&NFTA_REDIR_REG_PROTO_MIN));
                let port = register.and_then(|register| registers.get(&register));
                let port = port.and_then(|port| port.first_chunk::<2>());
                return Some(port.map_or_else(
                    || Action::Other(name.clone()),
                    |port| Action::Redirect(u16::from_be_bytes(*port)),
                ));
            }
            "target" => {
                let target = text(data.get(&NFTA_TARGET_NAME)).unwrap_or_default();
                let info = data.get(&NFTA_TARGET_INFO).map(Vec::as_slice).unwrap_or_default();
                return Some(target_of(&target, info));
            }
            "lookup" if !data.contains_key(&NFTA_LOOKUP_DREG) => {}
            name if CONDITIONS.contains(&name) => {}
            _ => return Some(Action::Other(name)),
        }
    }
    None
}

/// The lengths of `struct nf_nat_ipv4_multi_range_compat` and `struct nf_nat_range`; the first port
/// of either is four bytes before the end.
const RANGES: [usize; 2] = [20, 40];
/// `NF_NAT_RANGE_PROTO_SPECIFIED`
const WITH_PORT: u32 = 2;

/// A target of iptables with its data.
fn target_of(name: &str, info: &[u8]) -> Action {
    let range =
        RANGES.iter().find(|len| info.len() == len.next_multiple_of(8) || info.len() == **len);
    let port = range.filter(|_| name == "REDIRECT").and_then(|len| {
        let at = if *len == RANGES[0] { 4 } else { 0 };
        let flags = u32::from_ne_bytes(*info.get(at..)?.first_chunk()?);
        let port = u16::from_be_bytes(*info.get(len - 4..)?.first_chunk()?);
        (flags & WITH_PORT != 0).then_some(port)
    });
    port.map_or_else(|| Action::Other(name.to_owned()), Action::Redirect)
}

// From linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h and netfilter/x_tables.h.
/// Where `hook_entry` and `num_entries` are in `struct ipt_getinfo`, and its length.
const INFO_HOOKS: usize = 36;
const INFO_LEN: usize = 84;
/// The length of `struct ipt_get_entries` without the entries.
const ENTRIES: usize = 40;
/// The lengths of `struct ipt_entry` and `struct ip6t_entry`, and of their `target_offset`'s place.
const ENTRY: [(usize, usize); 2] = [(112, 88), (168, 140)];
/// The length of `struct xt_entry_target`.
const TARGET: usize = 32;
/// `XT_RETURN`
const XT_RETURN: i32 = -5;

/// The chains of a table of iptables' older kind. Entries lie one after another: the kernel's own
/// chains, each of which ends with its policy, then the others, each behind an entry that has its
/// name.
fn legacy(info: &[u8], entries: &[u8], v6: bool) -> Result<Ruleset> {
    ensure!(info.len() >= INFO_LEN && entries.len() >= ENTRIES, "the kernel's answer is too short");
    let entries = &entries[ENTRIES..];
    let u16_at = |bytes: &[u8], at: usize| -> Option<u16> {
        Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
    };
    let u32_at = |bytes: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
    };
    let family = if v6 { Family::V6 } else { Family::V4 };
    let (len, target_offset) = ENTRY[usize::from(v6)];
    let hooks = [("PREROUTING", 0, Some(Hook::Prerouting)), ("INPUT", 1, None)];
    let hooks =
        hooks.into_iter().chain([("OUTPUT", 3, Some(Hook::Output)), ("POSTROUTING", 4, None)]);
    let starts: BTreeMap<usize, (&str, Option<Hook>)> = hooks
        .filter_map(|(name, n, hook)| {
            Some((u32_at(info, INFO_HOOKS + 4 * n)? as usize, (name, hook)))
        })
        .collect();
    let fresh = |name: &str, hook| Chain {
        backend: Backend::Legacy,
        family,
        table: "nat".into(),
        name: name.into(),
        hook,
        rules: Vec::new(),
    };
    let mut all: Vec<(usize, Chain)> = Vec::new();
    // The rules' jumps lead to places; the last rule of a chain is its policy.
    let mut jumps: Vec<(usize, usize, usize)> = Vec::new();
    let mut at = 0;
    while at < entries.len() {
        let entry = &entries[at..];
        let next = u16_at(entry, target_offset + 2).map(usize::from);
        let next = next.filter(|next| *next >= len + TARGET && *next <= entry.len());
        let next = next.context("an entry is cut")?;
        let target =
            u16_at(entry, target_offset).map(usize::from).and_then(|at| entry.get(at..next));
        let target = target.filter(|target| target.len() >= TARGET).context("a target is cut")?;
        let cut = |bytes: &[u8]| {
            let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        };
        let (name, data) = (cut(&target[2..TARGET - 1]), &target[TARGET..]);
        if let Some((chain, hook)) = starts.get(&at) {
            all.push((at, fresh(chain, *hook)));
        }
        if name == "ERROR" {
            // The head of a chain, or the table's end.
            all.push((at + next, fresh(&cut(data), None)));
        } else {
            let (_, chain) = all.last_mut().context("a rule without a chain")?;
            if name.is_empty() {
                let verdict = u32_at(data, 0).context("a verdict is cut")?.cast_signed();
                match usize::try_from(verdict) {
                    Ok(to) if to == at + next => {}
                    Ok(to) => {
                        chain.rules.push(Action::Jump(String::new()));
                        jumps.push((all.len() - 1, all[all.len() - 1].1.rules.len() - 1, to));
                    }
                    Err(_) if verdict == XT_RETURN => chain.rules.push(Action::Return),
                    Err(_) if verdict == -2 => chain.rules.push(Action::Other("accept".into())),
                    Err(_) => chain.rules.push(Action::Other(format!("verdict {verdict}"))),
                }
            } else {
                chain.rules.push(target_of(&name, data));
            }
        }
        at += next;
    }
    let names: BTreeMap<usize, String> =
        all.iter().map(|(at, chain)| (*at, chain.name.clone())).collect();
    for (chain, rule, to) in jumps {
        let name = names.get(&to).context("a jump leads to no chain")?;
        all[chain].1.rules[rule] = Action::Jump(name.clone());
    }
    for (_, chain) in &mut all {
        // The policy, or the return at the end.
        chain.rules.pop();
    }
    all.retain(|(at, _)| *at < entries.len());
    Ok(all.into_iter().map(|(_, chain)| chain).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of a legacy table of IPv4 with this target.
    fn entry(name: &str, data: &[u8]) -> Vec<u8> {
        let (len, at) = ENTRY[0];
        let mut bytes = vec![0; len + TARGET];
        bytes[at..at + 2].copy_from_slice(&(len as u16).to_ne_bytes());
        bytes[len + 2..len + 2 + name.len()].copy_from_slice(name.as_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let next = bytes.len() as u16;
        bytes[at + 2..at + 4].copy_from_slice(&next.to_ne_bytes());
        bytes
    }

    fn verdict(verdict: i32) -> Vec<u8> {
        entry("", &verdict.to_ne_bytes())
    }

    fn redirect(port: u16) -> Vec<u8> {
        let mut range = vec![0; RANGES[0]];
        range[4..8].copy_from_slice(&WITH_PORT.to_ne_bytes());
        range[16..18].copy_from_slice(&port.to_be_bytes());
        entry("REDIRECT", &range)
    }

    fn head(name: &str) -> Vec<u8> {
        let mut text = name.as_bytes().to_vec();
        text.resize(32, 0);
        entry("ERROR", &text)
    }

    /// A table: OUTPUT jumps to a chain of the mesh's, which returns or redirects.
    fn table() -> (Vec<u8>, Vec<u8>) {
        let accept = || verdict(-2);
        let plain = accept().len();
        let chain = 5 * plain + head("X").len();
        let jump = i32::try_from(chain).expect("small");
        let parts = [
            accept(), // PREROUTING
            accept(), // INPUT
            verdict(jump),
            accept(), // OUTPUT's policy
            accept(), // POSTROUTING
            head("ISTIO_OUTPUT"),
            verdict(XT_RETURN),
            redirect(15001),
            entry("DNAT", &[0; 20]),
            verdict(XT_RETURN),
            head("ERROR"),
        ];
        let mut info = vec![0; INFO_LEN];
        for (hook, at) in [(0, 0), (1, plain), (3, 2 * plain), (4, 4 * plain)] {
            let at = u32::try_from(at).expect("small");
            info[INFO_HOOKS + 4 * hook..][..4].copy_from_slice(&at.to_ne_bytes());
        }
        (info, [vec![0; ENTRIES], parts.concat()].concat())
    }

    #[test]
    fn a_legacy_table_is_read_chain_by_chain() {
        let (info, entries) = table();
        let all = legacy(&info, &entries, false).expect("read");
        let rules = |name: &str| {
            let chain = all.iter().find(|chain| chain.name == name).expect("the chain");
            (chain.hook, chain.rules.clone())
        };
        assert_eq!(all.len(), 5);
        assert_eq!(rules("PREROUTING"), (Some(Hook::Prerouting), vec![]));
        let jump = Action::Jump("ISTIO_OUTPUT".into());
        assert_eq!(rules("OUTPUT"), (Some(Hook::Output), vec![jump]));
        let does = vec![Action::Return, Action::Redirect(15001), Action::Other("DNAT".into())];
        assert_eq!(rules("ISTIO_OUTPUT"), (None, does));
    }

    /// What is cut, or lies, ends in an error or in something, but ends.
    #[test]
    fn a_legacy_table_that_makes_no_sense_comes_to_an_end() {
        let (info, entries) = table();
        assert!(legacy(&info[..INFO_LEN - 1], &entries, false).is_err());
        for end in 0..entries.len() {
            let _ = legacy(&info, &entries[..end], false);
            let _ = legacy(&info, &entries[..end], true);
        }
        for at in 0..entries.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = entries.clone();
                bytes[at] = value;
                let _ = legacy(&info, &bytes, false);
            }
        }
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn expression(name: &str, data: &[u8]) -> Vec<u8> {
        let name = attribute(NFTA_EXPR_NAME, &[name.as_bytes(), b"\0"].concat());
        attribute(1, &[name, attribute(NFTA_EXPR_DATA, data)].concat())
    }

    #[test]
    fn what_a_rule_of_nftables_does() {
        let number = |kind, value: u32| attribute(kind, &value.to_be_bytes());
        let judge = |code: i32, chain: &[u8]| {
            let code = number(NFTA_VERDICT_CODE, code.cast_unsigned());
            let verdict = [code, attribute(NFTA_VERDICT_CHAIN, chain)].concat();
            let data = attribute(NFTA_IMMEDIATE_DATA, &attribute(NFTA_DATA_VERDICT, &verdict));
            expression("immediate", &[number(NFTA_IMMEDIATE_DREG, 0), data].concat())
        };
        let port = attribute(NFTA_DATA_VALUE, &15001u16.to_be_bytes());
        let load = [number(NFTA_IMMEDIATE_DREG, 9), attribute(NFTA_IMMEDIATE_DATA, &port)].concat();
        let load = expression("immediate", &load);
        let redirect = expression("redir", &number(NFTA_REDIR_REG_PROTO_MIN, 9));
        let counter = expression("counter", &[]);
        let vmap = expression("lookup", &number(NFTA_LOOKUP_DREG, 0));
        for (rule, does) in [
            (counter.clone(), None),
            ([counter.clone(), judge(NFT_RETURN, b"\0")].concat(), Some(Action::Return)),
            (judge(NFT_JUMP, b"x\0"), Some(Action::Jump("x".into()))),
            (judge(1, b"\0"), Some(Action::Other("accept".into()))),
            ([counter, load, redirect.clone()].concat(), Some(Action::Redirect(15001))),
            (redirect, Some(Action::Other("redir".into()))),
            (vmap, Some(Action::Other("lookup".into()))),
            (expression("nat", &[]), Some(Action::Other("nat".into()))),
        ] {
            assert_eq!(action(&rule), does, "{rule:x?}");
            for end in 0..rule.len() {
                let _ = action(&rule[..end]);
            }
        }
    }
}
