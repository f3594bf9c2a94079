/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * connect() and sendmsg() to a Service's address go to an endpoint, once, in the system call; what
 * is no Service's goes on as it is, to kube-proxy's rules where there are some. The mesh comes
 * first: what it takes keeps the Service's address.
 */
#pragma once

#include "lib/hook.h"
#include "lib/kernel.h"
#include "lib/pod.h"
#include "service/socket.h"

/*
 * Whether Services are translated at all. Where not, the verifier takes what is behind this out of
 * the programs when they are loaded, so that the mesh pays nothing for it.
 */
const volatile __u8 services_on;

/*
 * Network namespaces whose calls are translated: the node's own, and those of pods that the agent
 * has looked at. Not those of pods that opted out, nor of those that a mesh captures by other
 * means, whose proxy has to see what was dialled; nor any that the agent does not know. The
 * value is whose namespace it is. Agent writes.
 */
#define OF_POD 1
#define OF_NODE 2
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS * 2);
	__type(key, __u64);
	__type(value, __u8);
} service_netns SEC(".maps");

/*
 * The agent's process, whose calls are left alone: it may dial the API server's Service before it
 * has learnt of any endpoint. A process's number comes again, so its start counts too.
 */
struct process {
	__u64 start; /* in nanoseconds since boot */
	__u32 tgid;
	__u32 pad;
} agent = {};

static __always_inline __u64 start_of_process(void)
{
	const struct task_struct *task = (const void *)bpf_get_current_task();

	return BPF_CORE_READ(task, group_leader, start_boottime);
}

/* The agent says that it is the agent. */
static __always_inline void agent_is_current(void)
{
	agent.tgid = bpf_get_current_pid_tgid() >> 32;
	agent.start = start_of_process();
}

static __always_inline bool is_agent(void)
{
	volatile struct process *the = &agent;

	return bpf_get_current_pid_tgid() >> 32 == the->tgid && start_of_process() == the->start;
}

/* What a call is about. */
static __always_inline struct frontend frontend_of(struct bpf_sock_addr *ctx, int family)
{
	return (struct frontend){
		.addr = sockaddr_get(ctx, family),
		.port = bpf_ntohs(ctx->user_port),
		.protocol = ctx->protocol,
	};
}

/* Addresses that nobody has: the agent dials them to see that its programs translate. */
#define CANARY4 0xc00002b7 /* 192.0.2.183 */
#define CANARY6_HI 0x20010db853494445ull /* 2001:db8:5349:4445::1 */
#define CANARY6_LO 1ull

static __always_inline bool is_canary(const struct addr *a)
{
	if (addr_is4(a))
		return a->w[3] == bpf_htonl(CANARY4);
	return a->w[0] == bpf_htonl(CANARY6_HI >> 32) && a->w[1] == bpf_htonl((__u32)CANARY6_HI) &&
	       a->w[2] == 0 && a->w[3] == bpf_htonl(CANARY6_LO);
}

/* Is a socket bound to 127.0.0.0/8? Then it reaches no endpoint off the machine. */
static __always_inline bool is_bound_to_loopback(struct bpf_sock *sk)
{
	/* Through a volatile pointer: the field must be one plain load for the verifier. */
	volatile struct bpf_sock *fields = sk;

	return (fields->src_ip4 & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
}

/* Is there a Service, and is the call one to translate? */
static __always_inline const struct service_list *list_for(struct bpf_sock_addr *ctx,
							   const struct frontend *frontend,
							   __u64 netns, bool is_test, __u32 *list)
{
	const __u32 *number = bpf_map_lookup_elem(&services, frontend);
	const __u8 *whose;

	if (!number) {
		service_count(SERVICE_MISSED);
		return NULL;
	}
	whose = bpf_map_lookup_elem(&service_netns, &netns);
	if (!whose || (is_agent() && !is_test)) {
		service_count(SERVICE_PASSED);
		return NULL;
	}
	/* A NodePort at localhost is the node's. A pod's localhost is its own. */
	if (addr_is_loopback(&frontend->addr)) {
		if (*whose != OF_NODE) {
			service_count(SERVICE_MISSED);
			return NULL;
		}
		if (is_bound_to_loopback(ctx->sk)) {
			service_count(SERVICE_PASSED);
			return NULL;
		}
	}
	*list = *number;
	return bpf_map_lookup_elem(&service_lists, number);
}

static __always_inline void service_translated(const struct frontend *frontend)
{
	bool is4 = addr_is4(&frontend->addr);

	if (frontend->protocol == IPPROTO_TCP)
		service_count(is4 ? SERVICE_TCP4 : SERVICE_TCP6);
	else
		service_count(is4 ? SERVICE_UDP4 : SERVICE_UDP6);
}

/*
 * Refuses as the ICMP error would that a Service without endpoints is answered with: at once. A
 * kernel that lets a program name no error refuses port 0 of localhost by itself.
 */
static __always_inline enum outcome refuse_connect(struct bpf_sock_addr *ctx, int family,
						   const struct addr *dst)
{
	struct addr localhost = localhost_for(dst);

	service_count(SERVICE_REFUSED);
	if (sets_error)
		return refuse(ECONNREFUSED);
	sockaddr_set(ctx, family, &localhost, 0);
	return TAKEN;
}

/* A process connects a socket that the mesh leaves alone. */
static __always_inline enum outcome service_connect(struct bpf_sock_addr *ctx, int family)
{
	struct dialled_service to = {}, *peer;
	const struct service_list *of;
	struct frontend frontend;
	bool is_test;
	__u64 netns;
	__u32 list;

	if (!services_on || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_UDP))
		return NOT_MINE;
	frontend = frontend_of(ctx, family);
	netns = bpf_get_netns_cookie(ctx);
	is_test = is_canary(&frontend.addr);
	of = list_for(ctx, &frontend, netns, is_test, &list);
	if (!of || !of->count) {
		/* A peer that it had before is its peer no more, even if the address is the same.
		 */
		socket_forget(&service_peers, ctx->sk);
		return of ? refuse_connect(ctx, family, &frontend.addr) : NOT_MINE;
	}
	if (!pick(list, of, netns, &to.backend)) {
		service_count(SERVICE_TORN);
		return NOT_MINE;
	}
	peer = socket_storage(&service_peers, ctx->sk, BPF_SK_STORAGE_GET_F_CREATE);
	if (!peer) {
		service_count(SERVICE_NO_STATE);
		return NOT_MINE;
	}
	to.vip = frontend.addr;
	to.vip_port = frontend.port;
	*peer = to;
	sockaddr_set(ctx, family, &to.backend.addr, to.backend.port);
	if (!is_test)
		service_translated(&frontend);
	return TAKEN;
}

