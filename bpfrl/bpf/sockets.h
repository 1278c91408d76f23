/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What is kept with each socket and set on it.
 *
 * There is one such map on a node, which all limiters and the cooperation of
 * senders share: a socket's pacing has one place where it says what is its
 * application's and what is not, whoever comes and goes.
 */
#ifndef BPFRL_SOCKETS_H
#define BPFRL_SOCKETS_H

#include "bpf_helpers.h"

/* What is read of the kernel's own structures; libbpf finds the offsets. */
#define __kernel_type __attribute__((preserve_access_index))

struct kernfs_node {
	__u64 id;
} __kernel_type;

struct cgroup {
	struct kernfs_node *kn;
	int level;
	struct cgroup *ancestors[];
} __kernel_type;

struct sock_cgroup_data {
	struct cgroup *cgroup;
} __kernel_type;

struct sock {
	unsigned long sk_max_pacing_rate;
	struct sock_cgroup_data sk_cgrp_data;
} __kernel_type;

struct inet_sock {
	struct sock sk;
} __kernel_type;

struct inet_connection_sock {
	struct inet_sock icsk_inet;
} __kernel_type;

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 window_clamp;
	__u32 rcv_ooopack;
} __kernel_type;

struct bpfrl_socket {
	__u64 tat;		/* not paced (UDP, raw): the socket's own clock */
	__u64 owner;		/* id of the cgroup whose limiter has it; 0: none */
	__u32 own_pacing;	/* the application's SO_MAX_PACING_RATE, byte/s */
	__u32 pacing;		/* what was set in its place, byte/s; 0: nothing */
	__u32 fair;		/* what the limiter lets it send, byte/s; 0: no limit */
	__u32 asked;		/* what its receiver asks it to send, byte/s; 0: nothing */
	__u32 cwnd;		/* limit of the congestion window that was set, segments; 0: none */
	__u16 silent;		/* round trips since its receiver has asked */
	__u8 doubts;		/* how often what this socket offers seems to be lost */
	__u8 writes;		/* 1: the header that is being made has room for the offer */
	__u32 own_window;	/* TCP_WINDOW_CLAMP as the kernel or the application had it, byte */
	__u32 window;		/* what was set in its place, byte; 0: nothing */
	__u32 offer;		/* what this socket asks its sender for, 8 byte/s; 0: nothing */
	__u32 offered_at;	/* what the last ACK that said so has acknowledged */
	__u32 doubted_at;	/* the same when one seems not to have arrived */
	__u32 segments;		/* of data that had come in order, or again, when the last ACK left */
	__u64 acked_ns;		/* when the last ACK left */
	__u64 received;		/* bytes that have come when the last ACK left */
	__u64 share_tat;	/* the clock of what this socket may receive */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct bpfrl_socket);
} sockets SEC(".maps");

/* Offers count in 8 byte/s: 32 bits of them are 275 Gbit/s. */
#define OFFER_SHIFT 3

/* Payload in 1500 byte of layer 3, TCP/IPv4 with timestamps: 1448/1500, in
 * 256ths. A pacing rate counts payload, a limit counts packets. */
#define PAYLOAD_256THS 247

/* Smallest window that keeps fast retransmit alive, segments. */
#define CWND_FLOOR 4
/* The window's limit is of use only below this RTT, where the kernel inflates TSO
 * bursts (tcp_tso_rtt_log). */
#define CWND_NEAR_US 4000
#define RTT_CEILING_US 1000000ULL
#define RTT_SLACK_US 1000

/* The widest window that TCP can say (RFC 7323), byte. */
#define WINDOW_UNLIMITED (65535U << 14)

static __always_inline struct bpfrl_socket *socket_of(struct bpf_sock_ops *ops, __u64 flags)
{
	struct bpf_sock *sk = ops->sk;

	return sk ? bpf_sk_storage_get(&sockets, sk, NULL, flags) : NULL;
}

static __always_inline struct tcp_sock *tcp_of(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;

	return sk ? bpf_skc_to_tcp_sock(sk) : NULL;
}

/*
 * A value that differs from the one set here is the application's, now or since
 * then.
 */
