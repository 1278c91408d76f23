// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Gives the sockets of a cgroup back what a limiter took from them.
 *
 * A socket keeps its pacing rate and its window's limit when the limiter goes.
 * This iterator visits every TCP socket of a network namespace, once, and
 * undoes both in those that the limiter has touched: the ones with an entry
 * in the limiter's own socket storage. The sockets of other cgroups in the
 * same namespace are left alone, and so is what an application set itself.
 */
#include "bpf_helpers.h"
#include "sockets.h"

/* What is read of the kernel's own structures; libbpf finds the offsets. */
#define __kernel_type __attribute__((preserve_access_index))

struct bpf_iter_meta {
	struct seq_file *seq;
} __kernel_type;

struct bpf_iter__tcp {
	__bpf_md_ptr(struct bpf_iter_meta *, meta);
	__bpf_md_ptr(struct sock_common *, sk_common);
} __kernel_type;

SEC("iter/tcp")
int bpfrl_release(struct bpf_iter__tcp *context)
{
	struct sock_common *common = context->sk_common;
	struct bpfrl_socket *state;
	struct tcp_sock *tcp;
	int cwnd = CWND_UNLIMITED;

	if (!common)
		return 0;
	tcp = bpf_skc_to_tcp_sock(common);
	if (!tcp)
		return 0;
	state = bpf_sk_storage_get(&sockets, tcp, NULL, 0);
	if (!state || !state->own_pacing)
		return 0;
	bpf_setsockopt(tcp, SOL_SOCKET, SO_MAX_PACING_RATE, &state->own_pacing,
		       sizeof(state->own_pacing));
	bpf_setsockopt(tcp, SOL_TCP, TCP_BPF_SNDCWND_CLAMP, &cwnd, sizeof(cwnd));
	state->own_pacing = 0;
	state->cwnd = 0;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
