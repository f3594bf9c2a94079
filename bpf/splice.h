/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Splice: what one end of a connection sends goes straight to the other end's queue, where both
 * are on this node. docs/splice.md has the reasons.
 *
 * sock_ops marks connections that qualify by their addresses. The agent's sweep puts those that
 * have lived for a moment into the map, and only sockets whose state it can see to be safe.
 * From then on redirect decides for each message: the other end's queue, or TCP as ever. Both
 * ways end at the same reader, who always empties the queue first. So:
 *
 *   - TCP -> queue only when the reader has consumed every byte that went by TCP: its copied_seq
 *     has reached this end's write_seq. Both count the same bytes: they are one connection.
 *   - queue -> TCP at any time. It is done for large messages, which TCP carries better, but only
 *     when the queue is empty; and when much is unread, so that TCP's own limits hold the writer.
 */
#pragma once

#define O_NONBLOCK 00004000
#define SEND_SHUTDOWN 2
#define SPLICE_SETTLE 500000000ull /* ns: younger connections are left alone */
#define SPLICE_GIVE_UP 5000000000ull /* ns: what is not eligible by then never is */
#define SPLICE_LARGE (32 * 1024) /* bytes: a message above it is better off with TCP */
#define SPLICE_LIMIT (64 * 1024) /* bytes: unread at the other end at most */
/* Bytes that a message counts for by itself: the kernel takes a kilobyte and charges nobody. */
#define SPLICE_MESSAGE 512
#define SPLICE_BULKY (4 << 20) /* bytes by TCP beyond those redirected: better out of the map */
#define SPLICE_PAGES 64 /* of the reader's pod's memory that must be free */

/* The kernel's flags in the low bits of a pointer, SK_USER_DATA_PTRMASK. */
#define SK_USER_DATA_FLAGS 7ul

/* Some connection wants to be looked at. */
__u32 splices_wanted = 0;

static __always_inline bool leg_on(__u32 which)
{
	struct leg *leg = bpf_map_lookup_elem(&legs, &which);

	return leg && leg->on;
}

/* Is this an address of a pod of this node that may be spliced with? */
static __always_inline bool is_neighbour(const struct addr *a)
{
	struct local_key key = { .netns = 0, .addr = *a };

	return bpf_map_lookup_elem(&locals, &key);
}

/* Which leg a connection is; LEGS: none, or its other end is not on this node. */
static __always_inline enum splice_leg leg_of(struct bpf_sock *sk, bool client, __u64 netns,
					      const struct pod *pod, const struct conn *c)
{
	const struct addr *remote = client ? &c->dst : &c->src;
	struct origdst *od = origdst_of(sk, 0);

	/* An app that was sent to its proxy, and the socket that the proxy accepted. */
	if (od)
		return addr_is_via(&c->dst) && c->dport == pod->out_port ? LEG_APP : LEGS;
	/* The proxy's call to its app. */
	if (addr_is_passthrough(&c->src))
		return LEG_APP;
	return !pod_owns(netns, remote) && is_neighbour(remote) ? LEG_SIDECAR : LEGS;
}

/* A connection is established: does it stay on this node? */
static __always_inline void splice_offer(struct bpf_sock_ops *ctx, bool client)
{
	__u64 netns = bpf_get_netns_cookie(ctx);
	const struct pod *pod = pod_by_netns(netns);
	struct bpf_sock *sk = ctx->sk;
	struct splice *s;
	enum splice_leg leg;
	struct conn c;

	if (!pod || !sk || !(pod->flags & POD_SPLICE))
		return;
	c = sockops_conn(ctx, client);
	leg = leg_of(sk, client, netns, pod, &c);
	if (leg == LEGS || !leg_on(leg))
		return;
	s = bpf_sk_storage_get(&splices, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!s)
		return;
	s->key.src = c.src;
	s->key.dst = c.dst;
	s->key.sport = c.sport;
	s->key.dport = c.dport;
	s->key.client_isn = (client ? ctx->snd_una : ctx->rcv_nxt) - 1;
	s->key.server_isn = (client ? ctx->rcv_nxt : ctx->snd_una) - 1;
	s->key.server = !client;
	s->leg = leg;
	s->mesh = pod->mesh;
	s->since = bpf_ktime_get_ns();
	s->state = SPLICE_CANDIDATE;
	splices_wanted = 1;
}

/* What a socket has while it is in the map. */
static __always_inline struct sk_psock *psock_of(const struct sock *sk)
{
	return (void *)((__u64)BPF_CORE_READ(sk, sk_user_data) & ~SK_USER_DATA_FLAGS);
}

/* Is all that was redirected to a socket read? */
static __always_inline bool queue_is_empty(const struct sock *sk)
{
	struct sk_psock *psock = psock_of(sk);

	return !psock || BPF_CORE_READ(psock, ingress_msg.next) == &psock->ingress_msg;
}

