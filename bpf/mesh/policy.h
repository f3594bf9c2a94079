/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The decision of a mesh's rules about outgoing connections, and nothing else: no context, no side
 * effects. The tests are in the order of the mesh's own iptables rules.
 */
#pragma once

#include "lib/reason.h"
#include "mesh/rules.h"

/* Users of a pod with excluded ports of their own. Value: their class, from 1. */
struct uid_rule_key {
	__u32 prefixlen; /* 64 (the cookie) + 32 for one user, less for an aligned range */
	__u32 netns[2];
	__u32 uid; /* network byte order */
};
_Static_assert(sizeof(struct uid_rule_key) == 16, "uid_rule_key");

/*
 * Users with excluded ports of their own. Agent writes; policy reads. A range takes at most 62
 * entries.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 16);
	__type(key, struct uid_rule_key);
	__type(value, __u32);
} uid_rules SEC(".maps");

__noinline __u32 uid_class_listed(__u64 netns, __u32 uid)
{
	struct uid_rule_key key = {
		.prefixlen = 8 * (sizeof(key.netns) + sizeof(key.uid)),
		.netns = { (__u32)netns, (__u32)(netns >> 32) },
		.uid = bpf_htonl(uid),
	};
	__u32 *class = bpf_map_lookup_elem(&uid_rules, &key);

	return class ? *class : 0;
}

/* The class of users with excluded ports that this one belongs to; 0: none. */
static __always_inline __u32 uid_class(const struct pod *pod, __u64 netns, __u32 uid)
{
	if (!(pod->sets & (1U << OUT_EXCLUDE_TCP_UIDS | 1U << OUT_EXCLUDE_UDP_UIDS)))
		return 0;
	return uid_class_listed(netns, uid);
}

#define DNS_PORT 53

/* A connection or a datagram before any rewrite. */
struct outbound {
	__u64 netns;
	struct addr src; /* what the socket is bound to; any: not bound */
	struct addr dst;
	__u16 dport;
	__u16 pad; /* the verifier wants all of it written */
	struct owner owner;
	__u32 ifindex; /* the device that the socket is bound to; 0: none */
};

static __always_inline bool is_dns(const struct pod *pod, const struct outbound *c)
{
	return pod->dns_port && c->dport == DNS_PORT;
}

/* May the proxy's connection over lo go to its own inbound listener? (T5, T6, T10) */
static __always_inline struct decision self_decision(const struct pod *pod,
						     const struct outbound *c)
{
	if (!(pod->flags & POD_SELF_INBOUND) || addr_is_localhost(&c->dst) ||
	    c->dport == pod->hbone_port)
		return decide(GO_DIRECT, REASON_PROXY_TO_POD);
	return decide(GO_INBOUND, REASON_PROXY_TO_POD);
}

/* Does it stay within the pod, on lo? */
static __always_inline bool within_pod(const struct outbound *c)
{
	return c->ifindex == LOOPBACK_IFINDEX || pod_owns(c->netns, &c->dst);
}

/*
 * A pod without an address of a family has no route of it either. The kernel refuses such a call
 * before any iptables rule applies, and happy eyeballs rely on it; capturing the call would make
 * every address of that family seem reachable.
 */
static __always_inline bool leads_nowhere(const struct pod *pod, const struct outbound *c,
					  bool within)
{
	const struct addr *own = addr_is4(&c->dst) ? &pod->ip4 : &pod->ip6;

	if (within)
		return false;
	return addr_is_any(own) || (addr_is_link6(own) && !addr_is_link6(&c->dst));
}

/*
 * Does the kernel refuse it before any iptables rule, because IPv4's loopback cannot leave the pod?
 */
static __always_inline bool is_martian(const struct pod *pod, const struct outbound *c, bool within)
{
	return !within && addr_is4(&c->src) && addr_is_loopback(&c->src) &&
	       !(pod->flags & POD_ROUTE_LOCALNET);
}

/* Does it leave by an exempt interface? */
static __always_inline bool leaves_exempt(const struct pod *pod, const struct outbound *c,
					  bool within)
{
	if (within)
		return if_excluded(pod, c->netns, LOOPBACK_IFINDEX);
	/* The device that the socket is bound to, or else the one of the pod's route. */
	return c->ifindex ? if_excluded(pod, c->netns, c->ifindex)
			  : cidr_in(pod, c->netns, OUT_EXCLUDE_ROUTES, &c->dst);
}

