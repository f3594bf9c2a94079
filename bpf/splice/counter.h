/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What splicing's programs count. */
#pragma once

#include "lib/counter.h"
#include "lib/pod.h"

/* The agent has the names of metrics from here. */
enum splice_counter {
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
	SPLICE_COUNTERS,
};

/* Index: mesh * SPLICE_COUNTERS + enum splice_counter. Programs write; agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_MESHES *SPLICE_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} splice_counters SEC(".maps");

static __always_inline void splice_count(__u32 mesh, enum splice_counter counter, __u64 n)
{
	count_at(&splice_counters, mesh * SPLICE_COUNTERS + counter, n);
}
