/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Quotas. A map that the processes of pods can fill has a quota per pod, so that no pod takes
 * another's room. A map counts the entries in use, by the namespace's cookie.
 */
#pragma once

#include "lib/core.h"

/* Takes one entry of a pod's quota; false if the quota is used up. */
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