/*
 * Whether a socket may be in the map at all. Blocking readers are not: the kernel answers them
 * EAGAIN for any wake-up that brings no data. Nor are sockets with an upper layer (kTLS), where
 * the program would see plain text, or that wait for word of pages that they sent.
 */
static __always_inline bool splice_safe(const struct sock *sk)
{
	const struct inet_connection_sock *icsk = (const void *)sk;

	return BPF_CORE_READ(sk, sk_socket, file, f_flags) & O_NONBLOCK &&
	       !BPF_CORE_READ(icsk, icsk_ulp_ops) &&
	       !(BPF_CORE_READ(sk, __sk_common.skc_flags) &
		 (1ul << bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY)));
}

/* Set by the agent: 1: take every connection out of use. */
__u32 sweep_off = 0;
/*
 * Answers to the agent: sockets that the next sweep should look at again, those that are on their
 * way out, and those with redirected data that is not read.
 */
__u32 splices_left = 0;
__u32 splices_leaving = 0;
__u32 splices_unread = 0;

/*
 * Out of the map again: the kernel's way to TCP is slower for sockets in it. With a socket goes its
 * queue, so a connection leaves in steps, a sweep each at the least: both ends send by TCP; no
 * call is under way that began before (each holds a reference); both queues are empty, and
 * stay so. The agent is told of each end that has come so far, and takes both out.
 */
static __always_inline void splice_leave(struct bpf_iter__bpf_sk_storage_map *ctx,
					 const struct sock *sk, struct splice *s)
{
	const struct sk_psock *psock = psock_of(sk);
	struct splice_key key = s->key;

	if (!psock) {
		s->state = SPLICE_OUT;
		count_n(s->mesh, SPLICE_LEFT, 1);
		return;
	}
	splices_leaving++;
	if (!s->quiet)
		s->quiet = BPF_CORE_READ(psock, refcnt.refs.counter) == 1;
	else if (queue_is_empty(sk))
		bpf_seq_write(ctx->meta->seq, &key, sizeof(key));
}

/* Does a spliced connection leave, by its own or by its other end's doing? */
static __always_inline bool splice_leaves(const struct sock *sk, struct splice *s)
{
	struct splice_key key = s->key;
	__u8 one = 1;

	if (bpf_map_lookup_elem(&leaving, &key)) {
		bpf_map_delete_elem(&leaving, &key);
		return true;
	}
	if (s->bulk < SPLICE_BULKY && splice_safe(sk))
		return false;
	key.server = !key.server;
	return !bpf_map_update_elem(&leaving, &key, &one, BPF_ANY);
}

/* Puts what is eligible into the map, once it has settled, and takes pods' changes over. */
SEC("iter/bpf_sk_storage_map")
int sweep_splices(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct splice *s = ctx->value;
	struct sock *sk = ctx->sk;
	struct outbound owner = {};
	const struct pod *pod;
	struct splice_key key;
	__u64 age;

	if (!sk || !s)
		return 0;
	pod = pod_by_netns(BPF_CORE_READ(sk, __sk_common.skc_net.net, net_cookie));
	if (!queue_is_empty(sk))
		splices_unread++;
	/* Off for good: not for a moment may it be on again, or a message could follow. */
	if (s->state == SPLICE_LEAVING) {
		splice_leave(ctx, sk, s);
		return 0;
	}
	if (s->state == SPLICE_IN && splice_leaves(sk, s)) {
		s->off = 1;
		s->state = SPLICE_LEAVING;
		splices_leaving++;
		return 0;
	}
	s->off =
		sweep_off || !pod || !(pod->flags & POD_SPLICE) || !leg_on(s->leg) ||
		(s->leg == LEG_SIDECAR && !is_neighbour(s->key.server ? &s->key.src : &s->key.dst));
	if (s->off || !pod || s->state != SPLICE_CANDIDATE)
		return 0;
	age = bpf_ktime_get_ns() - s->since;
	owner_of_kernel(sk, &owner);
	if (age < SPLICE_SETTLE || (age < SPLICE_GIVE_UP && !splice_safe(sk))) {
		splices_left++;
		return 0;
	}
	s->state = SPLICE_OUT;
	if (!splice_safe(sk)) {
		count(pod, SPLICE_NOT_SAFE);
		return 0;
	}
	if (s->leg == LEG_SIDECAR && owner.uid != pod->proxy_uid) {
		count(pod, SPLICE_NOT_PROXY);
		return 0;
	}
	key = s->key;
	if (bpf_map_update_elem(&spliced, &key, sk, BPF_NOEXIST)) {
		count(pod, SPLICE_MAP_FULL);
		return 0;
	}
	s->state = SPLICE_IN;
	count(pod, SPLICE_SOCKETS);
	return 0;
}

