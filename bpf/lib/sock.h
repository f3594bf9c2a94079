/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The addresses of a hook's context, and of a socket. */
#pragma once

#include "lib/addr.h"

/*
 * Each hook has a fixed family, because the verifier wants every field of a context read at a
 * constant offset.
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

/* The socket of a process' open file; NULL: the file is something else. */
static __always_inline struct sock *sock_of_file(struct file *file)
{
	struct socket *socket = file ? bpf_sock_from_file(file) : NULL;

	return socket ? socket->sk : NULL;
}

/* A socket's own address, from the kernel's structure. */
static __always_inline struct addr sock_local(const struct sock_common *sk)
{
	const __u32 *ip6 = sk->skc_v6_rcv_saddr.in6_u.u6_addr32;

	if (sk->skc_family == AF_INET6)
		return (struct addr){ { ip6[0], ip6[1], ip6[2], ip6[3] } };
	return addr4(sk->skc_rcv_saddr);
}

/* The address that it is connected to. */
static __always_inline struct addr sock_peer(const struct sock_common *sk)
{
	const __u32 *ip6 = sk->skc_v6_daddr.in6_u.u6_addr32;

	if (sk->skc_family == AF_INET6)
		return (struct addr){ { ip6[0], ip6[1], ip6[2], ip6[3] } };
	return addr4(sk->skc_daddr);
}

/*
 * A socket's entry in a storage map. For an MPTCP subflow it is that of its connection, the socket
 * that the application holds.
 */
static __always_inline void *socket_storage(void *map, struct bpf_sock *sk, __u64 flags)
{
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_skc_to_mptcp_sock)) {
		struct mptcp_sock *msk = bpf_skc_to_mptcp_sock(sk);

		if (msk)
			return bpf_sk_storage_get(map, msk, NULL, flags);
	}
	return bpf_sk_storage_get(map, sk, NULL, flags);
}

/* Deletes the entry. */
static __always_inline void socket_forget(void *map, struct bpf_sock *sk)
{
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_skc_to_mptcp_sock)) {
		struct mptcp_sock *msk = bpf_skc_to_mptcp_sock(sk);

		if (msk) {
			bpf_sk_storage_delete(map, msk);
			return;
		}
	}
	bpf_sk_storage_delete(map, sk);
}

/* The address of a sock_ops callback's socket. */
static __always_inline struct addr sockops_local(struct bpf_sock_ops *ctx)
{
	struct addr local;

	if (ctx->family != AF_INET6)
		return addr4(ctx->local_ip4);
	local = (struct addr){ { ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2],
				 ctx->local_ip6[3] } };
	barrier(); /* or both branches' loads become one, at an offset in a register */
	return local;
}
