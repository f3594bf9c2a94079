/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The base of every header: the kernel's types, libbpf's helpers, and the kernel's constants that
 * BTF does not carry. The agent uses the types that the skeleton generates from these headers, so
 * that no second definition has to be kept in step.
 */
#pragma once

#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define IP_OFFSET 0x1fff
#define SOL_IP 0
#define SOL_IPV6 41
#define IP_OPTIONS 4
#define IPV6_2292PKTOPTIONS 6
#define IPV6_RTHDR 57
#define SOCK_RAW 3
#define SO_ORIGINAL_DST 80 /* the same number at both levels */
#define LOOPBACK_IFINDEX 1
#define TC_PASS -1 /* TC_ACT_UNSPEC: the next filter decides */
#define TC_DROP 2 /* TC_ACT_SHOT */
#define ENOENT 2
#define EAGAIN 11
#define EACCES 13
#define ENETUNREACH 101
#define ENOBUFS 105
#define ECONNREFUSED 111
#define UID_GID_MAP_MAX_BASE_EXTENTS 5 /* extents that a user namespace holds without a table */
