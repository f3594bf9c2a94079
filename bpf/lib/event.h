/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What programs tell the agent: a header, and what the kind of event has behind it. */
#pragma once

#include "lib/pod.h"
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

/* What a pod's share of the ring is for. */
struct event_source {
	__u64 netns;
	enum event_kind kind;
	__u32 port; /* of a listener; else 0 */
};

/* Events of a source, from one that the agent has not read yet on. */
struct event_share {
	__u64 first; /* where in the ring that one is */
	__u64 number;
};

/*
 * So that one pod does not take the room of all others. event_send alone. An entry that is lost
 * gives its source a new share.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_PODS * 4);
	__type(key, struct event_source);
	__type(value, struct event_share);
} event_shares SEC(".maps");

/*
 * Tells the agent, unless it has to read `most` events of this source first. They are read in
 * order, so that a source has fewer than twice as many in the ring. The header is filled in.
 */
static __always_inline void event_send(struct event *event, __u64 size, __u32 port, __u64 most)
{
	struct event_source source = { .netns = event->netns, .kind = event->kind, .port = port };
	struct event_share fresh = { .number = 1 };
	struct event_share *share = bpf_map_lookup_elem(&event_shares, &source);

	if (share && bpf_ringbuf_query(&events, BPF_RB_CONS_POS) <= share->first) {
		if (__sync_fetch_and_add(&share->number, 1) < most)
			bpf_ringbuf_output(&events, event, size, 0);
		return;
	}
	fresh.first = bpf_ringbuf_query(&events, BPF_RB_PROD_POS);
	/* An event that found no room is not waited for. */
	if (!bpf_ringbuf_output(&events, event, size, 0))
		bpf_map_update_elem(&event_shares, &source, &fresh, BPF_ANY);
}
