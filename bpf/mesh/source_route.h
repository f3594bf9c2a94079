/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Source routes: an IPv6 routing header, or options of IPv4. They send a connection's packets to
 * the first stop of the route, whatever address was dialled; and any process may set one, also on
 * an established connection. With a destination that is not captured, that would bypass the proxy.
 */
#pragma once

#include "lib/hook.h"
#include "lib/owner.h"
#include "mesh/counter.h"

/* Does the socket have a source route already? */
static __always_inline bool is_source_routed(struct bpf_sock *ctx)
{
	const struct inet_sock *sk = kernel_ptr(number_of(ctx), struct inet_sock);
	const struct ip_options_rcu *options = peek(sk, inet_opt);
	const struct ipv6_pinfo *v6 = peek(sk, pinet6);
	const struct ipv6_txoptions *options6;

	if (options && peek(options, opt.srr))
		return true;
	if (!v6)
		return false;
	options6 = peek(v6, opt);
	return options6 && peek(options6, srcrt);
}

/* Would this option set a source route? Removing one is always allowed. */
static __always_inline bool sets_source_route(volatile struct bpf_sockopt *ctx)
{
	__s32 level = ctx->level, name = ctx->optname; /* each one load, as in origdst_answer */

	if (ctx->optlen <= 0)
		return false;
	return (level == SOL_IP && name == IP_OPTIONS) ||
	       (level == SOL_IPV6 && (name == IPV6_RTHDR || name == IPV6_2292PKTOPTIONS));
}

/* A process sets an option of a socket. */
static __always_inline enum outcome mesh_setsockopt(struct bpf_sockopt *ctx)
{
	volatile struct bpf_sock *sk = ctx->sk;
	struct owner owner = {};
	const struct pod *pod;

	if (!sets_source_route(ctx))
		return NOT_MINE;
	/* Raw sockets need a privilege and serve tools. */
	if (sk->type == SOCK_RAW)
		return NOT_MINE;
	pod = pod_by_netns(bpf_get_netns_cookie(ctx));
	if (!pod || pod->flags & POD_BESIDE)
		return NOT_MINE;
	owner_of(ctx->sk, &owner);
	if (is_proxy(pod, &owner))
		return NOT_MINE;
	count(pod, REFUSED_SOURCE_ROUTE);
	return REFUSED;
}
