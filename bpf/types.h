/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every struct that the agent shares with the kernel side. The agent uses the types that the
 * skeleton generates from these, so there is no second definition to keep in step.
 *
 * An IPv4 address is always kept v4-mapped (::ffff:a.b.c.d): one code path and one map serve
 * AF_INET, AF_INET6 and the v4-mapped addresses in between. Addresses are in network byte
 * order, ports in host byte order, unless a comment says otherwise.
 */
#pragma once

struct addr {
	__u32 w[4];
};
_Static_assert(sizeof(struct addr) == 16, "addr");

/* struct pod, flags */
enum pod_flag {
	POD_CAPTURE_V4 = 1 << 0, /* IPv4 is intercepted */
	POD_CAPTURE_V6 = 1 << 1, /* IPv6 is intercepted */
	POD_GID_EXEMPT = 1 << 2, /* processes of proxy_gid are the proxy too */
	POD_SELF_INBOUND = 1 << 3, /* proxy -> its own pod goes to the inbound port */
	POD_OUT_ALL = 1 << 4, /* no include list outbound: everything is included */
	POD_IN_ALL = 1 << 5, /* no include list inbound: everything is included */
	POD_LOOPBACK_INCLUDED = 1 << 6, /* the include ranges name loopback: lo is not exempt */
	POD_UDP_EXCLUDES = 1 << 7, /* excluded outbound ports hold for UDP (DNS) as well */
	POD_CIDRS_FIRST = 1 << 8, /* excluded destinations beat everything, not just includes */
	POD_EXCLUDE_IFS = 1 << 9, /* some of the pod's interfaces are exempt */
	POD_SPLICE = 1 << 10, /* its connections may skip the TCP/IP stack */
	POD_NO_UID = 1 << 11, /* proxy_uid is nobody: no user is exempt */
	POD_TCP_DNS_DIRECT = 1 << 12, /* DNS is captured, but the app's DNS over TCP never is */
	POD_TCP_DNS_ANY = 1 << 13, /* DNS is captured; over TCP, 53 is a port as any other */
	POD_ROUTE_LOCALNET = 1 << 14, /* what is bound to 127.0.0.0/8 may call off the pod */
	POD_OWN_NAT = 1 << 15, /* the pod's own rules translate what comes in */
};

/* One enrolled pod; key: its network namespace's cookie. */
struct pod {
	__u32 proxy_uid; /* as the pod's own user namespace numbers it */
	__u32 proxy_gid;
	enum pod_flag flags;
	__u32 sets; /* bit n: enum rule_set n has entries for this pod */
	struct addr ip4; /* the pod's IPv4 address, v4-mapped; zero: none */
	struct addr ip6; /* the pod's IPv6 address; zero: none */
	__u16 out_port; /* the proxy's outbound listener */
	__u16 in_port; /* the proxy's inbound listener */
	__u16 hbone_port; /* never redirected on the way from the proxy to its own pod; 0: none */
	__u16 dns_port; /* the proxy's DNS listener; 0: DNS is not captured */
	__u16 mesh; /* index into the counters */
	__u16 pad;
	__u32 device; /* the one that has its address; 0: not known */
};
_Static_assert(sizeof(struct pod) == 64, "pod");

/* Which list of a pod an entry of port_rules or cidr_rules belongs to. */
enum rule_set {
	OUT_EXCLUDE_PORTS,
	OUT_INCLUDE_PORTS,
	IN_EXCLUDE_PORTS,
	IN_INCLUDE_PORTS,
	OUT_EXCLUDE_CIDRS,
	OUT_INCLUDE_CIDRS,
	IN_EXCLUDE_CIDRS,
	OUT_EXCLUDE_TCP_UIDS, /* with the class of the uid in the bits from UID_CLASS_SHIFT on */
	OUT_EXCLUDE_UDP_UIDS,
	OUT_EXCLUDE_ROUTES, /* every route of the pod; 1: behind an interface that is exempt */
};

/* In the keys, bits above a set say which class of users, or which family, it is for. */
#define UID_CLASS_SHIFT 8
#define CIDR_V6 (1 << 8)

