/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Addresses, counters, and socket -> pod: the only identity rule. */
#pragma once

static __always_inline struct addr addr4(__u32 ip4)
{
	struct addr a = { { 0, 0, V4MAPPED, ip4 } };
	return a;
}

static __always_inline bool addr_is4(const struct addr *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == V4MAPPED;
}

static __always_inline bool addr_eq(const struct addr *a, const struct addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

/* 0.0.0.0, ::ffff:0.0.0.0 or :: */
static __always_inline bool addr_is_any(const struct addr *a)
{
	return a->w[3] == 0 && a->w[0] == 0 && a->w[1] == 0 &&
	       (a->w[2] == 0 || a->w[2] == V4MAPPED);
}

/* 127.0.0.1 or ::1: the addresses that a mesh's rules name /32 and /128. */
static __always_inline bool addr_is_localhost(const struct addr *a)
{
	if (addr_is4(a))
		return a->w[3] == bpf_htonl(0x7f000001);
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == 0 && a->w[3] == bpf_htonl(1);
}

/* 127.0.0.0/8 or ::1 */
static __always_inline bool addr_is_loopback(const struct addr *a)
{
	if (addr_is4(a))
		return (a->w[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return addr_is_localhost(a);
}

/* The address to which REDIRECT leads what a pod sends. */
static __always_inline struct addr localhost_for(const struct addr *like)
{
	if (addr_is4(like))
		return addr4(bpf_htonl(0x7f000001));
	return (struct addr){ { 0, 0, 0, bpf_htonl(1) } };
}

/* fe80::/10; of IPv4, where a pod may have no other address and use it for all, none. */
static __always_inline bool addr_is_link6(const struct addr *a)
{
	return (a->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* 127.0.0.6 or ::6: the source that Istio's and Kuma's proxies use towards the app. */
static __always_inline bool addr_is_passthrough(const struct addr *a)
{
	if (addr_is4(a))
		return a->w[3] == bpf_htonl(0x7f000006);
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == 0 && a->w[3] == bpf_htonl(6);
}

/* Multicast, or IPv4's broadcast: TCP can't connect there, and the kernel says so itself. */
static __always_inline bool addr_is_multicast(const struct addr *a)
{
	if (addr_is4(a))
		return (a->w[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) ||
		       a->w[3] == bpf_htonl(0xffffffff);
	return (a->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

/* Where captured connections go, see config.h. */
static __always_inline bool addr_is_via(const struct addr *a)
{
	if (addr_is4(a))
		return (a->w[3] & bpf_htonl(VIA4_MASK)) == bpf_htonl(VIA4_NET);
	return a->w[0] == bpf_htonl(VIA6_HI) && a->w[1] == bpf_htonl(VIA6_LO);
}

/* Identity is the network namespace's cookie: never an address, never a process. */
static __always_inline const struct pod *pod_by_netns(__u64 netns)
{
	return bpf_map_lookup_elem(&pods, &netns);
}

static __always_inline bool pod_captures(const struct pod *pod, const struct addr *a)
{
	return pod->flags & (addr_is4(a) ? POD_CAPTURE_V4 : POD_CAPTURE_V6);
}

/* Is this an address of the pod itself, so that traffic to it stays on its lo? */
static __always_inline bool pod_owns(__u64 netns, const struct addr *a)
{
	struct local_key key = { .netns = netns, .addr = *a };

	return addr_is_loopback(a) || bpf_map_lookup_elem(&locals, &key);
}

/* Is this the port of a listener that connections are handed to? */
static __always_inline bool is_steered_port(const struct pod *pod, __u16 port)
{
	return port && (port == pod->in_port || port == pod->out_port || port == pod->dns_port);
}

/* Takes one more of what a map counts for each pod; false: the pod has its share. */
static __always_inline bool share_take(void *shares, __u64 netns, __u32 most)
{
	__u32 *used = bpf_map_lookup_elem(shares, &netns);

	if (!used)
		return false;
	if (__sync_fetch_and_add(used, 1) < most)
		return true;
	__sync_fetch_and_add(used, -1);
	return false;
}

static __always_inline void share_give(void *shares, __u64 netns)
{
	__u32 *used = bpf_map_lookup_elem(shares, &netns);

	if (used)
		__sync_fetch_and_add(used, -1);
}

static __always_inline void count_n(__u32 mesh, enum counter counter, __u64 n)
{
	__u32 index = mesh * COUNTERS + counter;
	__u64 *value = bpf_map_lookup_elem(&counters, &index);

	if (value)
		__sync_fetch_and_add(value, n); /* connect can be preempted */
}

static __always_inline void count(const struct pod *pod, enum counter counter)
{
	count_n(pod->mesh, counter, 1);
}
