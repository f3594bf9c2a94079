/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Converts a socket address hook's context for the policy. */
#pragma once

#include "lib/sock.h"
#include "mesh/policy.h"

/* The policy's inputs, except the owner. */
static __always_inline void outbound_of(struct bpf_sock_addr *ctx, int family, struct outbound *c)
{
	/* Through a volatile pointer: each field must be one plain load for the verifier. */
	volatile struct bpf_sock *sk = ctx->sk;

	c->dst = sockaddr_get(ctx, family);
	c->dport = bpf_ntohs(ctx->user_port);
	c->ifindex = sk->bound_dev_if;
	/* An AF_INET6 socket sends to a v4-mapped address by way of the IPv4 hook. */
	if (sk->family == AF_INET) {
		c->src = addr4(sk->src_ip4);
	} else {
		c->src = (struct addr){ { sk->src_ip6[0], sk->src_ip6[1], sk->src_ip6[2],
					  sk->src_ip6[3] } };
		barrier(); /* or both branches' loads become one, at an offset in a register */
	}
	/* The kernel treats an unspecified destination the same way. */
	if (addr_is_any(&c->dst)) {
		if (!addr_is_any(&c->src))
			c->dst = c->src;
		else
			c->dst.w[3] = bpf_htonl(addr_is4(&c->dst) ? 0x7f000001 : 1);
	}
	/* An unbound socket would call ::6 from ::6, but 127.0.0.6 from 127.0.0.1. */
	if (addr_is_any(&c->src) && !addr_is4(&c->dst) && addr_is_passthrough(&c->dst))
		c->src = c->dst;
}
