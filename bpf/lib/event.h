/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What programs tell the agent: a header, and what the kind of event has behind it. */
#pragma once

#include "lib/reason.h"

enum event_kind {
	EVENT_NO_LISTENER = 1, /* struct listener_event: look for a listener that was missed */
	EVENT_BULK, /* the header alone: a spliced connection is better off without */
	EVENT_UNREAD, /* struct unread_event: reset the other end of a connection */
};

struct event {
	__u64 netns;
	enum event_kind kind;
	enum reason reason; /* of the verdict that it is about, if any */
};
_Static_assert(sizeof(struct event) == 16, "event");

/*
 * struct event and what follows. Programs write; agent reads. A full ring loses events: a missing
 * listener is told of again, bulk is seen by the next sweep, and what is not reset learns it at its
 * second write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 * 1024);
} events SEC(".maps");
