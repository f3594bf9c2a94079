//! How a pod of a mesh is treated, by the mesh's own rules that its network namespace has, by its
//! annotation, and by the node's setting. Pure.

use std::{collections::BTreeSet, fmt};

use clap::ValueEnum;
use k8s_openapi::api::core::v1::Pod;

use super::{
    MESHES, Mesh,
    annotations::{FactsError, annotation, invalid},
    facts::PodFacts,
    policy::{Ports, Ranges},
};
use crate::node::ruleset::{Action, Backend, Chain, Family, Hook, Ruleset};

/// `sidestep.io/mode`: `off`, `instead` or `beside`. A pod's annotation, a namespace's label.
pub const MODE: &str = "sidestep.io/mode";

/// How a pod of a mesh is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is left alone.
    Off,
    /// Sidestep decides everything: the pod has no rules of the mesh's.
    Instead,
    /// Sidestep takes connections over in connect(); what it does not take, the mesh's own rules do.
    Beside,
}

impl Mode {
    /// The name in the annotation and in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Instead => "instead",
            Self::Beside => "beside",
        }
    }
}

/// The mode of pods that have the mesh's own rules and do not name one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum PodsWithRules {
    /// Left alone.
    #[default]
    Off,
    /// Outbound connections are taken over in connect(); the rules stay, and do the rest.
    Beside,
}

/// The mode that the pod asks for.
///
/// # Errors
/// If the annotation cannot be read: the pod is treated as if it had none.
pub fn asked(pod: &Pod) -> Result<Option<Mode>, FactsError> {
    let Some(text) = annotation(pod, MODE) else { return Ok(None) };
    let modes = [Mode::Off, Mode::Instead, Mode::Beside];
    let mode = modes.into_iter().find(|mode| mode.name() == text);
    let bad = || invalid(MODE, text, "expected off, instead or beside");
    mode.map(Some).ok_or_else(bad)
}

/// The families whose connections a mesh's own rules redirect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

/// What the rules in a pod's namespace are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// None of a mesh's.
    None,
    /// Those of the pod's own mesh, whole.
    Whole(Families),
    /// It cannot be told, and why.
    Unclear(String),
}

/// The mesh whose chain this is, by its name.
fn mesh_of(chain: &Chain) -> Option<&'static Mesh> {
    let is_of = |mesh: &&Mesh| mesh.chains.iter().any(|begin| chain.name.starts_with(begin));
    MESHES.iter().copied().find(is_of)
}

/// The name of a chain for people.
struct Named<'a>(&'a Chain);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.0.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
            Family::Both => "inet",
        };
        write!(f, "chain {} of table {} ({family})", self.0.name, self.0.table)
    }
}

/// What the rules of a pod's namespace are. Whole are rules that lead from where the kernel enters
/// them to the ports of this pod's sidecar, and nowhere else.
pub fn found(facts: &PodFacts, rules: &Result<Ruleset, String>) -> Found {
    let all = match rules {
        Ok(all) => all,
        Err(error) => return Found::Unclear(format!("its rules cannot be read: {error}")),
    };
    let own: Vec<&Chain> = all.iter().filter(|chain| mesh_of(chain).is_some()).collect();
    let meshes: BTreeSet<&str> =
        own.iter().filter_map(|chain| mesh_of(chain)).map(|mesh| mesh.name).collect();
    if meshes.is_empty() {
        return Found::None;
    }
    if meshes.len() > 1 {
        let names = Vec::from_iter(meshes).join(" and ");
        return Found::Unclear(format!("it has rules of {names} at once"));
    }
    if !meshes.contains(facts.mesh.name) {
        let name = meshes.first().copied().unwrap_or_default();
        return Found::Unclear(format!(
            "its rules are {name}'s, its sidecar is {}'s",
            facts.mesh.name
        ));
    }
    let backends: BTreeSet<Backend> = own.iter().map(|chain| chain.backend).collect();
    if backends.len() > 1 {
        let text = "it has the mesh's rules twice, in nf_tables and in iptables' legacy tables";
        return Found::Unclear(text.into());
    }
    let mut families = Families::default();
    for (family, of, name) in
        [(Family::V4, &mut families.v4, "IPv4"), (Family::V6, &mut families.v6, "IPv6")]
    {
        let sees = |chain: &&Chain| chain.family == family || chain.family == Family::Both;
        if own.iter().copied().any(|chain| sees(&chain)) {
            let chains: Vec<&Chain> = all.iter().filter(sees).collect();
            match whole(facts, &chains) {
                Ok(()) => *of = true,
                Err(why) => return Found::Unclear(format!("{name}: {why}")),
            }
        }
    }
    Found::Whole(families)
}

