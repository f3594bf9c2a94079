/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Identifies the ends of connections. */
#pragma once

#include "splice/types.h"

static __always_inline struct splice_key other_end(const struct splice_key *key)
{
	return (struct splice_key){
		.local = key->remote,
		.remote = key->local,
		.lport = key->rport,
		.rport = key->lport,
		.first_sent = key->first_received,
		.first_received = key->first_sent,
	};
}

/*
 * The key of a connection's end; false if TCP's counts do not show its initial sequence numbers.
 * The acknowledged bytes include a client's SYN, but not a server's.
 */
static __always_inline bool splice_key_of(const struct tcp_sock *tp, struct splice_key *key)
{
	const struct sock_common *sk = &tp->inet_conn.icsk_inet.sk.__sk_common;
	__u32 sent = tp->snd_nxt - (__u32)(tp->bytes_sent - tp->bytes_retrans);
	__u32 acked = tp->snd_una - (__u32)tp->bytes_acked;

	if (sk->skc_family == AF_INET6) {
		/* v4-mapped if it is IPv4 */
		__builtin_memcpy(&key->local, &sk->skc_v6_rcv_saddr, sizeof(key->local));
		__builtin_memcpy(&key->remote, &sk->skc_v6_daddr, sizeof(key->remote));
	} else {
		key->local = addr4(sk->skc_rcv_saddr);
		key->remote = addr4(sk->skc_daddr);
	}
	key->lport = sk->skc_num;
	key->rport = bpf_ntohs(sk->skc_dport);
	key->first_sent = sent;
	key->first_received = tp->rcv_nxt - (__u32)tp->bytes_received;
	return sent == acked || sent == acked + 1;
}
