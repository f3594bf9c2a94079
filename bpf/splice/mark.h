/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Marks connections for the sweep that stay on this node and have sent data both ways. */
#pragma once

#include "splice/key.h"
#include "splice/leg.h"

#define SPLICE_TALK 16 /* segments with data each way: below it, a connection is left alone */

/*
 * A connection is established. Most end after one request, so it is looked at once it has sent
 * more, which TCP's round-trip measurements show.
 */
static __always_inline void splice_watch(struct bpf_sock_ops *ctx)
{
	const struct pod *pod = pod_by_netns(bpf_get_netns_cookie(ctx));

	if (pod && pod->flags & POD_SPLICE && (leg_on(LEG_SIDECAR) || leg_on(LEG_APP)))
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
}

/* Has the connection sent enough to be considered, and has it not been decided yet? */
static __always_inline bool splice_is_due(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (ctx->data_segs_out < SPLICE_TALK || ctx->data_segs_in < SPLICE_TALK)
		return false;
	return sk && !bpf_sk_storage_get(&splices, sk, NULL, 0);
}

/*
 * Does the connection stay on this node? That is decided once. The flag stays set, because others
 * at this hook may need it too.
 */
static __always_inline void splice_mark(struct bpf_sock_ops *ctx, enum role role)
{
	struct bpf_sock *sk = ctx->sk;
	enum splice_leg leg = LEGS;
	struct tcp_sock *tp;
	const struct pod *pod;
	struct splice *s;
	__u64 netns;

	if (!sk)
		return;
	netns = bpf_get_netns_cookie(ctx);
	pod = pod_by_netns(netns);
	tp = bpf_skc_to_tcp_sock(sk);
	s = bpf_sk_storage_get(&splices, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!pod || !tp || !s)
		return;
	if (splice_key_of(tp, &s->key))
		leg = leg_of(role, netns, pod, &s->key);
	s->state = SPLICE_OUT;
	if (leg == LEGS || !leg_on(leg))
		return;
	s->leg = leg;
	s->mesh = pod->mesh;
	s->since = bpf_ktime_get_ns();
	s->state = SPLICE_CANDIDATE;
	splices_wanted = 1;
}
