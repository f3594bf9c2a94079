/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Splice: data that one end of a connection sends goes straight to the other end's queue, if both
 * are on this node. docs/splice.md has the reasons. sock_ops marks connections that have sent data
 * both ways and whose addresses qualify. The agent's sweep puts those that have settled into the
 * map, and only sockets whose state it can see to be safe. From then on redirect decides for each
 * message: the other end's queue, or TCP as usual. Both paths end at the same reader, who always
 * empties the queue first. So:
 *
 * - TCP -> queue is allowed only when the reader has consumed every byte sent by TCP: its
 *   copied_seq has reached this end's write_seq. Both count the same bytes: they are one
 *   connection.
 * - queue -> TCP is allowed at any time. It is done for large messages, which TCP carries better,
 *   but only when the queue is empty; and when much is unread, so that TCP's own limits hold the
 *   writer.
 */
#pragma once

#include "lib/event.h"
#include "lib/pod.h"

#define SPLICED 2048 /* spliced sockets of a pod; further ones stay on TCP */

#define SPLICE_BULKY (4 << 20) /* bytes by TCP minus redirected ones: leave the map above this */

/*
 * The priority of released spliced sockets and their packets; setting one above 6 takes a
 * privilege.
 */
#define SPLICE_PRIORITY 0x53696465

/* The part of the path that a connection within the node is. */
enum splice_leg {
	LEG_SIDECAR, /* a pod's proxy <-> another pod's proxy */
	LEG_APP, /* an app <-> its own pod's proxy */
	LEGS,
};

/* The agent's decision about a leg, for the programs and for `status`. */
struct leg {
	__u32 on;
	__u8 why[2044]; /* why it is off, NUL-padded */
};
_Static_assert(sizeof(struct leg) == 2048, "leg");

/* The spliced legs. Agent writes; sockops and sweep_splices read. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LEGS);
	__type(key, __u32);
	__type(value, struct leg);
} splice_legs SEC(".maps");

/*
 * One end of a connection. The initial sequence numbers make the key unique to the connection: two
 * pods with the same addresses and ports, or an old connection and its successor, have different
 * keys. The other end's key has the fields in reverse.
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

enum splice_state {
	SPLICE_CANDIDATE = 1, /* the agent's next sweep looks at it */
	SPLICE_IN, /* the socket is in the map */
	SPLICE_LEAVING, /* leaving the map: it sends by TCP */
	SPLICE_OUT, /* not eligible, for good */
	SPLICE_RESET, /* released with unread bytes: its FIN becomes a reset */
};

/* State of a socket whose other end is on this node; it lives as long as the socket. */
struct splice {
	__u32 off; /* 1: all goes by TCP; first, so that other layouts' agents find it */
	enum splice_state state;
	__u32 redirecting; /* 1: nothing of what this end sent is in TCP any more */
	__u32 burst; /* bytes redirected since the other end was last seen to have read all */
	__u64 since; /* when it was marked, ns */
	__u64 bulk; /* bytes sent by TCP minus redirected bytes */
	__u64 by_tcp; /* time of the last message by TCP, ns */
	__u64 share; /* cookie of the namespace whose quota it counts in; 0: none */
	__u64 peer; /* the kernel's address of the other end's socket; 0: not known yet */
	enum splice_leg leg;
	__u16 mesh; /* index into the counters */
	__u8 quiet; /* leaving: no earlier call is still running */
	__u8 pass; /* the last sweep by open files that came to it */
	struct splice_key key;
};
_Static_assert(sizeof(struct splice) == 112, "splice");

/*
 * Sockets whose other end is on this node. sockops makes them; sweep_splices and redirect use.
 * Agents with maps of another layout look for it by this name.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct splice);
} splices SEC(".maps");

/*
 * The spliced sockets. sweep_splices adds; the kernel removes a socket when it closes; redirect
 * looks up the other end. If the map is full, further connections use TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct splice_key);
	__type(value, __u64);
} splice_sockets SEC(".maps");

/*
 * The number of a pod's sockets in `splice_sockets`, so that no pod takes all the room. The map has
 * no room for every pod's quota, and a connection that finds none uses TCP. As for
 * `handover_shares`, the agent adds and removes pods; sweep_splices and sock_release count.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, __u64);
	__type(value, __u32);
} splice_shares SEC(".maps");

/* A spliced socket was closed with unread bytes, after its FIN. */
struct unread_event {
	struct event head;
	struct splice_key end; /* the closed one */
	__u32 sent; /* the next sequence numbers of both directions */
	__u32 received;
};
_Static_assert(sizeof(struct unread_event) == 72, "unread_event");

/* A sweep's report on a socket. */
struct swept {
	__u64 stuck; /* cookie of the namespace whose writer needs waking; 0: see below */
	struct splice_key leaves; /* this end may leave the map when the other end may */
};
_Static_assert(sizeof(struct swept) == 56, "swept");

/*
 * Ends of connections whose other end is leaving. Only sweep_splices uses it, and visits one end at
 * a time. If an entry is lost, its connection stays in the map and uses TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct splice_key);
	__type(value, __u8);
} splice_leaving SEC(".maps");

/* Whether some connection asks for a sweep. */
__u32 splices_wanted = 0;
