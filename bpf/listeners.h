/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which sockets are the proxies' listeners. The inbound one is where new connections are handed
 * to; the outbound and the DNS one are found by the kernel itself, unless they are bound to
 * localhost alone, which is not where captured connections are sent.
 */
#pragma once

static __always_inline void listener_add(struct bpf_sock_ops *ctx)
{
	struct listener_key key = { .netns = bpf_get_netns_cookie(ctx) };
	const struct pod *pod = pod_by_netns(key.netns);

	if (!pod || !is_steered_port(pod, ctx->local_port))
		return;
	key.family = ctx->family;
	key.port = ctx->local_port;
	for (__u32 slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot; /* not counted in memory: the verifier loses track of it there */
		if (!bpf_sock_hash_update(ctx, &listeners, &key, BPF_NOEXIST))
			return;
	}
}

/* The port that the agent looks for listeners on. */
__u16 wanted_port = 0;

/*
 * Adds the listeners that are older than the hooks. An iterator sees the network namespace of
 * the task that opened it: the agent opens it inside the pod's.
 */
SEC("iter/tcp")
int find_listeners(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct listener_key key = {};

	if (!sk || sk->skc_state != BPF_TCP_LISTEN || sk->skc_num != wanted_port)
		return 0;
	key.netns = sk->skc_net.net->net_cookie;
	key.family = sk->skc_family;
	key.port = sk->skc_num;
	for (__u32 slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot;
		if (!bpf_map_update_elem(&listeners, &key, sk, BPF_NOEXIST))
			return 0;
	}
	return 0;
}