/*
 * Is there memory for a message? The kernel would fail the writer's call with ENOMEM where TCP
 * makes it wait: so nothing is redirected while TCP is short of memory, or the reader's pod is
 * close to its limit.
 */
static __always_inline bool splice_room(const struct sock *to)
{
	const struct mem_cgroup *group = BPF_CORE_READ(to, sk_memcg);
	unsigned long *pressure = BPF_CORE_READ(to, __sk_common.skc_prot, memory_pressure);
	unsigned long short_of_it = 0;

	bpf_probe_read_kernel(&short_of_it, sizeof(short_of_it), pressure);
	if (short_of_it)
		return false;
	return !group || BPF_CORE_READ(group, memory.usage.counter) + SPLICE_PAGES <
				 (long)BPF_CORE_READ(group, memory.max);
}

/* May this end send, and that one be sent to, other than by TCP? */
static __always_inline bool splice_open(const struct tcp_sock *from, const struct sock *to)
{
	const struct sock *sk = (const void *)from;

	/* After shutdown, or with an upper layer, TCP has an answer of its own. */
	return !(sk->sk_shutdown & SEND_SHUTDOWN) && !from->inet_conn.icsk_ulp_ops &&
	       BPF_CORE_READ(to, __sk_common.skc_state) == BPF_TCP_ESTABLISHED &&
	       !BPF_CORE_READ(to, sk_shutdown) && splice_safe(to) && splice_room(to);
}

/* TCP or queue? A counter says why TCP; COUNTERS: the queue. */
static __always_inline enum counter splice_verdict(struct splice *s, __u32 size,
						   const struct tcp_sock *from)
{
	const struct tcp_sock *to = (const void *)s->peer;
	bool empty;

	if (!s->redirecting && from->write_seq != BPF_CORE_READ(to, copied_seq))
		return SPLICE_UNREAD;
	if (!splice_open(from, (const void *)to))
		return SPLICE_NO_PEER;
	empty = queue_is_empty((const void *)to);
	if (empty)
		s->burst = 0;
	if (empty && size > SPLICE_LARGE)
		return SPLICE_BULK;
	if (s->burst + SPLICE_MESSAGE + size > SPLICE_LIMIT)
		return SPLICE_SPILLED;
	return COUNTERS;
}

/*
 * Where the other end's state is: the map's look-up that redirects leaves it in the message. It
 * stays true for as long as the map has that end, and without that nothing is redirected.
 */
static __always_inline __u64 redirect_target(struct sk_msg_md *msg)
{
	const struct sk_msg *kernel_msg = NULL;

	/* Read back from memory, the pointer is a plain number, which may be added to. */
	bpf_probe_read_kernel(&kernel_msg, sizeof(kernel_msg), &msg);
	return (__u64)BPF_CORE_READ(kernel_msg, sk_redir);
}

/* One decision for each message of a spliced socket. */
SEC("sk_msg")
int redirect(struct sk_msg_md *msg)
{
	enum counter why = SPLICE_NO_PEER;
	struct bpf_sock *sk = msg->sk;
	struct tcp_sock *from;
	struct splice_key key;
	struct splice *s;
	bool first;

	if (!sk)
		return SK_PASS;
	s = bpf_sk_storage_get(&splices, sk, NULL, 0);
	from = bpf_skc_to_tcp_sock(sk);
	if (!s || !from)
		return SK_PASS;
	key = s->key;
	key.server = !key.server;
	if (s->off)
		goto tcp;
	first = !s->peer;
	if (first) {
		if (bpf_msg_redirect_hash(msg, &spliced, &key, BPF_F_INGRESS) != SK_PASS)
			goto tcp;
		s->peer = redirect_target(msg);
	}
	why = splice_verdict(s, msg->size, from);
	if (why == COUNTERS &&
	    (first || bpf_msg_redirect_hash(msg, &spliced, &key, BPF_F_INGRESS) == SK_PASS)) {
		s->redirecting = 1;
		s->burst += SPLICE_MESSAGE + msg->size;
		s->bulk -= s->bulk < msg->size ? s->bulk : msg->size;
		count_n(s->mesh, SPLICE_MESSAGES, 1);
		count_n(s->mesh, SPLICE_BYTES, msg->size);
		return SK_PASS;
	}
	if (first) {
		/* A redirection can't be taken back, only turned to this end's own TCP. */
		key.server = !key.server;
		bpf_msg_redirect_hash(msg, &spliced, &key, 0);
	}
tcp:
	s->redirecting = 0;
	if (!s->off) {
		s->bulk += msg->size;
		if (s->bulk >= SPLICE_BULKY)
			splices_wanted = 1;
	}
	count_n(s->mesh, why == COUNTERS ? SPLICE_NO_PEER : why, 1);
	return SK_PASS;
}