/* One of the pod's own addresses; netns 0: some enrolled pod of this node has it. */
struct local_key {
	__u64 netns;
	struct addr addr;
};
_Static_assert(sizeof(struct local_key) == 24, "local_key");

enum local {
	LOCAL_OWN = 1,
	LOCAL_LANDING, /* the first of a device: where REDIRECT leads what comes in by it */
};

/* Longest-prefix keys: the fields behind prefixlen are matched bit by bit, in memory order. */
struct port_rule_key {
	__u32 prefixlen; /* 96 (set and cookie) + 16 for one port, less for an aligned range */
	enum rule_set set;
	__u32 netns[2]; /* the cookie's halves: the struct must not be padded */
	__u16 port; /* network byte order */
	__u16 pad;
};
_Static_assert(sizeof(struct port_rule_key) == 20, "port_rule_key");

struct cidr_rule_key {
	__u32 prefixlen; /* 96 (set and cookie) + the prefix length in the v4-mapped 128 bits */
	enum rule_set set;
	__u32 netns[2];
	struct addr addr;
};
_Static_assert(sizeof(struct cidr_rule_key) == 32, "cidr_rule_key");

/* An interface of a pod that is exempt. */
struct if_key {
	__u64 netns;
	__u32 ifindex;
	__u32 pad;
};
_Static_assert(sizeof(struct if_key) == 16, "if_key");

/* Users of a pod with ports of their own that are excluded. Value: their class, from 1. */
struct uid_rule_key {
	__u32 prefixlen; /* 64 (the cookie) + 32 for one user, less for an aligned range */
	__u32 netns[2];
	__u32 uid; /* network byte order */
};
_Static_assert(sizeof(struct uid_rule_key) == 16, "uid_rule_key");

#define DNS_SLOT_BITS 6
#define DNS_SERVERS (1 << DNS_SLOT_BITS) /* that one socket can have questions open to */
#define DNS_TURNS 512 /* of a slot, until an answer could be taken for another server's */
#define DNS_PATIENCE 30 /* seconds that an answer may take: as long as conntrack waits for one */

/* A server that a UDP socket asked. */
struct dns_server {
	struct addr addr;
	__u32 asked; /* when it was asked last, in seconds; 0: unused */
	__u32 turn; /* how many servers have had this slot */
};
_Static_assert(sizeof(struct dns_server) == 24, "dns_server");

/* The servers that a UDP socket asked without being connected to them. */
struct dns_servers {
	struct bpf_spin_lock lock;
	__u32 pad;
	struct dns_server server[DNS_SERVERS]; /* whose answers have a number each */
	struct dns_server alone; /* of a socket that can't be given numbers */
};
_Static_assert(sizeof(struct dns_servers) == 1568, "dns_servers");

#define DNS_CLIENTS 64

/* Somebody that a UDP socket of the pod heard from, port 53: what goes there is an answer. */
struct dns_client {
	struct addr addr;
	__u32 heard; /* when, in seconds; 0: unused */
	__u32 pad;
};
_Static_assert(sizeof(struct dns_client) == 24, "dns_client");

struct dns_clients {
	struct dns_client client[DNS_CLIENTS];
	__u32 next; /* the slot for the next one, in turn */
	__u32 pad;
};
_Static_assert(sizeof(struct dns_clients) == 1544, "dns_clients");

enum origdst_role {
	ROLE_CLIENT = 1, /* dialled orig, was sent to via */
	ROLE_PROXY = 2, /* accepted a connection that was dialled to orig */
};

