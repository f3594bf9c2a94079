/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The pods' lists: ports, ranges, interfaces. The look-ups are global functions, so that the
 * verifier checks each separately, and not on every path to it.
 */
#pragma once

#include "lib/pod.h"

/* The list that an entry of port_rules or cidr_rules belongs to. */
enum rule_set {
	OUT_EXCLUDE_PORTS,
	OUT_INCLUDE_PORTS,
	IN_EXCLUDE_PORTS,
	IN_INCLUDE_PORTS,
	OUT_EXCLUDE_CIDRS,
	OUT_INCLUDE_CIDRS,
	IN_EXCLUDE_CIDRS,
	OUT_EXCLUDE_TCP_UIDS, /* with the class of the uid in the bits from UID_CLASS_SHIFT on */
	OUT_EXCLUDE_UDP_UIDS,
	OUT_EXCLUDE_ROUTES, /* every route of the pod; 1: behind an interface that is exempt */
};

/* In the keys, the bits above the list name the class of users, or the family. */
#define UID_CLASS_SHIFT 8
#define CIDR_V6 (1 << 8)

/* Longest-prefix keys: the fields behind prefixlen are matched bit by bit, in memory order. */
struct port_rule_key {
	__u32 prefixlen; /* 96 (set and cookie) + 16 for one port, less for an aligned range */
	enum rule_set set;
	__u32 netns[2]; /* the cookie's halves: the struct must not be padded */
	__u16 port; /* network byte order */
	__u16 pad;
};
_Static_assert(sizeof(struct port_rule_key) == 20, "port_rule_key");

/* Port lists of pods. Agent writes; policy reads. A range takes at most 30 entries. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 64);
	__type(key, struct port_rule_key);
	__type(value, __u8);
} port_rules SEC(".maps");

struct cidr_rule_key {
	__u32 prefixlen; /* 96 (set and cookie) + the prefix length in the v4-mapped 128 bits */
	enum rule_set set;
	__u32 netns[2];
	struct addr addr;
};
_Static_assert(sizeof(struct cidr_rule_key) == 32, "cidr_rule_key");

/* Address ranges of pods. Agent writes; policy reads. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 64);
	__type(key, struct cidr_rule_key);
	__type(value, __u8);
} cidr_rules SEC(".maps");

/* An interface of a pod that is exempt. */
struct if_key {
	__u64 netns;
	__u32 ifindex;
	__u32 pad;
};
_Static_assert(sizeof(struct if_key) == 16, "if_key");

/* Exempt interfaces. Agent writes; policy reads. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 4);
	__type(key, struct if_key);
	__type(value, __u8);
} excluded_ifs SEC(".maps");

__noinline int port_listed(__u64 netns, __u32 set, __u16 port)
{
	struct port_rule_key key = {
		.prefixlen = 8 * (sizeof(key.set) + sizeof(key.netns) + sizeof(key.port)),
		.set = set,
		.netns = { (__u32)netns, (__u32)(netns >> 32) },
		.port = bpf_htons(port),
	};

	return bpf_map_lookup_elem(&port_rules, &key) != NULL;
}

/* The families are separate: ::/0 must not match ::ffff:a.b.c.d. */
__noinline int cidr_listed(__u64 netns, __u32 set, const struct addr *a)
{
	struct cidr_rule_key key = {
		.prefixlen = 8 * (sizeof(key.set) + sizeof(key.netns) + sizeof(key.addr)),
		.netns = { (__u32)netns, (__u32)(netns >> 32) },
	};
	__u8 *member;

	if (!a)
		return 0;
	key.set = set | (addr_is4(a) ? 0 : CIDR_V6);
	key.addr = *a;
	member = bpf_map_lookup_elem(&cidr_rules, &key);
	return member && *member;
}

static __always_inline bool port_in_class(const struct pod *pod, __u64 netns, enum rule_set set,
					  __u32 class, __u16 port)
{
	return pod->sets & (1U << set) && port_listed(netns, set | class << UID_CLASS_SHIFT, port);
}

static __always_inline bool port_in(const struct pod *pod, __u64 netns, enum rule_set set,
				    __u16 port)
{
	return port_in_class(pod, netns, set, 0, port);
}

static __always_inline bool cidr_in(const struct pod *pod, __u64 netns, enum rule_set set,
				    const struct addr *a)
{
	return pod->sets & (1U << set) && cidr_listed(netns, set, a);
}

static __always_inline bool if_excluded(const struct pod *pod, __u64 netns, __u32 ifindex)
{
	struct if_key key = { .netns = netns, .ifindex = ifindex };

	return pod->flags & POD_EXCLUDE_IFS && bpf_map_lookup_elem(&excluded_ifs, &key);
}
