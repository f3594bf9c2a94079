/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The agent's sweep over all marked sockets: it decides which enter the map, leave it, or need
 * waking.
 */
#pragma once

#include "lib/event.h"
#include "lib/owner.h"
#include "splice/counter.h"
#include "splice/key.h"
#include "splice/leg.h"
#include "splice/memory.h"
#include "splice/socket.h"

#define EBUSY 16
#define SOCK_NOSPACE 2 /* bit of a socket's flags: its writer waits for room */
#define SOL_TCP 6
#define TCP_NOTSENT_LOWAT 25
#define SPLICE_SETTLE 500000000ull /* ns from the mark on */
#define SPLICE_GIVE_UP 5000000000ull /* ns: a socket not eligible by then never is */

/*
 * Results for the agent: the numbers of sockets that the next sweep should look at again, and of
 * those that are leaving.
 */
__u32 splices_left = 0;
__u32 splices_leaving = 0;
/*
 * Set by the agent: the number of a sweep by open files, from 1 to 255. Several processes can have
 * the same socket open, and it leaves the map in steps, one in each sweep.
 */
__u32 sweep_pass = 0;

/*
 * Leaves the map, because the kernel's path to TCP is slower for sockets in it. A socket's queue
 * goes with it, so a connection leaves in steps, each at least one sweep: both ends send by TCP; no
 * earlier call is still running (each holds a reference); both queues are empty, and stay so. The
 * agent is told of each end that has come so far, and removes both.
 */
static __always_inline void splice_leave(struct seq_file *seq, const struct sock *sk,
					 struct splice *s)
{
	const struct sk_psock *psock = psock_of(sk);
	struct swept swept = { .leaves = s->key };

	if (!psock) {
		s->state = SPLICE_OUT;
		splice_uncount(s);
		splice_count(s->mesh, SPLICE_LEFT, 1);
		return;
	}
	splices_leaving++;
	if (!s->quiet)
		s->quiet = peek(psock, refcnt.refs.counter) == 1;
	else if (queue_is_empty(sk))
		bpf_seq_write(seq, &swept, sizeof(swept));
}

/*
 * Does a writer wait for an edge that never comes? It waits for memory, and has no data of its own
 * in TCP whose acknowledgement would make room. TCP lets such a writer go on with the memory that
 * it has; for a socket in the map it does not.
 */
static __always_inline bool writer_is_stuck(const struct tcp_sock *tp)
{
	const struct socket *socket = peek(tp, inet_conn.icsk_inet.sk.sk_socket);

	return socket && peek(socket, flags) & (1ul << SOCK_NOSPACE) &&
	       peek(tp, write_seq) == peek(tp, snd_una);
}

/*
 * Makes such a writer retry: setting this limit to its present value makes the kernel signal room.
 */
static __always_inline void splice_wake(struct sock_common *sk)
{
	struct tcp_sock *tp;
	int limit;

	if (sk->skc_state == BPF_TCP_LISTEN)
		return;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp || !writer_is_stuck(tp))
		return;
	limit = (int)tp->notsent_lowat;
	bpf_setsockopt(tp, SOL_TCP, TCP_NOTSENT_LOWAT, &limit, sizeof(limit));
}

/* Does a spliced connection leave the map, because of this end or of its other end? */
static __always_inline bool splice_leaves(const struct tcp_sock *tp, struct splice *s)
{
	struct splice_key key = s->key;
	__u8 one = 1;

	if (bpf_map_lookup_elem(&splice_leaving, &key)) {
		bpf_map_delete_elem(&splice_leaving, &key);
		return true;
	}
	if (s->bulk < SPLICE_BULKY && splice_safe(tp) && !tcp_is_short(&tp->inet_conn.icsk_inet.sk))
		return false;
	key = other_end(&key);
	return !bpf_map_update_elem(&splice_leaving, &key, &one, BPF_ANY);
}

static __always_inline void splice_refuse(struct splice *s, const struct pod *pod,
					  enum splice_counter why)
{
	s->state = SPLICE_OUT;
	splice_count(pod->mesh, why, 1);
}

/* Puts eligible sockets into the map once they have settled, and applies changes of pods. */
static __always_inline void splice_sweep(struct seq_file *seq, struct sock *sk, struct splice *s)
{
	struct owner owner = {};
	struct swept swept = {};
	const struct pod *pod;
	struct splice_key key;
	struct tcp_sock *tp;
	__u64 netns, age;
	long err;

	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return;
	netns = sk->__sk_common.skc_net.net->net_cookie;
	if (writer_is_stuck(tp)) {
		swept.stuck = netns;
		bpf_seq_write(seq, &swept, sizeof(swept));
	}
	if (s->state == SPLICE_OUT)
		return;
	/*
	 * Switched off for good: it may not be on again even for a moment, or a message could
	 * follow.
	 */
	if (s->state == SPLICE_LEAVING) {
		splice_leave(seq, sk, s);
		return;
	}
	if (s->state == SPLICE_IN && splice_leaves(tp, s)) {
		s->off = 1;
		s->state = SPLICE_LEAVING;
		splices_leaving++;
		return;
	}
	pod = pod_by_netns(netns);
	s->off = !pod || !(pod->flags & POD_SPLICE) || !leg_on(s->leg) ||
		 (s->leg == LEG_SIDECAR && !is_neighbour(&s->key.remote));
	if (s->off || !pod || s->state != SPLICE_CANDIDATE)
		return;
	age = bpf_ktime_get_ns() - s->since;
	if (age < SPLICE_SETTLE || (age < SPLICE_GIVE_UP && !splice_safe(tp)) || tcp_is_short(sk)) {
		splices_left++;
		return;
	}
	if (!splice_safe(tp)) {
		splice_refuse(s, pod, SPLICE_NOT_SAFE);
		return;
	}
	owner_of_kernel(sk, &owner);
	if (s->leg == LEG_SIDECAR && !is_proxy_user(pod, owner.uid)) {
		splice_refuse(s, pod, SPLICE_NOT_PROXY);
		return;
	}
	if (!share_take(&splice_shares, netns, SPLICED)) {
		splice_refuse(s, pod, SPLICE_MAP_FULL);
		return;
	}
	s->share = netns;
	key = s->key;
	err = bpf_map_update_elem(&splice_sockets, &key, sk, BPF_NOEXIST);
	if (err) {
		splice_uncount(s);
		splice_refuse(s, pod, err == -EBUSY ? SPLICE_IN_OTHER_MAP : SPLICE_MAP_FULL);
		return;
	}
	s->by_tcp = bpf_ktime_get_ns();
	s->state = SPLICE_IN;
	splice_count(pod->mesh, SPLICE_SOCKETS, 1);
}

/*
 * Has a socket send by TCP from now on, and tells the agent of it if it has unread redirected data.
 * Of the map, which may be another layout's, only the first field is known.
 */
static __always_inline void splice_drain(struct seq_file *seq, struct sock *sk, struct splice *s)
{
	__u64 cookie = bpf_get_socket_cookie(sk);

	s->off = 1;
	if (!queue_is_empty(sk))
		bpf_seq_write(seq, &cookie, sizeof(cookie));
}
