/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The original destination: kept with the client's socket, handed over to the socket that the proxy
 * accepts, and returned by SO_ORIGINAL_DST, getpeername and getsockname.
 */
#pragma once

#include "lib/hook.h"
#include "lib/share.h"
#include "lib/sock.h"
#include "mesh/counter.h"
#include "mesh/handover.h"

/*
 * The original destinations of captured sockets. connect and sockops write; the socket hooks read.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origdst);
} origdsts SEC(".maps");

/*
 * The number of a pod's entries in `handovers`. The agent adds pods, and removes a pod without
 * entries that is no longer enrolled; sockops counts; connect reads.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, __u64);
	__type(value, __u32);
} handover_shares SEC(".maps");

/* The socket's role in a captured connection. */
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

/*
 * The same connection in a pod with the mesh's own rules. Conntrack may change its source port on
 * the way, if a connection that these rules redirected has the same; the number of its first byte
 * stays. No real connection has the source port 0, as this key.
 */
static __always_inline struct conn numbered_conn(const struct conn *c, __u32 first)
{
	return (struct conn){
		.netns = c->netns,
		.src = { { 0, 0, 0, first } },
		.dst = c->dst,
		.dport = c->dport,
	};
}

/* Has the pod used up its quota of handshakes in progress? */
static __always_inline bool is_busy(__u64 netns)
{
	const __u32 *under_way = bpf_map_lookup_elem(&handover_shares, &netns);

	return !under_way || *under_way >= HANDSHAKES;
}

/* Adds an entry within the pod's quota of `handovers`; false if there is no room. */
static __always_inline bool handover_put(const struct conn *c, const struct origdst *od)
{
	if (share_take(&handover_shares, c->netns, HANDSHAKES)) {
		if (!bpf_map_update_elem(&handovers, c, od, BPF_NOEXIST))
			return true;
		share_give(&handover_shares, c->netns);
	}
	/* An earlier connection with these addresses and ports may have left one. */
	return !bpf_map_update_elem(&handovers, c, od, BPF_EXIST);
}

/* Removes an entry, if there is one. */
static __always_inline bool handover_drop(const struct conn *c)
{
	if (bpf_map_delete_elem(&handovers, c))
		return false;
	share_give(&handover_shares, c->netns);
	return true;
}

/* The client's SYN is about to be sent; its source port is chosen. */
static __always_inline void origdst_offer(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	const struct pod *pod;
	struct tcp_sock *tp;
	struct origdst *od;
	struct conn c;

	if (!sk)
		return;
	od = socket_storage(&origdsts, sk, 0);
	if (!od || od->role != ROLE_CLIENT)
		return;
	c = sockops_conn(ctx, true);
	/* An earlier connection of this socket was captured; this one is not. */
	if (!addr_eq(&c.dst, &od->via) || c.dport != od->via_port)
		return;
	pod = pod_by_netns(c.netns);
	if (pod && pod->flags & POD_BESIDE) {
		tp = bpf_skc_to_tcp_sock(sk);
		if (!tp)
			return;
		c = numbered_conn(&c, tp->write_seq);
	}
	if (!handover_put(&c, od)) {
		if (pod)
			count(pod, HANDOVER_FULL);
		return;
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* The client's socket closes: an offer that the proxy has not taken is withdrawn. */
static __always_inline void origdst_withdraw(struct bpf_sock_ops *ctx)
{
	struct conn c;

	if (ctx->args[1] != BPF_TCP_CLOSE)
		return;
	c = sockops_conn(ctx, true);
	if (handover_drop(&c))
		return;
	/* The acknowledged bytes include the SYN. */
	c = numbered_conn(&c, ctx->snd_una - (__u32)ctx->bytes_acked);
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
	if (!offer && (addr_is_localhost(&c.dst) || addr_eq(&c.src, &c.dst))) {
		c = numbered_conn(&c, ctx->rcv_nxt - 1);
		offer = bpf_map_lookup_elem(&handovers, &c);
	}
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

/* Is the kernel's answer the redirected address of a captured connection? */
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

	/* Also if its pod is enrolled no more: the proxy may not have asked yet. */
	if (od) {
		*dst = od->orig;
		*port = od->orig_port;
		return true;
	}
	if (!pod)
		return false;
	/*
	 * The kernel has an answer, or another program: if the mesh's own rules are installed as
	 * well, or for connections older than the present layout of the maps. If only conntrack
	 * knows the connection, the kernel answers with our redirected address. (Before Linux 5.18
	 * the caller gets EFAULT in that case. Another layout's program, which runs later, may know
	 * better.)
	 */
	if (!ctx->retval) {
		if (is_redirect(ctx, pod))
			ctx->retval = -ENOENT;
		return false;
	}
	/*
	 * Any other connected socket: its own address is what was dialled, and iptables returns the
	 * same for a tracked connection that it did not translate.
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

/*
 * A process asks for a socket's original destination. NOT_MINE if it asks for something else, or
 * there is none.
 */
static __always_inline enum outcome mesh_getsockopt(struct bpf_sockopt *ctx)
{
	const struct pod *pod;
	struct addr dst;
	__u16 port;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		return NOT_MINE;
	pod = pod_by_netns(bpf_get_netns_cookie(ctx));
	if (!origdst_answer(ctx, pod, &dst, &port))
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
	if (pod)
		count(pod, ORIGDST_ANSWERED);
	return TAKEN;
}

/* Replaces the redirected address by the dialled one. */
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

/* getpeername() of a client returns the dialled address. */
static __always_inline enum outcome mesh_getpeername(struct bpf_sock_addr *ctx, int family)
{
	return restore_dialled(ctx, family);
}

/*
 * getsockname() of the proxy's accepted socket returns localhost and the listener's port, the
 * address to which iptables redirects.
 */
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
