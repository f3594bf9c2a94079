/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Splice: what one end of a connection sends goes straight to the other end's queue, where both
 * are on this node. docs/splice.md has the reasons.
 *
 * sock_ops marks connections that have something to say both ways and qualify by their addresses.
 * The agent's sweep puts those that have settled into the map, and only sockets whose state it
 * can see to be safe.
 * From then on redirect decides for each message: the other end's queue, or TCP as ever. Both
 * ways end at the same reader, who always empties the queue first. So:
 *
 *   - TCP -> queue only when the reader has consumed every byte that went by TCP: its copied_seq
 *     has reached this end's write_seq. Both count the same bytes: they are one connection.
 *   - queue -> TCP at any time. It is done for large messages, which TCP carries better, but only
 *     when the queue is empty; and when much is unread, so that TCP's own limits hold the writer.
 */
#pragma once

#include "lib/event.h"
#include "lib/pod.h"

#define SPLICED 2048 /* spliced sockets of a pod; more stay with TCP */

#define SPLICE_BULKY (4 << 20) /* bytes by TCP beyond those redirected: better out of the map */

/* Of spliced sockets that are released, and their packets: above 6, it takes a privilege to set. */
#define SPLICE_PRIORITY 0x53696465

/* Which part of the path a connection that stays on this node is. */
enum splice_leg {
	LEG_SIDECAR, /* a pod's proxy <-> another pod's proxy */
	LEG_APP, /* an app <-> its own pod's proxy */
	LEGS,
};

/* Agent's word on a leg, for the programs and for `status`. */
struct leg {
	__u32 on;
	__u8 why[2044]; /* why it is off, NUL-padded */
};
_Static_assert(sizeof(struct leg) == 2048, "leg");

/* Which legs are spliced. Agent writes; sockops and sweep_splices read. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LEGS);
	__type(key, __u32);
	__type(value, struct leg);
} splice_legs SEC(".maps");

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

enum splice_state {
	SPLICE_CANDIDATE = 1, /* the agent's next sweep looks at it */
	SPLICE_IN, /* the socket is in the map */
	SPLICE_LEAVING, /* on its way out of the map: it sends by TCP */
	SPLICE_OUT, /* not eligible, for good */
	SPLICE_RESET, /* released with unread bytes: its FIN is to be a reset */
};

/* A socket whose other end is on this node; lives and dies with it. */
struct splice {
	__u32 off; /* 1: all goes by TCP; first, so that other layouts' agents find it */
	enum splice_state state;
	__u32 redirecting; /* 1: nothing of what this end sent is in TCP any more */
	__u32 burst; /* bytes redirected since the other end was last seen to have read all */
	__u64 since; /* when it was marked, ns */
	__u64 bulk; /* bytes that went by TCP, less those that were redirected */
	__u64 by_tcp; /* when a message last went by TCP, ns */
	__u64 share; /* cookie of the namespace in whose share it counts; 0: in none */
	__u64 peer; /* the kernel's address of the other end's socket; 0: not known yet */
	enum splice_leg leg;
	__u16 mesh; /* index into the counters */
	__u16 quiet; /* leaving: no call that began before is under way any more */
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
 * Those that are spliced. sweep_splices adds, the kernel removes a socket when it closes; redirect
 * looks the other end up. Full: the others go by TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct splice_key);
	__type(value, __u64);
} splice_sockets SEC(".maps");

/*
 * How many of `splice_sockets` are a pod's, so that one does not take the room of all others; there
 * is no room for every pod's share, and a connection that finds none goes by TCP. As
 * `handover_shares`: sweep_splices and sock_release count.
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

/* What a sweep tells the agent of a socket. */
struct swept {
	__u64 stuck; /* cookie of the namespace where its writer is to be woken; 0: see below */
	struct splice_key leaves; /* the end may be taken out of the map when the other end may */
};
_Static_assert(sizeof(struct swept) == 56, "swept");

/*
 * Ends of connections whose other end is leaving. sweep_splices alone: it visits one end at a
 * time. An entry that is lost leaves its connection in the map, with TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct splice_key);
	__type(value, __u8);
} splice_leaving SEC(".maps");

/* Some connection wants to be looked at. */
__u32 splices_wanted = 0;
