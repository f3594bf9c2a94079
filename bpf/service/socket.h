/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a socket dialled, kept with the socket: it goes when the socket does, and nothing evicts
 * it. A socket can have been led elsewhere since (connect(AF_UNSPEC) runs no hook), so before it
 * is used it is compared with the socket's present peer, or with where a datagram came from.
 */
#pragma once

#include "lib/sock.h"
#include "service/lookup.h"

/* A Service's address, and the endpoint that took its place. */
struct dialled_service {
	struct addr vip;
	struct backend backend;
	__u16 vip_port;
	__u16 pad;
};
_Static_assert(sizeof(struct dialled_service) == 40, "dialled_service");

/* What a socket is connected to. connect writes; getpeername and recvmsg read. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct dialled_service);
} service_peers SEC(".maps");

#define SERVICE_ASKED 8 /* Services that an unconnected socket can have answers from at a time */

/* A Service that a UDP socket sent to. */
struct asked_service {
	struct dialled_service to;
	__u32 turn; /* counts up with each use: the least is the oldest; 0: unused */
	__u32 is_former; /* another endpoint has its place; answers under way are this one's */
};
_Static_assert(sizeof(struct asked_service) == 48, "asked_service");

struct asked_services {
	struct bpf_spin_lock lock;
	__u32 turn;
	struct asked_service service[SERVICE_ASKED];
};
_Static_assert(sizeof(struct asked_services) == 392, "asked_services");

/* Which Services a socket sent to without being connected to them. sendmsg writes; recvmsg reads.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct asked_services);
} services_asked SEC(".maps");

static __always_inline bool backend_is(const struct backend *backend, const struct addr *a,
				       __u16 port)
{
	return addr_eq(&backend->addr, a) && backend->port == port;
}

static __always_inline bool dialled_is(const struct dialled_service *to,
				       const struct frontend *frontend)
{
	return addr_eq(&to->vip, &frontend->addr) && to->vip_port == frontend->port;
}

/* The endpoint that a socket has for a Service, if it has one. */
static __always_inline bool asked_backend(struct asked_services *asked,
					  const struct frontend *frontend, struct backend *backend)
{
	bool is_known = false;

	bpf_spin_lock(&asked->lock);
	for (__u32 n = 0; n < SERVICE_ASKED; n++) {
		struct asked_service *one = &asked->service[n];

		if (!one->turn || one->is_former || !dialled_is(&one->to, frontend))
			continue;
		one->turn = ++asked->turn;
		*backend = one->to.backend;
		is_known = true;
		break;
	}
	bpf_spin_unlock(&asked->lock);
	return is_known;
}

/* Remembers a Service's endpoint. The oldest goes where there is no room; whether it did. */
static __always_inline bool asked_put(struct asked_services *asked,
				      const struct dialled_service *to)
{
	struct asked_service *oldest = &asked->service[0];
	bool is_full;

	bpf_spin_lock(&asked->lock);
	for (__u32 n = 0; n < SERVICE_ASKED; n++) {
		struct asked_service *one = &asked->service[n];

		if (one->turn && addr_eq(&one->to.vip, &to->vip) &&
		    one->to.vip_port == to->vip_port)
			one->is_former = 1;
		if (one->turn < oldest->turn)
			oldest = one;
	}
	is_full = oldest->turn;
	oldest->to = *to;
	oldest->is_former = 0;
	oldest->turn = ++asked->turn;
	bpf_spin_unlock(&asked->lock);
	return is_full;
}

/* The Service in whose place an endpoint answers: the one that was asked last. */
static __always_inline bool asked_vip(struct asked_services *asked, const struct addr *from,
				      __u16 port, struct frontend *vip)
{
	__u32 turn = 0;

	bpf_spin_lock(&asked->lock);
	for (__u32 n = 0; n < SERVICE_ASKED; n++) {
		struct asked_service *one = &asked->service[n];

		if (one->turn <= turn || !backend_is(&one->to.backend, from, port))
			continue;
		turn = one->turn;
		vip->addr = one->to.vip;
		vip->port = one->to.vip_port;
	}
	bpf_spin_unlock(&asked->lock);
	return turn;
}
