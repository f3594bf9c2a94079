// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What the mesh's policy says about a connection, asked of the policy itself: who wants to know
 * runs this program (BPF_PROG_TEST_RUN) with the maps that the question is about. It is attached to
 * nothing. Its type is that of a filter: programs of type syscall may use no tries.
 */
#include "mesh/policy.h"
#include "lib/reason.h"
#include "mesh/inbound_policy.h"

enum direction {
	OUTBOUND = 1, /* a pod's process connects, or sends a datagram */
	INBOUND, /* a connection comes to the pod */
};

/* The packet that the program is run with: filled by who asks, but for the decision. */
struct question {
	__u64 netns; /* cookie of the pod's network namespace */
	struct addr src; /* any: not bound */
	struct addr dst;
	__u16 port; /* of the destination */
	__u16 protocol;
	struct owner owner; /* of the socket, in the pod's numbers */
	__u32 ifindex; /* that it leaves by, bound to it, or comes by; 0: none */
	enum direction direction;
	struct decision decision;
	__u32 pad;
};
_Static_assert(sizeof(struct question) == 72, "question");

/* Unused: the skeleton knows only the types of variables. */
const volatile struct question question_layout;

static __always_inline struct decision answer(const struct question *q)
{
	const struct pod *pod = pod_by_netns(q->netns);
	struct outbound c = {
		.netns = q->netns,
		.src = q->src,
		.dst = q->dst,
		.dport = q->port,
		.owner = q->owner,
		.ifindex = q->ifindex,
	};

	if (!pod)
		return decide(GO_DIRECT, REASON_NOT_ENROLLED);
	if (q->direction == INBOUND)
		return inbound_decision(pod, c.netns, &c.src, &c.dst, c.dport, c.ifindex);
	return q->protocol == IPPROTO_UDP ? udp_decision(pod, &c) : tcp_decision(pod, &c);
}

SEC("tc")
int ask_policy(struct __sk_buff *skb)
{
	struct question q;

	if (bpf_skb_load_bytes(skb, 0, &q, sizeof(q)))
		return TC_DROP;
	q.decision = answer(&q);
	bpf_skb_store_bytes(skb, 0, &q, sizeof(q), 0);
	return TC_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