/* What a captured connection was meant for; lives and dies with its socket. */
struct origdst {
	struct addr orig; /* what the client dialled */
	struct addr via; /* where the connection really goes */
	__u16 orig_port;
	__u16 via_port;
	enum origdst_role role;
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

/* A slot for one of the proxy's listeners. */
struct listener_key {
	__u64 netns;
	struct addr at; /* what it is bound to; any of IPv4, v4-mapped, is not any of IPv6 */
	__u16 port;
	__u16 slot; /* 0 .. LISTENER_SLOTS - 1 */
	__u32 pad;
};
_Static_assert(sizeof(struct listener_key) == 32, "listener_key");

enum device_family {
	DEVICE_V4 = 1,
	DEVICE_V6,
	DEVICE_V6_LINK, /* link-local */
};

/* A device of a pod, and which kind of address of it. */
struct device_key {
	__u64 netns;
	__u32 ifindex;
	enum device_family family;
};
_Static_assert(sizeof(struct device_key) == 16, "device_key");

/* The source of a connection that comes into a pod. */
struct dialled_key {
	__u64 netns;
	struct addr src;
	__u16 sport;
	__u16 pad[3];
};
_Static_assert(sizeof(struct dialled_key) == 32, "dialled_key");

/* Userspace's own record of an enrolled pod, pinned so that `status` and the next agent know. */
struct pod_record {
	__u8 pod[320]; /* "namespace/name", NUL-padded */
	__u8 uid[64]; /* metadata.uid, NUL-padded */
	__u8 netns[256]; /* path of the network namespace, NUL-padded */
};
_Static_assert(sizeof(struct pod_record) == 640, "pod_record");

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

/* What a sweep tells the agent of a socket. */
struct swept {
	__u64 stuck; /* cookie of the namespace where its writer is to be woken; 0: see below */
	struct splice_key leaves; /* the end may be taken out of the map when the other end may */
};
_Static_assert(sizeof(struct swept) == 56, "swept");

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

enum counter {
	CAPTURED_OUTBOUND, /* connect: sent to the outbound listener */
	CAPTURED_SELF, /* connect: the proxy's call to its own pod, sent to the inbound listener */
	CAPTURED_DNS, /* connect or sendmsg: a question sent to the DNS listener */
	DIRECT, /* connect of an enrolled pod, left alone */
	STEERED_INBOUND, /* a new connection handed to the inbound listener */
	PASSED_INBOUND, /* a new connection left alone (excluded, or from the pod itself) */
	REFUSED_NO_LISTENER, /* a new connection refused: the proxy does not listen */
	REFUSED_NO_STATE, /* connect refused: no memory to keep the original destination */
	REFUSED_NO_ADDRESS, /* connect refused: off the pod, which has no address of that family */
	REFUSED_BUSY, /* connect refused: too many of the pod's wait for the proxy to accept them */
	REFUSED_SOURCE_ROUTE, /* connect or setsockopt refused: the packets would go elsewhere */
	HANDOVER_FULL, /* the original destination could not be handed over: no room */
	HANDOVER_MISSED, /* a connection came to the outbound listener's redirect address
			    unannounced */
	ORIGDST_ANSWERED, /* getsockopt(SO_ORIGINAL_DST) answered */
	DNS_REFUSED, /* sendmsg refused: too many DNS servers at a time from one socket */
	DNS_FORGED, /* datagrams dropped that passed for the DNS listener's */
	SPLICE_SOCKETS, /* sockets that were spliced */
	SPLICE_NOT_SAFE, /* not eligible: blocking, or with an option that splicing breaks */
	SPLICE_NOT_PROXY, /* not eligible: between pods, but not between their proxies */
	SPLICE_LEFT, /* sockets that left the map again: they send bulk, or have begun to block */
	SPLICE_MAP_FULL, /* eligible, but there is no room in the map */
	SPLICE_IN_OTHER_MAP, /* not eligible: in another program's sockmap */
	SPLICE_MESSAGES, /* messages that skipped the TCP/IP stack */
	SPLICE_BYTES, /* their bytes */
	SPLICE_SPILLED, /* by TCP: too much is unread at the other end */
	SPLICE_BULK, /* by TCP: a large message, which TCP carries better */
	SPLICE_REFRESH, /* by TCP: its turn, so that what is between the ends sees the connection */
	SPLICE_UNREAD, /* by TCP: what went by TCP before is not read yet */
	SPLICE_NO_PEER, /* by TCP: the other end is not spliced, or may not be sent to */
	COUNTERS,
};

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
