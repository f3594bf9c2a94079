// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The programs that a node needs once; inbound.bpf.c has those that each pod needs. A hook is a
 * list of workers in their order: the first that takes the call, or refuses it, ends the list.
 */
#include "lib/core.h"
#include "lib/hook.h"
#include "lib/layouts.h"
#include "lib/records.h"
#include "mesh/connect.h"
#include "mesh/dns.h"
#include "mesh/dns_nat.h"
#include "mesh/listeners.h"
#include "mesh/origdst.h"
#include "mesh/source_route.h"
#include "service/stale.h"
#include "service/translate.h"
#include "splice/mark.h"
#include "splice/redirect.h"
#include "splice/rst.h"
#include "splice/sweep.h"

/*
 * What the agent has as well: a unit test compares them. The types are here because the skeleton
 * knows only those of variables.
 */
const volatile struct shared {
	struct listener_event listener_event;
	struct unread_event unread_event;
	struct swept swept;
	struct stale_peer stale_peer;
	enum mesh_counter mesh_counters; /* how many there are */
	enum service_counter service_counters;
	enum splice_counter splice_counters;
	enum local local_landing;
	__u32 max_meshes;
	__u32 listener_slots;
	__u32 landings;
	__u32 uid_class_shift;
	__u32 of_pod;
	__u32 of_node;
	__u32 cidr_v6;
	__u32 via4_net;
	__u32 via4_mask;
	__u32 via6_hi;
	__u32 via6_lo;
	__u32 dns4_net;
	__u32 dns4_mask;
	__u32 dns6_subnet;
	__u32 canary4;
	__u64 canary6_hi;
	__u64 canary6_lo;
	__u32 splice_large;
	__u32 splice_limit;
} shared = {
	.mesh_counters = MESH_COUNTERS,
	.service_counters = SERVICE_COUNTERS,
	.splice_counters = SPLICE_COUNTERS,
	.local_landing = LOCAL_LANDING,
	.max_meshes = MAX_MESHES,
	.listener_slots = LISTENER_SLOTS,
	.landings = LANDINGS,
	.uid_class_shift = UID_CLASS_SHIFT,
	.of_pod = OF_POD,
	.of_node = OF_NODE,
	.cidr_v6 = CIDR_V6,
	.via4_net = VIA4_NET,
	.via4_mask = VIA4_MASK,
	.via6_hi = VIA6_HI,
	.via6_lo = VIA6_LO,
	.dns4_net = DNS4_NET,
	.dns4_mask = DNS4_MASK,
	.dns6_subnet = DNS6_SUBNET,
	.canary4 = CANARY4,
	.canary6_hi = CANARY6_HI,
	.canary6_lo = CANARY6_LO,
	.splice_large = SPLICE_LARGE,
	.splice_limit = SPLICE_LIMIT,
};

/* What a hook of a cgroup answers. */
#define REFUSE 0
#define PROCEED 1

static __always_inline int verdict_of(enum outcome outcome)
{
	return outcome == REFUSED ? REFUSE : PROCEED;
}

/*
 * Calls of processes.
 */

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	enum outcome outcome = mesh_connect(ctx, AF_INET);

	return verdict_of(outcome == NOT_MINE ? service_connect(ctx, AF_INET) : outcome);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	enum outcome outcome = mesh_connect(ctx, AF_INET6);

	return verdict_of(outcome == NOT_MINE ? service_connect(ctx, AF_INET6) : outcome);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	enum outcome outcome = mesh_sendmsg(ctx, AF_INET);

	return verdict_of(outcome == NOT_MINE ? service_sendmsg(ctx, AF_INET) : outcome);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	enum outcome outcome = mesh_sendmsg(ctx, AF_INET6);

	return verdict_of(outcome == NOT_MINE ? service_sendmsg(ctx, AF_INET6) : outcome);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	if (mesh_recvmsg(ctx, AF_INET) == NOT_MINE)
		service_recvmsg4(ctx);
	return PROCEED;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	if (mesh_recvmsg(ctx, AF_INET6) == NOT_MINE)
		service_recvmsg6(ctx);
	return PROCEED;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	if (mesh_getpeername(ctx, AF_INET) == NOT_MINE)
		service_getpeername4(ctx);
	return PROCEED;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	if (mesh_getpeername(ctx, AF_INET6) == NOT_MINE)
		service_getpeername6(ctx);
	return PROCEED;
}

SEC("cgroup/getsockname4")
int getsockname4(struct bpf_sock_addr *ctx)
{
	mesh_getsockname(ctx, AF_INET);
	return PROCEED;
}

SEC("cgroup/getsockname6")
int getsockname6(struct bpf_sock_addr *ctx)
{
	mesh_getsockname(ctx, AF_INET6);
	return PROCEED;
}

/*
 * The kernel shows a program one page of its answer at most, and nothing of one that comes with an
 * error; and takes what the program saw for the whole answer (with an error, on Linux 5.15), unless
 * told to keep its own.
 */
SEC("cgroup/getsockopt")
int getsockopt(struct bpf_sockopt *ctx)
{
	volatile struct bpf_sockopt *fields = ctx; /* as in origdst_answer */

	if (mesh_getsockopt(ctx) == NOT_MINE &&
	    (fields->retval || fields->optlen > ctx->optval_end - ctx->optval))
		fields->optlen = 0;
	return PROCEED;
}

