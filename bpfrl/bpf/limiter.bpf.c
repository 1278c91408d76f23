// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The limiter of one cgroup: pacing at the source on one virtual clock.
 *
 * Each direction has a clock, `tat`: the theoretical arrival time of the
 * generic cell rate algorithm (ITU-T I.371), in ns of CLOCK_MONOTONIC, up to
 * which the limit is used up. A packet moves it on by its length at layer 3
 * divided by the rate; D = tat - now is the backlog. Nothing is queued
 * anywhere: D is virtual and delays nobody.
 *
 * What holds the pod to the limit, in the order in which it takes effect:
 *
 *  1. sockops makes every TCP socket send at the fair rate
 *
 *         fair(D) = min(1.25 C, max(C (D0/D)^2, Q2/D)),
 *
 *     C the limit in byte/s. N backlogged flows settle where N fair(D) = C,
 *     without anything counting the flows; one that goes idle gives its share
 *     back at once. Setting it just before each data segment leaves is what
 *     makes it exact.
 *  2. The egress program holds each socket that cannot be paced (UDP, raw)
 *     to the same fair rate with a clock of its own, by dropping, and only
 *     while the pod as a whole is behind its limit.
 *  3. Both cgroup_skb programs drop everything that arrives while D is above
 *     drop_ns; short packets (a ping, an ACK, a SYN) have a little more room,
 *     so that they get through where bulk does not.
 *
 * So whatever the pod's IP sockets do, any interval T passes at most
 * C T + burst + drop_short_ns C, and a packet for each CPU. Packet sockets
 * (AF_PACKET) do not pass through cgroup programs at all.
 */
#include "bpf_helpers.h"
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include "limiter.h"
#include "sockets.h"

/* Verdicts of cgroup_skb programs. On egress 0 shows EPERM to the sender;
 * 2 drops as a full queue would (congestion for TCP, silence for UDP). */
#define PASS 1
#define EGRESS_DROP 2
#define INGRESS_DROP 0

/* A packet up to this length, byte, is never the bulk of a transfer. */
#define SHORT_PACKET 128

/* A packet that is longer than this and no GSO packet leaves in fragments: 1500
 * byte each, in which IPv4 has 1480 and IPv6, with its fragment header, 1448
 * byte of payload. With a larger MTU this charges up to 3 % too much. */
#define UNFRAGMENTED 1500
#define FRAGMENT_IPV4 1480
#define FRAGMENT_IPV6 1448
#define FRAGMENT_HEADER_IPV6 8

/* An unpaced socket may be ahead of its share by the longer of this time and
 * the time that these bytes take, so that it can send a pair of packets. */
#define SHARE_TOLERANCE_NS 5000000ULL
#define SHARE_TOLERANCE_BYTES 6000ULL

/* Fraction bits of a ratio of rates, of which the largest has 50 bits. */
#define RESCALE_SHIFT 14

/* Payload in 1500 byte of layer 3, TCP/IPv4 with timestamps: 1448/1500, in
 * 256ths. A pacing rate counts payload, a limit counts packets. */
#define PAYLOAD_256THS 247

/* Smallest window that keeps fast retransmit alive, segments. */
#define CWND_FLOOR 4
/* The window's limit is in the way only below this RTT, where the kernel
 * inflates TSO bursts (tcp_tso_rtt_log); above it is at least CWND_FAR. */
#define CWND_NEAR_US 4000
#define CWND_FAR 4096
#define RTT_CEILING_US 1000000ULL
#define RTT_SLACK_US 1000

struct bpfrl_limits limits SEC(".data.limits") = {};
const volatile struct bpfrl_identity identity SEC(".rodata.identity") = {
	.layout = BPFRL_LAYOUT,
};

/* What the programs write, a cache line each. */
struct clock {
	__u64 tat;
	__u64 rate_bits;	/* of the limit under which tat has come about */
} __cacheline_aligned;

struct clock clocks[BPFRL_DIRECTIONS];

/* Mean fair rate at which segments left, byte/s; a plain racy average. */
__u64 mean_fair __cacheline_aligned;

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, BPFRL_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct bpfrl_counters);
} counters SEC(".maps");

struct packet {
	__u64 bytes;	/* at layer 3, with the headers of every segment */
	__u64 segments;
	__u8 protocol;
};

