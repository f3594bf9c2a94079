/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Closing with unread bytes. TCP then sends a reset instead of its FIN, so that the other end
 * learns of the loss. But TCP looks only at its own queue, and redirected bytes are in another one.
 * So if a socket is released with unread redirected bytes, its FIN is turned into a reset on the
 * egress of the pod's device. If the socket was shut down before, its FIN has been sent already,
 * and the agent sends a reset. Only the first FIN is changed: TCP, which does not know about the
 * reset, sends it again after a while, and the answer to that one, from a connection that no longer
 * exists, ends this end too.
 */
#pragma once

#include "lib/event.h"
#include "splice/socket.h"

#define RESETS 64 /* a pod's unread ones; without, a second write tells */

#define TCP_FIN 0x0001
#define TCP_PSH 0x0008
#define TCP_RST 0x0004

/* Asks the agent to reset the other end of a connection whose FIN has been sent already. */
static __always_inline void ask_for_reset(struct bpf_sock *ctx, const struct splice *s)
{
	const struct tcp_sock *tp = kernel_ptr(number_of(ctx), struct tcp_sock);
	struct unread_event event = {
		.head = { .netns = bpf_get_netns_cookie(ctx), .kind = EVENT_UNREAD },
		.end = s->key,
	};

	/* Both ends have finished: TCP does not send a reset either. */
	if (ctx->state == BPF_TCP_CLOSE ||
	    !(peek(tp, inet_conn.icsk_inet.sk.sk_shutdown) & SEND_SHUTDOWN))
		return;
	event.sent = peek(tp, snd_nxt);
	event.received = peek(tp, rcv_nxt);
	event_send(&event.head, sizeof(event), 0, RESETS);
}

/* No process has the socket any more; the kernel closes it after this. */
static __always_inline void splice_release(struct bpf_sock *ctx)
{
	struct splice *s = bpf_sk_storage_get(&splices, ctx, NULL, 0);

	if (!s || (s->state != SPLICE_IN && s->state != SPLICE_LEAVING))
		return;
	splice_uncount(s);
	/*
	 * From here on the other end sends by TCP; the priority identifies this socket's packets.
	 */
	ctx->priority = SPLICE_PRIORITY;
	if (queue_is_empty(kernel_ptr(number_of(ctx), struct sock)))
		return;
	s->state = SPLICE_RESET;
	ask_for_reset(ctx, s);
}

/* Turns a FIN into a reset, given the position of its TCP header. */
static __always_inline bool fin_to_reset(struct __sk_buff *skb, __u32 tcp)
{
	const __u32 at = tcp + offsetof(struct tcphdr, ack_seq) + sizeof(__be32);
	__be16 fin, reset;

	/* The word with the flags. */
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

	/*
	 * Tunnels have no Ethernet header, and never lead to the other end of a spliced connection.
	 */
	if (bpf_skb_load_bytes(skb, offsetof(struct ethhdr, h_proto), &proto, sizeof(proto)) ||
	    proto != skb->protocol)
		return false;
	if (proto == bpf_htons(ETH_P_IP))
		return !bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)) &&
		       fin_to_reset(skb, l3 + ip.ihl * 4);
	return proto == bpf_htons(ETH_P_IPV6) && !bpf_skb_load_bytes(skb, l3, &ip6, sizeof(ip6)) &&
	       ip6.nexthdr == IPPROTO_TCP && fin_to_reset(skb, l3 + sizeof(ip6));
}

/* A packet on the egress of a pod's device. It always passes. */
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
