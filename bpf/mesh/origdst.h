/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The original destination: kept with the client's socket, handed over to the socket that the
 * proxy accepts, and answered to whoever asks (SO_ORIGINAL_DST, getpeername, getsockname).
 */
#pragma once

#include "lib/hook.h"
#include "lib/share.h"
#include "lib/sock.h"
#include "mesh/counter.h"
#include "mesh/handover.h"

/* What a captured socket was meant for. connect and sockops write; the socket hooks read. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origdst);
} origdsts SEC(".maps");

/*
 * How many of `handovers` are a pod's. Agent adds a pod, and takes away one that has none and is
 * not enrolled any more; sockops counts; connect reads.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, __u64);
	__type(value, __u32);
} handover_shares SEC(".maps");

/* Which end of a captured connection a socket is. */
static __always_inline enum role captured_role(struct bpf_sock *sk)
{
	const struct origdst *od = sk ? bpf_sk_storage_get(&origdsts, sk, NULL, 0) : NULL;

	return od ? od->role : ROLE_NONE;
}

/* The connection of a sock_ops callback, as its client sees it. */
static __always_inline struct conn sockops_conn(struct bpf_sock_ops *ctx, bool client)
{
	struct conn c = { .netns = bpf_get_netns_cookie(ctx) };
	struct addr local = sockops_local(ctx), remote;
	__u16 lport = ctx->local_port, rport = bpf_ntohl(ctx->remote_port);

	if (ctx->family == AF_INET6) {
		remote = (struct addr){ { ctx->remote_ip6[0], ctx->remote_ip6[1],
					  ctx->remote_ip6[2], ctx->remote_ip6[3] } };
		barrier(); /* or both branches' loads become one, at an offset in a register */
	} else {
		remote = addr4(ctx->remote_ip4);
	}
	c.src = client ? local : remote;
	c.dst = client ? remote : local;
	c.sport = client ? lport : rport;
	c.dport = client ? rport : lport;
	return c;
}

/* Has the pod as many connections that wait for its proxy as it may have? */
static __always_inline bool is_busy(__u64 netns)
{
	const __u32 *under_way = bpf_map_lookup_elem(&handover_shares, &netns);

	return !under_way || *under_way >= HANDSHAKES;
}

/* Puts an entry into the pod's share of `handovers`. False: there is no room. */
static __always_inline bool handover_put(const struct conn *c, const struct origdst *od)
{
	if (share_take(&handover_shares, c->netns, HANDSHAKES)) {
		if (!bpf_map_update_elem(&handovers, c, od, BPF_NOEXIST))
			return true;
		share_give(&handover_shares, c->netns);
	}
	/* One that an earlier connection of these addresses and ports left, if anything. */
	return !bpf_map_update_elem(&handovers, c, od, BPF_EXIST);
}

/* Takes an entry away, if there is one. */
static __always_inline void handover_drop(const struct conn *c)
{
	if (!bpf_map_delete_elem(&handovers, c))
		share_give(&handover_shares, c->netns);
}