static __always_inline struct packet measure(struct __sk_buff *skb)
{
	struct packet packet = { .bytes = skb->len, .segments = 1 };
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	__u32 network, offset, header, payload;
	struct iphdr *ip = data;

	if ((void *)(ip + 1) > end)
		return packet;
	if (ip->version == 4) {
		packet.protocol = ip->protocol;
		network = offset = header = ip->ihl * 4;
		payload = FRAGMENT_IPV4;
	} else {
		__u8 *options = data + sizeof(struct ipv6hdr);

		packet.protocol = ((struct ipv6hdr *)data)->nexthdr;
		network = offset = sizeof(struct ipv6hdr);
		header = network + FRAGMENT_HEADER_IPV6;
		payload = FRAGMENT_IPV6;
		/* Above 64 KB the length stands in an option, which never leaves the machine. */
		if (packet.protocol == IPPROTO_HOPOPTS && (void *)(options + 8) <= end) {
			packet.protocol = options[0];
			offset += 8;
		}
	}

	if (skb->gso_size) {
		struct tcphdr *tcp = data + offset;

		header = network + sizeof(struct udphdr);
		if (packet.protocol == IPPROTO_TCP) {
			header = network + sizeof(*tcp);
			if ((void *)(tcp + 1) <= end)
				header = network + tcp->doff * 4;
		}
		payload = skb->gso_size;
		/* Devices that do not trust their peer leave the count to be derived. */
		packet.segments = skb->gso_segs;
		if (unlikely(!packet.segments))
			packet.segments = (packet.bytes - header + payload - 1) / payload;
	} else if (unlikely(packet.bytes > UNFRAGMENTED && packet.protocol != IPPROTO_TCP)) {
		packet.segments = (packet.bytes - network + payload - 1) / payload;
	}
	if (packet.segments > 1)
		packet.bytes += (packet.segments - 1) * header;
	return packet;
}

/*
 * The limit was changed since the last packet. The backlog keeps its bytes, and
 * so the time that they take becomes another; or else a pod that comes from
 * 1 kbit/s would wait for minutes before its new rate means anything. The one
 * CPU that wins the exchange moves the clock.
 */
static __always_inline __s64 rescale(struct clock *clock, const struct bpfrl_limit *limit,
				     __s64 backlog)
{
	__u64 old = READ_ONCE(clock->rate_bits), most = limit->drop_ns, scaled, ratio;

	if (__sync_val_compare_and_swap(&clock->rate_bits, old, limit->rate_bits) != old ||
	    !old || backlog <= 0)
		return backlog;
	ratio = (old << RESCALE_SHIFT) / limit->rate_bits;
	/* Compared as a quotient: the product may leave 64 bits. */
	if (ratio && (__u64)backlog > (most << RESCALE_SHIFT) / ratio)
		scaled = most;
	else
		scaled = ((__u64)backlog * ratio) >> RESCALE_SHIFT;
	__sync_fetch_and_add(&clock->tat, scaled - backlog);
	return scaled;
}

/* The backlog at `now`. */
static __always_inline __s64 backlog_at(struct clock *clock, const struct bpfrl_limit *limit,
					__u64 now)
{
	__s64 backlog = READ_ONCE(clock->tat) - now;

	if (unlikely(READ_ONCE(clock->rate_bits) != limit->rate_bits))
		return rescale(clock, limit, backlog);
	return backlog;
}

/* Pull an idle clock up to the burst's credit; the backlog afterwards. */
static __always_inline __s64 cap_credit(struct clock *clock, const struct bpfrl_limit *limit,
					__u64 now, __s64 backlog)
{
	__s64 credit = -limit->burst_ns;

	if (backlog >= credit)
		return backlog;
	__sync_val_compare_and_swap(&clock->tat, now + backlog, now + credit);
	return credit;
}

static __always_inline void charge(struct clock *clock, const struct bpfrl_limit *limit,
				   __u64 bytes)
{
	__u64 cost = READ_ONCE(limit->cost);
	__u64 shift = cost & ((1 << BPFRL_SHIFT_BITS) - 1);

	__sync_fetch_and_add(&clock->tat, (bytes * (cost >> BPFRL_SHIFT_BITS)) >> shift);
}

