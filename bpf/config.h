/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Fixed for every program: the kernel's numbers that BTF does not carry, and our addresses. */
#pragma once

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define IP_OFFSET 0x1fff
#define DNS_PORT 53
#define SOL_IP 0
#define SOL_IPV6 41
#define IP_OPTIONS 4
#define IPV6_2292PKTOPTIONS 6
#define IPV6_RTHDR 57
#define SOCK_RAW 3
#define SO_ORIGINAL_DST 80 /* the same number at both levels */
#define LOOPBACK_IFINDEX 1
#define TC_PASS -1 /* TC_ACT_UNSPEC: other filters have their turn */
#define TC_DROP 2 /* TC_ACT_SHOT */
#define ENOENT 2
#define EAGAIN 11
#define EACCES 13
#define ENETUNREACH 101
#define ENOBUFS 105
#define ECONNREFUSED 111
#define UID_GID_MAP_MAX_BASE_EXTENTS 5 /* what a user namespace maps without a table */

#define V4MAPPED bpf_htonl(0x0000ffff)

/*
 * A captured connection is sent to one of 64 addresses within a range that is local to the pod: by
 * the kernel's own table for IPv4, by a route that the agent adds for IPv6. 64, rather than
 * 127.0.0.1 for all: so many times as many connections can be open as the pod has ephemeral ports,
 * to whatever destinations. No more, for TCP remembers each address that it had to do with; but a
 * socket that is bound to a port of its own may share it with many, and gets one of 65,536. The
 * agent's routes for both ranges prefer the pod's address as source, so that the proxy sees the
 * pod as its peer.
 */
#define VIA4_NET 0x7f800000 /* 127.128.0.0/16 */
#define VIA4_MASK 0xffff0000
#define VIA6_HI 0xfd536964 /* fd53:6964:6573:7465::/64 */
#define VIA6_LO 0x65737465
#define VIA_FEW 63 /* the bits of either that tell connections apart */
#define VIA_MANY 0xffff /* where the application has chosen the port */

/*
 * Where captured DNS over UDP goes; the low 16 bits are a number. The agent's routes have these
 * ranges on each of the pod's devices, with the device's own address as source: so the kernel
 * picks that one, and a socket that names a device finds its way.
 */
#define DNS4_NET 0x7f810000 /* 127.129.0.0/16 */
#define DNS4_MASK 0xffff0000
#define DNS6_SUBNET 1 /* fd53:6964:6573:7465:0:1::/96 */
#define DNS_ALONE 0 /* all that a socket asks, which has one server at a time */
#define DNS_TOKEN 0x8000 /* one of a socket's servers: its slot, and the turn that it has there */
