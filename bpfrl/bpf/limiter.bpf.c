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
 *     while the pod as a whole is behind its limit; one that is alone may
 *     be further ahead.
 *  3. Both cgroup_skb programs drop everything that arrives while D is above
 *     drop_ns; short packets (a ping, an ACK, a SYN) have a little more room,
 *     so that they get through where bulk does not.
 *
 * So whatever the pod's IP sockets do, any interval T passes at most
 * C T + burst + drop_short_ns C, and a packet for each CPU. Packet sockets
 * (AF_PACKET) do not pass through cgroup programs at all.
 */
#include "bpf_helpers.h"
#include "clock.h"
#include "limiter.h"
#include "packet.h"
#include "sockets.h"

/* Verdicts of cgroup_skb programs. On egress 0 shows EPERM to the sender, which
 * TCP takes for a device that is busy: it keeps the segments and tries again, at the
 * latest when its probe timer ends. 2 drops as a full queue would (congestion for
 * TCP, silence for UDP). */
#define PASS 1
#define DROP 0
#define EGRESS_DROP 2
#define EGRESS_REFUSE 0

/* So many segments of a connection leave before the kernel paces it
 * (tcp_update_skb_after_send()). */
#define UNPACED_SEGMENTS 10

/* Q2 of law.py: where packets are no longer, no turn comes sooner than at the fair rate. */
#define LONG_BYTES 3000ULL

/* An unpaced socket may be ahead of its share by the longer of this time and
 * the time that these bytes take, so that it can send a pair of packets. */
#define SHARE_TOLERANCE_NS 5000000ULL
#define SHARE_TOLERANCE_BYTES 6000ULL

/* So long without another's packet, and a sender is alone: half a second, longer than the
 * 200 ms after which TCP repeats what was lost, or those would be forgotten meanwhile. */
#define AT_SHIFT 20
#define ALONE 500U
/* It may be so much ahead: less than fresh_ns and drop_ns, which are 100 ms at least, or
 * it would hold the backlog where all others lose what they send. Short packets beside
 * it may be further ahead, as with the drops. */
#define ALONE_TOLERANCE_NS 90000000LL
#define ALONE_TOLERANCE_SHORT_NS 110000000LL

/* A receive window has at least so many segments, or ACKs would wait for more;
 * and it is less than 16 MB, for which the window scale is 8: windows then are
 * multiples of 256 byte. */
#define WINDOW_FLOOR 2
#define SEGMENT_BYTES 1448ULL
#define WINDOW_CEILING ((16ULL << 20) - 1)
/* What a connection advertises before it knows anything, segments: as much as senders
 * begin with (RFC 6928), and not 64 KB of which only a loss could take something back. */
#define INITIAL_WINDOW 10
/* A change of less than one in this is not worth a new window. */
#define WINDOW_STEP 8
/* The least that the kernel lets a window be, SOCK_MIN_RCVBUF / 2 (net/ipv4/tcp.c),
 * is less than a segment of Ethernet. */
#define WINDOW_PAUSE 1152U
#define PAUSE_OPTION_BYTES 4

/* A receiving socket is paused when it is ahead of its share by so much, and saves
 * up so much: together a persist timer, and less than the drops' backlog. */
#define SHARE_LEAD_NS 100000000LL
#define SHARE_CREDIT_NS 140000000LL
/* Those who follow the fair rate exactly are not to be paused by chance. */
#define SHARE_PERCENT 125
/* Keeps a product in 64 bits. */
#define SHARE_GAIN_CEILING (1LL << 24)

struct bpfrl_limits limits SEC(".data.limits") = {};
const volatile struct bpfrl_identity identity SEC(".rodata.identity") = {
	.layout = BPFRL_LAYOUT,
};

struct clock clocks[BPFRL_DIRECTIONS];

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, BPFRL_DIRECTIONS);
	__type(key, __u32);
	__type(value, struct bpfrl_counters);
} counters SEC(".maps");

/* True for a time that is long gone; another CPU may just have written it. */
static __always_inline bool is_long_ago(__u32 at, __u64 now)
{
	return (__u32)(now >> AT_SHIFT) + 1 - at > ALONE + 1;
}

