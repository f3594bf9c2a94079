/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The agent's records for `status` and for the next agent; no program reads them. */
#pragma once

#include "lib/pod.h"

/* The agent's record of an enrolled pod, pinned for `status` and the next agent. */
struct pod_record {
	__u8 pod[320]; /* "namespace/name", NUL-padded */
	__u8 uid[64]; /* metadata.uid, NUL-padded */
	__u8 netns[256]; /* path of the network namespace, NUL-padded */
};
_Static_assert(sizeof(struct pod_record) == 640, "pod_record");

/* Agent writes and reads; no program does. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod_record);
} pod_records SEC(".maps");

/* Namespaces whose devices have filters of ours, those of former mesh pods included. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, __u64);
	__type(value, struct pod_record);
} tc_namespaces SEC(".maps");
