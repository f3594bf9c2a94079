/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A build whose maps have another layout than its predecessor's leaves that one's answering
 * programs attached while sockets have state in the old maps. This counts them.
 */
#pragma once

#include "lib/core.h"

/* The number of sockets with storage in the map that the iterator was made for. */
__u64 storages = 0;

static __always_inline void storage_count(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	if (ctx->sk)
		storages++;
}
