/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* connect() by a process of a pod. */
#pragma once

#include "mesh/counter.h"
#include "mesh/dns.h"
#include "mesh/inbound.h"
#include "mesh/source_route.h"

/* The address for a captured connection, see capture.h. */
static __always_inline struct addr via_for(struct bpf_sock_addr *ctx, const struct pod *pod,
					   const struct outbound *c)
{
	bool is4 = addr_is4(&c->dst);
	const struct addr *own = is4 ? &pod->ip4 : &pod->ip6;
	__u32 bits = ctx->sk->src_port ? VIA_MANY : VIA_FEW;
	__u32 which = (__u32)bpf_get_socket_cookie(ctx) & bits;
	struct addr via = { { bpf_htonl(VIA6_HI), bpf_htonl(VIA6_LO), 0, bpf_htonl(which) } };

	/* For a captured call to localhost, the source stays localhost as well. */
	if (addr_is_loopback(&c->dst))
		return localhost_for(&c->dst);
	/* Bound to a device, the kernel finds only that device's own addresses. */
	if (c->ifindex && !addr_is_any(own))
		return *own;
	return is4 ? addr4(bpf_htonl(VIA4_NET | which)) : via;
}

/*
 * Binds a socket to the pod's address, the source of a connection that REDIRECT leads to localhost.
 * A socket that is already bound to a port stays as it is, and its connection comes from localhost.
 */
static __always_inline long come_from_pod(struct bpf_sock_addr *ctx, int family,
					  const struct pod *pod, bool is4)
{
	const struct addr *own = is4 ? &pod->ip4 : &pod->ip6;
	struct sockaddr_in6 in6 = { .sin6_family = AF_INET6 };
	struct sockaddr_in in = { .sin_family = AF_INET };

	if (family == AF_INET) {
		in.sin_addr.s_addr = own->w[3];
		return bpf_bind(ctx, (struct sockaddr *)&in, sizeof(in));
	}
	__builtin_memcpy(&in6.sin6_addr, own, sizeof(*own));
	return bpf_bind(ctx, (struct sockaddr *)&in6, sizeof(in6));
}

/* Does the outbound listener listen at all addresses of IPv6, or of both families? */
static __always_inline bool listens_everywhere(const struct pod *pod, __u64 netns)
{
	struct listener_key key = { .netns = netns, .port = pod->out_port };
	struct bpf_sock *sk;

	for (__u32 slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot;
		sk = bpf_map_lookup_elem(&listeners, &key);
		if (sk) {
			bpf_sk_release(sk);
			return true;
		}
	}
	return false;
}

/*
 * Where a connection goes beside the mesh's own rules, which leave alone what goes there: to the
 * address that they would redirect it to. Not so with IPv6: the kernel cannot send an
 * acknowledgment to ::1 for a connection from another address once its socket is closed. There it
 * goes to the pod's own address, if the proxy listens there too.
 */
static __always_inline struct addr beside_via(const struct pod *pod, const struct outbound *c)
{
	return addr_is4(&c->dst) ? localhost_for(&c->dst) : pod->ip6;
}

/*
 * Does a connection that the policy sends to the outbound listener stay with the rules in the pod?
 * They redirect it as well, so theirs is whatever could turn out differently: that of a socket with
 * a port or a device of its own, and one from or to an address that is not an ordinary one.
 */
static __always_inline bool rules_keep(struct bpf_sock_addr *ctx, const struct pod *pod,
				       const struct outbound *c)
{
	const struct addr *own = addr_is4(&c->dst) ? &pod->ip4 : &pod->ip6;

	return c->ifindex || ctx->sk->src_port || addr_is_any(own) || addr_is_link6(own) ||
	       addr_is_link6(&c->dst) || (!addr_is_any(&c->src) && !addr_eq(&c->src, own)) ||
	       pod_owns(c->netns, &c->dst) || is_busy(c->netns) ||
	       (!addr_is4(&c->dst) && !listens_everywhere(pod, c->netns));
}

