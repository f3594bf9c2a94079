/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A socket address hook's context in policy's terms. */
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

/*
 * A kernel id as a user namespace numbers it; -1 where it is not mapped. The map's address comes
 * as a number, and the function is global, so that the verifier looks at it once and by itself.
 */
__noinline __u32 id_in(__u64 address, __u32 id)
{
	const struct uid_gid_map *map = (const void *)address;
	struct uid_gid_extent extent[UID_GID_MAP_MAX_BASE_EXTENTS];
	__u32 count = BPF_CORE_READ(map, nr_extents);

	if (bpf_core_read(extent, sizeof(extent), &map->extent))
		return -1;
	for (__u32 i = 0; i < UID_GID_MAP_MAX_BASE_EXTENTS; i++)
		if (i < count && id >= extent[i].lower_first &&
		    id - extent[i].lower_first < extent[i].count)
			return extent[i].first + (id - extent[i].lower_first);
	return -1;
}

/*
 * Who made the socket, the way iptables' owner match sees it: the file's credentials, in the
 * numbers of the user namespace that the network namespace belongs to.
 */
static __always_inline void owner_of_kernel(const struct sock *sk, struct outbound *c)
{
	const struct socket *socket = peek(sk, sk_socket);
	const struct file *file = socket ? peek(socket, file) : NULL;
	const struct user_namespace *ns;
	const struct cred *cred;
	const struct net *net;

	c->uid = c->gid = (__u32)-1;
	if (!file)
		return;
	cred = peek(file, f_cred);
	c->uid = peek(cred, fsuid.val);
	c->gid = peek(cred, fsgid.val);
	net = peek(sk, __sk_common.skc_net.net);
	ns = peek(net, user_ns);
	if (peek(ns, level)) {
		ns = (const void *)number_of(ns);
		c->uid = id_in((__u64)&ns->uid_map, c->uid);
		c->gid = id_in((__u64)&ns->gid_map, c->gid);
	}
}

/* The same, of a hook's socket. */
static __always_inline void owner_of(struct bpf_sock *sk, struct outbound *c)
{
	owner_of_kernel(kernel_ptr(number_of(sk), struct sock), c);
}

/* What policy wants to know, but for the owner. */
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
	/* As the kernel does with an unspecified destination. */
	if (addr_is_any(&c->dst)) {
		if (!addr_is_any(&c->src))
			c->dst = c->src;
		else
			c->dst.w[3] = bpf_htonl(addr_is4(&c->dst) ? 0x7f000001 : 1);
	}
	/* Not bound, it would call ::6 from ::6. (127.0.0.6 it would call from 127.0.0.1.) */
	if (addr_is_any(&c->src) && !addr_is4(&c->dst) && addr_is_passthrough(&c->dst))
		c->src = c->dst;
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