/* A process sends a datagram by a socket that is not connected, or to another than its peer. */
static __always_inline enum outcome service_sendmsg(struct bpf_sock_addr *ctx, int family)
{
	const struct service_list *of;
	struct dialled_service to = {};
	struct asked_services *asked;
	struct frontend frontend;
	__u64 netns;
	__u32 list;

	if (!services_on)
		return NOT_MINE;
	frontend = frontend_of(ctx, family);
	netns = bpf_get_netns_cookie(ctx);
	of = list_for(ctx, &frontend, netns, false, &list);
	if (!of)
		return NOT_MINE;
	if (!of->count) {
		if (!sets_error)
			return NOT_MINE; /* and kube-proxy refuses: here it would be EPERM */
		service_count(SERVICE_REFUSED);
		return refuse(ECONNREFUSED);
	}
	asked = bpf_sk_storage_get(&services_asked, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!asked) {
		service_count(SERVICE_NO_STATE);
		return NOT_MINE;
	}
	if (!asked_backend(asked, &frontend, &to.backend) || !is_eligible(list, &to.backend)) {
		if (!pick(list, of, netns, &to.backend)) {
			service_count(SERVICE_TORN);
			return NOT_MINE;
		}
		to.vip = frontend.addr;
		to.vip_port = frontend.port;
		if (asked_put(asked, &to))
			service_count(SERVICE_FORGOTTEN);
	}
	sockaddr_set(ctx, family, &to.backend.addr, to.backend.port);
	service_translated(&frontend);
	return TAKEN;
}

/* The Service that a socket is connected to, if its peer is that endpoint still. */
static __always_inline bool peer_vip(struct bpf_sock *sk, const struct addr *a, __u16 port,
				     struct frontend *vip)
{
	const struct dialled_service *peer = bpf_sk_storage_get(&service_peers, sk, NULL, 0);

	if (!peer || !backend_is(&peer->backend, a, port))
		return false;
	vip->addr = peer->vip;
	vip->port = peer->vip_port;
	return true;
}

/* Puts the Service's address in the place of a socket's peer. */
static __always_inline enum outcome service_getpeername(struct bpf_sock_addr *ctx, int family)
{
	struct frontend vip = {};
	struct addr a;

	if (!services_on)
		return NOT_MINE;
	a = sockaddr_get(ctx, family);
	if (!peer_vip(ctx->sk, &a, bpf_ntohs(ctx->user_port), &vip))
		return NOT_MINE;
	sockaddr_set(ctx, family, &vip.addr, vip.port);
	return TAKEN;
}

/* The same of where a datagram came from. */
static __always_inline enum outcome service_recvmsg(struct bpf_sock_addr *ctx, int family)
{
	/* Through a volatile pointer: each field must be one plain load for the verifier. */
	volatile struct bpf_sock *fields = ctx->sk;
	struct asked_services *asked;
	struct frontend vip = {};
	struct addr from;
	__u16 port;

	if (!services_on)
		return NOT_MINE;
	from = sockaddr_get(ctx, family);
	port = bpf_ntohs(ctx->user_port);
	/* A connected socket hears its peer alone. */
	if (!fields->dst_port || !peer_vip(ctx->sk, &from, port, &vip)) {
		asked = bpf_sk_storage_get(&services_asked, ctx->sk, NULL, 0);
		if (!asked || !asked_vip(asked, &from, port, &vip))
			return NOT_MINE;
	}
	sockaddr_set(ctx, family, &vip.addr, vip.port);
	return TAKEN;
}

/*
 * Functions of their own: or the compiler makes one access of what two workers do to the same
 * field, at an address in a register, which the verifier does not take.
 */
static __noinline __attribute__((unused)) enum outcome service_getpeername4(
	struct bpf_sock_addr *ctx)
{
	return service_getpeername(ctx, AF_INET);
}

static __noinline __attribute__((unused)) enum outcome service_getpeername6(
	struct bpf_sock_addr *ctx)
{
	return service_getpeername(ctx, AF_INET6);
}

static __noinline __attribute__((unused)) enum outcome service_recvmsg4(struct bpf_sock_addr *ctx)
{
	return service_recvmsg(ctx, AF_INET);
}

static __noinline __attribute__((unused)) enum outcome service_recvmsg6(struct bpf_sock_addr *ctx)
{
	return service_recvmsg(ctx, AF_INET6);
}
