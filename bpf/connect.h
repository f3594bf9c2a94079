/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* connect(), and what the two ends of a captured connection are told about it. */
#pragma once

/*
 * Each hook knows its family when it is compiled: the verifier wants every field of a context
 * read at a constant offset.
 */
static __always_inline struct addr sockaddr_get(struct bpf_sock_addr *ctx, int family)
{
	if (family == AF_INET)
		return addr4(ctx->user_ip4);
	return (struct addr){ { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
				ctx->user_ip6[3] } };
}

static __always_inline void sockaddr_set(struct bpf_sock_addr *ctx, int family,
					 const struct addr *a, __u16 port)
{
	if (family == AF_INET) {
		ctx->user_ip4 = a->w[3];
	} else {
		ctx->user_ip6[0] = a->w[0];
		ctx->user_ip6[1] = a->w[1];
		ctx->user_ip6[2] = a->w[2];
		ctx->user_ip6[3] = a->w[3];
	}
	ctx->user_port = bpf_htons(port);
}

/* Who made the socket, the way iptables' owner match sees it. */
static __always_inline void owner_of(struct bpf_sock *sk, struct outbound *c)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	struct file *file;

	c->uid = c->gid = (__u32)-1;
	if (!tp)
		return;
	file = tp->inet_conn.icsk_inet.sk.sk_socket->file;
	if (!file)
		return;
	c->uid = file->f_cred->fsuid.val;
	c->gid = file->f_cred->fsgid.val;
}

/* The address for a captured connection, see config.h. */
static __always_inline struct addr via_for(struct bpf_sock_addr *ctx, const struct pod *pod,
					   const struct outbound *c)
{
	bool is4 = addr_is4(&c->dst);
	const struct addr *own = is4 ? &pod->ip4 : &pod->ip6;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct addr via = { { bpf_htonl(VIA6_HI), bpf_htonl(VIA6_LO),
			      bpf_htonl((__u32)(cookie >> 32)), bpf_htonl((__u32)cookie) } };

	/* Bound to a device, the kernel finds only that device's own addresses. */
	if (c->ifindex && !addr_is_any(own))
		return *own;
	return is4 ? addr4(bpf_htonl(VIA4_NET | ((__u32)cookie & ~VIA4_MASK))) : via;
}

static __always_inline int connect_any(struct bpf_sock_addr *ctx, int family)
{
	volatile struct bpf_sock *fields = ctx->sk;
	struct outbound c = {};
	const struct pod *pod;
	struct origdst *od;
	enum verdict verdict;
	struct addr via;

	if (ctx->protocol != IPPROTO_TCP)
		return 1;
	c.netns = bpf_get_netns_cookie(ctx);
	pod = pod_by_netns(c.netns);
	if (!pod)
		return 1;
	c.dst = sockaddr_get(ctx, family);
	c.dport = bpf_ntohs(ctx->user_port);
	c.ifindex = fields->bound_dev_if;
	if (family == AF_INET) {
		c.src = addr4(fields->src_ip4);
	} else {
		c.src = (struct addr){ { fields->src_ip6[0], fields->src_ip6[1], fields->src_ip6[2],
					 fields->src_ip6[3] } };
	}
	/* As the kernel does with an unspecified destination. */
	if (addr_is_any(&c.dst)) {
		if (!addr_is_any(&c.src))
			c.dst = c.src;
		else
			c.dst.w[3] = bpf_htonl(addr_is4(&c.dst) ? 0x7f000001 : 1);
	}
	owner_of(ctx->sk, &c);

	verdict = outbound_verdict(pod, &c);
	if (verdict == GO_DIRECT) {
		count(pod, DIRECT);
		return 1;
	}
	od = origdst_of(ctx->sk, BPF_SK_STORAGE_GET_F_CREATE);
	if (!od) {
		count(pod, REFUSED_NO_STATE);
		return 0;
	}
	/* The proxy's call to its own pod keeps its address: only the port is the listener's. */
	via = verdict == GO_OUTBOUND ? via_for(ctx, pod, &c) : c.dst;
	od->orig = c.dst;
	od->orig_port = c.dport;
	od->via = via;
	od->via_port = verdict == GO_OUTBOUND ? pod->out_port : pod->in_port;
	od->role = ROLE_CLIENT;
	sockaddr_set(ctx, family, &via, od->via_port);
	count(pod, verdict == GO_OUTBOUND ? CAPTURED_OUTBOUND : CAPTURED_SELF);
	return 1;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return connect_any(ctx, AF_INET);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return connect_any(ctx, AF_INET6);
}

/* The client's peer is what it dialled. */
static __always_inline int getpeername_any(struct bpf_sock_addr *ctx, int family)
{
	struct origdst *od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, 0);
	struct addr a;

	if (!od || od->role != ROLE_CLIENT)
		return 1;
	a = sockaddr_get(ctx, family);
	if (addr_eq(&a, &od->via) && bpf_ntohs(ctx->user_port) == od->via_port)
		sockaddr_set(ctx, family, &od->orig, od->orig_port);
	return 1;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return getpeername_any(ctx, AF_INET);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return getpeername_any(ctx, AF_INET6);
}

/* The proxy accepted on its listener's port at localhost, which is where iptables redirects. */
static __always_inline int getsockname_any(struct bpf_sock_addr *ctx, int family)
{
	struct origdst *od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, 0);
	struct addr localhost = addr4(bpf_htonl(0x7f000001));

	if (!od || od->role != ROLE_PROXY)
		return 1;
	if (!addr_is4(&od->orig))
		localhost = (struct addr){ { 0, 0, 0, bpf_htonl(1) } };
	sockaddr_set(ctx, family, &localhost, od->via_port);
	return 1;
}

SEC("cgroup/getsockname4")
int getsockname4(struct bpf_sock_addr *ctx)
{
	return getsockname_any(ctx, AF_INET);
}

SEC("cgroup/getsockname6")
int getsockname6(struct bpf_sock_addr *ctx)
{
	return getsockname_any(ctx, AF_INET6);
}
