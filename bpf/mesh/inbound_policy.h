/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The decision of a mesh's rules about incoming connections, and nothing else, as in policy.h. */
#pragma once

#include "lib/reason.h"
#include "mesh/rules.h"

/*
 * Does a new connection from src to the pod's own dst:dport go to the inbound listener? Port 0: the
 * dialled port is unknown.
 */
static __always_inline struct decision inbound_decision(const struct pod *pod, __u64 netns,
							const struct addr *src,
							const struct addr *dst, __u16 dport,
							__u32 ifindex)
{
	if (!pod_captures(pod, dst))
		return decide(GO_DIRECT, REASON_OTHER_FAMILY);
	if (if_excluded(pod, netns, ifindex))
		return decide(GO_DIRECT, REASON_EXCLUDED_INTERFACE);
	if (cidr_in(pod, netns, IN_EXCLUDE_CIDRS, src))
		return decide(GO_DIRECT, REASON_EXCLUDED_RANGE);
	if (!dport)
		return decide(GO_INBOUND, REASON_PORT_UNKNOWN);
	if (pod->flags & POD_IN_ALL) {
		if (port_in(pod, netns, IN_EXCLUDE_PORTS, dport))
			return decide(GO_DIRECT, REASON_EXCLUDED_PORT);
		return decide(GO_INBOUND, REASON_ALL_INCLUDED);
	}
	if (port_in(pod, netns, IN_INCLUDE_PORTS, dport))
		return decide(GO_INBOUND, REASON_INCLUDED_PORT);
	return decide(GO_DIRECT, REASON_NOT_INCLUDED);
}
