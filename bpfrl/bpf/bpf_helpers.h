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

#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/*
 * The same value, of which the verifier knows nothing. It follows each way through a program
 * with what it knows of the values on it, and two ways that differ in that are two for all that
 * comes after. Where a bound that was just drawn serves nobody later, forgetting it makes them one:
 * loading sockops, of which each pod has its own, takes a fifth of the time.
 */
#ifdef __bpf__
#define forget(x)                                                              \
	({                                                                     \
		__u64 value_ = (x);                                            \
		asm volatile("%0 = be64 %0; %0 = be64 %0" : "+r"(value_));     \
		(typeof(x))value_;                                             \
	})
#else
#define forget(x) (x)
#endif

#define __cacheline_aligned __attribute__((aligned(64)))

/* Values of the SO_MAX_PACING_RATE and TCP_BPF_SNDCWND_CLAMP options that
 * stand for "no limit" (net/core/sock.c, net/ipv4/tcp.c: the option is an
 * int, and a clamp must be positive). */
#define PACING_UNLIMITED 0xffffffffU
#define CWND_UNLIMITED 0x7fffffff

#endif /* BPFRL_BPF_HELPERS_H */
