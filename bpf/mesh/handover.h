/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A captured connection between its client's SYN and the proxy's accept. */
#pragma once

#include "lib/capture.h"
#include "lib/pod.h"

#define HANDSHAKES 512 /* captured connections of a pod that its proxy has yet to accept */

/* The original destination of a captured connection; it lives as long as its socket. */
struct origdst {
	struct addr orig; /* what the client dialled */
	struct addr via; /* where the connection really goes */
	__u16 orig_port;
	__u16 via_port;
	enum role role;
};
_Static_assert(sizeof(struct origdst) == 40, "origdst");

/* A connection as its client sees it. */
struct conn {
	__u64 netns;
	struct addr src;
	struct addr dst;
	__u16 sport;
	__u16 dport;
	__u32 pad;
};
_Static_assert(sizeof(struct conn) == 48, "conn");

/*
 * Original destinations between the client's SYN and the proxy's accept. Only sockops writes and
 * removes: an entry goes to the accepted socket, or is withdrawn when the client's socket closes;
 * inbound reads. So the limit applies to handshakes in progress, not to connections. A process can
 * keep its handshakes in progress for as long as it likes, so each pod has a quota.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS *HANDSHAKES);
	__type(key, struct conn);
	__type(value, struct origdst);
} handovers SEC(".maps");