/* The exclusions, in order: interfaces, ports of users, Kuma's destinations, ports. */
static __always_inline enum reason excluded_first(const struct pod *pod, const struct outbound *c,
						  bool within, bool udp)
{
	enum rule_set of_users = udp ? OUT_EXCLUDE_UDP_UIDS : OUT_EXCLUDE_TCP_UIDS;
	__u32 class = uid_class(pod, c->netns, c->owner.uid);

	if (leaves_exempt(pod, c, within))
		return REASON_EXCLUDED_INTERFACE;
	if (class && port_in_class(pod, c->netns, of_users, class, c->dport))
		return REASON_EXCLUDED_USER_PORT;
	if (pod->flags & POD_CIDRS_FIRST && cidr_in(pod, c->netns, OUT_EXCLUDE_CIDRS, &c->dst))
		return REASON_EXCLUDED_RANGE;
	if ((!udp || pod->flags & POD_UDP_EXCLUDES) &&
	    port_in(pod, c->netns, OUT_EXCLUDE_PORTS, c->dport))
		return REASON_EXCLUDED_PORT;
	return REASON_NONE;
}

/* The reason to include a destination; REASON_NONE if there is none. */
static __always_inline enum reason included(const struct pod *pod, const struct outbound *c)
{
	if (pod->flags & POD_OUT_ALL)
		return REASON_ALL_INCLUDED;
	if (port_in(pod, c->netns, OUT_INCLUDE_PORTS, c->dport))
		return REASON_INCLUDED_PORT;
	if (cidr_in(pod, c->netns, OUT_INCLUDE_CIDRS, &c->dst))
		return REASON_INCLUDED_RANGE;
	return REASON_NONE;
}

static __always_inline struct decision tcp_decision(const struct pod *pod, const struct outbound *c)
{
	bool proxy = is_proxy_user(pod, c->owner.uid), dns = is_dns(pod, c), within;
	enum reason why;

	if (!pod_captures(pod, &c->dst))
		return decide(GO_DIRECT, REASON_OTHER_FAMILY);
	if (addr_is_multicast(&c->dst))
		return decide(GO_DIRECT, REASON_MULTICAST);
	if (dns && pod->flags & (POD_TCP_DNS_DIRECT | POD_TCP_DNS_ANY)) {
		if (pod->flags & POD_TCP_DNS_DIRECT && !proxy)
			return decide(GO_DIRECT, REASON_DNS_OVER_TCP);
		dns = false;
	}
	within = within_pod(c);
	why = excluded_first(pod, c, within, false);
	if (why)
		return decide(GO_DIRECT, why);
	if (within) {
		if (addr_is_passthrough(&c->src))
			return decide(GO_DIRECT, REASON_FROM_PASSTHROUGH);
		if (proxy)
			return dns ? decide(GO_DIRECT, REASON_FROM_PROXY) : self_decision(pod, c);
		/*
		 * Calls within the pod stay direct, except DNS, which may have a server on
		 * localhost.
		 */
		if (!dns && !(pod->flags & POD_LOOPBACK_INCLUDED))
			return decide(GO_DIRECT, REASON_WITHIN_POD);
		if (is_proxy_group(pod, &c->owner))
			return self_decision(pod, c);
	}
	if (is_martian(pod, c, within))
		return decide(GO_DIRECT, REASON_FROM_LOOPBACK);
	if (is_proxy(pod, &c->owner))
		return decide(GO_DIRECT, REASON_FROM_PROXY);
	if (!dns) {
		if (addr_is_localhost(&c->dst))
			return decide(GO_DIRECT, REASON_TO_LOCALHOST);
		if (cidr_in(pod, c->netns, OUT_EXCLUDE_CIDRS, &c->dst))
			return decide(GO_DIRECT, REASON_EXCLUDED_RANGE);
	}
	why = dns ? REASON_DNS : included(pod, c);
	if (!why)
		return decide(GO_DIRECT, REASON_NOT_INCLUDED);
	if (leads_nowhere(pod, c, within))
		return decide(GO_NOWHERE, REASON_NO_ADDRESS);
	return decide(dns ? GO_DNS : GO_OUTBOUND, why);
}

static __always_inline struct decision udp_decision(const struct pod *pod, const struct outbound *c)
{
	enum reason why;
	bool within;

	if (!is_dns(pod, c))
		return decide(GO_DIRECT, REASON_NOT_DNS);
	if (!pod_captures(pod, &c->dst))
		return decide(GO_DIRECT, REASON_OTHER_FAMILY);
	within = within_pod(c);
	why = excluded_first(pod, c, within, true);
	if (why)
		return decide(GO_DIRECT, why);
	if (leads_nowhere(pod, c, within))
		return decide(GO_DIRECT, REASON_NO_ADDRESS);
	if (is_martian(pod, c, within))
		return decide(GO_DIRECT, REASON_FROM_LOOPBACK);
	if (is_proxy(pod, &c->owner))
		return decide(GO_DIRECT, REASON_FROM_PROXY);
	return decide(GO_DNS, REASON_DNS);
}

/* Separate functions, so that the verifier checks each once, and not on every path to it. */
__noinline int tcp_verdict(const struct pod *pod, const struct outbound *c)
{
	return pod && c ? tcp_decision(pod, c).verdict : GO_NOWHERE;
}

__noinline int udp_verdict(const struct pod *pod, const struct outbound *c)
{
	return pod && c ? udp_decision(pod, c).verdict : GO_NOWHERE;
}
