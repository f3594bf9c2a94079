// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Inbound: one instance for each pod, linked to the pod's network namespace. An sk_lookup
 * program can't ask in which namespace it runs, and an address is no identity, so each instance
 * is told its namespace's cookie when it is loaded. It shares the node's maps.
 */
#include "vmlinux.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "config.h"
#include "types.h"
#include "maps.h"
#include "pod.h"
#include "policy.h"

/* The cookie of the network namespace that this instance is linked to. */
const volatile __u64 netns_cookie;
/* Unused: a ring has no value type, and the skeleton knows only the types of variables. */
const volatile struct event event_layout;

static __always_inline bool steer_to(struct bpf_sk_lookup *ctx, const struct pod *pod, __u16 family)
{
	struct listener_key key = { .netns = netns_cookie, .family = family, .port = pod->in_port };

	for (__u32 slot = 0; slot < LISTENER_SLOTS; slot++) {
		struct bpf_sock *sk;
		long err;

		key.slot = slot;
		sk = bpf_map_lookup_elem(&listeners, &key);
		if (!sk)
			continue;
		/* Fails for a socket that no longer listens, or takes IPv6 only. */
		err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_REPLACE);
		bpf_sk_release(sk);
		if (!err)
			return true;
	}
	return false;
}

static __always_inline void ask_for_listeners(void)
{
	struct event *event;

	/* The agent is being told already: a flood of refused connections adds nothing. */
	if (bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > 1024)
		return;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return;
	event->netns = netns_cookie;
	event->kind = EVENT_NO_LISTENER;
	event->pad = 0;
	bpf_ringbuf_submit(event, 0);
}

/* One decision for each new connection; established ones never come here. */
SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	const struct pod *pod;
	struct addr src, dst;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	pod = pod_by_netns(netns_cookie);
	if (!pod)
		return SK_PASS;
	if (ctx->family == AF_INET6) {
		src = (struct addr){ { ctx->remote_ip6[0], ctx->remote_ip6[1], ctx->remote_ip6[2],
				       ctx->remote_ip6[3] } };
		dst = (struct addr){ { ctx->local_ip6[0], ctx->local_ip6[1], ctx->local_ip6[2],
				       ctx->local_ip6[3] } };
		barrier(); /* or both branches' loads become one, at an offset in a register */
	} else {
		src = addr4(ctx->remote_ip4);
		dst = addr4(ctx->local_ip4);
	}
	if (!inbound_steered(pod, netns_cookie, &src, &dst, ctx->local_port)) {
		count(pod, PASSED_INBOUND);
		return SK_PASS;
	}
	if ((ctx->family == AF_INET && steer_to(ctx, pod, AF_INET)) ||
	    steer_to(ctx, pod, AF_INET6)) {
		count(pod, STEERED_INBOUND);
		return SK_PASS;
	}
	/* Never to the app in plain text. */
	count(pod, REFUSED_NO_LISTENER);
	ask_for_listeners();
	return SK_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
