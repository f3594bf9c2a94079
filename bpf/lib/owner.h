/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The user and group that made a socket. */
#pragma once

#include "lib/kernel.h"
#include "lib/pod.h"

/*
 * A kernel id, numbered as in a user namespace; -1 if it is not mapped. The map's address is passed
 * as a number, and the function is global, so that the verifier checks it once and separately.
 */
__noinline __u32 id_in(__u64 address, __u32 id)
{
	const struct uid_gid_map *map = (const void *)address;
	struct uid_gid_extent extent[UID_GID_MAP_MAX_BASE_EXTENTS];
	__u32 count = BPF_CORE_READ(map, nr_extents);

	if (bpf_core_read(extent, sizeof(extent), &map->extent))
		return -1;
	for (__u32 i = 0; i < UID_GID_MAP_MAX_BASE_EXTENTS; i++)
		if (i < count && id >= extent[i].lower_first &&
		    id - extent[i].lower_first < extent[i].count)
			return extent[i].first + (id - extent[i].lower_first);
	return -1;
}

/*
 * The owner as iptables' owner match sees it: the credentials of the socket's file, numbered as in
 * the user namespace that owns the network namespace.
 */
static __always_inline void owner_of_kernel(const struct sock *sk, struct owner *owner)
{
	const struct socket *socket = peek(sk, sk_socket);
	const struct file *file = socket ? peek(socket, file) : NULL;
	const struct user_namespace *ns;
	const struct cred *cred;
	const struct net *net;

	owner->uid = owner->gid = (__u32)-1;
	if (!file)
		return;
	cred = peek(file, f_cred);
	owner->uid = peek(cred, fsuid.val);
	owner->gid = peek(cred, fsgid.val);
	net = peek(sk, __sk_common.skc_net.net);
	ns = peek(net, user_ns);
	if (peek(ns, level)) {
		ns = (const void *)number_of(ns);
		owner->uid = id_in((__u64)&ns->uid_map, owner->uid);
		owner->gid = id_in((__u64)&ns->gid_map, owner->gid);
	}
}

/* The owner of a hook's socket. */
static __always_inline void owner_of(struct bpf_sock *sk, struct owner *owner)
{
	owner_of_kernel(kernel_ptr(number_of(sk), struct sock), owner);
}
