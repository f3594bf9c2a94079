/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A connection's part of the path, and whether that part is spliced. */
#pragma once

#include "lib/capture.h"
#include "splice/types.h"

static __always_inline bool leg_on(__u32 which)
{
	struct leg *leg = bpf_map_lookup_elem(&splice_legs, &which);

	return leg && leg->on;
}

/* Is this an address of a pod of this node that may be spliced with? */
static __always_inline bool is_neighbour(const struct addr *a)
{
	struct local_key key = { .netns = 0, .addr = *a };

	return bpf_map_lookup_elem(&locals, &key);
}

/* An end's leg; LEGS if it is on none, or its other end is not on this node. */
static __always_inline enum splice_leg leg_of(enum role role, __u64 netns, const struct pod *pod,
					      const struct splice_key *key)
{
	/* An app's redirected socket, and the socket that the proxy accepted. */
	if (role == ROLE_CLIENT)
		return addr_is_via(&key->remote) && key->rport == pod->out_port ? LEG_APP : LEGS;
	if (role == ROLE_PROXY)
		return addr_is_via(&key->local) && key->lport == pod->out_port ? LEG_APP : LEGS;
	/* The proxy's call to its app. */
	if (addr_is_passthrough(&key->local) || addr_is_passthrough(&key->remote))
		return LEG_APP;
	return !pod_owns(netns, &key->remote) && is_neighbour(&key->remote) ? LEG_SIDECAR : LEGS;
}