/* The kernel shows a program one page of a value, and has to be told to take the whole. */
SEC("cgroup/setsockopt")
int setsockopt(struct bpf_sockopt *ctx)
{
	volatile struct bpf_sockopt *fields = ctx; /* as in origdst_answer */

	if (mesh_setsockopt(ctx) == REFUSED)
		return REFUSE;
	if (fields->optlen > ctx->optval_end - ctx->optval)
		fields->optlen = 0;
	return PROCEED;
}

/* The last time that a process has to do with a socket; then the kernel closes it. */
SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	splice_release(ctx);
	return PROCEED;
}

/*
 * TCP's own doing, and packets and messages under way.
 */

SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		origdst_offer(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		splice_watch(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		origdst_take(ctx);
		splice_watch(ctx);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		if (splice_is_due(ctx))
			splice_mark(ctx, captured_role(ctx->sk));
		break;
	case BPF_SOCK_OPS_STATE_CB:
		origdst_withdraw(ctx);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		listener_add(ctx);
		break;
	}
	return 1;
}

/* A message of a socket that is spliced. */
SEC("sk_msg")
int redirect(struct sk_msg_md *msg)
{
	splice_redirect(msg);
	return SK_PASS;
}

/* On the way out of lo, in pods whose DNS is captured. */
SEC("tc")
int dns_nat(struct __sk_buff *skb)
{
	return mesh_dns_nat(skb);
}

/* On the way out of a pod's devices. */
SEC("tc")
int reset(struct __sk_buff *skb)
{
	splice_reset(skb);
	return TC_PASS;
}

/*
 * What the agent runs when it wants to know something. An iterator over connections sees the
 * network namespace of the task that opened it: the agent opens it inside the pod's.
 */

/* Adds the listeners that are older than the hooks. */
SEC("iter/tcp")
int find_listeners(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;

	if (sk)
		listener_look(sk);
	return 0;
}

/*
 * The same by the open files of all tasks, where iter/tcp runs with the socket's spin lock held
 * (until Linux 6.4): the map takes it as well, and the processor would wait for itself for ever.
 */
SEC("iter/task_file")
int find_listeners_by_file(struct bpf_iter__task_file *ctx)
{
	struct file *file = ctx->file;

	if (file)
		listener_look_at_file(file);
	return 0;
}

SEC("iter/tcp")
int wake_writers(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;

	if (sk)
		splice_wake(sk);
	return 0;
}

/* The agent calls this from its own process, see is_agent(). */
SEC("syscall")
int note_agent(const void *ctx)
{
	(void)ctx;
	agent_is_current();
	return 0;
}

/*
 * Programs that visit the sockets with storage in a map. Each is there twice: some kernels are
 * built to refuse iterators over maps, and there the sockets are found by the open files of all
 * tasks, which takes longer, comes to a socket once for each process that has it open, and misses
 * one that no process has open but the kernel holds. The agent loads one of each two. The programs
 * for maps of other layouts are loaded anew, with those maps in place of this layout's. What may be
 * NULL is read once: to the verifier of Linux 6.1 a second load may be NULL again.
 */
SEC("iter/bpf_sk_storage_map")
int sweep_splices(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct splice *s = ctx->value;
	struct sock *sk = ctx->sk;

	if (sk && s)
		splice_sweep(ctx->meta->seq, sk, s);
	return 0;
}

SEC("iter/task_file")
int sweep_splices_by_file(struct bpf_iter__task_file *ctx)
{
	struct sock *sk = sock_of_file(ctx->file);
	struct splice *s = sk ? bpf_sk_storage_get(&splices, sk, NULL, 0) : NULL;

	if (s && s->pass != sweep_pass) {
		s->pass = sweep_pass;
		splice_sweep(ctx->meta->seq, sk, s);
	}
	return 0;
}

SEC("iter/bpf_sk_storage_map")
int drain_splices(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct splice *s = ctx->value;
	struct sock *sk = ctx->sk;

	if (sk && s)
		splice_drain(ctx->meta->seq, sk, s);
	return 0;
}

SEC("iter/task_file")
int drain_splices_by_file(struct bpf_iter__task_file *ctx)
{
	struct sock *sk = sock_of_file(ctx->file);
	struct splice *s = sk ? bpf_sk_storage_get(&splices, sk, NULL, 0) : NULL;

	if (s)
		splice_drain(ctx->meta->seq, sk, s);
	return 0;
}

SEC("iter/bpf_sk_storage_map")
int find_stale_peers(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct dialled_service *to = ctx->value;
	struct sock *sk = ctx->sk;

	if (sk && to)
		stale_look(ctx->meta->seq, sk, to);
	return 0;
}

SEC("iter/task_file")
int find_stale_peers_by_file(struct bpf_iter__task_file *ctx)
{
	struct sock *sk = sock_of_file(ctx->file);
	struct dialled_service *to = sk ? bpf_sk_storage_get(&service_peers, sk, NULL, 0) : NULL;

	if (to)
		stale_look(ctx->meta->seq, sk, to);
	return 0;
}

SEC("iter/bpf_sk_storage_map")
int count_storages(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	if (ctx->sk)
		storages++;
	return 0;
}

SEC("iter/task_file")
int count_storages_by_file(struct bpf_iter__task_file *ctx)
{
	struct sock *sk = sock_of_file(ctx->file);

	if (sk && (bpf_sk_storage_get(&origdsts, sk, NULL, 0) ||
		   bpf_sk_storage_get(&dns_asked, sk, NULL, 0) ||
		   bpf_sk_storage_get(&splices, sk, NULL, 0)))
		storages++;
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
