/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a mesh's rules decide, and nothing else: no context, no side effect. The order of the
 * tests is the order of the mesh's own iptables rules.
 */
#pragma once

static __always_inline bool port_in(const struct pod *pod, __u64 netns, enum rule_set set,
				    __u16 port)
{
	struct port_rule_key key = {
		.prefixlen = 8 * (sizeof(key.set) + sizeof(key.netns) + sizeof(key.port)),
		.set = set,
		.netns = { (__u32)netns, (__u32)(netns >> 32) },
		.port = bpf_htons(port),
	};

	return pod->sets & (1U << set) && bpf_map_lookup_elem(&port_rules, &key);
}

static __always_inline bool cidr_in(const struct pod *pod, __u64 netns, enum rule_set set,
				    const struct addr *a)
{
	struct cidr_rule_key key = {
		.prefixlen = 8 * (sizeof(key.set) + sizeof(key.netns) + sizeof(key.addr)),
		.set = set,
		.netns = { (__u32)netns, (__u32)(netns >> 32) },
		.addr = *a,
	};

	return pod->sets & (1U << set) && bpf_map_lookup_elem(&cidr_rules, &key);
}

enum verdict {
	GO_DIRECT,
	GO_OUTBOUND, /* to the proxy's outbound listener */
	GO_INBOUND, /* to the proxy's inbound listener */
};

/* A connection that is being made, before any rewrite. */
struct outbound {
	__u64 netns;
	struct addr src; /* what the socket is bound to; any: not bound */
	struct addr dst;
	__u16 dport;
	__u32 uid; /* of the socket's creator, as iptables' owner match has it */
	__u32 gid;
	__u32 ifindex; /* the device that the socket is bound to; 0: none */
};

static __always_inline enum verdict outbound_verdict(const struct pod *pod,
						     const struct outbound *c)
{
	bool proxy = c->uid == pod->proxy_uid;

	if (!pod_captures(pod, &c->dst) || addr_is_multicast(&c->dst))
		return GO_DIRECT;
	if (port_in(pod, c->netns, OUT_EXCLUDE_PORTS, c->dport))
		return GO_DIRECT;
	if (c->ifindex == LOOPBACK_IFINDEX || pod_owns(c->netns, &c->dst)) {
		/* Within the pod: direct, but for the proxy's call to its own pod (T5, T6, T10). */
		if (!proxy || !(pod->flags & POD_SELF_INBOUND))
			return GO_DIRECT;
		if (addr_is_passthrough(&c->src) || addr_is_localhost(&c->dst) ||
		    c->dport == pod->hbone_port)
			return GO_DIRECT;
		return GO_INBOUND;
	}
	if (proxy || (pod->flags & POD_GID_EXEMPT && c->gid == pod->proxy_gid))
		return GO_DIRECT;
	if (cidr_in(pod, c->netns, OUT_EXCLUDE_CIDRS, &c->dst))
		return GO_DIRECT;
	if (pod->flags & POD_OUT_ALL || port_in(pod, c->netns, OUT_INCLUDE_PORTS, c->dport) ||
	    cidr_in(pod, c->netns, OUT_INCLUDE_CIDRS, &c->dst))
		return GO_OUTBOUND;
	return GO_DIRECT;
}

/* Does a new connection from src to the pod's own dst:dport go to the inbound listener? */
static __always_inline bool inbound_steered(const struct pod *pod, __u64 netns,
					    const struct addr *src, const struct addr *dst,
					    __u16 dport)
{
	if (!pod_captures(pod, dst))
		return false;
	/* What comes from the pod itself was decided in connect. */
	if (addr_eq(src, dst) || pod_owns(netns, src))
		return false;
	if (cidr_in(pod, netns, IN_EXCLUDE_CIDRS, src))
		return false;
	if (pod->flags & POD_IN_ALL)
		return !port_in(pod, netns, IN_EXCLUDE_PORTS, dport);
	return port_in(pod, netns, IN_INCLUDE_PORTS, dport);
}
