/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The kernel's state of a spliced socket. */
#pragma once

#include "lib/kernel.h"
#include "lib/share.h"
#include "splice/types.h"

#define O_NONBLOCK 00004000
#define SEND_SHUTDOWN 2

/* The kernel's flags in the low bits of a pointer, SK_USER_DATA_PTRMASK. */
#define SK_USER_DATA_FLAGS 7ul

/* The state that a socket has while it is in the map. */
static __always_inline const struct sk_psock *psock_of(const struct sock *sk)
{
	__u64 psock = (__u64)peek(sk, sk_user_data) & ~SK_USER_DATA_FLAGS;

	return psock ? kernel_ptr(psock, struct sk_psock) : NULL;
}

/* Has all redirected data of a socket been read? */
static __always_inline bool queue_is_empty(const struct sock *sk)
{
	const struct sk_psock *psock = psock_of(sk);

	return !psock || (__u64)peek(psock, ingress_msg.next) == (__u64)&psock->ingress_msg;
}

/*
 * Whether a socket may be in the map at all. Blocking readers may not: the kernel returns EAGAIN to
 * them for any wake-up without data. Nor may sockets with an upper layer (kTLS), where the program
 * would see plain text, or sockets that wait for a completion of sent pages (zero copy).
 */
static __always_inline bool splice_safe(const struct tcp_sock *tp)
{
	const struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	const struct socket *socket = peek(sk, sk_socket);
	const struct file *file = socket ? peek(socket, file) : NULL;

	return file && peek(file, f_flags) & O_NONBLOCK && !peek(tp, inet_conn.icsk_ulp_ops) &&
	       !(peek(sk, __sk_common.skc_flags) &
		 (1ul << bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY)));
}

/* Returns the socket's part of its pod's quota. Two callers may do so at once. */
static __always_inline void splice_uncount(struct splice *s)
{
	__u64 netns = __sync_lock_test_and_set(&s->share, 0);

	if (netns)
		share_give(&splice_shares, netns);
}
