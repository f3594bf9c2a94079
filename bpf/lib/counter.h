/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Counters. Each domain has a map of its own, indexed by mesh and counter. */
#pragma once

#include "lib/core.h"

#define MAX_MESHES 4

static __always_inline void count_at(void *counters, __u32 index, __u64 n)
{
	__u64 *value = bpf_map_lookup_elem(counters, &index);

	if (value)
		__sync_fetch_and_add(value, n); /* connect can be preempted */
}