/* The rate, byte/s, at which one flow may send while the backlog is D. */
static __always_inline __u64 fair_rate(const struct bpfrl_limit *limit, __s64 backlog)
{
	__u64 ratio, square, harmonic;

	if (backlog <= limit->fair_onset_ns)
		return limit->fair_cap;
	ratio = limit->fair_d0 / (__u64)backlog;	/* D0 / D */
	square = (((limit->rate * ratio) >> BPFRL_RATIO_SHIFT) * ratio) >> BPFRL_RATIO_SHIFT;
	harmonic = (limit->fair_q2 * ratio) >> BPFRL_RATIO_SHIFT;
	return max(square, harmonic) + 1;
}

/* True when a socket that cannot be paced is to lose this packet. */
static __always_inline bool over_share(struct __sk_buff *skb, const struct bpfrl_limit *limit,
				       __s64 backlog, __u64 now, __u64 bytes)
{
	struct bpf_sock *sk = skb->sk;
	struct bpfrl_socket *state;
	__u64 tat, ns_per_byte, tolerance, cost;

	if (!sk)
		return false;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return false;
	state = bpf_sk_storage_get(&sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!state)
		return false;

	ns_per_byte = (NSEC_PER_SEC << 16) / fair_rate(limit, backlog);
	tolerance = max(SHARE_TOLERANCE_NS, (SHARE_TOLERANCE_BYTES * ns_per_byte) >> 16);
	cost = (bytes * ns_per_byte) >> 16;

	tat = READ_ONCE(state->tat);
	if (unlikely(!tat) && backlog > limit->fresh_ns && bytes > SHORT_PACKET) {
		/* Ever new sockets are no way around a share: each begins at its end. */
		WRITE_ONCE(state->tat, now + tolerance);
		return true;
	}
	if ((__s64)(tat - now) < 0) {
		tat = now;
	} else if (tat - now > tolerance) {
		if (backlog > limit->share_ns)
			return true;
		tat = now + tolerance;
	}
	WRITE_ONCE(state->tat, tat + cost);
	return false;
}

static __always_inline bool over_limit(const struct bpfrl_limit *limit, __s64 backlog,
				       __u64 bytes)
{
	return backlog > (bytes > SHORT_PACKET ? limit->drop_ns : limit->drop_short_ns);
}

/* Atomic: on egress, an interrupt may send on the same CPU in between. */
static __always_inline void count(__u64 *packets, __u64 *bytes, const struct packet *packet)
{
	__sync_fetch_and_add(packets, packet->segments);
	__sync_fetch_and_add(bytes, packet->bytes);
}

static __always_inline bool admit(struct __sk_buff *skb, enum bpfrl_direction direction)
{
	const struct bpfrl_limit *limit = &limits.direction[direction];
	struct clock *clock = &clocks[direction];
	struct packet packet = measure(skb);
	__u32 key = direction;
	struct bpfrl_counters *counter = bpf_map_lookup_elem(&counters, &key);

	if (!counter)	/* cannot be: the key is within the map */
		return true;
	if (limit->rate_bits) {
		__u64 now = bpf_ktime_get_ns();
		__s64 backlog = backlog_at(clock, limit, now);

		backlog = cap_credit(clock, limit, now, backlog);
		if (over_limit(limit, backlog, packet.bytes) ||
		    (direction == BPFRL_EGRESS && packet.protocol != IPPROTO_TCP &&
		     over_share(skb, limit, backlog, now, packet.bytes))) {
			count(&counter->dropped_packets, &counter->dropped_bytes, &packet);
			return false;
		}
		charge(clock, limit, packet.bytes);
	}
	count(&counter->passed_packets, &counter->passed_bytes, &packet);
	return true;
}

SEC("cgroup_skb/egress")
int bpfrl_egress(struct __sk_buff *skb)
{
	return admit(skb, BPFRL_EGRESS) ? PASS : EGRESS_DROP;
}

SEC("cgroup_skb/ingress")
int bpfrl_ingress(struct __sk_buff *skb)
{
	return admit(skb, BPFRL_INGRESS) ? PASS : INGRESS_DROP;
}

