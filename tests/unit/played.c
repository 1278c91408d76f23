// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * One of the sockops programs as a library of this machine: PROGRAM, with a kernel
 * that is only played and has one socket. native.py is the Python side.
 *
 * clang's sanitizer calls the handlers at the end where a product or a quotient
 * leaves its type. Sums and differences may: clocks are compared modulo 2^64.
 */
#include <string.h>
#include <sys/mman.h>

#include "bpf_helpers.h"

#define PAGE 4096UL
#define CGROUP 4711
/* SOCK_MIN_RCVBUF / 2, of which tcp_set_window_clamp() makes smaller ones. */
#define LEAST_WINDOW 1152
#define COOKIES 16

struct played {
	__u64 now;
	__u32 pacing;		/* SO_MAX_PACING_RATE */
	__u32 lowest;		/* that it has been since the last call began: the kernel lowers at once */
	__u32 cwnd;		/* TCP_BPF_SNDCWND_CLAMP */
	__u32 window;		/* TCP_WINDOW_CLAMP */
	__u32 flags;		/* what the socket calls sockops for */
	__u32 reserved;		/* bytes for options in the headers of ACKs */
	__u32 squeezed;		/* the same in those of data, whose size is settled */
	__u32 told;		/* 1: the ACK that comes has the option */
	__u32 rate;		/* in it */
	__u32 offered;		/* the rate in the option that was written */
	__u32 vanishing;	/* 1: the limits go when the time is asked for */
	__u32 products;		/* that left their type */
	__u32 quotients;
	__u32 cookie;		/* of the socket that is meant: below COOKIES */
	__u32 segments;		/* of data that have come */
	__u32 early;		/* those of them that came before others */
	__u32 reply;		/* of the last call */
} played;

#define bpf_ktime_get_ns played_now
#define bpf_sk_storage_get(map, sk, value, flags) played_storage(flags)
#define bpf_sk_fullsock(sk) (sk)
#define bpf_tcp_sock(sk) (&played_tcp)
#define bpf_skc_to_tcp_sock(sk) played_kernel_socket()
#define bpf_get_socket_cookie(skb) played.cookie
#define bpf_map_lookup_elem(map, key) ((void)(key), (void *)&played_counters)
#define bpf_getsockopt(context, level, ...) played_get(__VA_ARGS__)
#define bpf_setsockopt(context, level, ...) played_set(__VA_ARGS__)
#define bpf_sock_ops_cb_flags_set(ops, value) (played.flags = (value))
#define bpf_reserve_hdr_opt(ops, size, flags) played_reserve((ops)->skb_len, size)
#define bpf_load_hdr_opt(ops, option, size, flags) played_load(option, size)
#define bpf_store_hdr_opt(ops, option, size, flags) played_store(option)

static const struct bpf_tcp_sock played_tcp = { .data_segs_out = 100 };
static __u64 played_now(void);
static void *played_storage(__u64 flags);
static void *played_kernel_socket(void);

static __u32 *played_option(int option)
{
	switch (option) {
	case 47:
		return &played.pacing;
	case 10:
		return &played.window;
	case TCP_BPF_SNDCWND_CLAMP:
		return &played.cwnd;
	}
	return NULL;
}

static inline long played_get(int option, void *value, int size)
{
	if (size != sizeof(__u32) || !played_option(option))
		return -1;
	memcpy(value, played_option(option), size);
	return 0;
}

static inline long played_set(int option, const void *value, int size)
{
	if (size != sizeof(__u32) || !played_option(option))
		return -1;
	memcpy(played_option(option), value, size);
	if (played.window < LEAST_WINDOW)
		played.window = LEAST_WINDOW;
	if (played.pacing < played.lowest)
		played.lowest = played.pacing;
	return 0;
}

static inline long played_reserve(__u32 length, __u32 size)
{
	*(length ? &played.squeezed : &played.reserved) += size;
	return 0;
}

static inline long played_load(void *option, int size)
{
	if (!played.told)
		return -1;
	memcpy((char *)option + size - sizeof(played.rate), &played.rate, sizeof(played.rate));
	return size;
}

