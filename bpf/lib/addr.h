/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Addresses. An IPv4 address is always kept v4-mapped (::ffff:a.b.c.d): one code path and one map
 * serve AF_INET, AF_INET6 and the v4-mapped addresses in between. Addresses are in network byte
 * order, ports in host byte order, unless a comment says otherwise.
 */
#pragma once

#include "lib/core.h"

#define V4MAPPED bpf_htonl(0x0000ffff)

struct addr {
	__u32 w[4];
};
_Static_assert(sizeof(struct addr) == 16, "addr");

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

/* Multicast, or IPv4's broadcast: TCP cannot connect there, and the kernel says so itself. */
static __always_inline bool addr_is_multicast(const struct addr *a)
{
	if (addr_is4(a))
		return (a->w[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) ||
		       a->w[3] == bpf_htonl(0xffffffff);
	return (a->w[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}
