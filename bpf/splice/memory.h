/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Memory: a message for which the kernel has no room fails its writer's call; by TCP the writer
 * waits.
 */
#pragma once

#include "lib/kernel.h"

#define SPLICE_PAGES 1024 /* that must be free below TCP's limit and each of the reader's */
#define SPLICE_GROUPS 16 /* memory cgroups above each other: a pod's are five, in kind nine */

/*
 * Is TCP short of memory? TCP lets its own sockets go on little by little, and wakes waiting
 * writers when there is more; for sockets in the map it does neither.
 */
static __always_inline bool tcp_is_short(const struct sock *sk)
{
	unsigned long pressure = 0;

	bpf_probe_read_kernel(&pressure, sizeof(pressure),
			      sk->__sk_common.skc_prot->memory_pressure);
	return pressure;
}

/* cgroup v1 with a limit of TCP's own, and kernels that may lack it. */
struct mem_cgroup___v1 {
	bool tcpmem_active;
} __attribute__((preserve_access_index));

/* The free pages of a memory cgroup below its limit, and its parent. */
struct headroom {
	long usage;
	long max;
	const struct page_counter *parent;
};

static __always_inline struct headroom headroom_of(const struct page_counter *counter)
{
	char copy[256] __attribute__((aligned(8)));

	if (CASTS)
		return (struct headroom){
			.usage = counter->usage.counter,
			.max = (long)counter->max,
			.parent = counter->parent,
		};
	/*
	 * One call for all fields where each read is a call. Kernels without casts have no larger
	 * ones.
	 */
	bpf_probe_read_kernel(copy, bpf_core_type_size(struct page_counter), counter);
#define COPIED(type, field) (*(type *)(copy + bpf_core_field_offset(struct page_counter, field)))
	return (struct headroom){
		.usage = COPIED(long, usage),
		.max = COPIED(long, max),
		.parent = COPIED(const struct page_counter *, parent),
	};
#undef COPIED
}

/*
 * Is there room below every limit of the reader's memory cgroup and its ancestors? A tree that is
 * deeper than the known depth counts as full, and so does cgroup v1, where TCP has limits of its
 * own.
 */
static __always_inline bool groups_have_room(const struct sock *to)
{
	const struct mem_cgroup *group = peek(to, sk_memcg);
	const struct page_counter *counter;

	if (!group)
		return true;
	if (bpf_core_field_exists(struct mem_cgroup___v1, tcpmem_active) &&
	    peek(kernel_ptr(group, struct mem_cgroup___v1), tcpmem_active))
		return false;
	counter = &group->memory;
	for (int i = 0; i < SPLICE_GROUPS; i++) {
		struct headroom room = headroom_of(counter);

		if (room.usage + SPLICE_PAGES >= room.max)
			return false;
		if (!room.parent)
			return true;
		counter = room.parent;
	}
	return false;
}

/*
 * Is there memory for a message? Where TCP makes a writer wait, the kernel would fail the call with
 * ENOMEM, or first kill a process of the reader's pod. So nothing is redirected unless TCP is below
 * tcp_mem[0], where no charge fails, and the reader is below all of its limits. The reserve is for
 * charges by others between this check and the kernel's charge: a dozen processors' messages (17
 * pages) and stocks (64) at once.
 */
static __always_inline bool splice_room(const struct sock *from, const struct sock *to)
{
	const struct proto *tcp = from->__sk_common.skc_prot;
	long limit = 0;

	bpf_probe_read_kernel(&limit, sizeof(limit), tcp->sysctl_mem);
	return tcp->memory_allocated->counter + SPLICE_PAGES < limit && groups_have_room(to);
}
