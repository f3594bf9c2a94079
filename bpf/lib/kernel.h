/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Reads the kernel's own structures, for values that no helper returns. */
#pragma once

#include "lib/core.h"

/* Since Linux 6.2 an address can be given a type, and reading through it is a plain load. */
#define CASTS bpf_ksym_exists(bpf_rdonly_cast)

/*
 * A kernel structure at an address. Reading a wrong address returns arbitrary values and is
 * harmless.
 */
#define kernel_ptr(address, type) \
	((const type *)(CASTS ? (void *)bpf_core_cast((void *)(address), type) : (void *)(address)))

/* A field of a kernel structure. */
#define peek(ptr, field) (CASTS ? (ptr)->field : BPF_CORE_READ(ptr, field))

/* A pointer as a plain number, which can be added to or cast to another type. */
static __always_inline __u64 number_of(const void *ptr)
{
	__u64 number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), &ptr);
	return number;
}