/* The storage of a TCP socket, which remembers what to give back. */
static __always_inline struct bpfrl_socket *enlist(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct bpfrl_socket *socket;

	if (!sk)
		return NULL;
	socket = bpf_sk_storage_get(&sockets, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (socket && unlikely(!socket->own_pacing)) {
		/* Before 6.1 the option cannot be read: taken as not set. */
		if (bpf_getsockopt(ops, SOL_SOCKET, SO_MAX_PACING_RATE, &socket->own_pacing,
				   sizeof(socket->own_pacing)) ||
		    !socket->own_pacing)
			socket->own_pacing = PACING_UNLIMITED;
	}
	return socket;
}

static __always_inline void set_pacing(struct bpf_sock_ops *ops,
				       const struct bpfrl_socket *socket, __u64 rate)
{
	__u32 value;

	/* The option has 32 bits: above 34 Gbit/s a socket is not paced. */
	rate = (rate * PAYLOAD_256THS) >> 8;
	value = min(rate, socket->own_pacing);
	bpf_setsockopt(ops, SOL_SOCKET, SO_MAX_PACING_RATE, &value, sizeof(value));
}

/*
 * Below a few ms of RTT, tcp_tso_autosize() makes bursts of up to 64 KB out of
 * any rate. A window of about two round trips keeps them small. The option
 * also writes ssthresh, so it is set only when the window has moved by half.
 */
static __always_inline void clamp_window(struct bpf_sock_ops *ops, struct bpfrl_socket *socket,
					 __u64 rate)
{
	__u64 rtt_us = min(ops->srtt_us >> 3, RTT_CEILING_US);
	__u64 mss = ops->mss_cache;
	__u64 segments;
	int value;

	if (!mss)
		return;
	segments = rate * (2 * rtt_us + RTT_SLACK_US) / (USEC_PER_SEC * mss);
	segments = max(segments, rtt_us < CWND_NEAR_US ? CWND_FLOOR : CWND_FAR);
	if (socket->cwnd && segments <= socket->cwnd + (socket->cwnd >> 1) &&
	    segments >= socket->cwnd >> 1)
		return;
	value = min(segments, CWND_UNLIMITED);
	if (!bpf_setsockopt(ops, SOL_TCP, TCP_BPF_SNDCWND_CLAMP, &value, sizeof(value)))
		socket->cwnd = value;
}

/* There is no egress limit any more: give the socket back what was its own. */
static __always_inline void release(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct bpfrl_socket *socket = sk ? bpf_sk_storage_get(&sockets, sk, NULL, 0) : NULL;
	int cwnd = CWND_UNLIMITED;

	if (!socket || !socket->own_pacing)
		return;
	bpf_setsockopt(ops, SOL_SOCKET, SO_MAX_PACING_RATE, &socket->own_pacing,
		       sizeof(socket->own_pacing));
	bpf_setsockopt(ops, SOL_TCP, TCP_BPF_SNDCWND_CLAMP, &cwnd, sizeof(cwnd));
	socket->own_pacing = 0;
	socket->cwnd = 0;
}

SEC("sockops")
int bpfrl_sockops(struct bpf_sock_ops *ops)
{
	const struct bpfrl_limit *limit = &limits.direction[BPFRL_EGRESS];
	struct bpfrl_socket *socket;
	__u64 fair, mean;

	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		/* Without a limit too: one may come while the connection lasts. */
		bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags |
						       BPF_SOCK_OPS_RTT_CB_FLAG |
						       BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		/* Asked for the MSS only, or for a packet without data. */
		if (ops->args[0] == BPF_WRITE_HDR_TCP_CURRENT_MSS || !ops->skb_len)
			return 1;
		break;
	case BPF_SOCK_OPS_RTT_CB:
		break;
	default:
		return 1;
	}
	if (!limit->rate_bits) {
		release(ops);
		return 1;
	}
	socket = enlist(ops);
	if (!socket)
		return 1;

	fair = fair_rate(limit, backlog_at(&clocks[BPFRL_EGRESS], limit, bpf_ktime_get_ns()));
	mean = READ_ONCE(mean_fair);
	if (ops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB) {
		set_pacing(ops, socket, fair);
		WRITE_ONCE(mean_fair, mean ? mean - (mean >> 3) + (fair >> 3) : fair);
		return 1;
	}
	/* The option lowers a socket's rate at once but raises it only with the
	 * next ACK: a socket caught at a low moment is let up to the mean here. */
	fair = max(fair, min(mean + (mean >> 2), limit->fair_cap));
	set_pacing(ops, socket, fair);
	if (ops->op != BPF_SOCK_OPS_TCP_CONNECT_CB)
		clamp_window(ops, socket, fair);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
