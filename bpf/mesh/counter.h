/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The counters of the mesh's programs. */
#pragma once

#include "lib/counter.h"
#include "lib/pod.h"

/* The agent reads the names of the metrics from here. */
enum mesh_counter {
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
	MESH_COUNTERS,
};

/* Index: mesh * MESH_COUNTERS + enum mesh_counter. Programs write; agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_MESHES *MESH_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} mesh_counters SEC(".maps");

static __always_inline void count(const struct pod *pod, enum mesh_counter counter)
{
	count_at(&mesh_counters, pod->mesh * MESH_COUNTERS + counter, 1);
}
