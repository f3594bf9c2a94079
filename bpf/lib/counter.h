/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Counters of what programs decided, by mesh. */
#pragma once

#include "lib/pod.h"

#define MAX_MESHES 4

enum counter {
	CAPTURED_OUTBOUND, /* connect: sent to the outbound listener */
	CAPTURED_SELF, /* connect: the proxy's call to its own pod, sent to the inbound listener */
	CAPTURED_DNS, /* connect or sendmsg: a question sent to the DNS listener */
	DIRECT, /* connect of an enrolled pod, left alone */
	STEERED_INBOUND, /* a new connection handed to the inbound listener */
	PASSED_INBOUND, /* a new connection left alone (excluded, or from the pod itself) */
	REFUSED_NO_LISTENER, /* a new connection refused: the proxy does not listen */
	REFUSED_NO_STATE, /* connect refused: no memory to keep the original destination */
	REFUSED_NO_ADDRESS, /* connect refused: off the pod, which has no address of that family */
	REFUSED_BUSY, /* connect refused: too many of the pod's wait for the proxy to accept them */
	REFUSED_SOURCE_ROUTE, /* connect or setsockopt refused: the packets would go elsewhere */
	HANDOVER_FULL, /* the original destination could not be handed over: no room */
	HANDOVER_MISSED, /* a connection came to the outbound listener's redirect address
			    unannounced */
	ORIGDST_ANSWERED, /* getsockopt(SO_ORIGINAL_DST) answered */
	DNS_REFUSED, /* sendmsg refused: too many DNS servers at a time from one socket */
	DNS_FORGED, /* datagrams dropped that passed for the DNS listener's */
	SPLICE_SOCKETS, /* sockets that were spliced */
	SPLICE_NOT_SAFE, /* not eligible: blocking, or with an option that splicing breaks */
	SPLICE_NOT_PROXY, /* not eligible: between pods, but not between their proxies */
	SPLICE_LEFT, /* sockets that left the map again: they send bulk, or have begun to block */
	SPLICE_MAP_FULL, /* eligible, but there is no room in the map */
	SPLICE_IN_OTHER_MAP, /* not eligible: in another program's sockmap */
	SPLICE_MESSAGES, /* messages that skipped the TCP/IP stack */
	SPLICE_BYTES, /* their bytes */
	SPLICE_SPILLED, /* by TCP: too much is unread at the other end */
	SPLICE_BULK, /* by TCP: a large message, which TCP carries better */
	SPLICE_REFRESH, /* by TCP: its turn, so that what is between the ends sees the connection */
	SPLICE_UNREAD, /* by TCP: what went by TCP before is not read yet */
	SPLICE_NO_PEER, /* by TCP: the other end is not spliced, or may not be sent to */
	COUNTERS,
};

/* Index: mesh * COUNTERS + enum counter. Programs write; agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_MESHES * COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

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
