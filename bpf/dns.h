/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * DNS over UDP: a question goes to the proxy's DNS listener on localhost, and the answer appears
 * to come from the server that was asked.
 *
 * connect and sendmsg send it to an address of the DNS range. On its way out over lo, dns_nat
 * makes that the listener's, and on the answer's way back the answer's source; getpeername and
 * recvmsg then put the server in its place. A connected socket has one server. Another may have
 * questions open to several, so each has a number, which the address carries: dns_nat makes it the
 * question's source as well, for the answer to bring it back. dns_nat itself knows no question:
 * all state is with the socket.
 */
#pragma once

/* An address of the DNS range. */
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

/* Of the pod's own addresses, the one where a socket is found that is bound to no other. */
static __always_inline struct addr own_address(const struct pod *pod, const struct addr *like)
{
	const struct addr *own = addr_is4(like) ? &pod->ip4 : &pod->ip6;

	return addr_is_any(own) ? localhost_for(like) : *own;
}

/* Seconds, counted so that nothing has happened for long when the node starts. */
static __always_inline __u32 dns_now(void)
{
	return bpf_ktime_get_ns() / 1000000000 + 2 * DNS_PATIENCE;
}

/* Has the socket heard from port 53 of this address, so that what it sends there is an answer? */
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
 * Is it a question that goes to the DNS listener? Conntrack would know an answer by the question
 * that came before; here the socket knows whom it heard from.
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

	/* What the socket was connected to before is forgotten. */
	bpf_sk_storage_delete(&origdsts, ctx->sk);
	if (c->dport != DNS_PORT)
		return NOT_MINE;
	owner_of(ctx->sk, c);
	if (!is_dns_question(pod, ctx->sk, c))
		return NOT_MINE;
	od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!od) {
		count(pod, REFUSED_NO_STATE);
		return refuse(ECONNREFUSED);
	}
	od->orig = c->dst;
	od->orig_port = c->dport;
	/* A server on localhost is asked from localhost. */
	od->via = addr_is_loopback(&c->dst) || addr_is_loopback(&c->src)
			  ? localhost_for(&c->dst)
			  : dns_via(&c->dst, DNS_ALONE);
	od->via_port = pod->dns_port;
	od->role = ROLE_CLIENT;
	sockaddr_set(ctx, family, &od->via, od->via_port);
	count(pod, CAPTURED_DNS);
	return TAKEN;
}

/* The number of a server of the socket, its own or a new one; -1: there is none to be had. */
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

		/* An answer that is still to come must find its server. */
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

/* The same, of a socket that has one server at a time. */
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
 * Can the answers to a socket have numbers? They come to the pod's own address, where one that is
 * bound to another address, or to another device, does not hear them.
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
	if (!pod)
		return NOT_MINE;
	outbound_of(ctx, family, &c);
	owner_of(ctx->sk, &c);
	if (!is_dns_question(pod, ctx->sk, &c))
		return NOT_MINE;
	od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, 0);
	/* To the server that the socket is connected to, by its name. */
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

