/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the programs of Services count. */
#pragma once

#include "lib/counter.h"

/* The agent has the names of metrics from here. */
enum service_counter {
	SERVICE_TCP4, /* connect: a Service's address became an endpoint's */
	SERVICE_TCP6,
	SERVICE_UDP4, /* connect or sendmsg: the same */
	SERVICE_UDP6,
	SERVICE_MISSED, /* connect or sendmsg to what is no Service's address */
	SERVICE_REFUSED, /* refused: the Service has no endpoint */
	SERVICE_PASSED, /* to a Service's address, left to kube-proxy: from a namespace that is not
			   translated, from the agent, or by localhost to localhost's NodePort */
	SERVICE_NO_STATE, /* the same, for want of memory to keep what was dialled */
	SERVICE_TORN, /* the same: the Service's endpoints changed twice meanwhile */
	SERVICE_AFFINITY, /* a client was led to the endpoint that it had before */
	SERVICE_FORGOTTEN, /* an unconnected socket asked more Services than it can remember */
	SERVICE_COUNTERS,
};

/* Index: enum service_counter. Programs write; agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SERVICE_COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} service_counts SEC(".maps");

static __always_inline void service_count(enum service_counter counter)
{
	count_at(&service_counts, counter, 1);
}
