/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Records the proxies' listeners by the addresses that they are bound to: a captured connection is
 * handed only to the listener that the mesh's REDIRECT would lead to.
 */
#pragma once

#include "lib/sock.h"
#include "mesh/inbound.h"

/*
 * Does REDIRECT lead to this address: localhost, or the first address of one of the pod's devices?
 * Other addresses of the pod do not qualify, nor foreign ones that a process may bind to.
 */
static __always_inline bool is_redirected_to(__u64 netns, const struct addr *a)
{
	struct local_key key = { .netns = netns, .addr = *a };
	const __u8 *local;

	if (addr_is_any(a) || addr_is_localhost(a))
		return true;
	local = bpf_map_lookup_elem(&locals, &key);
	return local && *local == LOCAL_LANDING;
}

static __always_inline void listener_add(struct bpf_sock_ops *ctx)
{
	struct listener_key key = { .netns = bpf_get_netns_cookie(ctx) };
	const struct pod *pod = pod_by_netns(key.netns);

	if (!pod || !is_steered_port(pod, ctx->local_port))
		return;
	key.at = sockops_local(ctx);
	if (!is_redirected_to(key.netns, &key.at))
		return;
	key.port = ctx->local_port;
	for (__u32 slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot; /* not counted in memory: the verifier loses track of it there */
		if (!bpf_sock_hash_update(ctx, &listeners, &key, BPF_NOEXIST))
			return;
	}
}

#define WANTED 8

/* The namespace, the port and the addresses that the agent looks for listeners on. */
__u64 wanted_netns = 0;
__u16 wanted_port = 0;
__u32 wanted_count = 0;
struct addr wanted_at[WANTED] = {};

/*
 * The sockets that this search has added, so that none is added twice: several processes can have
 * the same socket open, such as workers forked after listen(), and would fill the slots of the
 * other listeners.
 */
__u32 found_count = 0;
__u64 found[WANTED * LISTENER_SLOTS] = {};

__u64 looked_at = 0; /* the socket in question */

/* Global, so that the verifier checks it once and not on each path to it. */
__noinline int is_found(void)
{
	for (__u32 n = 0; n < WANTED * LISTENER_SLOTS; n++)
		if (found[n] == looked_at)
			return 1;
	return 0;
}

static __always_inline bool is_wanted(const struct addr *a)
{
	for (__u32 n = 0; n < WANTED; n++)
		if (n < wanted_count && addr_eq(a, &wanted_at[n]))
			return true;
	return false;
}

static __always_inline void listener_found(struct sock_common *sk)
{
	struct listener_key key = { .netns = sk->skc_net.net->net_cookie };

	if (key.netns != wanted_netns)
		return;
	key.at = sock_local(sk);
	looked_at = (__u64)sk;
	if (!is_wanted(&key.at) || is_found())
		return;
	key.port = sk->skc_num;
	for (__u32 slot = 0; slot < LISTENER_SLOTS; slot++) {
		key.slot = slot;
		if (bpf_map_update_elem(&listeners, &key, sk, BPF_NOEXIST))
			continue;
		if (found_count < WANTED * LISTENER_SLOTS)
			found[found_count++] = looked_at;
		return;
	}
}

/* Adds a TCP socket, if it is a wanted listener. */
static __always_inline void listener_look(struct sock_common *sk)
{
	if (sk->skc_state == BPF_TCP_LISTEN && sk->skc_num == wanted_port)
		listener_found(sk);
}

/* Adds the socket of a process' open file, if it is a wanted listener. */
static __always_inline void listener_look_at_file(struct file *file)
{
	struct sock *sk = sock_of_file(file);

	if (sk && sk->sk_protocol == IPPROTO_TCP &&
	    (sk->__sk_common.skc_family == AF_INET || sk->__sk_common.skc_family == AF_INET6))
		listener_look(&sk->__sk_common);
}
