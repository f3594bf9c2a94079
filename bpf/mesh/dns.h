/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * DNS over UDP: a query goes to the proxy's DNS listener on localhost, and the answer appears to
 * come from the server that was asked. connect and sendmsg send the query to an address of the DNS
 * range. On the egress of lo, dns_nat replaces it by the listener's address, and restores it as the
 * answer's source; getpeername and recvmsg then replace it by the server's. A connected socket has
 * one server. An unconnected one may have queries open to several, so each server has a number,
 * which is part of the address: dns_nat makes that address the query's source as well, and the
 * answer returns to it. dns_nat has no state of its own: all state is with the socket.
 */
#pragma once

#include "lib/hook.h"
#include "lib/owner.h"
#include "mesh/counter.h"
#include "mesh/origdst.h"
#include "mesh/outbound.h"

/*
 * The addresses of captured DNS over UDP; the low 16 bits are a number. The agent's routes have
 * these ranges on each of the pod's devices, with the device's own address as source: so the kernel
 * picks that address, and a socket that names a device finds a route.
 */
#define DNS4_NET 0x7f810000 /* 127.129.0.0/16 */
#define DNS4_MASK 0xffff0000
#define DNS6_SUBNET 1 /* fd53:6964:6573:7465:0:1::/96 */
#define DNS_ALONE 0 /* all that a socket asks, which has one server at a time */
#define DNS_TOKEN 0x8000 /* one of a socket's servers: its slot, and the turn that it has there */

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
	struct dns_server alone; /* of a socket that cannot be given numbers */
};
_Static_assert(sizeof(struct dns_servers) == 1568, "dns_servers");

/* The servers that an unconnected UDP socket asked. sendmsg writes; recvmsg reads. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct dns_servers);
} dns_asked SEC(".maps");

#define DNS_CLIENTS 64

/* A client that sent from port 53 to a UDP socket of the pod: datagrams to it are answers. */
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

/* The clients that sent from port 53 to a UDP socket. recvmsg writes; connect and sendmsg read. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct dns_clients);
} dns_clients SEC(".maps");

/* The address of the DNS range with this number. */
static __always_inline struct addr dns_via(const struct addr *like, __u32 number)
{
	if (addr_is4(like))
		return addr4(bpf_htonl(DNS4_NET | number));
	return (struct addr){ { bpf_htonl(VIA6_HI), bpf_htonl(VIA6_LO), bpf_htonl(DNS6_SUBNET),
				bpf_htonl(number) } };
}

static __always_inline bool addr_is_dns_via(const struct addr *a)
{
	if (addr_is4(a))
		return (a->w[3] & bpf_htonl(DNS4_MASK)) == bpf_htonl(DNS4_NET);
	return a->w[0] == bpf_htonl(VIA6_HI) && a->w[1] == bpf_htonl(VIA6_LO) &&
	       a->w[2] == bpf_htonl(DNS6_SUBNET);
}

static __always_inline __u32 dns_number(const struct addr *via)
{
	return bpf_ntohl(via->w[3]) & ~DNS4_MASK;
}

/* The pod's own address to which datagrams for a socket bound to no other address are sent. */
static __always_inline struct addr own_address(const struct pod *pod, const struct addr *like)
{
	const struct addr *own = addr_is4(like) ? &pod->ip4 : &pod->ip6;

	return addr_is_any(own) ? localhost_for(like) : *own;
}

/* The time in seconds, offset so that nothing counts as recent when the node starts. */
static __always_inline __u32 dns_now(void)
{
	return bpf_ktime_get_ns() / 1000000000 + 2 * DNS_PATIENCE;
}

/* Has the socket received from port 53 of this address, so that datagrams to it are answers? */
__noinline int dns_client_known(struct dns_clients *clients, const struct addr *a, __u32 now)
{
	if (!clients || !a)
		return 0;
	for (__u32 n = 0; n < DNS_CLIENTS; n++)
		if (addr_eq(&clients->client[n].addr, a))
			return now - clients->client[n].heard <= DNS_PATIENCE;
	return 0;
}

