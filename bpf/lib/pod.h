/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The enrolled pods, and the lookup of a socket's pod: the only identity rule. */
#pragma once

#include "lib/addr.h"

#define MAX_PODS 1024 /* a node's pods; kubelet's default is 110, 250 is common */

/* struct pod, flags */
enum pod_flag {
	POD_CAPTURE_V4 = 1 << 0, /* IPv4 is intercepted */
	POD_CAPTURE_V6 = 1 << 1, /* IPv6 is intercepted */
	POD_GID_EXEMPT = 1 << 2, /* processes of proxy_gid are the proxy too */
	POD_SELF_INBOUND = 1 << 3, /* proxy -> its own pod goes to the inbound port */
	POD_OUT_ALL = 1 << 4, /* no include list outbound: everything is included */
	POD_IN_ALL = 1 << 5, /* no include list inbound: everything is included */
	POD_LOOPBACK_INCLUDED = 1 << 6, /* the include ranges name loopback: lo is not exempt */
	POD_UDP_EXCLUDES = 1 << 7, /* excluded outbound ports hold for UDP (DNS) as well */
	POD_CIDRS_FIRST = 1 << 8, /* excluded destinations beat everything, not just includes */
	POD_EXCLUDE_IFS = 1 << 9, /* some of the pod's interfaces are exempt */
	POD_SPLICE = 1 << 10, /* its connections may skip the TCP/IP stack */
	POD_NO_UID = 1 << 11, /* proxy_uid is nobody: no user is exempt */
	POD_TCP_DNS_DIRECT = 1 << 12, /* DNS is captured, but the app's DNS over TCP never is */
	POD_TCP_DNS_ANY = 1 << 13, /* DNS is captured; over TCP, 53 is a port as any other */
	POD_ROUTE_LOCALNET = 1 << 14, /* sockets bound to 127.0.0.0/8 may call off the pod */
	POD_OWN_NAT = 1 << 15, /* the pod's own rules translate incoming connections */
	POD_BESIDE = 1 << 16, /* the mesh's own rules are in the pod, and do what connect leaves */
};

/* One enrolled pod; key: its network namespace's cookie. */
struct pod {
	__u32 proxy_uid; /* numbered as in the pod's own user namespace */
	__u32 proxy_gid;
	enum pod_flag flags;
	__u32 sets; /* bit n: enum rule_set n has entries for this pod */
	struct addr ip4; /* the pod's IPv4 address, v4-mapped; zero: none */
	struct addr ip6; /* the pod's IPv6 address; zero: none */
	__u16 out_port; /* the proxy's outbound listener */
	__u16 in_port; /* the proxy's inbound listener */
	__u16 hbone_port; /* never redirected from the proxy to its own pod; 0: none */
	__u16 dns_port; /* the proxy's DNS listener; 0: DNS is not captured */
	__u16 mesh; /* index into the counters */
	__u16 pad;
	__u32 device; /* the device with the pod's address; 0: unknown */
};
_Static_assert(sizeof(struct pod) == 64, "pod");

/* Enrolled pods. Agent writes; connect, sockops, getsockopt and inbound read. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

/* One of the pod's own addresses; netns 0: some enrolled pod of this node has it. */
struct local_key {
	__u64 netns;
	struct addr addr;
};
_Static_assert(sizeof(struct local_key) == 24, "local_key");

enum local {
	LOCAL_OWN = 1,
	LOCAL_LANDING, /* a device's first: the target of REDIRECT there */
};

/*
 * The enrolled pods' own addresses. Agent writes; connect, sockops and inbound read. 16 a pod. The
 * value is one of enum local.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 16);
	__type(key, struct local_key);
	__type(value, __u8);
} locals SEC(".maps");

/* A pod is identified by its network namespace's cookie, never by an address or a process. */
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

/* The owner of a socket, in the pod's numbers, as iptables' owner match uses it. */
struct owner {
	__u32 uid;
	__u32 gid;
};

static __always_inline bool is_proxy_user(const struct pod *pod, __u32 uid)
{
	return !(pod->flags & POD_NO_UID) && uid == pod->proxy_uid;
}

static __always_inline bool is_proxy_group(const struct pod *pod, const struct owner *owner)
{
	return pod->flags & POD_GID_EXEMPT && owner->gid == pod->proxy_gid;
}

static __always_inline bool is_proxy(const struct pod *pod, const struct owner *owner)
{
	return is_proxy_user(pod, owner->uid) || is_proxy_group(pod, owner);
}
