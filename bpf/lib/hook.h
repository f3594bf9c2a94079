/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The interface between a hook and its workers, one domain's after the other. */
#pragma once

#include "lib/core.h"

/* A worker's answer. */
enum outcome {
	NOT_MINE, /* unchanged: the next worker decides */
	TAKEN, /* goes on as this worker changed it: no other worker runs */
	REFUSED, /* fails */
};

/* Whether a program can choose the error of a call (Linux 6.1); otherwise it is EPERM. */
const volatile __u8 sets_error;

/* Makes the call fail. Some programs retry at once, and for ever, after EPERM. */
static __always_inline enum outcome refuse(int error)
{
	if (sets_error)
		bpf_set_retval(-error);
	return REFUSED;
}
