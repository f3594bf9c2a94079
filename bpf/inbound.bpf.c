// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Inbound: one instance for each pod, linked to the pod's network namespace. An sk_lookup
 * program cannot ask in which namespace it runs, and an address is no identity, so each instance
 * is told its namespace's cookie when it is loaded. It shares the node's maps.
 *
 * What it reads of the kernel is its stable interface. Anything to relocate would have libbpf
 * parse the whole kernel's types for each pod: most of what enrolling one took.
 */
#define BPF_NO_PRESERVE_ACCESS_INDEX
#include "mesh/inbound.h"
#include "lib/event.h"
#include "mesh/counter.h"
#include "mesh/handover.h"
#include "mesh/inbound_policy.h"

/* The cookie of the network namespace that this instance is linked to. */
const volatile __u64 netns_cookie;
/* Whether this kernel tells the interface that a connection comes from (Linux 5.17). */
const volatile __u8 tells_interface;

/* To a listener that is bound to just this address. */
static __always_inline bool steer_at(struct bpf_sk_lookup *ctx, const struct addr *at, __u16 port)
{
	struct listener_key key = { .netns = netns_cookie, .at = *at, .port = port };

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

/* To the listener that the kernel would find at this address: its own comes before wildcards. */
static __always_inline bool steer_to(struct bpf_sk_lookup *ctx, const struct addr *at, __u16 port)
{
	struct addr any4 = addr4(0), any6 = {};

	return steer_at(ctx, at, port) || (ctx->family == AF_INET && steer_at(ctx, &any4, port)) ||
	       steer_at(ctx, &any6, port);
}

static __always_inline void ask_for_listeners(__u16 port)
{
	struct listener_event event = {
      .head =
          {
              .netns = netns_cookie,
              .kind = EVENT_NO_LISTENER,
              .reason = REASON_NO_LISTENER,
          },
      .port = port,
  };

	/* A flood of refused connections adds nothing to what the agent is being told already. */
	event_send(&event.head, sizeof(event), port, 1);
}

/* Did connect capture this connection, which comes from the pod itself? */
static __always_inline bool is_captured(struct bpf_sk_lookup *ctx, const struct pod *pod,
					const struct addr *src, const struct addr *dst)
{
	struct conn c = { .netns = netns_cookie, .src = *src, .dst = *dst };

	if (!is_steered_port(pod, ctx->local_port))
		return false;
	c.sport = bpf_ntohs(ctx->remote_port);
	c.dport = ctx->local_port;
	return bpf_map_lookup_elem(&handovers, &c);
}

/* Where REDIRECT leads what comes to dst by a device: to the first address that this one has. */
static __always_inline struct addr device_address(const struct pod *pod, const struct addr *dst,
						  __u32 ifindex)
{
	struct device_key key = { .netns = netns_cookie, .ifindex = ifindex };
	const struct addr *first;

	key.family = addr_is4(dst) ? DEVICE_V4 : addr_is_link6(dst) ? DEVICE_V6_LINK : DEVICE_V6;
	first = bpf_map_lookup_elem(&device_addrs, &key);
	if (first) {
		struct addr at = *first;

		barrier(); /* or it is read by the pointer that the other branches have as well */
		return at;
	}
	/* The kernel does not tell the device, or the agent does not know it yet. */
	if (key.family == DEVICE_V6_LINK)
		return *dst;
	return key.family == DEVICE_V4 ? pod->ip4 : pod->ip6;
}

/* The port that a connection was dialled to, before the pod's own rules; 0: it is not known. */
static __always_inline __u16 dialled_port(struct bpf_sk_lookup *ctx, const struct pod *pod,
					  const struct addr *src)
{
	struct dialled_key key = { .netns = netns_cookie, .src = *src };
	const __u16 *port;

	if (!(pod->flags & POD_OWN_NAT))
		return ctx->local_port;
	key.sport = bpf_ntohs(ctx->remote_port);
	port = bpf_map_lookup_elem(&dialled, &key);
	return port ? *port : 0;
}

/* One decision for each new connection; established ones never come here. */
SEC("sk_lookup")
int steer(struct bpf_sk_lookup *ctx)
{
	const struct pod *pod;
	struct addr src, dst, at;
	__u32 ifindex = 0;
	__u16 port;
	bool own;

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
	own = addr_eq(&src, &dst) || pod_owns(netns_cookie, &src);
	if (own) {
		count(pod, PASSED_INBOUND);
		if (!is_captured(ctx, pod, &src, &dst))
			return SK_PASS;
		at = localhost_for(&dst);
		port = ctx->local_port;
	} else {
		if (tells_interface)
			ifindex = ctx->ingress_ifindex;
		port = dialled_port(ctx, pod, &src);
		if (inbound_decision(pod, netns_cookie, &src, &dst, port, ifindex).verdict ==
		    GO_DIRECT) {
			count(pod, PASSED_INBOUND);
			return SK_PASS;
		}
		at = device_address(pod, &dst, ifindex);
		port = pod->in_port;
	}
	if (steer_to(ctx, &at, port)) {
		if (!own)
			count(pod, STEERED_INBOUND);
		return SK_PASS;
	}
	ask_for_listeners(port);
	/*
	 * The map takes no socket of MPTCP. At these addresses the kernel itself finds what
	 * REDIRECT would lead to, or one that is bound to the redirect address.
	 */
	if (own && (addr_is_via(&dst) || addr_is_localhost(&dst)))
		return SK_PASS;
	/* Never to the app in plain text. */
	count(pod, REFUSED_NO_LISTENER);
	return SK_DROP;
}

/* Where a packet's TCP header is; 0: it has none that matters here. */
static __always_inline __u32 tcp_of(struct __sk_buff *skb, struct addr *src)
{
	struct ipv6hdr ip6;
	struct iphdr ip;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes_relative(skb, 0, &ip, sizeof(ip), BPF_HDR_START_NET) ||
		    ip.protocol != IPPROTO_TCP || ip.frag_off & bpf_htons(IP_OFFSET))
			return 0;
		*src = addr4(ip.saddr);
		return ip.ihl * 4;
	}
	if (skb->protocol != bpf_htons(ETH_P_IPV6) ||
	    bpf_skb_load_bytes_relative(skb, 0, &ip6, sizeof(ip6), BPF_HDR_START_NET) ||
	    ip6.nexthdr != IPPROTO_TCP)
		return 0;
	__builtin_memcpy(src, &ip6.saddr, sizeof(*src));
	return sizeof(ip6);
}

/*
 * On the way into the devices of a pod with NAT rules of its own: those have their turn before a
 * listener is looked for, and the mesh's rules go by the port that was dialled. Everything passes.
 */
SEC("tc")
int note_dialled(struct __sk_buff *skb)
{
	struct dialled_key key = { .netns = netns_cookie };
	__u32 at = tcp_of(skb, &key.src);
	struct tcphdr tcp;
	__u16 port;

	if (!at || bpf_skb_load_bytes_relative(skb, at, &tcp, sizeof(tcp), BPF_HDR_START_NET) ||
	    !tcp.syn || tcp.ack)
		return TC_PASS;
	key.sport = bpf_ntohs(tcp.source);
	port = bpf_ntohs(tcp.dest);
	bpf_map_update_elem(&dialled, &key, &port, BPF_ANY);
	return TC_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