/// Whether the chains of one family are the mesh's alone, and whole.
fn whole(facts: &PodFacts, chains: &[&Chain]) -> Result<(), String> {
    let mesh = facts.mesh;
    let policy = &facts.policy;
    let none = |ports: &Ports| matches!(ports, Ports::Only(ports) if ports.is_empty());
    let outbound_none = matches!(&policy.include_outbound_ranges, Ranges::Only(all) if all.is_empty())
        && policy.include_outbound_ports.is_empty();
    let ports = [Some(facts.outbound_port), Some(facts.inbound_port), facts.dns_port];
    for (hook, port, what, is_needed) in [
        (Hook::Output, facts.outbound_port, "outbound", !outbound_none),
        (Hook::Prerouting, facts.inbound_port, "inbound", !none(&policy.include_inbound_ports)),
    ] {
        let mut to_see: Vec<&Chain> =
            chains.iter().copied().filter(|chain| chain.hook == Some(hook)).collect();
        let mut seen: Vec<&Chain> = Vec::new();
        let mut leads = BTreeSet::new();
        while let Some(chain) = to_see.pop() {
            if seen.contains(&chain) {
                continue;
            }
            seen.push(chain);
            for rule in &chain.rules {
                let foreign = |does: &str| {
                    Err(format!("{} has a rule that is not {}'s: {does}", Named(chain), mesh.name))
                };
                match rule {
                    // Kuma has rules of this kind in front of its own chains.
                    Action::Return if chain.hook.is_some() && !mesh.rules_in_hooks => {
                        return foreign("it returns");
                    }
                    Action::Return => {}
                    Action::Redirect(to) if ports.contains(&Some(*to)) => {
                        leads.insert(*to);
                    }
                    Action::Redirect(to) => return foreign(&format!("it redirects to port {to}")),
                    Action::Jump(name) => {
                        let next = chains.iter().copied().find(|next| {
                            (next.backend, &next.table, &next.name)
                                == (chain.backend, &chain.table, name)
                        });
                        match next {
                            Some(next) if mesh_of(next) == Some(mesh) => to_see.push(next),
                            _ => return foreign(&format!("it jumps to {name}")),
                        }
                    }
                    Action::Other(does) => return foreign(does),
                }
            }
        }
        if is_needed && !leads.contains(&port) {
            return Err(format!(
                "{}'s rules are there in part: none leads {what} connections to port {port}",
                mesh.name
            ));
        }
    }
    Ok(())
}

/// What becomes of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Its mode.
    pub mode: Mode,
    /// The families that its rules redirect, beside them.
    pub families: Families,
    /// What the pod is told about it.
    pub told: Option<String>,
}

