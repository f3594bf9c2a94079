/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Every map: who writes it, who reads it, why that size. All are pinned, so that they outlive
 * the agent. Hashes are not preallocated where their limit is far above the usual fill.
 */
#pragma once

#define MAX_PODS 1024 /* a node's pods; kubelet's default is 110, 250 is common */
#define MAX_MESHES 4
/*
 * What processes of a pod can fill is theirs alone: no pod takes another's share.
 */
#define HANDSHAKES 512 /* captured connections of a pod that its proxy has yet to accept */
#define SPLICED 2048 /* spliced sockets of a pod; more stay with TCP */
#define LISTENER_SLOTS 8 /* listeners remembered for each pod, address and port */
#define LANDINGS 10 /* such addresses: any and localhost, of two families, and six of devices */
#define STEERED_PORTS 3 /* inbound, outbound, DNS */

/* Enrolled pods. Agent writes; connect, sockops, getsockopt and inbound read. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

/*
 * The enrolled pods' own addresses. Agent writes; connect, sockops and inbound read. 16 a pod. The
 * value is one of enum local.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 16);
	__type(key, struct local_key);
	__type(value, __u8);
} locals SEC(".maps");

/* Port lists of pods. Agent writes; policy reads. A range takes at most 30 entries. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 64);
	__type(key, struct port_rule_key);
	__type(value, __u8);
} port_rules SEC(".maps");

/* Address ranges of pods. Agent writes; policy reads. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 64);
	__type(key, struct cidr_rule_key);
	__type(value, __u8);
} cidr_rules SEC(".maps");

/* Exempt interfaces. Agent writes; policy reads. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 4);
	__type(key, struct if_key);
	__type(value, __u8);
} excluded_ifs SEC(".maps");

/* Users with ports of their own. Agent writes; policy reads. A range takes at most 62 entries. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 16);
	__type(key, struct uid_rule_key);
	__type(value, __u32);
} uid_rules SEC(".maps");

/* What a captured socket was meant for. connect and sockops write; the socket hooks read. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct origdst);
} origdsts SEC(".maps");

/* Whom a UDP socket asked without being connected. sendmsg writes; recvmsg reads. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct dns_servers);
} dns_asked SEC(".maps");

/* Who asked a UDP socket of the pod from port 53. recvmsg writes; connect and sendmsg read. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct dns_clients);
} dns_clients SEC(".maps");

/*
 * Original destinations between the client's SYN and the proxy's accept. sockops alone writes
 * and takes: an entry goes to the accepted socket, or is withdrawn when the client's socket
 * closes; inbound looks. So the limit is on handshakes under way, not on connections. A process
 * can keep those that it makes under way for as long as it likes: each pod has its share.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * HANDSHAKES);
	__type(key, struct conn);
	__type(value, struct origdst);
} handovers SEC(".maps");

/*
 * How many of `handovers` are a pod's. Agent adds a pod, and takes away one that has none and is
 * not enrolled any more; sockops counts; connect reads.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, __u64);
	__type(value, __u32);
} handshakes SEC(".maps");

/*
 * The proxies' listeners: inbound, outbound, DNS. sockops adds one at listen(), find_listeners adds
 * those that are older than the agent; the kernel removes a socket when it closes; inbound reads.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_PODS * STEERED_PORTS * LANDINGS * LISTENER_SLOTS);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

/*
 * The first address of each kind that a pod's devices have. Agent writes; inbound reads. An address
 * is two devices' firsts at most, so it is full after `locals`.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 16 * 2);
	__type(key, struct device_key);
	__type(value, struct addr);
} device_addrs SEC(".maps");

/*
 * The port that a connection was dialled to, before the pod's own rules translate it. note_dialled
 * writes; steer reads, while the same packet is under way on the same processor. So what others
 * write in between does not push it out; if it is not there, the connection is captured.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct dialled_key);
	__type(value, __u16);
} dialled SEC(".maps");

/* Sockets whose other end is on this node. sockops makes them; sweep_splices and redirect use. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct splice);
} splices SEC(".maps");

/*
 * Those that are spliced. sweep_splices adds, the kernel removes a socket when it closes; redirect
 * looks the other end up. Full: the others go by TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct splice_key);
	__type(value, __u64);
} spliced SEC(".maps");

/*
 * How many of `spliced` are a pod's, so that one does not take the room of all others; there is no
 * room for every pod's share, and a connection that finds none goes by TCP. As `handshakes`:
 * sweep_splices and sock_release count.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, __u64);
	__type(value, __u32);
} spliced_of SEC(".maps");

/*
 * Ends of connections whose other end is leaving. sweep_splices alone: it visits one end at a
 * time. An entry that is lost leaves its connection in the map, with TCP.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct splice_key);
	__type(value, __u8);
} leaving SEC(".maps");

/* Which legs are spliced. Agent writes; sockops and sweep_splices read. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LEGS);
	__type(key, __u32);
	__type(value, struct leg);
} legs SEC(".maps");

/* Agent writes and reads; no program does. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod_record);
} pod_records SEC(".maps");

/* Namespaces whose devices have filters of ours, also of pods that are not enrolled any more. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, __u64);
	__type(value, struct pod_record);
} filtered SEC(".maps");

/* Index: mesh * COUNTERS + enum counter. Programs write; agent reads. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_MESHES * COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/*
 * struct event. Programs write; agent reads. A full ring loses events: a missing listener is told
 * of again, bulk is seen by the next sweep, and what is not reset learns it at its second write.
 */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 64 * 1024);
} events SEC(".maps");
