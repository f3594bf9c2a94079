/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * DNS over UDP: a question goes to the proxy's DNS listener on localhost, and the answer appears
 * to come from the server that was asked.
 *
 * A connected socket has one server: its storage says which, and recvmsg puts it back. An
 * unconnected one may have questions open to several servers, whose answers all come from the
 * listener. What tells them apart is the address that the question came *from*: each server of
 * a socket has a token address of its own. On the answer's way back over lo, dns_reply looks at
 * the token and makes the server the packet's source. All state is with the socket.
 */
#pragma once

static __always_inline struct addr token_for(const struct addr *like, __u32 slot)
{
	if (addr_is4(like))
		return addr4(bpf_htonl(TOKEN4_NET | (slot + 1)));
	return (struct addr){ { bpf_htonl(VIA6_HI), bpf_htonl(VIA6_LO), 0, bpf_htonl(slot + 1) } };
}

static __always_inline int connect_udp(struct bpf_sock_addr *ctx, int family, const struct pod *pod,
				       struct outbound *c)
{
	struct origdst *od;

	/* What the socket was connected to before is forgotten. */
	bpf_sk_storage_delete(&origdsts, ctx->sk);
	if (c->dport != DNS_PORT)
		return 1;
	owner_of(ctx->sk, c);
	if (udp_verdict(pod, c) != GO_DNS)
		return 1;
	od = bpf_sk_storage_get(&origdsts, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!od) {
		count(pod, REFUSED_NO_STATE);
		return refuse(ECONNREFUSED);
	}
	od->orig = c->dst;
	od->orig_port = c->dport;
	od->via = localhost_for(&c->dst);
	od->via_port = pod->dns_port;
	od->role = ROLE_CLIENT;
	sockaddr_set(ctx, family, &od->via, od->via_port);
	count(pod, CAPTURED_DNS);
	return 1;
}

/* The slot of this server, its own or the next one in turn. */
static __always_inline __u32 slot_for(struct dns_servers *asked, const struct addr *server)
{
	__u32 slot;

	for (slot = 0; slot < DNS_SERVERS; slot++)
		if (slot < asked->used && addr_eq(&asked->server[slot], server))
			return slot;
	slot = asked->used++ & (DNS_SERVERS - 1);
	asked->server[slot] = *server;
	return slot;
}

static __always_inline int sendmsg_any(struct bpf_sock_addr *ctx, int family)
{
	struct dns_servers *asked;
	struct outbound c = {};
	const struct pod *pod;
	struct addr to, token;

	if (ctx->user_port != bpf_htons(DNS_PORT))
		return 1;
	c.netns = bpf_get_netns_cookie(ctx);
	pod = pod_by_netns(c.netns);
	if (!pod)
		return 1;
	outbound_of(ctx, family, &c);
	owner_of(ctx->sk, &c);
	if (udp_verdict(pod, &c) != GO_DNS)
		return 1;
	asked = bpf_sk_storage_get(&dns_asked, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!asked) {
		count(pod, REFUSED_NO_STATE);
		return refuse(ECONNREFUSED);
	}
	asked->last = slot_for(asked, &c.dst);
	token = token_for(&c.dst, asked->last);
	to = localhost_for(&c.dst);
	/* A socket that is bound to an address has but that one: its last server must do. */
	if (addr_is_any(&c.src)) {
		if (family == AF_INET) {
			ctx->msg_src_ip4 = token.w[3];
		} else {
			ctx->msg_src_ip6[0] = token.w[0];
			ctx->msg_src_ip6[1] = token.w[1];
			ctx->msg_src_ip6[2] = token.w[2];
			ctx->msg_src_ip6[3] = token.w[3];
		}
	}
	sockaddr_set(ctx, family, &to, pod->dns_port);
	count(pod, CAPTURED_DNS);
	return 1;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return sendmsg_any(ctx, AF_INET);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return sendmsg_any(ctx, AF_INET6);
}

/* The source of a datagram that was received, where it is the DNS listener. */
static __always_inline int recvmsg_any(struct bpf_sock_addr *ctx, int family)
{
	struct dns_servers *asked;
	const struct pod *pod;
	struct addr from;

	if (restore_dialled(ctx, family))
		return 1;
	asked = bpf_sk_storage_get(&dns_asked, ctx->sk, NULL, 0);
	if (!asked)
		return 1;
	/* An answer that came to no token: the socket is bound to an address. */
	from = sockaddr_get(ctx, family);
	pod = pod_by_netns(bpf_get_netns_cookie(ctx));
	if (!pod || !addr_is_localhost(&from) || bpf_ntohs(ctx->user_port) != pod->dns_port)
		return 1;
	from = asked->server[asked->last & (DNS_SERVERS - 1)];
	sockaddr_set(ctx, family, &from, DNS_PORT);
	return 1;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return recvmsg_any(ctx, AF_INET);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return recvmsg_any(ctx, AF_INET6);
}