/* The client's SYN is about to leave, its source port is chosen. */
static __always_inline void origdst_offer(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct origdst *od;
	struct conn c;

	if (!sk)
		return;
	od = socket_storage(&origdsts, sk, 0);
	if (!od || od->role != ROLE_CLIENT)
		return;
	c = sockops_conn(ctx, true);
	/* A socket that was captured once and now goes elsewhere. */
	if (!addr_eq(&c.dst, &od->via) || c.dport != od->via_port)
		return;
	if (!handover_put(&c, od)) {
		const struct pod *pod = pod_by_netns(c.netns);

		if (pod)
			count(pod, HANDOVER_FULL);
		return;
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* The client's socket closes: if the proxy never took the offer, nobody will. */
static __always_inline void origdst_withdraw(struct bpf_sock_ops *ctx)
{
	struct conn c;

	if (ctx->args[1] != BPF_TCP_CLOSE)
		return;
	c = sockops_conn(ctx, true);
	handover_drop(&c);
}

/* The proxy's side of the handshake is done; accept() will return this socket. */
static __always_inline void origdst_take(struct bpf_sock_ops *ctx)
{
	const struct pod *pod = pod_by_netns(bpf_get_netns_cookie(ctx));
	struct bpf_sock *sk = ctx->sk;
	struct origdst *offer, *od;
	struct conn c;

	if (!pod || !sk)
		return;
	if (!is_steered_port(pod, ctx->local_port))
		return;
	c = sockops_conn(ctx, false);
	offer = bpf_map_lookup_elem(&handovers, &c);
	if (!offer) {
		if (addr_is_via(&c.dst))
			count(pod, HANDOVER_MISSED);
		return;
	}
	od = socket_storage(&origdsts, sk, BPF_SK_STORAGE_GET_F_CREATE);
	if (od) {
		*od = *offer;
		od->role = ROLE_PROXY;
	} else {
		count(pod, HANDOVER_MISSED);
	}
	handover_drop(&c);
}

/* Is what the kernel answers where a captured connection was sent to? */
static __always_inline bool is_redirect(struct bpf_sockopt *ctx, const struct pod *pod)
{
	struct addr dst;
	__u16 port;

	if (ctx->level == SOL_IP) {
		struct sockaddr_in *sin = ctx->optval;

		if ((void *)(sin + 1) > ctx->optval_end)
			return false;
		dst = addr4(sin->sin_addr.s_addr);
		port = sin->sin_port;
	} else {
		struct sockaddr_in6 *sin6 = ctx->optval;

		if ((void *)(sin6 + 1) > ctx->optval_end)
			return false;
		__builtin_memcpy(&dst, &sin6->sin6_addr, sizeof(dst));
		port = sin6->sin6_port;
	}
	return addr_is_via(&dst) && is_steered_port(pod, bpf_ntohs(port));
}

/* Fills dst for a getsockopt of this level on this socket; false: leave the kernel's answer. */
static __always_inline bool origdst_answer(struct bpf_sockopt *ctx, const struct pod *pod,
					   struct addr *dst, __u16 *port)
{
	/* Through a volatile pointer: each field must be one plain load for the verifier. */
	volatile struct bpf_sock *fields = ctx->sk;
	struct origdst *od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, 0);
	__u32 state;

	if (od) {
		*dst = od->orig;
		*port = od->orig_port;
		return true;
	}
	/*
	 * The kernel knows it, or another program did: where the mesh's own rules are there as
	 * well, or for connections from before the layout of the maps moved. Where conntrack alone
	 * knows the connection, it answers with the redirect that ours is. (Before Linux 5.18 this
	 * is EFAULT for the caller. Another layout's program, which comes after, may know better.)
	 */
	if (!ctx->retval) {
		if (is_redirect(ctx, pod))
			ctx->retval = -ENOENT;
		return false;
	}
	/*
	 * Any other connected socket: what it was dialled to is its own address, which is how
	 * iptables answers for a tracked connection that it did not translate.
	 */
	state = fields->state;
	if (fields->protocol != IPPROTO_TCP || state == BPF_TCP_CLOSE || state == BPF_TCP_LISTEN)
		return false;
	if (fields->family == AF_INET6) {
		*dst = (struct addr){ { fields->src_ip6[0], fields->src_ip6[1], fields->src_ip6[2],
					fields->src_ip6[3] } };
	} else {
		*dst = addr4(fields->src_ip4);
	}
	*port = fields->src_port;
	/* Captured, but its original destination was lost: no answer is better than a wrong one. */
	return !addr_is_via(dst);
}

/* A process asks for a socket's original destination. NOT_MINE: it does not, or there is none. */
static __always_inline enum outcome mesh_getsockopt(struct bpf_sockopt *ctx)
{
	const struct pod *pod;
	struct addr dst;
	__u16 port;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		return NOT_MINE;
	pod = pod_by_netns(bpf_get_netns_cookie(ctx));
	if (!pod || !origdst_answer(ctx, pod, &dst, &port))
		return NOT_MINE;
	if (ctx->level == SOL_IP) {
		struct sockaddr_in *sin = ctx->optval;

		if (!addr_is4(&dst) || (void *)(sin + 1) > ctx->optval_end)
			return NOT_MINE;
		__builtin_memset(sin, 0, sizeof(*sin));
		sin->sin_family = AF_INET;
		sin->sin_port = bpf_htons(port);
		sin->sin_addr.s_addr = dst.w[3];
		ctx->optlen = sizeof(*sin);
	} else {
		struct sockaddr_in6 *sin6 = ctx->optval;

		if (addr_is4(&dst) || (void *)(sin6 + 1) > ctx->optval_end)
			return NOT_MINE;
		__builtin_memset(sin6, 0, sizeof(*sin6));
		sin6->sin6_family = AF_INET6;
		sin6->sin6_port = bpf_htons(port);
		__builtin_memcpy(&sin6->sin6_addr, &dst, sizeof(dst));
		ctx->optlen = sizeof(*sin6);
	}
	ctx->retval = 0;
	count(pod, ORIGDST_ANSWERED);
	return TAKEN;
}

/* Puts what the client dialled in the place of where it was sent. */
static __always_inline enum outcome restore_dialled(struct bpf_sock_addr *ctx, int family)
{
	struct origdst *od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, 0);
	struct addr a;

	if (!od || od->role != ROLE_CLIENT)
		return NOT_MINE;
	a = sockaddr_get(ctx, family);
	if (!addr_eq(&a, &od->via) || bpf_ntohs(ctx->user_port) != od->via_port)
		return NOT_MINE;
	sockaddr_set(ctx, family, &od->orig, od->orig_port);
	return TAKEN;
}

/* The client's peer is what it dialled. */
static __always_inline enum outcome mesh_getpeername(struct bpf_sock_addr *ctx, int family)
{
	return restore_dialled(ctx, family);
}

/* The proxy accepted on its listener's port at localhost, which is where iptables redirects. */
static __always_inline enum outcome mesh_getsockname(struct bpf_sock_addr *ctx, int family)
{
	struct origdst *od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, 0);
	struct addr localhost = addr4(bpf_htonl(0x7f000001));

	if (!od || od->role != ROLE_PROXY)
		return NOT_MINE;
	if (!addr_is4(&od->orig))
		localhost = (struct addr){ { 0, 0, 0, bpf_htonl(1) } };
	sockaddr_set(ctx, family, &localhost, od->via_port);
	return TAKEN;
}
