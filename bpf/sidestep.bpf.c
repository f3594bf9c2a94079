// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The programs that a node needs once; inbound.bpf.c has the one that each pod needs. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "config.h"
#include "kernel.h"
#include "types.h"
#include "maps.h"
#include "pod.h"
#include "policy.h"
#include "origdst.h"
#include "sockaddr.h"
#include "dns.h"
#include "route.h"
#include "connect.h"
#include "layouts.h"
#include "listeners.h"
#include "splice.h"
#include "reset.h"

SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		origdst_offer(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		splice_watch(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		origdst_take(ctx);
		splice_watch(ctx);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		splice_mark(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		origdst_withdraw(ctx);
		break;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		listener_add(ctx);
		break;
	}
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