/* The server behind a token address, from the socket that the answer is for. */
static __always_inline bool dns_server_of(struct __sk_buff *skb, struct bpf_sock_tuple *tuple,
					  __u32 size, __u32 slot, struct addr *server)
{
	struct dns_servers *asked;
	struct bpf_sock *sk;
	bool found = false;

	sk = bpf_sk_lookup_udp(skb, tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	asked = bpf_sk_storage_get(&dns_asked, sk, NULL, 0);
	if (asked && slot < asked->used && slot < DNS_SERVERS) {
		*server = asked->server[slot & (DNS_SERVERS - 1)];
		found = true;
	}
	bpf_sk_release(sk);
	return found;
}

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define UDP_CSUM (BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0)

static __always_inline void dns_reply4(struct __sk_buff *skb)
{
	const __u32 l3 = sizeof(struct ethhdr), l4 = l3 + sizeof(struct iphdr);
	struct bpf_sock_tuple tuple = {};
	struct addr server;
	struct iphdr ip;
	struct udphdr udp;
	__be16 port = bpf_htons(DNS_PORT);

	if (bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)) || ip.protocol != IPPROTO_UDP ||
	    ip.ihl != 5 || (ip.daddr & bpf_htonl(TOKEN4_MASK)) != bpf_htonl(TOKEN4_NET) ||
	    ip.saddr != bpf_htonl(0x7f000001) || bpf_skb_load_bytes(skb, l4, &udp, sizeof(udp)))
		return;
	tuple.ipv4.saddr = ip.saddr;
	tuple.ipv4.daddr = ip.daddr;
	tuple.ipv4.sport = udp.source;
	tuple.ipv4.dport = udp.dest;
	if (!dns_server_of(skb, &tuple, sizeof(tuple.ipv4),
			   (bpf_ntohl(ip.daddr) & ~TOKEN4_MASK) - 1, &server))
		return;
	bpf_l4_csum_replace(skb, l4 + offsetof(struct udphdr, check), ip.saddr, server.w[3],
			    UDP_CSUM | sizeof(__be32));
	bpf_l4_csum_replace(skb, l4 + offsetof(struct udphdr, check), udp.source, port,
			    BPF_F_MARK_MANGLED_0 | sizeof(__be16));
	bpf_l3_csum_replace(skb, l3 + offsetof(struct iphdr, check), ip.saddr, server.w[3],
			    sizeof(__be32));
	bpf_skb_store_bytes(skb, l3 + offsetof(struct iphdr, saddr), &server.w[3], sizeof(__be32),
			    0);
	bpf_skb_store_bytes(skb, l4 + offsetof(struct udphdr, source), &port, sizeof(port), 0);
}

static __always_inline void dns_reply6(struct __sk_buff *skb)
{
	const __u32 l3 = sizeof(struct ethhdr), l4 = l3 + sizeof(struct ipv6hdr);
	struct bpf_sock_tuple tuple = {};
	struct addr src, dst, server;
	struct ipv6hdr ip;
	struct udphdr udp;
	__be16 port = bpf_htons(DNS_PORT);

	if (bpf_skb_load_bytes(skb, l3, &ip, sizeof(ip)) || ip.nexthdr != IPPROTO_UDP)
		return;
	__builtin_memcpy(&src, &ip.saddr, sizeof(src));
	__builtin_memcpy(&dst, &ip.daddr, sizeof(dst));
	if (!addr_is_via(&dst) || dst.w[2] || !addr_is_localhost(&src) ||
	    bpf_skb_load_bytes(skb, l4, &udp, sizeof(udp)))
		return;
	__builtin_memcpy(&tuple.ipv6.saddr, &src, sizeof(src));
	__builtin_memcpy(&tuple.ipv6.daddr, &dst, sizeof(dst));
	tuple.ipv6.sport = udp.source;
	tuple.ipv6.dport = udp.dest;
	if (!dns_server_of(skb, &tuple, sizeof(tuple.ipv6), bpf_ntohl(dst.w[3]) - 1, &server))
		return;
	for (__u32 i = 0; i < 4; i++)
		bpf_l4_csum_replace(skb, l4 + offsetof(struct udphdr, check), src.w[i], server.w[i],
				    UDP_CSUM | sizeof(__be32));
	bpf_l4_csum_replace(skb, l4 + offsetof(struct udphdr, check), udp.source, port,
			    BPF_F_MARK_MANGLED_0 | sizeof(__be16));
	bpf_skb_store_bytes(skb, l3 + offsetof(struct ipv6hdr, saddr), &server, sizeof(server), 0);
	bpf_skb_store_bytes(skb, l4 + offsetof(struct udphdr, source), &port, sizeof(port), 0);
}

/* On the way out of lo, in pods whose DNS is captured. Everything passes. */
SEC("tc")
int dns_reply(struct __sk_buff *skb)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		dns_reply4(skb);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		dns_reply6(skb);
	return -1; /* TC_ACT_UNSPEC: other filters have their turn */
}