/*
 * Beside the mesh's own rules: is the connection left to them? If not, its source is the pod's
 * address from now on, as it is under REDIRECT; towards the pod's own address it is that anyway.
 */
static __always_inline bool left_to_rules(struct bpf_sock_addr *ctx, int family,
					  const struct pod *pod, const struct outbound *c,
					  enum verdict verdict)
{
	if (verdict != GO_OUTBOUND || rules_keep(ctx, pod, c))
		return true;
	return addr_is4(&c->dst) && addr_is_any(&c->src) && come_from_pod(ctx, family, pod, true);
}

static __always_inline enum outcome connect_tcp(struct bpf_sock_addr *ctx, int family,
						const struct pod *pod, struct outbound *c)
{
	bool beside = pod->flags & POD_BESIDE, routed, left;
	enum verdict verdict;
	struct origdst *od;

	owner_of(ctx->sk, &c->owner);
	routed = !is_proxy(pod, &c->owner) && is_source_routed(ctx->sk);
	if (routed && !beside) {
		count(pod, REFUSED_SOURCE_ROUTE);
		return refuse(EACCES);
	}
	verdict = tcp_verdict(pod, c);
	left = beside && (routed || left_to_rules(ctx, family, pod, c, verdict));
	if (verdict == GO_DIRECT || left) {
		count(pod, DIRECT);
		return NOT_MINE;
	}
	if (verdict == GO_NOWHERE) {
		count(pod, REFUSED_NO_ADDRESS);
		return refuse(ENETUNREACH);
	}
	if (is_busy(c->netns)) {
		count(pod, REFUSED_BUSY);
		return refuse(EAGAIN);
	}
	od = socket_storage(&origdsts, ctx->sk, BPF_SK_STORAGE_GET_F_CREATE);
	if (!od && beside)
		return NOT_MINE;
	if (!od) {
		count(pod, REFUSED_NO_STATE);
		return refuse(ECONNREFUSED);
	}
	od->orig = c->dst;
	od->orig_port = c->dport;
	od->role = ROLE_CLIENT;
	if (verdict == GO_INBOUND) {
		/*
		 * The address stays; only the port becomes the listener's. Within loopback the
		 * kernel itself finds the listener at localhost, also one of MPTCP, which steer
		 * does not know.
		 */
		od->via = addr_is_loopback(&c->dst) || addr_is_passthrough(&c->dst)
				  ? localhost_for(&c->dst)
				  : c->dst;
		od->via_port = pod->in_port;
		count(pod, CAPTURED_SELF);
	} else if (verdict == GO_DNS) {
		/*
		 * The DNS listener is at localhost, and in Istio it is one of MPTCP, which the
		 * kernel itself finds there. A socket bound to a device other than lo cannot reach
		 * localhost.
		 */
		od->via = c->ifindex ? via_for(ctx, pod, c) : localhost_for(&c->dst);
		od->via_port = pod->dns_port;
		if (!c->ifindex && !addr_is_loopback(&c->dst))
			come_from_pod(ctx, family, pod, addr_is4(&c->dst));
		count(pod, CAPTURED_DNS);
	} else {
		od->via = beside ? beside_via(pod, c) : via_for(ctx, pod, c);
		od->via_port = pod->out_port;
		count(pod, CAPTURED_OUTBOUND);
	}
	sockaddr_set(ctx, family, &od->via, od->via_port);
	return TAKEN;
}

/* A process connects a socket. */
static __always_inline enum outcome mesh_connect(struct bpf_sock_addr *ctx, int family)
{
	struct outbound c = {};
	const struct pod *pod;

	if (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP)
		return NOT_MINE;
	c.netns = bpf_get_netns_cookie(ctx);
	pod = pod_by_netns(c.netns);
	if (!pod)
		return NOT_MINE;
	outbound_of(ctx, family, &c);
	if (ctx->protocol == IPPROTO_UDP && pod->flags & POD_BESIDE)
		return NOT_MINE;
	if (ctx->protocol == IPPROTO_UDP)
		return connect_udp(ctx, family, pod, &c);
	return connect_tcp(ctx, family, pod, &c);
}
