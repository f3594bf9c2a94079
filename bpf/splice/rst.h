/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Closing with unread bytes. TCP then sends a reset in place of its FIN, so that the other end can
 * tell that they were lost. It looks at its own queue alone: bytes that were redirected are in
 * another one. So the FIN of a socket that is released with some of those is made a reset on its
 * way out of the pod's device. Where the socket was shut down before, that has been sent: the agent
 * sends a reset then.
 *
 * The first FIN alone: it is sent again after a while, as TCP knows nothing of the reset, and the
 * answer to that one, from where no connection is any more, ends this end too.
 */
#pragma once

#include "lib/event.h"
#include "splice/socket.h"

#define RESETS 64 /* a pod's, that the agent has not sent yet; without, a second write tells */

#define TCP_FIN 0x0001
#define TCP_PSH 0x0008
#define TCP_RST 0x0004

/* Has the agent reset the other end of a connection whose FIN is gone already. */
static __always_inline void ask_for_reset(struct bpf_sock *ctx, const struct splice *s)
{
	const struct tcp_sock *tp = kernel_ptr(number_of(ctx), struct tcp_sock);
	struct unread_event event = {
		.head = { .netns = bpf_get_netns_cookie(ctx), .kind = EVENT_UNREAD },
		.end = s->key,
	};

	/* Both ends are through with each other: TCP sends none either. */
	if (ctx->state == BPF_TCP_CLOSE ||
	    !(peek(tp, inet_conn.icsk_inet.sk.sk_shutdown) & SEND_SHUTDOWN))
		return;
	event.sent = peek(tp, snd_nxt);
	event.received = peek(tp, rcv_nxt);
	event_send(&event.head, sizeof(event), 0, RESETS);
}

/* The last time that a process has to do with a socket; then the kernel closes it. */
static __always_inline void splice_release(struct bpf_sock *ctx)
{
	struct splice *s = bpf_sk_storage_get(&splices, ctx, NULL, 0);

	if (!s || (s->state != SPLICE_IN && s->state != SPLICE_LEAVING))
		return;
	splice_uncount(s);
	/* From here on, the other end sends by TCP; and its packets are told from others by it. */
	ctx->priority = SPLICE_PRIORITY;
	if (queue_is_empty(kernel_ptr(number_of(ctx), struct sock)))
		return;
	s->state = SPLICE_RESET;
	ask_for_reset(ctx, s);
}

/* Makes a FIN a reset, given where its TCP header is. */
static __always_inline bool fin_to_reset(struct __sk_buff *skb, __u32 tcp)
{
	const __u32 at = tcp + offsetof(struct tcphdr, ack_seq) + sizeof(__be32);
	__be16 fin, reset;

	/* The word that has the flags. */
	if (bpf_skb_load_bytes(skb, at, &fin, sizeof(fin)) || !(fin & bpf_htons(TCP_FIN)))
		return false;
	reset = (fin & ~bpf_htons(TCP_FIN | TCP_PSH)) | bpf_htons(TCP_RST);
	return !bpf_l4_csum_replace(skb, tcp + offsetof(struct tcphdr, check), fin, reset,
				    sizeof(reset)) &&
	       !bpf_skb_store_bytes(skb, at, &reset, sizeof(reset), 0);
}

static __always_inline bool reset_instead(struct __sk_buff *skb)
{
	const __u32 l3 = sizeof(struct ethhdr);
	struct ipv6hdr ip6;
	struct iphdr ip;
	__be16 proto;

	/* Tunnels have no Ethernet header, and no other end of a spliced connection. */
	if (bpf_skb_load_bytes(skb, offsetof(struct ethhdr, h_proto), &proto, sizeof(proto)) ||
	    proto != skb->protocol)
		return false;
	if (proto == bpf_htons(ETH_P_IP))
		return !bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)) &&
		       fin_to_reset(skb, l3 + ip.ihl * 4);
	return proto == bpf_htons(ETH_P_IPV6) && !bpf_skb_load_bytes(skb, l3, &ip6, sizeof(ip6)) &&
	       ip6.nexthdr == IPPROTO_TCP && fin_to_reset(skb, l3 + sizeof(ip6));
}

/* A packet on the way out of a pod's device. It passes. */
static __always_inline void splice_reset(struct __sk_buff *skb)
{
	struct bpf_sock *sk;
	struct splice *s;

	if (skb->priority != SPLICE_PRIORITY)
		return;
	sk = skb->sk;
	if (!sk)
		return;
	s = bpf_sk_storage_get(&splices, sk, NULL, 0);
	if (s && s->state == SPLICE_RESET && reset_instead(skb))
		s->state = SPLICE_OUT;
}
