// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Cooperation between receivers and senders: the node's half that all its pods share.
 *
 * A receiver that is limited knows what it can take from each sender, and a
 * sender can keep to that exactly. So a limited pod's ACKs carry its fair rate in
 * a TCP option, and a sender under this program paces to it: nothing is dropped
 * and nothing queues. It is attached to the cgroup that holds a node's pods.
 *
 * The option is an experimental one (RFC 6994): kind 254, an identifier, and the
 * rate. Who does not know it skips it (RFC 9293, 3.1). Only ACKs without data
 * carry it, never a SYN: where something on the path throws such packets
 * away, no data is lost and the next ACK says the same again. An ACK that answers
 * what was acknowledged before goes without, so that it gets through; and a
 * socket to which this keeps happening stops offering.
 */
#include "bpf_helpers.h"
#include "sockets.h"

#define OPTION_KIND 254
#define OPTION_ID 0xeb9f

/* Round trips without the option until a sender takes the receiver at its silence:
 * ACKs that go with data do not carry it. */
#define SILENT_ROUND_TRIPS 64

/* Where options are lost, a sender repeats data after a pause of more than two
 * round trips (a tail loss probe, RFC 8985, comes after these and 2 ticks, 2 ms at least), and
 * brings nothing new. An ACK that is lost by chance looks alike, once; but where all
 * are, no more comes in between than a window. */
#define PAUSE_NS 2000000ULL
#define DOUBTS 2
#define TRUST_BYTES (1U << 20)

#define TCP_FLAG_ACK 0x10

/* One packet a second, byte/s: what is slower is left to the window, for a pacing timer
 * that has begun ends when it was told to. */
#define LEAST_RATE 1500

struct rate_option {
	__u8 kind;
	__u8 length;
	__be16 id;
	__be32 rate;
};

static __always_inline void add_flags(struct bpf_sock_ops *ops, int flags)
{
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | flags);
}

/* The receiver has said at what rate to send. */
static __always_inline void follow(struct bpf_sock_ops *ops)
{
	struct rate_option option = {
		.kind = OPTION_KIND,
		.length = offsetof(struct rate_option, rate),
		.id = bpf_htons(OPTION_ID),
	};
	struct bpfrl_socket *socket;
	__u64 rate;

	if (bpf_load_hdr_opt(ops, &option, sizeof(option), 0) != sizeof(option))
		return;
	socket = socket_of(ops, BPF_SK_STORAGE_GET_F_CREATE);
	if (!socket)
		return;
	rate = max((__u64)bpf_ntohl(option.rate) << OFFER_SHIFT, LEAST_RATE);
	if (!socket->asked)
		add_flags(ops, BPF_SOCK_OPS_RTT_CB_FLAG);
	heed_application(tcp_of(ops), socket);
	socket->asked = pacing_rate(rate);
	socket->silent = 0;
	pace(ops, socket);
	clamp_cwnd(ops, socket);
}

/* Another round trip; the receiver may be under no limit any more. */
static __always_inline void listen(struct bpf_sock_ops *ops)
{
	struct bpfrl_socket *socket = socket_of(ops, 0);

	if (!socket || !socket->asked || ++socket->silent < SILENT_ROUND_TRIPS)
		return;
	socket->asked = 0;
	release_sender(ops, tcp_of(ops), socket);
}

/* True when an ACK is to carry the option. */
static __always_inline bool offers(struct bpf_sock_ops *ops, struct bpfrl_socket *socket)
{
	__u64 now = bpf_ktime_get_ns(), then = socket->acked_ns;
	struct tcp_sock *tcp = tcp_of(ops);
	/* Not those behind one that was lost on the way here. A probe has no data. */
	__u32 segments = ops->data_segs_in - (tcp ? tcp->rcv_ooopack : 0);
	bool repeated = segments != socket->segments;

	socket->acked_ns = now;
	socket->segments = segments;
	if (!socket->offer || socket->doubts >= DOUBTS)
		return false;
	if (ops->rcv_nxt == socket->offered_at) {
		__u64 round_trips = (__u64)(ops->srtt_us >> 2) * NSEC_PER_USEC;

		if (repeated && now - then > max(PAUSE_NS, round_trips)) {
			__u32 trust = max(TRUST_BYTES, 2 * socket->window);

			if (ops->rcv_nxt - socket->doubted_at > trust)
				socket->doubts = 0;
			socket->doubts++;
			socket->doubted_at = ops->rcv_nxt;
		}
		return false;
	}
	socket->offered_at = ops->rcv_nxt;
	return true;
}

static __always_inline void reserve(struct bpf_sock_ops *ops)
{
	struct bpfrl_socket *socket;

	if (ops->args[0] || ops->skb_len || ops->skb_tcp_flags != TCP_FLAG_ACK)
		return;
	socket = socket_of(ops, 0);
	if (socket)
		socket->writes = offers(ops, socket) &&
				 !bpf_reserve_hdr_opt(ops, sizeof(struct rate_option), 0);
}

static __always_inline void write(struct bpf_sock_ops *ops)
{
	struct bpfrl_socket *socket = socket_of(ops, 0);
	struct rate_option option = {
		.kind = OPTION_KIND,
		.length = sizeof(option),
		.id = bpf_htons(OPTION_ID),
	};

	/* What room there is else, another program has reserved. */
	if (!socket || !socket->writes)
		return;
	socket->writes = 0;
	option.rate = bpf_htonl(socket->offer);
	bpf_store_hdr_opt(ops, &option, sizeof(option), 0);
}

SEC("sockops")
int bpfrl_cooperate(struct bpf_sock_ops *ops)
{
	switch (ops->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		add_flags(ops, BPF_SOCK_OPS_PARSE_UNKNOWN_HDR_OPT_CB_FLAG);
		break;
	case BPF_SOCK_OPS_PARSE_HDR_OPT_CB:
		follow(ops);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		listen(ops);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		reserve(ops);
		break;
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		write(ops);
		break;
	}
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
