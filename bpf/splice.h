/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Splice: what one end of a connection sends goes straight to the other end's queue, where both
 * are on this node. docs/splice.md has the reasons.
 *
 * sock_ops marks connections that have something to say both ways and qualify by their addresses.
 * The agent's sweep puts those that have settled into the map, and only sockets whose state it
 * can see to be safe.
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
#define EBUSY 16
#define SOCK_NOSPACE 2 /* bit of a socket's flags: its writer was told to wait */
#define SOL_TCP 6
#define TCP_NOTSENT_LOWAT 25
#define SPLICE_TALK 16 /* segments with data each way: below it, a connection is left alone */
#define SPLICE_SETTLE 500000000ull /* ns from the mark on */
#define SPLICE_GIVE_UP 5000000000ull /* ns: what is not eligible by then never is */
#define SPLICE_LARGE (32 * 1024) /* bytes: a message above it is better off with TCP */
#define SPLICE_LIMIT (64 * 1024) /* bytes: unread at the other end at most */
/* Bytes that a message counts for by itself: the kernel takes a kilobyte and charges nobody. */
#define SPLICE_MESSAGE 512
#define SPLICE_BULKY (4 << 20) /* bytes by TCP beyond those redirected: better out of the map */
#define SPLICE_PAGES 1024 /* that must be free below TCP's limit and each of the reader's */
#define SPLICE_GROUPS 16 /* memory cgroups above each other: a pod's are five, in kind nine */
/* Of spliced sockets that are released, and their packets: above 6, it takes a privilege to set. */
#define SPLICE_PRIORITY 0x53696465

/* The kernel's flags in the low bits of a pointer, SK_USER_DATA_PTRMASK. */
#define SK_USER_DATA_FLAGS 7ul

/*
 * A message of each direction goes by TCP at least this often, ns. Its packets keep the connection
 * alive in connection tracking, and a network policy that has come since stops it: what that
 * dropped is unread, and nothing is redirected before it is read.
 */
const volatile __u64 splice_refresh = 1000000000;

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
 * The key of a connection's end; false: TCP's counts don't say where it began. What was
 * acknowledged counts a client's SYN, and not a server's.
 */
