// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What reaches the TCP sockets that are there already, idle ones included.
 *
 * These iterators visit every TCP socket of a network namespace, once.
 * bpfrl_adopt gives those below a cgroup the callbacks that sockops asks for when
 * a connection begins; with its next segment each is paced as all others.
 * bpfrl_release gives those that a limiter has back what was their own; the
 * sockets of other cgroups in the same namespace are left alone. bpfrl_count changes nothing.
 */
#include "bpf_helpers.h"
#include "sockets.h"
#include <bpf/bpf_core_read.h>

/* The kernel's own number, newer than the headers that this is compiled with. */
#define TCP_BPF_SOCK_OPS_CB_FLAGS 1008

/* Deeper than any cgroup is nested that a limiter may be on. */
#define LEVELS 64

struct bpf_iter_meta {
	struct seq_file *seq;
} __kernel_type;

struct bpf_iter__tcp {
	__bpf_md_ptr(struct bpf_iter_meta *, meta);
	__bpf_md_ptr(struct sock_common *, sk_common);
} __kernel_type;

/* Whose sockets are meant, what they are to tell of, and what came of it. */
struct bpfrl_visit {
	__u64 cgroup;
	__u64 callbacks;	/* BPF_SOCK_OPS_*_CB_FLAG */
	__u64 done;
	__u64 refused;
	__u64 paced;		/* of those counted, how many have a rate set */
};

struct bpfrl_visit visit;

static __always_inline bool is_below(struct tcp_sock *tcp, __u64 id)
{
	struct cgroup *cgroup = BPF_CORE_READ(tcp, inet_conn.icsk_inet.sk.sk_cgrp_data.cgroup);
	int level = BPF_CORE_READ(cgroup, level);

	for (int i = 0; i < LEVELS && i <= level; i++) {
		struct cgroup *ancestor;

		if (bpf_core_read(&ancestor, sizeof(ancestor), &cgroup->ancestors[i]))
			return false;
		if (BPF_CORE_READ(ancestor, kn, id) == id)
			return true;
	}
	return false;
}

static __always_inline struct tcp_sock *visited(struct bpf_iter__tcp *context)
{
	struct sock_common *common = context->sk_common;

	return common ? bpf_skc_to_tcp_sock(common) : NULL;
}

SEC("iter/tcp")
int bpfrl_adopt(struct bpf_iter__tcp *context)
{
	struct tcp_sock *tcp = visited(context);
	int flags;

	if (!tcp || !is_below(tcp, visit.cgroup))
		return 0;
	if (!bpf_getsockopt(tcp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof(flags))) {
		flags |= visit.callbacks;
		if (!bpf_setsockopt(tcp, SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags,
				    sizeof(flags))) {
			visit.done++;
			return 0;
		}
	}
	visit.refused++;
	return 0;
}

/* What a socket carries where the cgroup's limiter has set something on it, else NULL. */
static __always_inline struct bpfrl_socket *owned(struct tcp_sock *tcp)
{
	struct bpfrl_socket *socket = tcp ? bpf_sk_storage_get(&sockets, tcp, NULL, 0) : NULL;

	return socket && socket->owner == visit.cgroup ? socket : NULL;
}

SEC("iter/tcp")
int bpfrl_release(struct bpf_iter__tcp *context)
{
	struct tcp_sock *tcp = visited(context);
	struct bpfrl_socket *socket = owned(tcp);

	if (!socket)
		return 0;
	socket->fair = 0;
	release_sender(tcp, tcp, socket);
	release_receiver(tcp, socket);
	socket->owner = 0;
	visit.done++;
	return 0;
}

SEC("iter/tcp")
int bpfrl_forget(struct bpf_iter__tcp *context)
{
	struct tcp_sock *tcp = visited(context);
	struct bpfrl_socket *socket;

	if (!tcp || !is_below(tcp, visit.cgroup))
		return 0;
	socket = bpf_sk_storage_get(&sockets, tcp, NULL, 0);
	if (!socket || !socket->asked)
		return 0;
	socket->asked = 0;
	release_sender(tcp, tcp, socket);
	visit.done++;
	return 0;
}

SEC("iter/tcp")
int bpfrl_count(struct bpf_iter__tcp *context)
{
	struct tcp_sock *tcp = visited(context);
	struct bpfrl_socket *socket = owned(tcp);

	if (!socket)
		return 0;
	visit.done++;
	if (socket->pacing)
		visit.paced++;
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
