/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What programs tell the agent. */
#pragma once

#include "lib/addr.h"

/*
 * One end of a connection, as it sees it. The initial sequence numbers make it the connection's
 * own: two pods with the same addresses and ports, or an old connection and its successor, never
 * meet. The other end's has them the other way round.
 */
struct splice_key {
	struct addr local;
	struct addr remote;
	__u16 lport;
	__u16 rport;
	__u32 first_sent; /* sequence number of the first byte that this end sent */
	__u32 first_received;
	__u32 pad;
};
_Static_assert(sizeof(struct splice_key) == 48, "splice_key");

enum event_kind {
	EVENT_NO_LISTENER = 1, /* look for a listener that was missed */
	EVENT_BULK, /* a spliced connection is better off without */
	EVENT_UNREAD, /* reset the other end of one that was shut down and closed */
};

struct event {
	__u64 netns;
	enum event_kind kind;
	__u32 port; /* of the listener that is missing */
	/* EVENT_UNREAD: which end was closed, and the next sequence numbers of both directions. */
	struct splice_key end;
	__u32 sent;
	__u32 received;
};
_Static_assert(sizeof(struct event) == 72, "event");

/*
 * struct event. Programs write; agent reads. A full ring loses events: a missing listener is told
 * of again, bulk is seen by the next sweep, and what is not reset learns it at its second write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 * 1024);
} events SEC(".maps");