static __always_inline bool splice_key_of(const struct tcp_sock *tp, struct splice_key *key)
{
	const struct sock_common *sk = &tp->inet_conn.icsk_inet.sk.__sk_common;
	__u32 sent = tp->snd_nxt - (__u32)(tp->bytes_sent - tp->bytes_retrans);
	__u32 acked = tp->snd_una - (__u32)tp->bytes_acked;

	if (sk->skc_family == AF_INET6) {
		/* v4-mapped, where it speaks IPv4 */
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

/* Which leg an end is of; LEGS: none, or its other end is not on this node. */
static __always_inline enum splice_leg leg_of(const struct origdst *od, __u64 netns,
					      const struct pod *pod, const struct splice_key *key)
{
	/* An app that was sent to its proxy, and the socket that the proxy accepted. */
	if (od && od->role == ROLE_CLIENT)
		return addr_is_via(&key->remote) && key->rport == pod->out_port ? LEG_APP : LEGS;
	if (od)
		return addr_is_via(&key->local) && key->lport == pod->out_port ? LEG_APP : LEGS;
	/* The proxy's call to its app. */
	if (addr_is_passthrough(&key->local) || addr_is_passthrough(&key->remote))
		return LEG_APP;
	return !pod_owns(netns, &key->remote) && is_neighbour(&key->remote) ? LEG_SIDECAR : LEGS;
}

/*
 * A connection is established. Most are gone after a request: it is looked at once it has said
 * more, which TCP's measurements of the round trip tell.
 */
static __always_inline void splice_watch(struct bpf_sock_ops *ctx)
{
	const struct pod *pod = pod_by_netns(bpf_get_netns_cookie(ctx));

	if (pod && pod->flags & POD_SPLICE && (leg_on(LEG_SIDECAR) || leg_on(LEG_APP)))
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
}

/*
 * Does a connection that talks stay on this node? It is decided once. The flag stays set: others at
 * this hook may want it too.
 */
static __always_inline void splice_mark(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	enum splice_leg leg = LEGS;
	struct tcp_sock *tp;
	const struct pod *pod;
	struct splice *s;
	__u64 netns;

	if (ctx->data_segs_out < SPLICE_TALK || ctx->data_segs_in < SPLICE_TALK)
		return;
	if (!sk || bpf_sk_storage_get(&splices, sk, NULL, 0))
		return;
	netns = bpf_get_netns_cookie(ctx);
	pod = pod_by_netns(netns);
	tp = bpf_skc_to_tcp_sock(sk);
	s = bpf_sk_storage_get(&splices, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!pod || !tp || !s)
		return;
	if (splice_key_of(tp, &s->key))
		leg = leg_of(bpf_sk_storage_get(&origdsts, sk, NULL, 0), netns, pod, &s->key);
	s->state = SPLICE_OUT;
	if (leg == LEGS || !leg_on(leg))
		return;
	s->leg = leg;
	s->mesh = pod->mesh;
	s->since = bpf_ktime_get_ns();
	s->state = SPLICE_CANDIDATE;
	splices_wanted = 1;
}

/* What a socket has while it is in the map. */
static __always_inline const struct sk_psock *psock_of(const struct sock *sk)
{
	__u64 psock = (__u64)peek(sk, sk_user_data) & ~SK_USER_DATA_FLAGS;

	return psock ? kernel_ptr(psock, struct sk_psock) : NULL;
}

/* Is all that was redirected to a socket read? */
static __always_inline bool queue_is_empty(const struct sock *sk)
{
	const struct sk_psock *psock = psock_of(sk);

	return !psock || (__u64)peek(psock, ingress_msg.next) == (__u64)&psock->ingress_msg;
}

/*
 * Whether a socket may be in the map at all. Blocking readers are not: the kernel answers them
 * EAGAIN for any wake-up that brings no data. Nor are sockets with an upper layer (kTLS), where
 * the program would see plain text, or that wait for word of pages that they sent.
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

/* Set by the agent: 1: take every connection out of use. */
__u32 sweep_off = 0;
/*
 * Answers to the agent: sockets that the next sweep should look at again, those that are on their
 * way out, and those with redirected data that is not read.
 */
__u32 splices_left = 0;
__u32 splices_leaving = 0;
__u32 splices_unread = 0;

/* Unused: the skeleton knows only the types of variables. */
const volatile struct swept swept_layout;
const volatile struct event event_layout;

/* It is no more in its pod's share. Two may say so at once. */
static __always_inline void splice_uncount(struct splice *s)
{
	__u64 netns = __sync_lock_test_and_set(&s->share, 0);

	if (netns)
		share_give(&spliced_of, netns);
}

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
	struct swept swept = { .leaves = s->key };

	if (!psock) {
		s->state = SPLICE_OUT;
		splice_uncount(s);
		count_n(s->mesh, SPLICE_LEFT, 1);
		return;
	}
	splices_leaving++;
	if (!s->quiet)
		s->quiet = peek(psock, refcnt.refs.counter) == 1;
	else if (queue_is_empty(sk))
		bpf_seq_write(ctx->meta->seq, &swept, sizeof(swept));
}

/*
 * Is TCP short of memory? Then its own sockets go on little by little, and wake who waits to write
 * when there is more: those in the map do neither.
 */
static __always_inline bool tcp_is_short(const struct sock *sk)
{
	unsigned long pressure = 0;

	bpf_probe_read_kernel(&pressure, sizeof(pressure),
			      sk->__sk_common.skc_prot->memory_pressure);
	return pressure;
}

/*
 * Does a writer wait for an edge that nobody gives? It was told to, for lack of memory: there is
 * nothing of its own in TCP, which an acknowledgement would make room for. TCP lets such a writer
 * go on with what it has, and a socket in the map does not.
 */
static __always_inline bool writer_is_stuck(const struct tcp_sock *tp)
{
	const struct socket *socket = peek(tp, inet_conn.icsk_inet.sk.sk_socket);

	return socket && peek(socket, flags) & (1ul << SOCK_NOSPACE) &&
	       peek(tp, write_seq) == peek(tp, snd_una);
}

/*
 * Has such a writer try again: setting this limit, to what it is, makes the kernel say that there
 * is room.
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

/* Does a spliced connection leave, by its own or by its other end's doing? */
static __always_inline bool splice_leaves(const struct tcp_sock *tp, struct splice *s)
{
	struct splice_key key = s->key;
	__u8 one = 1;

	if (bpf_map_lookup_elem(&leaving, &key)) {
		bpf_map_delete_elem(&leaving, &key);
		return true;
	}
	if (s->bulk < SPLICE_BULKY && splice_safe(tp) && !tcp_is_short(&tp->inet_conn.icsk_inet.sk))
		return false;
	key = other_end(&key);
	return !bpf_map_update_elem(&leaving, &key, &one, BPF_ANY);
}

static __always_inline void splice_refuse(struct splice *s, const struct pod *pod, enum counter why)
{
	s->state = SPLICE_OUT;
	count(pod, why);
}

/* Puts what is eligible into the map, once it has settled, and takes pods' changes over. */
static __always_inline void splice_sweep(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct splice *s = ctx->value;
	struct sock *sk = ctx->sk;
	struct outbound owner = {};
	struct swept swept = {};
	const struct pod *pod;
	struct splice_key key;
	struct tcp_sock *tp;
	__u64 netns, age;
	long err;

	if (!sk || !s)
		return;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return;
	netns = sk->__sk_common.skc_net.net->net_cookie;
	if (writer_is_stuck(tp)) {
		swept.stuck = netns;
		bpf_seq_write(ctx->meta->seq, &swept, sizeof(swept));
	}
	/* Of another layout's map, only the first field is known. */
	if (!sweep_off && s->state == SPLICE_OUT)
		return;
	if (!queue_is_empty(sk))
		splices_unread++;
	if (sweep_off) {
		s->off = 1;
		return;
	}
	/* Off for good: not for a moment may it be on again, or a message could follow. */
	if (s->state == SPLICE_LEAVING) {
		splice_leave(ctx, sk, s);
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
	if (!share_take(&spliced_of, netns, SPLICED)) {
		splice_refuse(s, pod, SPLICE_MAP_FULL);
		return;
	}
	s->share = netns;
	key = s->key;
	err = bpf_map_update_elem(&spliced, &key, sk, BPF_NOEXIST);
	if (err) {
		splice_uncount(s);
		splice_refuse(s, pod, err == -EBUSY ? SPLICE_IN_OTHER_MAP : SPLICE_MAP_FULL);
		return;
	}
	s->by_tcp = bpf_ktime_get_ns();
	s->state = SPLICE_IN;
	count(pod, SPLICE_SOCKETS);
}

/* cgroup v1 with a limit of TCP's own, and kernels that may lack it. */
struct mem_cgroup___v1 {
	bool tcpmem_active;
} __attribute__((preserve_access_index));

/* How far a memory cgroup is from its limit, in pages, and the one above. */
struct headroom {
	long usage;
	long max;
	const struct page_counter *parent;
};

static __always_inline struct headroom headroom_of(const struct page_counter *counter)
{
	char copy[256] __attribute__((aligned(8)));

	if (CASTS)
		return (struct headroom){
			.usage = counter->usage.counter,
			.max = (long)counter->max,
			.parent = counter->parent,
		};
	/* Where each read is a call: one for all. The kernels without casts have no larger ones. */
	bpf_probe_read_kernel(copy, bpf_core_type_size(struct page_counter), counter);
#define COPIED(type, field) (*(type *)(copy + bpf_core_field_offset(struct page_counter, field)))
	return (struct headroom){
		.usage = COPIED(long, usage),
		.max = COPIED(long, max),
		.parent = COPIED(const struct page_counter *, parent),
	};
#undef COPIED
}

/*
 * Is there room below every limit that counts for the reader, its pod's and those above? In a tree
 * that is deeper than is known, there is none; nor in cgroup v1, where TCP alone has limits.
 */
static __always_inline bool groups_have_room(const struct sock *to)
{
	const struct mem_cgroup *group = peek(to, sk_memcg);
	const struct page_counter *counter;

	if (!group)
		return true;
	if (bpf_core_field_exists(struct mem_cgroup___v1, tcpmem_active) &&
	    peek(kernel_ptr(group, struct mem_cgroup___v1), tcpmem_active))
		return false;
	counter = &group->memory;
	for (int i = 0; i < SPLICE_GROUPS; i++) {
		struct headroom room = headroom_of(counter);

		if (room.usage + SPLICE_PAGES >= room.max)
			return false;
		if (!room.parent)
			return true;
		counter = room.parent;
	}
	return false;
}

/*
 * Is there memory for a message? The kernel would fail the writer's call with ENOMEM where TCP
 * makes it wait, or first kill a process of the reader's pod. So nothing is redirected unless TCP
 * is below tcp_mem[0], where no charge fails, and the reader is below all of its limits. What is
 * left free is for what others charge between this look and the kernel's charge: a dozen
 * processors' messages (17 pages) and stocks (64) at once.
 */
static __always_inline bool splice_room(const struct sock *from, const struct sock *to)
{
	const struct proto *tcp = from->__sk_common.skc_prot;
	long limit = 0;

	bpf_probe_read_kernel(&limit, sizeof(limit), tcp->sysctl_mem);
	return tcp->memory_allocated->counter + SPLICE_PAGES < limit && groups_have_room(to);
}

/* May this end send, and that one be sent to, other than by TCP? */
static __always_inline bool splice_open(const struct tcp_sock *from, const struct tcp_sock *to)
{
	const struct sock *from_sk = &from->inet_conn.icsk_inet.sk;
	const struct sock *to_sk = &to->inet_conn.icsk_inet.sk;

	/* After shutdown, or with an upper layer, TCP has an answer of its own. */
	return !(from_sk->sk_shutdown & SEND_SHUTDOWN) && !from->inet_conn.icsk_ulp_ops &&
	       peek(to_sk, __sk_common.skc_state) == BPF_TCP_ESTABLISHED &&
	       !peek(to_sk, sk_shutdown) && peek(to_sk, sk_priority) != SPLICE_PRIORITY &&
	       splice_safe(to) && splice_room(from_sk, to_sk);
}

/* TCP or queue? A counter says why TCP; COUNTERS: the queue. */
static __always_inline enum counter splice_verdict(struct splice *s, __u32 size,
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
	return COUNTERS;
}

/*
 * Where the other end's state is: the map's look-up that redirects leaves it in the message. It
 * stays true for as long as the map has that end, and without that nothing is redirected.
 */
static __always_inline __u64 redirect_target(struct sk_msg_md *msg)
{
	const struct sk_msg *kernel_msg = kernel_ptr(number_of(msg), struct sk_msg);

	return number_of(peek(kernel_msg, sk_redir));
}

/* What went by TCP. */
static __always_inline void splice_bulk(struct splice *s, __u32 size)
{
	struct event event = { .kind = EVENT_BULK };
	bool was_bulky = s->bulk >= SPLICE_BULKY;

	s->bulk += size;
	if (was_bulky || s->bulk < SPLICE_BULKY)
		return;
	splices_wanted = 1;
	bpf_ringbuf_output(&events, &event, sizeof(event), 0);
}

/* One decision for each message of a spliced socket. */
static __always_inline void splice_redirect(struct sk_msg_md *msg)
{
	enum counter why = SPLICE_NO_PEER;
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
		return;
	}
	if (first) {
		/* A redirection can't be taken back, only turned to this end's own TCP. */
		key = s->key;
		bpf_msg_redirect_hash(msg, &spliced, &key, 0);
	}
tcp:
	s->redirecting = 0;
	s->by_tcp = bpf_ktime_get_ns();
	if (!s->off)
		splice_bulk(s, msg->size);
	count_n(s->mesh, why == COUNTERS ? SPLICE_NO_PEER : why, 1);
}