__noinline int dns_client_heard(struct dns_clients *clients, const struct addr *a, __u32 now)
{
	struct dns_client *client;

	if (!clients || !a)
		return 0;
	for (__u32 n = 0; n < DNS_CLIENTS; n++) {
		client = &clients->client[n];
		if (addr_eq(&client->addr, a)) {
			client->heard = now;
			return 0;
		}
	}
	client = &clients->client[clients->next++ & (DNS_CLIENTS - 1)];
	client->addr = *a;
	client->heard = now;
	return 0;
}

/*
 * Is it a query for the DNS listener? Conntrack would recognize an answer by the earlier query;
 * here the socket remembers whom it has received from.
 */
static __always_inline bool is_dns_question(const struct pod *pod, struct bpf_sock *sk,
					    const struct outbound *c)
{
	struct dns_clients *clients;

	if (udp_verdict(pod, c) != GO_DNS)
		return false;
	clients = bpf_sk_storage_get(&dns_clients, sk, NULL, 0);
	return !clients || !dns_client_known(clients, &c->dst, dns_now());
}

static __always_inline enum outcome connect_udp(struct bpf_sock_addr *ctx, int family,
						const struct pod *pod, struct outbound *c)
{
	struct origdst *od;

	/* The socket's former peer is forgotten. */
	bpf_sk_storage_delete(&origdsts, ctx->sk);
	if (c->dport != DNS_PORT)
		return NOT_MINE;
	owner_of(ctx->sk, &c->owner);
	if (!is_dns_question(pod, ctx->sk, c))
		return NOT_MINE;
	od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!od) {
		count(pod, REFUSED_NO_STATE);
		return refuse(ECONNREFUSED);
	}
	od->orig = c->dst;
	od->orig_port = c->dport;
	/* A server on localhost is queried from localhost. */
	od->via = addr_is_loopback(&c->dst) || addr_is_loopback(&c->src)
			  ? localhost_for(&c->dst)
			  : dns_via(&c->dst, DNS_ALONE);
	od->via_port = pod->dns_port;
	od->role = ROLE_CLIENT;
	sockaddr_set(ctx, family, &od->via, od->via_port);
	count(pod, CAPTURED_DNS);
	return TAKEN;
}

/* The number of one of the socket's servers, present or new; -1 if there is no free one. */
static __always_inline int dns_number_for(struct dns_servers *asked, const struct addr *server)
{
	__u32 now = dns_now();
	int number = -1;

	bpf_spin_lock(&asked->lock);
	for (__u32 slot = 0; slot < DNS_SERVERS; slot++) {
		struct dns_server *s = &asked->server[slot];

		if (!addr_eq(&s->addr, server))
			continue;
		s->asked = now;
		number = DNS_TOKEN | (s->turn & (DNS_TURNS - 1)) << DNS_SLOT_BITS | slot;
		goto out;
	}
	for (__u32 slot = 0; slot < DNS_SERVERS; slot++) {
		struct dns_server *s = &asked->server[slot];

		/* A pending answer must find its server. */
		if (now - s->asked <= DNS_PATIENCE)
			continue;
		s->addr = *server;
		s->asked = now;
		s->turn++;
		number = DNS_TOKEN | (s->turn & (DNS_TURNS - 1)) << DNS_SLOT_BITS | slot;
		goto out;
	}
out:
	bpf_spin_unlock(&asked->lock);
	return number;
}

/* The number for a socket that can have one server at a time. */
static __always_inline int dns_alone_for(struct dns_servers *asked, const struct addr *server)
{
	__u32 now = dns_now();
	int number = -1;

	bpf_spin_lock(&asked->lock);
	if (addr_eq(&asked->alone.addr, server) || now - asked->alone.asked > DNS_PATIENCE) {
		asked->alone.addr = *server;
		asked->alone.asked = now;
		number = DNS_ALONE;
	}
	bpf_spin_unlock(&asked->lock);
	return number;
}

/* The server that an answer comes from, by its number. */
static __always_inline bool dns_server_of(struct dns_servers *asked, __u32 number,
					  struct addr *server)
{
	struct dns_server *s = &asked->alone;
	bool found = true;

