/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The packets of DNS over UDP on the egress of lo; dns.h says why they are translated. */
#pragma once

#include "mesh/counter.h"
#include "mesh/dns.h"

#define TC_NAT 3 /* ours: to be given its new addresses */

/* A UDP datagram's addresses and ports; where its UDP header is. */
struct datagram {
	struct addr src;
	struct addr dst;
	__be16 sport;
	__be16 dport;
	__u32 l4;
};

/* The namespace's socket that would receive a datagram from src to dst. */
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

/* A query to the DNS range goes to the listener; without a listener it is dropped. */
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

/* A datagram from the listener. */
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
	/* The query was to localhost, to the listener's own address. */
	if (addr_is_loopback(&d->dst))
		return TC_PASS;
	to->src = dns_via(&d->dst, DNS_ALONE);
	/* This does not find sockets that are connected to the DNS range or bound to a device. */
	client = socket_at(skb, &d->src, d->sport, &d->dst, d->dport);
	if (!client)
		return TC_NAT;
	/* Otherwise it has queried the listener at its own address, or is not connected. */
	asked = client->state != BPF_TCP_ESTABLISHED &&
		(bpf_sk_storage_get(&origdsts, client, NULL, 0) ||
		 bpf_sk_storage_get(&dns_asked, client, NULL, 0));
	bpf_sk_release(client);
	return asked ? TC_NAT : TC_PASS;
}

/* Computes the new addresses of a datagram on the egress of lo. */
static __always_inline int dns_translate(struct __sk_buff *skb, const struct datagram *d,
					 struct datagram *to)
{
	struct bpf_sock *from = skb->sk;
	struct owner sender = {};
	__u64 netns;
	const struct pod *pod;
	const struct sock *sk;
	const struct net *net;

	if (!addr_is_dns_via(&d->src) && !addr_is_dns_via(&d->dst) && !addr_is_localhost(&d->src))
		return TC_PASS;
	if (!from)
		return TC_PASS;
	sk = kernel_ptr(number_of(from), struct sock);
	net = peek(sk, __sk_common.skc_net.net);
	netns = peek(net, net_cookie);
	pod = pod_by_netns(netns);
	if (!pod || !pod->dns_port)
		return TC_PASS;
	if (addr_is_localhost(&d->src) && bpf_ntohs(d->sport) == pod->dns_port) {
		owner_of_kernel(sk, &sender);
		if (is_proxy(pod, &sender))
			return dns_answer(skb, pod, d, to);
		count(pod, DNS_FORGED);
		return TC_DROP;
	}
	/* No other code sets such a source. */
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

/* A packet on the egress of lo, in a pod whose DNS is captured. */
static __always_inline int mesh_dns_nat(struct __sk_buff *skb)
{
	if (skb->protocol == bpf_htons(ETH_P_IP))
		return dns_nat4(skb);
	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return dns_nat6(skb);
	return TC_PASS;
}
