/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Decides for each message of a spliced socket: the other end's queue, or TCP. */
#pragma once

#include "lib/event.h"
#include "splice/counter.h"
#include "splice/key.h"
#include "splice/memory.h"
#include "splice/socket.h"

#define SPLICE_LARGE (32 * 1024) /* bytes: larger messages use TCP */
#define SPLICE_LIMIT (64 * 1024) /* bytes: the most that may be unread at the other end */
/* Bytes that each message counts for: the kernel takes a kilobyte and charges it to nobody. */
#define SPLICE_MESSAGE 512

/*
 * The longest time without a message by TCP in each direction, in ns. Its packets keep the
 * connection alive in connection tracking, and let a later network policy stop it: a dropped
 * message stays unread, and nothing is redirected until it is read.
 */
const volatile __u64 splice_refresh = 1000000000;

/* May messages from this end to that one bypass TCP? */
static __always_inline bool splice_open(const struct tcp_sock *from, const struct tcp_sock *to)
{
	const struct sock *from_sk = &from->inet_conn.icsk_inet.sk;
	const struct sock *to_sk = &to->inet_conn.icsk_inet.sk;

	/* After a shutdown, or with an upper layer, TCP answers in its own way. */
	return !(from_sk->sk_shutdown & SEND_SHUTDOWN) && !from->inet_conn.icsk_ulp_ops &&
	       peek(to_sk, __sk_common.skc_state) == BPF_TCP_ESTABLISHED &&
	       !peek(to_sk, sk_shutdown) && peek(to_sk, sk_priority) != SPLICE_PRIORITY &&
	       splice_safe(to) && splice_room(from_sk, to_sk);
}

/* TCP or queue? Returns the counter of the reason for TCP, or SPLICE_COUNTERS for the queue. */
static __always_inline enum splice_counter splice_verdict(struct splice *s, __u32 size,
							  const struct tcp_sock *from)
{
	const struct tcp_sock *to = kernel_ptr(s->peer, struct tcp_sock);
	bool empty;

	if (!s->redirecting && from->write_seq != peek(to, copied_seq))
		return SPLICE_UNREAD;
	if (!splice_open(from, to))
		return SPLICE_NO_PEER;
	empty = queue_is_empty(&to->inet_conn.icsk_inet.sk);
	if (empty)
		s->burst = 0;
	if (empty && size > SPLICE_LARGE)
		return SPLICE_BULK;
	if (bpf_ktime_get_ns() - s->by_tcp >= splice_refresh)
		return SPLICE_REFRESH;
	if (s->burst + SPLICE_MESSAGE + size > SPLICE_LIMIT)
		return SPLICE_SPILLED;
	return SPLICE_COUNTERS;
}

/*
 * The address of the other end's socket, which the map's redirecting look-up leaves in the message.
 * It is valid while the map has that end, and otherwise nothing is redirected.
 */
static __always_inline __u64 redirect_target(struct sk_msg_md *msg)
{
	const struct sk_msg *kernel_msg = kernel_ptr(number_of(msg), struct sk_msg);

	return number_of(peek(kernel_msg, sk_redir));
}

/* Counts a message that uses TCP. */
static __always_inline void splice_bulk(struct splice *s, __u32 size)
{
	struct event event = { .netns = s->share, .kind = EVENT_BULK };
	bool was_bulky = s->bulk >= SPLICE_BULKY;

	s->bulk += size;
	if (was_bulky || s->bulk < SPLICE_BULKY)
		return;
	splices_wanted = 1;
	event_send(&event, sizeof(event), 0, 1);
}

/* One decision for each message of a spliced socket. */
static __always_inline void splice_redirect(struct sk_msg_md *msg)
{
	enum splice_counter why = SPLICE_NO_PEER;
	struct bpf_sock *sk = msg->sk;
	struct tcp_sock *from;
	struct splice_key key;
	struct splice *s;
	bool first;

	if (!sk)
		return;
	s = bpf_sk_storage_get(&splices, sk, NULL, 0);
	from = bpf_skc_to_tcp_sock(sk);
	if (!s || !from)
		return;
	key = other_end(&s->key);
	if (s->off)
		goto tcp;
	first = !s->peer;
	if (first) {
		if (bpf_msg_redirect_hash(msg, &splice_sockets, &key, BPF_F_INGRESS) != SK_PASS)
			goto tcp;
		s->peer = redirect_target(msg);
	}
	why = splice_verdict(s, msg->size, from);
	if (why == SPLICE_COUNTERS && (first || bpf_msg_redirect_hash(msg, &splice_sockets, &key,
								      BPF_F_INGRESS) == SK_PASS)) {
		s->redirecting = 1;
		s->burst += SPLICE_MESSAGE + msg->size;
		s->bulk -= s->bulk < msg->size ? s->bulk : msg->size;
		splice_count(s->mesh, SPLICE_MESSAGES, 1);
		splice_count(s->mesh, SPLICE_BYTES, msg->size);
		return;
	}
	if (first) {
		/* A redirection cannot be cancelled, only turned to this end's own TCP. */
		key = s->key;
		bpf_msg_redirect_hash(msg, &splice_sockets, &key, 0);
	}
tcp:
	s->redirecting = 0;
	s->by_tcp = bpf_ktime_get_ns();
	if (!s->off)
		splice_bulk(s, msg->size);
	splice_count(s->mesh, why == SPLICE_COUNTERS ? SPLICE_NO_PEER : why, 1);
}
