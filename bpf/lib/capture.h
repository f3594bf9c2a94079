/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The addresses of captured connections, for code of any domain. */
#pragma once

#include "lib/addr.h"

/*
 * A captured connection is sent to one of 64 addresses in a range that is local to the pod: by the
 * kernel's own table for IPv4, by a route that the agent adds for IPv6. With 127.0.0.1 alone, a pod
 * could have only as many captured connections as it has ephemeral ports; with 64 addresses it can
 * have 64 times as many. There are no more than 64 because TCP remembers each address that it has
 * had connections with. A socket that is bound to a port of its own may share that port with many
 * others, so it gets one of 65,536. The agent's routes for both ranges prefer the pod's address as
 * source, so that the proxy sees the pod as its peer.
 */
#define VIA4_NET 0x7f800000 /* 127.128.0.0/16 */
#define VIA4_MASK 0xffff0000
#define VIA6_HI 0xfd536964 /* fd53:6964:6573:7465::/64 */
#define VIA6_LO 0x65737465
#define VIA_FEW 63 /* the bits of either range that vary by connection */
#define VIA_MANY 0xffff /* where the application has chosen the port */

/* Is this an address of captured connections? */
static __always_inline bool addr_is_via(const struct addr *a)
{
	if (addr_is4(a))
		return (a->w[3] & bpf_htonl(VIA4_MASK)) == bpf_htonl(VIA4_NET);
	return a->w[0] == bpf_htonl(VIA6_HI) && a->w[1] == bpf_htonl(VIA6_LO);
}

/* A socket's role in a captured connection. */
enum role {
	ROLE_NONE, /* it is in none */
	ROLE_CLIENT, /* the client's: sent elsewhere than it dialled */
	ROLE_PROXY, /* the proxy's: accepted in the server's place */
};
