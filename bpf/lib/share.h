/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Shares. What processes of a pod can fill is theirs alone: no pod takes another's share. Such a
 * map counts, by the cookie of the namespace, what is in use.
 */
#pragma once

#include "lib/core.h"

/* Takes one more of what a map counts for each pod; false: the pod has its share. */
static __always_inline bool share_take(void *shares, __u64 netns, __u32 most)
{
	__u32 *used = bpf_map_lookup_elem(shares, &netns);

	if (!used)
		return false;
	if (__sync_fetch_and_add(used, 1) < most)
		return true;
	__sync_fetch_and_add(used, -1);
	return false;
}

static __always_inline void share_give(void *shares, __u64 netns)
{
	__u32 *used = bpf_map_lookup_elem(shares, &netns);

	if (used)
		__sync_fetch_and_add(used, -1);
}