	if (number & DNS_TOKEN)
		s = &asked->server[number & (DNS_SERVERS - 1)];
	bpf_spin_lock(&asked->lock);
	if (number & DNS_TOKEN)
		found = (s->turn & (DNS_TURNS - 1)) == ((number & ~DNS_TOKEN) >> DNS_SLOT_BITS);
	*server = s->addr;
	bpf_spin_unlock(&asked->lock);
	return found && !addr_is_any(server);
}

/*
 * Can the socket's servers have numbers? The answers come to the pod's own address, so a socket
 * that is bound to another address or device does not receive them.
 */
static __always_inline bool takes_dns_numbers(const struct pod *pod, const struct outbound *c)
{
	struct addr own = own_address(pod, &c->dst);

	return (addr_is_any(&c->src) || addr_eq(&c->src, &own)) &&
	       (!c->ifindex || c->ifindex == pod->device);
}

/* A process sends a datagram by a socket that is not connected, or to another than its peer. */
static __always_inline enum outcome mesh_sendmsg(struct bpf_sock_addr *ctx, int family)
{
	struct dns_servers *asked;
	struct outbound c = {};
	const struct pod *pod;
	struct origdst *od;
	struct addr via;
	int number = -1;

	if (ctx->user_port != bpf_htons(DNS_PORT))
		return NOT_MINE;
	c.netns = bpf_get_netns_cookie(ctx);
	pod = pod_by_netns(c.netns);
	if (!pod || pod->flags & POD_BESIDE)
		return NOT_MINE;
	outbound_of(ctx, family, &c);
	owner_of(ctx->sk, &c.owner);
	if (!is_dns_question(pod, ctx->sk, &c))
		return NOT_MINE;
	od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, 0);
	/* To the server that the socket is connected to, named explicitly. */
	if (od && od->role == ROLE_CLIENT && addr_eq(&od->orig, &c.dst)) {
		sockaddr_set(ctx, family, &od->via, od->via_port);
		count(pod, CAPTURED_DNS);
		return TAKEN;
	}
	asked = bpf_sk_storage_get(&dns_asked, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!asked) {
		count(pod, REFUSED_NO_STATE);
		return refuse(ECONNREFUSED);
	}
	if (takes_dns_numbers(pod, &c))
		number = dns_number_for(asked, &c.dst);
	else if (!od)
		number = dns_alone_for(asked, &c.dst);
	if (number < 0) {
		count(pod, DNS_REFUSED);
		return refuse(ENOBUFS);
	}
	via = dns_via(&c.dst, number);
	sockaddr_set(ctx, family, &via, pod->dns_port);
	count(pod, CAPTURED_DNS);
	return TAKEN;
}

/* Restores the source of a received datagram, if it is an answer. */
static __always_inline enum outcome mesh_recvmsg(struct bpf_sock_addr *ctx, int family)
{
	struct addr from = sockaddr_get(ctx, family), server;
	struct dns_servers *asked;
	struct dns_clients *clients;
	const struct pod *pod;

	/* Only the DNS listener's answers come from the DNS range, see dns_nat. */
	if (restore_dialled(ctx, family) == TAKEN)
		return TAKEN;
	if (ctx->user_port != bpf_htons(DNS_PORT)) {
		if (!addr_is_dns_via(&from) && !addr_is_localhost(&from))
			return NOT_MINE;
		asked = bpf_sk_storage_get(&dns_asked, ctx->sk, NULL, 0);
		if (!asked)
			return NOT_MINE;
		pod = pod_by_netns(bpf_get_netns_cookie(ctx));
		if (!pod || bpf_ntohs(ctx->user_port) != pod->dns_port)
			return NOT_MINE;
		if (!dns_server_of(asked, addr_is_localhost(&from) ? DNS_ALONE : dns_number(&from),
				   &server))
			return NOT_MINE;
		sockaddr_set(ctx, family, &server, DNS_PORT);
		return TAKEN;
	}
	pod = pod_by_netns(bpf_get_netns_cookie(ctx));
	if (!pod || !pod->dns_port)
		return NOT_MINE;
	clients = bpf_sk_storage_get(&dns_clients, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (clients)
		dns_client_heard(clients, &from, dns_now());
	return NOT_MINE;
}
