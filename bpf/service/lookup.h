/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From what was dialled to an endpoint: `services` names a list, `service_lists` says how long it
 * is, `backends` has its endpoints by number. The agent writes the endpoints first, then the
 * length, then what leads there, and takes them away the other way round; it never uses a list's
 * number again. So whoever reads meanwhile finds an endpoint that was eligible a moment ago, or
 * none and looks again.
 */
#pragma once

#include "lib/addr.h"
#include "service/counter.h"

#define MAX_FRONTENDS 131072 /* addresses and ports of Services that can be dialled */
#define MAX_BACKENDS 262144 /* endpoints, each counted for each port of each Service it is in */
#define MAX_AFFINITIES 65536 /* clients that were led to an endpoint, by Service port */

/* What is dialled. */
struct frontend {
	struct addr addr;
	__u16 port;
	__u8 protocol; /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 pad;
};
_Static_assert(sizeof(struct frontend) == 20, "frontend");

/* Which list of endpoints a frontend has. Agent writes; connect and sendmsg read. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FRONTENDS);
	__type(key, struct frontend);
	__type(value, __u32);
} services SEC(".maps");

/* The eligible endpoints of a port of a Service, in one family and under one policy. */
struct service_list {
	__u32 count; /* 0: whoever dials is refused */
	__u32 affinity; /* key of `affinities`, one for all lists of the port; 0: none */
	__u32 timeout; /* seconds that an affinity lasts */
};
_Static_assert(sizeof(struct service_list) == 12, "service_list");

/* By number. Agent writes; connect and sendmsg read. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FRONTENDS);
	__type(key, __u32);
	__type(value, struct service_list);
} service_lists SEC(".maps");

/* An endpoint. */
struct backend {
	struct addr addr;
	__u16 port;
	__u16 pad;
};
_Static_assert(sizeof(struct backend) == 20, "backend");

struct backend_key {
	__u32 list;
	__u32 slot; /* from 0 */
};
_Static_assert(sizeof(struct backend_key) == 8, "backend_key");

/* Agent writes; connect and sendmsg read. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_BACKENDS);
	__type(key, struct backend_key);
	__type(value, struct backend);
} backends SEC(".maps");

struct member {
	__u32 list;
	struct backend backend;
};
_Static_assert(sizeof(struct member) == 24, "member");

/*
 * The same the other way round: whether an endpoint that was chosen before is eligible still, and
 * for the agent, its number. Agent writes; connect and sendmsg read.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_BACKENDS);
	__type(key, struct member);
	__type(value, __u32);
} service_members SEC(".maps");

/* A client of a Service port with affinity. */
struct affinity_key {
	__u64 client; /* the network namespace's cookie: a pod, or the host */
	__u32 affinity;
	__u32 pad;
};
_Static_assert(sizeof(struct affinity_key) == 16, "affinity_key");

struct affinity {
	struct backend backend;
	__u32 used; /* when it was led there last, in seconds */
};
_Static_assert(sizeof(struct affinity) == 24, "affinity");

/* Losing one is harmless: the client gets another endpoint. connect and sendmsg write and read. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_AFFINITIES);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
} affinities SEC(".maps");

/* Whether an endpoint that was chosen before may be used still. */
static __always_inline bool is_eligible(__u32 list, const struct backend *backend)
{
	struct member member = { .list = list, .backend = *backend };

	return bpf_map_lookup_elem(&service_members, &member);
}

/* Any endpoint of a list that has some. */
static __always_inline bool pick_any(__u32 list, __u32 count, struct backend *backend)
{
	struct backend_key key = { .list = list };
	const struct service_list *now;
	const struct backend *one;

	key.slot = bpf_get_prandom_u32() % count;
	one = bpf_map_lookup_elem(&backends, &key);
	if (!one) {
		/* The list has become shorter meanwhile. */
		now = bpf_map_lookup_elem(&service_lists, &list);
		if (!now || !now->count)
			return false;
		key.slot = bpf_get_prandom_u32() % now->count;
		one = bpf_map_lookup_elem(&backends, &key);
		if (!one)
			return false;
	}
	*backend = *one;
	return true;
}

/* The endpoint for a client, by its affinity where the Service has that. */
static __always_inline bool pick(__u32 list, const struct service_list *of, __u64 client,
				 struct backend *backend)
{
	struct affinity_key key = { .client = client, .affinity = of->affinity };
	struct affinity *last, next = {};
	__u32 now;

	if (!of->affinity)
		return pick_any(list, of->count, backend);
	now = bpf_ktime_get_ns() / 1000000000;
	last = bpf_map_lookup_elem(&affinities, &key);
	if (last && now - last->used <= of->timeout && is_eligible(list, &last->backend)) {
		last->used = now;
		*backend = last->backend;
		service_count(SERVICE_AFFINITY);
		return true;
	}
	if (!pick_any(list, of->count, backend))
		return false;
	next.backend = *backend;
	next.used = now;
	bpf_map_update_elem(&affinities, &key, &next, BPF_ANY);
	return true;
}