static __always_inline void heed_application(struct tcp_sock *tcp, struct bpfrl_socket *socket)
{
	__u64 rate = tcp ? tcp->inet_conn.icsk_inet.sk.sk_max_pacing_rate : 0;
	/* 0 is none, and as much as the highest. */
	__u32 value = rate - 1 < PACING_UNLIMITED ? rate : PACING_UNLIMITED;

	if (!socket->pacing || value != socket->pacing) {
		socket->own_pacing = value;
		socket->pacing = 0;
	}
}

/* A rate at layer 3, byte/s, as one of payload. */
static __always_inline __u64 payload_rate(__u64 rate)
{
	return ((rate * PAYLOAD_256THS) >> 8) + 1;
}

/* The same as a pacing rate, for which there are 32 bits: from 34 Gbit/s on a socket
 * is not paced, and 0 stands for that. */
static __always_inline __u32 pacing_rate(__u64 rate)
{
	rate = payload_rate(rate);
	return rate < PACING_UNLIMITED ? rate : 0;
}

/* Have a socket send as fast as the slowest of those wants it who have a say. */
static __always_inline void pace(void *context, struct bpfrl_socket *socket)
{
	/* 0 is the highest here. */
	__u32 limit = min(socket->fair - 1, socket->asked - 1);
	/* To the kernel, 0 is no pacing at all. */
	__u32 value = max(min(limit, socket->own_pacing), 1);

	if (value != socket->pacing &&
	    !bpf_setsockopt(context, SOL_SOCKET, SO_MAX_PACING_RATE, &value, sizeof(value)))
		socket->pacing = value;
}

/*
 * Below a few ms of RTT, tcp_tso_autosize() makes bursts of up to 64 KB out of
 * any rate. A window of about two round trips of the pacing rate keeps them small. The option
 * also writes ssthresh: so it is set only when the window has moved by half, and never
 * where RTTs are longer, for it would turn recovery from a loss into slow start.
 */
static __always_inline void clamp_cwnd(struct bpf_sock_ops *ops, struct bpfrl_socket *socket)
{
	__u64 rate = socket->pacing;
	__u64 rtt_us = ops->srtt_us >> 3;
	__u64 mss = ops->mss_cache;
	__u64 segments;
	int value;

	if (!mss || !rtt_us || (rtt_us >= CWND_NEAR_US && !socket->cwnd))
		return;
	segments = CWND_UNLIMITED;
	if (rtt_us < CWND_NEAR_US && rate && rate < PACING_UNLIMITED)
		segments = max(rate * (2 * rtt_us + RTT_SLACK_US) / (USEC_PER_SEC * mss), CWND_FLOOR);
	if (socket->cwnd && segments <= socket->cwnd + (socket->cwnd >> 1) &&
	    segments >= socket->cwnd >> 1)
		return;
	value = min(segments, CWND_UNLIMITED);
	if (!bpf_setsockopt(ops, SOL_TCP, TCP_BPF_SNDCWND_CLAMP, &value, sizeof(value)))
		socket->cwnd = value < CWND_UNLIMITED ? value : 0;
}

/* One of those who have a say has none any more: sockops or an iterator is here
 * to tell the socket, and to give back what was its own. */
static __always_inline void release_sender(void *context, struct tcp_sock *tcp,
					   struct bpfrl_socket *socket)
{
	int cwnd = CWND_UNLIMITED;

	if (!socket->pacing)
		return;
	heed_application(tcp, socket);
	pace(context, socket);
	if (socket->fair || socket->asked)
		return;
	socket->pacing = 0;
	if (socket->cwnd)
		bpf_setsockopt(context, SOL_TCP, TCP_BPF_SNDCWND_CLAMP, &cwnd, sizeof(cwnd));
	socket->cwnd = 0;
}

/* Give a socket back what was its own as a receiver. */
static __always_inline void release_receiver(void *context, struct bpfrl_socket *socket)
{
	socket->offer = 0;
	if (!socket->window)
		return;
	bpf_setsockopt(context, SOL_TCP, TCP_WINDOW_CLAMP, &socket->own_window,
		       sizeof(socket->own_window));
	socket->window = 0;
}

#endif /* BPFRL_SOCKETS_H */
