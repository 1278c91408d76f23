/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What every program here starts from: libbpf's helpers, and the few
 * definitions that neither libbpf nor the kernel's UAPI headers carry.
 */
#ifndef BPFRL_BPF_HELPERS_H
#define BPFRL_BPF_HELPERS_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define NSEC_PER_SEC 1000000000ULL
#define USEC_PER_SEC 1000000ULL
#define NSEC_PER_USEC 1000ULL

#define SOL_SOCKET 1
#define SOL_TCP 6
#define SO_MAX_PACING_RATE 47
#define TCP_WINDOW_CLAMP 10

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/*
 * All ones for a negative number, and 0 for any other; the compiler, which would make a branch of
 * what comes of it, does not see through.
 */
static __always_inline __s64 sign(__s64 x)
{
#ifdef __bpf__
	asm("%0 s>>= 63" : "+r"(x));
	return x;
#else
	return x >> 63;
#endif
}

/*
 * Without a branch, of which each is a second way for the verifier: loading a limiter takes half
 * the time. The two may be no more than 2^63 apart.
 */
static __always_inline __s64 least(__s64 a, __s64 b)
{
	return b + ((a - b) & sign(a - b));
}

static __always_inline __s64 greatest(__s64 a, __s64 b)
{
	return a - ((a - b) & sign(a - b));
}

#define min(a, b) ((typeof(0 ? (a) : (b)))least(a, b))
#define max(a, b) ((typeof(0 ? (a) : (b)))greatest(a, b))

#define __cacheline_aligned __attribute__((aligned(64)))

/* Values of the SO_MAX_PACING_RATE and TCP_BPF_SNDCWND_CLAMP options that
 * stand for "no limit" (net/core/sock.c, net/ipv4/tcp.c: the option is an
 * int, and a clamp must be positive). */
#define PACING_UNLIMITED 0xffffffffU
#define CWND_UNLIMITED 0x7fffffff

#endif /* BPFRL_BPF_HELPERS_H */
