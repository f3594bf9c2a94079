/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a captured connection looks like, to whom it does not belong. */
#pragma once

#include "lib/addr.h"

/*
 * A captured connection is sent to one of 64 addresses within a range that is local to the pod: by
 * the kernel's own table for IPv4, by a route that the agent adds for IPv6. 64, rather than
 * 127.0.0.1 for all: so many times as many connections can be open as the pod has ephemeral ports,
 * to whatever destinations. No more, for TCP remembers each address that it had to do with; but a
 * socket that is bound to a port of its own may share it with many, and gets one of 65,536. The
 * agent's routes for both ranges prefer the pod's address as source, so that the proxy sees the
 * pod as its peer.
 */
#define VIA4_NET 0x7f800000 /* 127.128.0.0/16 */
#define VIA4_MASK 0xffff0000
#define VIA6_HI 0xfd536964 /* fd53:6964:6573:7465::/64 */
#define VIA6_LO 0x65737465
#define VIA_FEW 63 /* the bits of either that tell connections apart */
#define VIA_MANY 0xffff /* where the application has chosen the port */

/* Where captured connections go, see above. */
static __always_inline bool addr_is_via(const struct addr *a)
{
	if (addr_is4(a))
		return (a->w[3] & bpf_htonl(VIA4_MASK)) == bpf_htonl(VIA4_NET);
	return a->w[0] == bpf_htonl(VIA6_HI) && a->w[1] == bpf_htonl(VIA6_LO);
}

/* Which end of a captured connection a socket is. */
enum role {
	ROLE_NONE, /* of no captured connection */
	ROLE_CLIENT, /* was sent elsewhere than it dialled */
	ROLE_PROXY, /* was accepted in its place */
};
