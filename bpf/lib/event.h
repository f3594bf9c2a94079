/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Events for the agent: a header, then the fields of the event's kind. */
#pragma once

#include "lib/pod.h"
#include "lib/reason.h"

enum event_kind {
	EVENT_NO_LISTENER = 1, /* struct listener_event: a connection found no listener */
	EVENT_BULK, /* header only: a spliced connection carries bulk */
	EVENT_UNREAD, /* struct unread_event: reset the other end of a connection */
};

struct event {
	__u64 netns;
	enum event_kind kind;
	enum reason reason; /* of the related verdict, if any */
};
_Static_assert(sizeof(struct event) == 16, "event");

/*
 * struct event and the fields of its kind. Programs write; the agent reads. If the ring is full,
 * events are lost: a missing listener is reported again, bulk is seen by the next sweep, and a
 * connection that is not reset learns of its end at its second write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 * 1024);
} events SEC(".maps");

/* The kinds of events that a quota is for. */
struct event_source {
	__u64 netns;
	enum event_kind kind;
	__u32 port; /* of a listener; else 0 */
};

/* A source's events in the ring, from the first that the agent has not read. */
struct event_share {
	__u64 first; /* that event's position in the ring */
	__u64 number;
};

/*
 * Quotas, so that no pod fills the ring. Only event_send writes. A source whose entry is lost
 * starts with a new quota.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_PODS * 4);
	__type(key, struct event_source);
	__type(value, struct event_share);
} event_shares SEC(".maps");

/*
 * Sends an event, unless the agent has yet to read `most` events of this source. Events are read in
 * order, so a source has fewer than twice as many in the ring. Fills in the header.
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
	/* An event that does not fit is dropped. */
	if (!bpf_ringbuf_output(&events, event, size, 0))
		bpf_map_update_elem(&event_shares, &source, &fresh, BPF_ANY);
}
