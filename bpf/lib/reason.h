/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Verdicts and their reasons. */
#pragma once

#include "lib/core.h"

enum verdict {
	GO_DIRECT,
	GO_OUTBOUND, /* to the proxy's outbound listener */
	GO_INBOUND, /* to the proxy's inbound listener */
	GO_DNS, /* to the proxy's DNS listener */
	GO_NOWHERE, /* refused: off the pod, which has no address of that family */
};

/* The agent reads the names from here, without the prefix. */
enum reason {
	REASON_NONE,
	REASON_NOT_ENROLLED, /* the namespace is no enrolled pod's */
	REASON_OTHER_FAMILY, /* the pod's mesh does not capture this family */
	REASON_MULTICAST, /* TCP cannot connect there */
	REASON_NOT_DNS, /* not a query, or the mesh does not capture DNS */
	REASON_DNS_OVER_TCP, /* the mesh leaves the app's DNS over TCP alone */
	REASON_DNS, /* a query */
	REASON_EXCLUDED_INTERFACE,
	REASON_EXCLUDED_USER_PORT, /* the port is excluded for this user */
	REASON_EXCLUDED_RANGE,
	REASON_EXCLUDED_PORT,
	REASON_FROM_PASSTHROUGH, /* the proxy's call to its app */
	REASON_FROM_PROXY, /* the proxy's call off the pod, or its query */
	REASON_PROXY_TO_POD, /* the proxy's call to its own pod */
	REASON_WITHIN_POD, /* within the pod */
	REASON_FROM_LOOPBACK, /* the kernel refuses it before any iptables rule */
	REASON_TO_LOCALHOST,
	REASON_NO_ADDRESS, /* the pod has none of that family, so no route either */
	REASON_ALL_INCLUDED, /* there is no include list */
	REASON_INCLUDED_PORT,
	REASON_INCLUDED_RANGE,
	REASON_NOT_INCLUDED,
	REASON_PORT_UNKNOWN, /* the dialled port is unknown: captured */
	REASON_NO_LISTENER, /* the proxy does not listen there */
};

struct decision {
	enum verdict verdict;
	enum reason reason;
};

static __always_inline struct decision decide(enum verdict verdict, enum reason reason)
{
	return (struct decision){ verdict, reason };
}