/* Remember who sends without being paced, and whether another does too. */
static __always_inline void note_sender(struct __sk_buff *skb, struct clock *clock, __u64 now)
{
	__u32 cookie = bpf_get_socket_cookie(skb), at = now >> AT_SHIFT;

	if (READ_ONCE(clock->unpaced) != cookie) {
		if (!is_long_ago(READ_ONCE(clock->unpaced_at), now))
			WRITE_ONCE(clock->others_at, at);
		WRITE_ONCE(clock->unpaced, cookie);
	}
	if (READ_ONCE(clock->unpaced_at) != at)
		WRITE_ONCE(clock->unpaced_at, at);
}

/*
 * True when of late no more than one has sent anything to speak of, and so there is
 * nobody to be fair to. One that has a congestion control of its own (QUIC) then finds as
 * much room as in a queue before it loses anything.
 */
static __always_inline bool is_alone(struct clock *clock, __u64 now, __s64 backlog, bool bulk)
{
	return backlog <= (bulk ? ALONE_TOLERANCE_NS : ALONE_TOLERANCE_SHORT_NS) &&
	       is_long_ago(READ_ONCE(clock->others_at), now) &&
	       is_long_ago(READ_ONCE(clock->paced_at), now);
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

/*
 * True for what a connection sends in one burst before it is paced, when the pod is
 * behind: 64 new connections would put seconds of a small limit in front of
 * everyone. Refused, it counts as sent once, so that what follows is paced.
 */
static __always_inline bool is_unpaced_burst(struct __sk_buff *skb,
					     const struct bpfrl_limit *limit, __s64 backlog)
{
	struct bpf_sock *sk = skb->sk;
	struct bpf_tcp_sock *tcp;

	if (likely(!skb->gso_size || backlog <= limit->fresh_ns) || !sk)
		return false;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return false;
	tcp = bpf_tcp_sock(sk);
	return tcp && tcp->data_segs_out <= UNPACED_SEGMENTS;
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

static __always_inline int judge(struct __sk_buff *skb, enum bpfrl_direction direction)
{
	const struct bpfrl_limit *limit = &limits.direction[direction];
	struct clock *clock = &clocks[direction];
	struct packet packet = measure(skb);
	__u32 key = direction;
	struct bpfrl_counters *counter = bpf_map_lookup_elem(&counters, &key);

	if (!counter)	/* cannot be: the key is within the map */
		return PASS;
	if (limit->rate_bits) {
		__u64 now = bpf_ktime_get_ns();
		__s64 backlog = backlog_at(clock, limit, now);
		bool unpaced, bulk = packet.bytes > SHORT_PACKET;

		backlog = cap_credit(clock, limit, now, backlog);
		if (direction == BPFRL_EGRESS && packet.protocol == IPPROTO_TCP &&
		    is_unpaced_burst(skb, limit, backlog))
			return EGRESS_REFUSE;
		unpaced = direction == BPFRL_EGRESS && packet.protocol != IPPROTO_TCP;
		if (unpaced && bulk)
			note_sender(skb, clock, now);
		if (over_limit(limit, backlog, packet.bytes) ||
		    (unpaced && !is_alone(clock, now, backlog, bulk) &&
		     over_share(skb, limit, backlog, now, packet.bytes))) {
			/* A ping leaves others alone; a flood of short packets does not. */
			if (unpaced && !bulk)
				note_sender(skb, clock, now);
			count(&counter->dropped_packets, &counter->dropped_bytes, &packet);
			return direction == BPFRL_EGRESS ? EGRESS_DROP : DROP;
		}
		charge(clock, limit, packet.bytes);
	}
	count(&counter->passed_packets, &counter->passed_bytes, &packet);
	return PASS;
}

SEC("cgroup_skb/egress")
int bpfrl_egress(struct __sk_buff *skb)
{
	return judge(skb, BPFRL_EGRESS);
}

SEC("cgroup_skb/ingress")
int bpfrl_ingress(struct __sk_buff *skb)
{
	return judge(skb, BPFRL_INGRESS);
}

/* The backlog as a packet would find it that came now. */
static __always_inline __s64 backlog_now(enum bpfrl_direction direction, __u64 now)
{
	const struct bpfrl_limit *limit = &limits.direction[direction];

	return max(backlog_at(&clocks[direction], limit, now), -limit->burst_ns);
}

/* The storage of a TCP socket, which from now on is this limiter's to set. */
static __always_inline struct bpfrl_socket *enlist(struct bpf_sock_ops *ops)
{
	struct bpfrl_socket *socket = socket_of(ops, BPF_SK_STORAGE_GET_F_CREATE);

	if (socket && unlikely(!socket->owner)) {
		socket->owner = identity.cgroup;
		heed_application(tcp_of(ops), socket);
	}
	return socket;
}

/*
 * The rate, byte/s, at which the next segment leaves when the backlog is gone, this one
 * included, or 0 where the fair rate is more. The law is made for packets of 1500 byte. One of
 * loopback's, of 64 KB, is 52 ms of 10 Mbit/s, and at the fair rate of such a backlog the limit
 * would lie idle until the next. And what a socket had under way when the limit came would
 * wait for a minute, in one segment, and the others would not.
 */
static __always_inline __u64 rate_of_turn(const struct bpf_sock_ops *ops,
					  const struct bpfrl_limit *limit, __s64 backlog)
{
	__u64 bytes = ops->skb_len;

	if (backlog <= limit->fresh_ns) {
		bytes = min(bytes, (__u64)ops->mss_cache);
		if (likely(bytes <= LONG_BYTES) || backlog <= 0)
			return 0;
	}
	return bytes * NSEC_PER_SEC / (backlog + bytes * NSEC_PER_SEC / (limit->rate + 1));
}

/*
 * A connection begins, or a segment is about to leave. Setting the option lowers the pacing rate
 * at once, which is what holds this segment; but it raises it only with the next ACK, and by then
 * the backlog may be gone: a socket caught at a low moment would stay there. So
 * right after, the option is set to somewhat more than the mean of all.
 */
static __always_inline void pace_sender(struct bpf_sock_ops *ops, struct bpfrl_socket *socket)
{
	const struct bpfrl_limit *limit = &limits.direction[BPFRL_EGRESS];
	struct clock *clock = &clocks[BPFRL_EGRESS];
	__u64 now = bpf_ktime_get_ns();
	__s64 backlog = backlog_now(BPFRL_EGRESS, now);
	__u64 fair = fair_rate(limit, backlog), let_up = 0;

	if (READ_ONCE(ops->op) == BPF_SOCK_OPS_HDR_OPT_LEN_CB) {
		__u64 mean = READ_ONCE(clock->mean_fair), counted = min(fair, limit->fair_cap);

		mean = mean ? mean - (mean >> 3) + (counted >> 3) : counted;
		WRITE_ONCE(clock->mean_fair, mean);
		WRITE_ONCE(clock->paced_at, now >> AT_SHIFT);
		let_up = max(fair, min(mean + (mean >> 2), limit->fair_cap));
		fair = max(fair, rate_of_turn(ops, limit, backlog));
	}
	heed_application(tcp_of(ops), socket);
	socket->fair = pacing_rate(fair);
	pace(ops, socket);
	if (!let_up)
		return;
	if (let_up > fair) {
		socket->fair = pacing_rate(let_up);
		pace(ops, socket);
	}
	clamp_cwnd(ops, socket);
}

/* There is no limit to what the pod sends. */
static __always_inline void let_go(struct bpf_sock_ops *ops, struct bpfrl_socket *socket)
{
	if (!socket->fair && (!socket->pacing || socket->asked))
		return;
	socket->fair = 0;
	release_sender(ops, tcp_of(ops), socket);
}

/*
 * True when a socket has had more than its share of late: a clock of its own runs
 * at the fair rate of the mean backlog, and so the pauses of many sockets, and the
 * saw-tooth that one alone makes, come to the same mean.
 */
static __always_inline bool is_ahead(struct bpf_sock_ops *ops, struct bpfrl_socket *socket,
				     const struct bpfrl_limit *limit, __s64 mean, __s64 behind,
				     __u64 now)
{
	__u64 share = min(fair_rate(limit, mean) * SHARE_PERCENT / 100, limit->rate);
	__s64 came = ops->bytes_received - socket->received;
	__u64 gained = max(min(came, SHARE_GAIN_CEILING), 0);
	__u64 tat = socket->share_tat;

	socket->received = ops->bytes_received;
	if (unlikely(!tat)) {
		/* New, or there before its limiter. Ever new ones are no way around
		 * a share: the more the pod is behind, the nearer to its end each begins. */
		tat = now + max(min(behind, SHARE_LEAD_NS), 0);
		gained = 0;
	}
	tat = max((__s64)(tat - now), -SHARE_CREDIT_NS) + now;
	tat += gained * NSEC_PER_SEC / payload_rate(share);
	tat = min((__s64)(tat - now), 2 * SHARE_LEAD_NS) + now;
	socket->share_tat = tat;
	return (__s64)(tat - now) > SHARE_LEAD_NS;
}

static __always_inline void set_window(struct bpf_sock_ops *ops, struct bpfrl_socket *socket,
				       __u32 value)
{
	/* As the kernel does, or what it has made of it would pass for the application's. */
	value = max(value, WINDOW_PAUSE);
	if (!bpf_setsockopt(ops, SOL_TCP, TCP_WINDOW_CLAMP, &value, sizeof(value)))
		socket->window = value;
}

/* The least window that lets a sender go on. How long its segments are is not known: as
 * long as those that leave, and no less than Ethernet's. */
static __always_inline __u64 least_window(struct bpf_sock_ops *ops)
{
	return WINDOW_FLOOR * max((__u64)ops->mss_cache, SEGMENT_BYTES);
}

/*
 * The window that this socket is about to advertise: what the fair rate brings
 * in one round trip. Against a sender that knows nothing of the limit it is the
 * only means that costs no packets. What the kernel or the application has set
 * meanwhile is the most that it may be.
 *
 * Where round trips are short or shares small, no window says so little: two
 * segments each 50 us are 460 Mbit/s. There a socket that is ahead of its share
 * advertises less than one segment. Its sender waits for more until its persist
 * timer ends (RFC 9293, 3.8.6.1; 200 ms in Linux), sends what fits, and finds the window
 * open again or not: the pause that a lost packet would give, without the loss.
 */
static __always_inline void open_window(struct bpf_sock_ops *ops, struct bpfrl_socket *socket)
{
	const struct bpfrl_limit *limit = &limits.direction[BPFRL_INGRESS];
	struct clock *clock = &clocks[BPFRL_INGRESS];
	__u64 now = bpf_ktime_get_ns();
	__s64 backlog = backlog_now(BPFRL_INGRESS, now);
	__u64 rtt_us = min(ops->srtt_us >> 3, RTT_CEILING_US);
	__u64 smallest = least_window(ops);
	__u64 fair = fair_rate(limit, backlog);
	__u64 steady = steady_rate(clock, limit, fair, backlog, now);
	__s64 behind = backlog - limit->share_ns;
	bool ahead = is_ahead(ops, socket, limit, READ_ONCE(clock->mean_backlog), behind, now);
	struct tcp_sock *tcp = tcp_of(ops);
	__u32 current, value;
	__u64 window;

	if (rtt_us >= CWND_NEAR_US)
		fair = steady;
	window = fair * (rtt_us + RTT_SLACK_US) / USEC_PER_SEC;
	socket->offer = min(fair >> OFFER_SHIFT, 0xffffffffULL);
	if (!rtt_us || !tcp)
		return;
	current = tcp->window_clamp;
	if (!socket->window || current != socket->window)
		socket->own_window = current;
	/* Not with a segment of data: it has no room for the padding. */
	if (!ops->skb_len && ahead && behind > 0 && (window < smallest || rtt_us < RTT_SLACK_US)) {
		set_window(ops, socket, WINDOW_PAUSE);
		/* Asks for a call when the header has been written: see reopen_window(). */
		bpf_reserve_hdr_opt(ops, PAUSE_OPTION_BYTES, 0);
		return;
	}
	value = min(min(max(window, smallest), WINDOW_CEILING), socket->own_window);
	if (value > current + current / WINDOW_STEP || value < current - current / WINDOW_STEP)
		set_window(ops, socket, value);
}

/*
 * An ACK with a window of less than a segment is written; no option goes with it
 * but padding. The kernel lets a window grow no faster than data comes in, beginning
 * with what is allowed when they come: so that what ends the pause can open
 * the window at once, it is allowed now.
 */
static __always_inline void reopen_window(struct bpf_sock_ops *ops)
{
	struct bpfrl_socket *socket = socket_of(ops, 0);

	if (socket && socket->window == WINDOW_PAUSE)
		set_window(ops, socket, least_window(ops));
}

/* A window scale (RFC 7323) at which a window of less than one segment can be said: a
 * socket that has not begun takes it from the widest window that it may have. */
static __always_inline void choose_window_scale(struct bpf_sock_ops *ops)
{
	struct bpfrl_socket *socket = enlist(ops);
	struct tcp_sock *tcp = tcp_of(ops);

	if (!socket || !tcp || (tcp->window_clamp && tcp->window_clamp < WINDOW_CEILING))
		return;
	socket->own_window = WINDOW_UNLIMITED;
	set_window(ops, socket, WINDOW_CEILING - 1);
}

/* False for a connection that has not begun, and for a segment of data that leaves where
 * nothing has come since the last: its window says what that one's said. */
static __always_inline bool is_received_on(struct bpf_sock_ops *ops, struct bpfrl_socket *socket)
{
	if (READ_ONCE(ops->op) != BPF_SOCK_OPS_HDR_OPT_LEN_CB)	/* skb_len is that of what has come */
		return READ_ONCE(ops->op) != BPF_SOCK_OPS_TCP_CONNECT_CB;
	return !ops->skb_len || ops->bytes_received != socket->received;
}

/* Read each time: carried along, the answer would be one way more for the verifier through
 * all that comes before it is asked for again. One that changes meanwhile is put right by
 * the next call. */
static __always_inline bool is_limited(enum bpfrl_direction direction)
{
	return READ_ONCE(limits.direction[direction].rate_bits);
}

SEC("sockops")
int bpfrl_sockops(struct bpf_sock_ops *ops)
{
	struct bpfrl_socket *socket;

	/* By far most calls come from the kernel's asking for the MSS only. */
	if (likely(ops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB)) {
		if (ops->args[0] == BPF_WRITE_HDR_TCP_CURRENT_MSS)
			return 1;
	} else if (ops->op == BPF_SOCK_OPS_WRITE_HDR_OPT_CB) {
		reopen_window(ops);
		return 1;
	}

	switch (ops->op) {
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		break;
	case BPF_SOCK_OPS_RWND_INIT:
		if (is_limited(BPFRL_INGRESS))
			ops->reply = INITIAL_WINDOW;
		return 1;
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (is_limited(BPFRL_INGRESS))
			choose_window_scale(ops);
		if (READ_ONCE(ops->op) == BPF_SOCK_OPS_TCP_LISTEN_CB)
			return 1;
		/* fallthrough */
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		/* Without a limit too: one may come while the connection lasts. */
		bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags |
						       BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		break;
	default:
		return 1;
	}

	socket = is_limited(BPFRL_EGRESS) || is_limited(BPFRL_INGRESS) ? enlist(ops) : socket_of(ops, 0);
	if (!socket)
		return 1;
	if (!is_limited(BPFRL_EGRESS))
		let_go(ops, socket);
	else if (READ_ONCE(ops->op) != BPF_SOCK_OPS_HDR_OPT_LEN_CB || ops->skb_len)
		pace_sender(ops, socket);
	if (!is_limited(BPFRL_INGRESS))
		release_receiver(ops, socket);
	else if (is_received_on(ops, socket))
		open_window(ops, socket);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
