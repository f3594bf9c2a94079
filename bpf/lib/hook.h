/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Between a hook and the workers that it asks, one domain's after the other. */
#pragma once

#include "lib/core.h"

/* What a worker makes of a call. */
enum outcome {
	NOT_MINE, /* left as it is: the next worker has its turn */
	TAKEN, /* goes on as this worker made it: nobody else has a say */
	REFUSED, /* fails */
};

/* Whether a program may say with which error a call fails (Linux 6.1); without it is EPERM. */
const volatile __u8 sets_error;

/* The call fails. EPERM is an error that some programs try again at once, and for ever. */
static __always_inline enum outcome refuse(int error)
{
	if (sets_error)
		bpf_set_retval(-error);
	return REFUSED;
}
