/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Hands a pod's inbound connections to its proxy's listeners. */
#pragma once

#include "lib/event.h"
#include "lib/pod.h"

#define LISTENER_SLOTS 8 /* listeners remembered for each pod, address and port */
#define LANDINGS 10 /* such addresses: any and localhost, of two families, and six of devices */
#define STEERED_PORTS 3 /* inbound, outbound, DNS */

/* A slot for one of the proxy's listeners. */
struct listener_key {
	__u64 netns;
	struct addr at; /* what it is bound to; any of IPv4, v4-mapped, is not any of IPv6 */
	__u16 port;
	__u16 slot; /* 0 .. LISTENER_SLOTS - 1 */
	__u32 pad;
};
_Static_assert(sizeof(struct listener_key) == 32, "listener_key");

/*
 * The proxies' listeners: inbound, outbound, DNS. sockops adds one at listen(), find_listeners adds
 * those that are older than the agent; the kernel removes a socket when it closes; inbound reads.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_PODS *STEERED_PORTS *LANDINGS *LISTENER_SLOTS);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

enum device_family {
	DEVICE_V4 = 1,
	DEVICE_V6,
	DEVICE_V6_LINK, /* link-local */
};

/* A device of a pod, and which kind of address of it. */
struct device_key {
	__u64 netns;
	__u32 ifindex;
	enum device_family family;
};
_Static_assert(sizeof(struct device_key) == 16, "device_key");

/*
 * The first address of each kind on each device of a pod. Agent writes; inbound reads. An address
 * is the first of at most two kinds, so this map fills up after `locals`.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 16 * 2);
	__type(key, struct device_key);
	__type(value, struct addr);
} device_addrs SEC(".maps");

/* The source of a connection that comes into a pod. */
struct dialled_key {
	__u64 netns;
	struct addr src;
	__u16 sport;
	__u16 pad[3];
};
_Static_assert(sizeof(struct dialled_key) == 32, "dialled_key");

/*
 * The dialled port of a connection, before the pod's own rules translate it. note_dialled writes
 * and steer reads while the same packet is processed on the same processor, so writes in between do
 * not evict it. Without an entry, the connection is captured.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct dialled_key);
	__type(value, __u16);
} dialled SEC(".maps");

/* A connection found no listener. */
struct listener_event {
	struct event head;
	__u16 port;
	__u16 pad[3];
};
_Static_assert(sizeof(struct listener_event) == 24, "listener_event");