/* The source of a datagram that was received, where it is an answer. */
static __always_inline enum outcome mesh_recvmsg(struct bpf_sock_addr *ctx, int family)
{
	struct addr from = sockaddr_get(ctx, family), server;
	struct dns_servers *asked;
	struct dns_clients *clients;
	const struct pod *pod;

	/* From the DNS range there are answers of the DNS listener alone, see dns_nat. */
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

#define TC_NAT 3 /* ours: to be given its new addresses */

/* A UDP datagram's addresses and ports; where its UDP header is. */
struct datagram {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u32 l4;
};

/* The socket in the namespace that would get what comes from src to dst. */
static __always_inline struct bpf_sock *socket_at(struct __sk_buff *skb, const struct addr *src,
						  __be16 sport, const struct addr *dst,
						  __be16 dport)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = sizeof(tuple.ipv6);

	if (addr_is4(dst)) {
		tuple.ipv4.saddr = src->w[3];
		tuple.ipv4.daddr = dst->w[3];
		tuple.ipv4.sport = sport;
		tuple.ipv4.dport = dport;
		return bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	__builtin_memcpy(&tuple.ipv6.saddr, src, sizeof(*src));
	__builtin_memcpy(&tuple.ipv6.daddr, dst, sizeof(*dst));
	tuple.ipv6.sport = sport;
	tuple.ipv6.dport = dport;
	return bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
}

/* A question to the DNS range goes to the listener; where there is none, to nobody. */
static __always_inline int dns_question(struct __sk_buff *skb, const struct datagram *d,
					struct datagram *to)
{
	struct bpf_sock *listener;

	to->dst = localhost_for(&d->dst);
	if (dns_number(&d->dst) & DNS_TOKEN)
		to->src = d->dst;
	listener = socket_at(skb, &to->src, d->sport, &to->dst, d->dport);
	if (!listener)
		return TC_PASS;
	bpf_sk_release(listener);
	return TC_NAT;
}

/* What the listener sends. */
static __always_inline int dns_answer(struct __sk_buff *skb, const struct pod *pod,
				      const struct datagram *d, struct datagram *to)
{
	struct bpf_sock *client;
	bool asked;

	if (addr_is_dns_via(&d->dst)) {
		to->src = d->dst;
		to->dst = own_address(pod, &d->dst);
		return TC_NAT;
	}
	/* Asked on localhost, by its own address. */
	if (addr_is_loopback(&d->dst))
		return TC_PASS;
	to->src = dns_via(&d->dst, DNS_ALONE);
	/* One that is connected to the DNS range is not found, nor one that is bound to a device.
	 */
	client = socket_at(skb, &d->src, d->sport, &d->dst, d->dport);
	if (!client)
		return TC_NAT;
	/* Else it has asked the listener by its own address, or is not connected. */
	asked = client->state != BPF_TCP_ESTABLISHED &&
		(bpf_sk_storage_get(&origdsts, client, NULL, 0) ||
		 bpf_sk_storage_get(&dns_asked, client, NULL, 0));
	bpf_sk_release(client);
	return asked ? TC_NAT : TC_PASS;
}

/* Where a datagram on its way out of lo is to go, and where it is to come from. */
static __always_inline int dns_translate(struct __sk_buff *skb, const struct datagram *d,
					 struct datagram *to)
{
	struct bpf_sock *from = skb->sk;
	struct outbound sender = {};
	const struct pod *pod;
	const struct sock *sk;
	const struct net *net;

	if (!addr_is_dns_via(&d->src) && !addr_is_dns_via(&d->dst) && !addr_is_localhost(&d->src))
		return TC_PASS;
	if (!from)
		return TC_PASS;
	sk = kernel_ptr(number_of(from), struct sock);
	net = peek(sk, __sk_common.skc_net.net);
	sender.netns = peek(net, net_cookie);
	pod = pod_by_netns(sender.netns);
	if (!pod || !pod->dns_port)
		return TC_PASS;
	if (addr_is_localhost(&d->src) && bpf_ntohs(d->sport) == pod->dns_port) {
		owner_of_kernel(sk, &sender);
		if (is_proxy(pod, &sender))
			return dns_answer(skb, pod, d, to);
		count(pod, DNS_FORGED);
		return TC_DROP;
	}
	/* Only here does anything get such a source. */
	if (addr_is_dns_via(&d->src)) {
		count(pod, DNS_FORGED);
		return TC_DROP;
	}
	if (addr_is_dns_via(&d->dst) && bpf_ntohs(d->dport) == pod->dns_port)
		return dns_question(skb, d, to);
	return TC_PASS;
}

#define UDP_CSUM (BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0)

static __always_inline bool datagram_ports(struct __sk_buff *skb, struct datagram *d)
{
	struct udphdr udp;

	if (bpf_skb_load_bytes(skb, d->l4, &udp, sizeof(udp)))
		return false;
	d->sport = udp.source;
	d->dport = udp.dest;
	return true;
}

static __always_inline int dns_nat4(struct __sk_buff *skb)
{
	const __u32 l3 = sizeof(struct ethhdr);
	struct datagram d = {}, to;
	struct iphdr ip;
	int verdict;

	if (bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)) || ip.protocol != IPPROTO_UDP)
		return TC_PASS;
	d.src = addr4(ip.saddr);
	d.dst = addr4(ip.daddr);
	d.l4 = l3 + ip.ihl * 4;
	if (!datagram_ports(skb, &d))
		return TC_PASS;
	to = d;
	verdict = dns_translate(skb, &d, &to);
	if (verdict != TC_NAT)
		return verdict;
	bpf_l4_csum_replace(skb, d.l4 + offsetof(struct udphdr, check), ip.saddr, to.src.w[3],
			    UDP_CSUM | sizeof(__be32));
	bpf_l4_csum_replace(skb, d.l4 + offsetof(struct udphdr, check), ip.daddr, to.dst.w[3],
			    UDP_CSUM | sizeof(__be32));
	bpf_l3_csum_replace(skb, l3 + offsetof(struct iphdr, check), ip.saddr, to.src.w[3],
			    sizeof(__be32));
	bpf_l3_csum_replace(skb, l3 + offsetof(struct iphdr, check), ip.daddr, to.dst.w[3],
			    sizeof(__be32));
	bpf_skb_store_bytes(skb, l3 + offsetof(struct iphdr, saddr), &to.src.w[3], sizeof(__be32),
			    0);
	bpf_skb_store_bytes(skb, l3 + offsetof(struct iphdr, daddr), &to.dst.w[3], sizeof(__be32),
			    0);
	return TC_PASS;
}

static __always_inline int dns_nat6(struct __sk_buff *skb)
{
	const __u32 l3 = sizeof(struct ethhdr);
	struct datagram d = {}, to;
	struct ipv6hdr ip;
	int verdict;

	if (bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)) || ip.nexthdr != IPPROTO_UDP)
		return TC_PASS;
	__builtin_memcpy(&d.src, &ip.saddr, sizeof(d.src));
	__builtin_memcpy(&d.dst, &ip.daddr, sizeof(d.dst));
	d.l4 = l3 + sizeof(ip);
	if (!datagram_ports(skb, &d))
		return TC_PASS;
	to = d;
	verdict = dns_translate(skb, &d, &to);
	if (verdict != TC_NAT)
		return verdict;
	for (__u32 i = 0; i < 4; i++) {
		bpf_l4_csum_replace(skb, d.l4 + offsetof(struct udphdr, check), d.src.w[i],
				    to.src.w[i], UDP_CSUM | sizeof(__be32));
		bpf_l4_csum_replace(skb, d.l4 + offsetof(struct udphdr, check), d.dst.w[i],
				    to.dst.w[i], UDP_CSUM | sizeof(__be32));
	}
	bpf_skb_store_bytes(skb, l3 + offsetof(struct ipv6hdr, saddr), &to.src, sizeof(to.src), 0);
	bpf_skb_store_bytes(skb, l3 + offsetof(struct ipv6hdr, daddr), &to.dst, sizeof(to.dst), 0);
	return TC_PASS;
}

/* A packet on the way out of lo, in a pod whose DNS is captured. */
static __always_inline int mesh_dns_nat(struct __sk_buff *skb)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return dns_nat4(skb);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return dns_nat6(skb);
	return TC_PASS;
}
