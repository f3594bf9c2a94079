// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Inbound: one instance for each pod, linked to the pod's network namespace. An sk_lookup
 * program can't ask in which namespace it runs, and an address is no identity, so each instance
 * is told its namespace's cookie when it is loaded. It shares the node's maps.
 *
 * What it reads of the kernel is its stable interface. Anything to relocate would have libbpf
 * parse the whole kernel's types for each pod: most of what enrolling one took.
 */
#define BPF_NO_PRESERVE_ACCESS_INDEX
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
/* Whether this kernel tells the interface that a connection comes from (Linux 5.17). */
const volatile __u8 tells_interface;

static __always_inline bool steer_to_family(struct bpf_sk_lookup *ctx, __u16 family, __u16 port)
{
	struct listener_key key = { .netns = netns_cookie, .family = family, .port = port };

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

static __always_inline bool steer_to(struct bpf_sk_lookup *ctx, __u16 port)
{
	return (ctx->family == AF_INET && steer_to_family(ctx, AF_INET, port)) ||
	       steer_to_family(ctx, AF_INET6, port);
}

static __always_inline void ask_for_listeners(__u16 port)
{
	struct event event = {
		.netns = netns_cookie,
		.kind = EVENT_NO_LISTENER,
		.port = port,
	};

	/* The agent is being told already: a flood of refused connections adds nothing. */
	if (bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > 1024)
		return;
	bpf_ringbuf_output(&events, &event, sizeof(event), 0);
}

/*
 * From the pod itself: connect has decided. A captured connection may need help to find a
 * listener that is bound to localhost alone.
 */
static __always_inline void steer_own(struct bpf_sk_lookup *ctx, const struct pod *pod,
				      const struct addr *src, const struct addr *dst)
{
	struct conn c = { .netns = netns_cookie, .src = *src, .dst = *dst };

	c.sport = bpf_ntohs(ctx->remote_port);
	c.dport = ctx->local_port;
	if (c.dport == pod->in_port || !is_steered_port(pod, c.dport))
		return;
	if (bpf_map_lookup_elem(&handovers, &c) && !steer_to(ctx, c.dport))
		ask_for_listeners(c.dport);
}

/* One decision for each new connection; established ones never come here. */
SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	const struct pod *pod;
	struct addr src, dst;
	__u32 ifindex = 0;

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
	if (addr_eq(&src, &dst) || pod_owns(netns_cookie, &src)) {
		count(pod, PASSED_INBOUND);
		steer_own(ctx, pod, &src, &dst);
		return SK_PASS;
	}
	if (tells_interface)
		ifindex = ctx->ingress_ifindex;
	if (!inbound_steered(pod, netns_cookie, &src, &dst, ctx->local_port, ifindex)) {
		count(pod, PASSED_INBOUND);
		return SK_PASS;
	}
	if (steer_to(ctx, pod->in_port)) {
		count(pod, STEERED_INBOUND);
		return SK_PASS;
	}
	/* Never to the app in plain text. */
	count(pod, REFUSED_NO_LISTENER);
	ask_for_listeners(pod->in_port);
	return SK_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
