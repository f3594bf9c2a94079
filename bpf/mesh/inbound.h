/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What leads connections to a pod on to its proxy's listeners. */
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
 * The first address of each kind that a pod's devices have. Agent writes; inbound reads. An address
 * is two devices' firsts at most, so it is full after `locals`.
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
 * The port that a connection was dialled to, before the pod's own rules translate it. note_dialled
 * writes; steer reads, while the same packet is under way on the same processor. So what others
 * write in between does not push it out; if it is not there, the connection is captured.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct dialled_key);
	__type(value, __u16);
} dialled SEC(".maps");

/* No listener where a connection was to be handed to. */
struct listener_event {
	struct event head;
	__u16 port;
	__u16 pad[3];
};
_Static_assert(sizeof(struct listener_event) == 24, "listener_event");
