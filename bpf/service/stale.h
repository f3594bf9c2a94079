/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The agent's look at connected UDP sockets: nothing tells such a socket that its endpoint is gone,
 * and a datagram to a gone endpoint is lost in silence.
 */
#pragma once

#include "lib/sock.h"
#include "service/socket.h"

/* A connected UDP socket whose endpoint its Service has not any more, or not for this node. */
struct stale_peer {
	__u64 netns; /* cookie */
	__u64 socket; /* cookie */
	struct dialled_service to;
	struct addr local;
	__u32 device; /* that the socket is bound to; 0: to none */
	__u16 local_port;
	__u16 pad;
};
_Static_assert(sizeof(struct stale_peer) == 80, "stale_peer");

/* Is this socket connected to that endpoint, now? connect(AF_UNSPEC) runs no hook. */
static __always_inline bool is_connected_to(const struct sock *sk, const struct backend *backend)
{
	const struct sock_common *common = &sk->__sk_common;
	struct addr peer;

	if (common->skc_state != BPF_TCP_ESTABLISHED)
		return false;
	peer = sock_peer(common);
	return backend_is(backend, &peer, bpf_ntohs(common->skc_dport));
}

/* Tells the agent of a socket, which knows whether the endpoint is gone or only not eligible. */
static __always_inline void stale_look(struct seq_file *seq, struct sock *sk,
				       const struct dialled_service *to)
{
	struct frontend frontend = { .protocol = IPPROTO_UDP };
	struct stale_peer stale = {};
	const __u32 *list;

	if (sk->sk_protocol != IPPROTO_UDP)
		return;
	stale.to = *to;
	if (!is_connected_to(sk, &stale.to.backend))
		return;
	frontend.addr = stale.to.vip;
	frontend.port = stale.to.vip_port;
	list = bpf_map_lookup_elem(&services, &frontend);
	if (!list || is_eligible(*list, &stale.to.backend))
		return;
	stale.netns = sk->__sk_common.skc_net.net->net_cookie;
	stale.socket = bpf_get_socket_cookie(sk);
	stale.local = sock_local(&sk->__sk_common);
	stale.local_port = sk->__sk_common.skc_num;
	stale.device = sk->__sk_common.skc_bound_dev_if;
	bpf_seq_write(seq, &stale, sizeof(stale));
}
