/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A build whose maps have another layout than its predecessor's leaves that one's answering
 * programs attached while sockets have state in the old maps. This counts them.
 */
#pragma once

#include "lib/core.h"

/* The number of sockets with storage in the map that is looked at, at least. */
__u64 storages = 0;