static inline long played_store(const void *option)
{
	memcpy(&played.offered, (const char *)option + 4, sizeof(played.offered));
	return 0;
}

#ifdef LIMITER
#include "limiter.h"
static struct bpfrl_counters played_counters;
#endif

#include PROGRAM

struct bpfrl_socket storage[COOKIES];
static bool stored[COOKIES];

static void *played_storage(__u64 flags)
{
	stored[played.cookie] |= flags & BPF_SK_STORAGE_GET_F_CREATE;
	return stored[played.cookie] ? &storage[played.cookie] : NULL;
}

static void *played_kernel_socket(void)
{
	static struct tcp_sock tcp;

	tcp.inet_conn.icsk_inet.sk.sk_max_pacing_rate =
		played.pacing == PACING_UNLIMITED ? ~0UL : played.pacing;
	tcp.window_clamp = played.window;
	tcp.rcv_ooopack = played.early;
	return &tcp;
}

static __u64 played_now(void)
{
#ifdef LIMITER
	if (played.vanishing)
		memset(&limits, 0, sizeof(limits));
#endif
	return played.now;
}

void reset(void)
{
	memset(&played, 0, sizeof(played));
	memset(&storage, 0, sizeof(storage));
	memset(&stored, 0, sizeof(stored));
#ifdef LIMITER
	memset(&limits, 0, sizeof(limits));
	memset(&clocks, 0, sizeof(clocks));
	/* Constant only once it is in the kernel. */
	mprotect((void *)((unsigned long)&identity & -PAGE), 2 * PAGE, PROT_READ | PROT_WRITE);
	*(volatile __u64 *)&identity.cgroup = CGROUP;
#endif
}

int call(__u32 op, __u32 srtt_us, __u32 mss, __u64 received, __u32 length, __u32 next)
{
	static struct bpf_sock sk;
	struct bpf_sock_ops ops = {
		.op = op,
		.srtt_us = srtt_us,
		.mss_cache = mss,
		.bytes_received = received,
		.data_segs_in = played.segments,
		.skb_len = length,
		.rcv_nxt = next,
		.skb_tcp_flags = 0x10,
		.bpf_sock_ops_cb_flags = played.flags,
		.sk = &sk,
	};

	played.lowest = played.pacing;
	played.reply = 0;
	if (!ENTRY(&ops))
		return 0;
	played.reply = ops.reply;
	return 1;
}

#ifdef LIMITER
/* A packet in IPv4: true when it passes. */
int packet(__u32 direction, __u32 length, __u8 protocol)
{
	static struct bpf_sock sk;
	static __u8 *data;	/* 32 bits of address */
	struct __sk_buff skb = { .len = length, .sk = &sk };

	if (!data)
		data = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	if (data == MAP_FAILED)
		return -1;
	data[0] = 0x45;
	data[9] = protocol;
	skb.data = (long)data;
	skb.data_end = skb.data + 40;
	return (direction == BPFRL_EGRESS ? bpfrl_egress(&skb) : bpfrl_ingress(&skb)) == PASS;
}

__u64 fair_rate_of(const struct bpfrl_limit *limit, __s64 backlog)
{
	return fair_rate(limit, backlog);
}

__s64 rescale_of(struct clock *clock, const struct bpfrl_limit *limit, __u64 now)
{
	return rescale(clock, limit, now);
}

void charge_of(struct clock *clock, const struct bpfrl_limit *limit, __u64 bytes)
{
	charge(clock, limit, bytes);
}

__s64 least_of(__s64 a, __s64 b)
{
	return min(a, b);
}

__s64 greatest_of(__s64 a, __s64 b)
{
	return max(a, b);
}
#endif

void __ubsan_handle_mul_overflow_minimal(void)
{
	played.products++;
}

void __ubsan_handle_divrem_overflow_minimal(void)
{
	played.quotients++;
}

void __ubsan_handle_add_overflow_minimal(void)
{
}

void __ubsan_handle_sub_overflow_minimal(void)
{
}

void __ubsan_handle_negate_overflow_minimal(void)
{
}