/// The mode of a pod.
pub fn choose(facts: &PodFacts, found: &Found, default: PodsWithRules) -> Choice {
    let by_default = match default {
        PodsWithRules::Off => Mode::Off,
        PodsWithRules::Beside => Mode::Beside,
    };
    let choice = |mode, told| Choice { mode, families: Families::default(), told };
    let asks = |mode: Mode| format!("{MODE}: {:?} is not possible", mode.name());
    if facts.asked == Some(Mode::Off) {
        return choice(Mode::Off, None);
    }
    match found {
        Found::Unclear(why) => {
            choice(Mode::Off, Some(format!("Sidestep leaves the pod to its own rules: {why}")))
        }
        // They are about to be installed.
        Found::None if facts.brings_rules => {
            let init = facts.mesh.init_container;
            let told = facts.asked.filter(|asked| *asked == Mode::Instead).map(|asked| {
                format!("{}: its init container {init} installs the mesh's rules", asks(asked))
            });
            choice(Mode::Off, told)
        }
        Found::None => {
            let told = facts.asked.filter(|asked| *asked == Mode::Beside).map(|asked| {
                let has = "its network namespace has no rules of the mesh";
                format!("{}: {has}, so Sidestep decides everything (instead)", asks(asked))
            });
            choice(Mode::Instead, told)
        }
        Found::Whole(families) => {
            let mode = facts.asked.filter(|asked| *asked == Mode::Beside).unwrap_or(by_default);
            let told = facts.asked.filter(|asked| *asked == Mode::Instead).map(|asked| {
                let has = "its network namespace has the mesh's own rules";
                format!("{}: {has}, so its mode is {:?}", asks(asked), mode.name())
            });
            if mode == Mode::Beside && facts.is_policy_unread {
                let text =
                    "Sidestep leaves the pod to its own rules until its settings can be read";
                return choice(Mode::Off, Some(text.into()));
            }
            Choice { families: *families, ..choice(mode, told) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{ISTIO, KUMA, LINKERD, desired::tests::candidate};

    fn facts(mesh: &'static Mesh) -> PodFacts {
        let mut facts = (*candidate("ns/a", 7, "10.0.0.7").facts).clone();
        facts.mesh = mesh;
        if mesh == &LINKERD {
            (facts.outbound_port, facts.inbound_port) = (4140, 4143);
        }
        facts
    }

    fn chain(name: &str, hook: Option<Hook>, rules: &[Action]) -> Chain {
        let (backend, family, table) = (Backend::Nft, Family::V4, "nat".into());
        Chain { backend, family, table, name: name.into(), hook, rules: rules.to_vec() }
    }

    fn jump(to: &str) -> Action {
        Action::Jump(to.into())
    }

    fn istio() -> Ruleset {
        vec![
            chain("PREROUTING", Some(Hook::Prerouting), &[jump("ISTIO_INBOUND")]),
            chain("OUTPUT", Some(Hook::Output), &[jump("ISTIO_OUTPUT")]),
            chain("ISTIO_INBOUND", None, &[Action::Return, jump("ISTIO_IN_REDIRECT")]),
            chain("ISTIO_IN_REDIRECT", None, &[Action::Redirect(15006)]),
            chain("ISTIO_OUTPUT", None, &[jump("ISTIO_IN_REDIRECT"), jump("ISTIO_REDIRECT")]),
            chain("ISTIO_REDIRECT", None, &[Action::Redirect(15001)]),
        ]
    }

    fn linkerd() -> Ruleset {
        vec![
            chain("PREROUTING", Some(Hook::Prerouting), &[jump("PROXY_INIT_REDIRECT")]),
            chain("OUTPUT", Some(Hook::Output), &[jump("PROXY_INIT_OUTPUT")]),
            chain("PROXY_INIT_REDIRECT", None, &[Action::Redirect(4143)]),
            chain("PROXY_INIT_OUTPUT", None, &[Action::Return, Action::Redirect(4140)]),
        ]
    }

    fn kuma() -> Ruleset {
        vec![
            chain("PREROUTING", Some(Hook::Prerouting), &[jump("KUMA_MESH_INBOUND")]),
            chain("OUTPUT", Some(Hook::Output), &[Action::Return, jump("KUMA_MESH_OUTBOUND")]),
            chain("KUMA_MESH_INBOUND", None, &[Action::Redirect(15006)]),
            chain("KUMA_MESH_OUTBOUND", None, &[Action::Redirect(15001)]),
        ]
    }

    #[test]
    fn each_meshs_rules_are_known() {
        let v4 = Found::Whole(Families { v4: true, v6: false });
        for (mesh, rules) in [(&ISTIO, istio()), (&LINKERD, linkerd()), (&KUMA, kuma())] {
            assert_eq!(found(&facts(mesh), &Ok(rules.clone())), v4, "{}", mesh.name);
            let both = rules.iter().cloned().map(|one| Chain { family: Family::Both, ..one });
            let both = found(&facts(mesh), &Ok(both.collect()));
            assert_eq!(both, Found::Whole(Families { v4: true, v6: true }));
        }
        assert_eq!(found(&facts(&ISTIO), &Ok(vec![])), Found::None);
        // Rules of the pod's own that no mesh has to do with.
        let own = vec![chain("OUTPUT", Some(Hook::Output), &[Action::Other("DNAT".into())])];
        assert_eq!(found(&facts(&ISTIO), &Ok(own)), Found::None);
    }

    /// Each is left alone, with a text that says why.
    #[test]
    fn what_cannot_be_told_is_unclear() {
        let istio_with = |change: &dyn Fn(&mut Ruleset)| {
            let mut rules = istio();
            change(&mut rules);
            rules
        };
        let two: Ruleset = istio().into_iter().chain(linkerd()).collect();
        let legacy = istio().into_iter().map(|one| Chain { backend: Backend::Legacy, ..one });
        let twice: Ruleset = istio().into_iter().chain(legacy).collect();
        let dnat = Action::Other("DNAT".into());
        let v6 = chain("ISTIO_OUTPUT", None, &[]);
        for (rules, why) in [
            (two, "rules of istio and linkerd at once"),
            (linkerd(), "its rules are linkerd's, its sidecar is istio's"),
            (twice, "twice"),
            (
                istio_with(&|all| all[0].rules.clear()),
                "none leads inbound connections to port 15006",
            ),
            (
                istio_with(&|all| all[1].rules.clear()),
                "none leads outbound connections to port 15001",
            ),
            (istio_with(&|all| all[5].rules.clear()), "none leads outbound"),
            (istio_with(&|all| drop(all.drain(..2))), "there in part"),
            (istio_with(&|all| all[1].rules.insert(0, dnat.clone())), "chain OUTPUT of table nat"),
            (istio_with(&|all| all[4].rules.push(dnat.clone())), "ISTIO_OUTPUT"),
            (istio_with(&|all| all[1].rules.insert(0, Action::Return)), "it returns"),
            (istio_with(&|all| all[5].rules = vec![Action::Redirect(15101)]), "to port 15101"),
            (istio_with(&|all| all[1].rules.insert(0, jump("DOCKER"))), "jumps to DOCKER"),
            (istio_with(&|all| all.push(Chain { family: Family::V6, ..v6.clone() })), "IPv6: "),
        ] {
            let Found::Unclear(text) = found(&facts(&ISTIO), &Ok(rules)) else { panic!("{why}") };
            assert!(text.contains(why), "{why}: {text}");
        }
        let unread = found(&facts(&ISTIO), &Err("EPERM".into()));
        assert_eq!(unread, Found::Unclear("its rules cannot be read: EPERM".into()));
    }

    #[test]
    fn a_direction_that_is_not_captured_needs_no_rules() {
        let mut outbound = facts(&ISTIO);
        outbound.policy.include_inbound_ports = Ports::Only([].into());
        let rules: Ruleset = istio().into_iter().skip(1).collect();
        assert!(matches!(found(&outbound, &Ok(rules)), Found::Whole(_)));
    }

    #[test]
    fn rules_annotation_and_setting_choose_the_mode() {
        let whole = Found::Whole(Families { v4: true, v6: true });
        let unclear = Found::Unclear("why".into());
        let (off, beside) = (PodsWithRules::Off, PodsWithRules::Beside);
        for (asked, brings, found, default, mode, told) in [
            (None, false, &Found::None, beside, Mode::Instead, false),
            (None, false, &whole, off, Mode::Off, false),
            (None, false, &whole, beside, Mode::Beside, false),
            (None, false, &unclear, beside, Mode::Off, true),
            (None, true, &Found::None, beside, Mode::Off, false),
            (None, true, &whole, beside, Mode::Beside, false),
            (Some(Mode::Off), false, &Found::None, beside, Mode::Off, false),
            (Some(Mode::Off), false, &unclear, beside, Mode::Off, false),
            (Some(Mode::Beside), false, &whole, off, Mode::Beside, false),
            (Some(Mode::Beside), false, &Found::None, off, Mode::Instead, true),
            (Some(Mode::Instead), false, &Found::None, beside, Mode::Instead, false),
            (Some(Mode::Instead), false, &whole, off, Mode::Off, true),
            (Some(Mode::Instead), false, &whole, beside, Mode::Beside, true),
            (Some(Mode::Instead), true, &Found::None, off, Mode::Off, true),
        ] {
            let facts = PodFacts { asked, brings_rules: brings, ..facts(&ISTIO) };
            let choice = choose(&facts, found, default);
            let what = format!("{asked:?} {brings} {found:?} {default:?}");
            assert_eq!((choice.mode, choice.told.is_some()), (mode, told), "{what}");
        }
        let unread = PodFacts { is_policy_unread: true, ..facts(&ISTIO) };
        assert_eq!(choose(&unread, &whole, beside).mode, Mode::Off);
        assert_eq!(choose(&unread, &Found::None, beside).mode, Mode::Instead, "it is captured");
    }
}
