/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The layout that the limiter's programs and user space share.
 *
 * User space writes struct bpfrl_limits whole (one map update), and reads the
 * counters; layout.py is the Python side of this file, and a unit test holds
 * the two together through the object's BTF. Every value derived from a rate
 * is computed there, once per change, so that the programs divide as little
 * as possible.
 *
 * Any change of a structure here is a new BPFRL_LAYOUT: a limiter that is
 * already in the kernel is updated in place only where the layout is its own.
 */
#ifndef BPFRL_LIMITER_H
#define BPFRL_LIMITER_H

#define BPFRL_LAYOUT 3

#define BPFRL_UID_LEN 64	/* a pod UID has 36 characters, a static pod's 32 */
#define BPFRL_NAMESPACE_LEN 64	/* DNS label: 63 and the terminating zero */
#define BPFRL_NAME_LEN 256	/* DNS subdomain: 253 and the terminating zero */
#define BPFRL_BUILD_LEN 32	/* SHA-256 */

/* Low bits of bpfrl_limit.cost that hold its number of fraction bits. */
#define BPFRL_SHIFT_BITS 6

/* Fraction bits of D0 / D in the fair rate. */
#define BPFRL_RATIO_SHIFT 24

/* The highest rate that is reckoned with, byte/s; it takes the products of the fair
 * rate to 64 bits. Faster limits are shared as this one would be. */
#define BPFRL_FASTEST (1ULL << 38)

enum bpfrl_direction {
	BPFRL_EGRESS,
	BPFRL_INGRESS,
	BPFRL_DIRECTIONS,
};

/* One direction's limit, and what follows from it. Every packet reads the first
 * cache line and what sets the pace the second; neither is written while the limit
 * holds. */
struct bpfrl_limit {
	__u64 rate_bits;	/* bit/s at layer 3; 0: no limit, count only */
	__u64 cost;		/* ns per byte: fraction bits in the low BPFRL_SHIFT_BITS,
				 * the value above them: one word, never read by half */
	__s64 burst_ns;		/* credit that an idle clock keeps */
	__s64 drop_ns;		/* backlog from which all packets are dropped */
	__s64 drop_short_ns;	/* the same for short packets */
	__s64 fresh_ns;		/* backlog from which a socket's first packets have to wait, and no segment waits longer */
	__s64 share_ns;		/* backlog from which sockets are held to their share that do
				 * not keep to it by themselves */
	__s64 fair_onset_ns;	/* backlog up to which fair_cap applies */

	__u64 fair_cap;		/* byte/s */
	__u64 fair_d0;		/* D0 in ns, shifted by BPFRL_RATIO_SHIFT */
	__u64 fair_q2;		/* Q2 / D0 in byte/s */
	__u64 rate;		/* byte/s, for the fair rate */
	__u64 fair_steep;	/* 1: it falls by the fourth power of the backlog, not the second */
	__s64 reserve_ns;	/* backlog, negative, below which an asked-for burst is left to spend */
	__u64 unused[2];
};

struct bpfrl_limits {
	struct bpfrl_limit direction[BPFRL_DIRECTIONS];
	__u64 burst;		/* byte, as asked for; 0: the default */
	__u64 adopted;		/* 1: the sockets that were there before are paced too */
};

/* Whose limiter this is, and which build of it. */
struct bpfrl_identity {
	__u32 layout;				/* BPFRL_LAYOUT */
	char uid[BPFRL_UID_LEN];
	char namespace[BPFRL_NAMESPACE_LEN];	/* empty: not known */
	char name[BPFRL_NAME_LEN];		/* empty: not known */
	__u8 build[BPFRL_BUILD_LEN];		/* digest of the object before it was filled in */
	__u64 cgroup;				/* where it is attached; 0: not known yet */
};

/* Per CPU and direction. Packets and bytes are those on the wire at layer 3:
 * a GSO packet counts as its segments, each with its headers. */
struct bpfrl_counters {
	__u64 passed_packets;
	__u64 passed_bytes;
	__u64 dropped_packets;
	__u64 dropped_bytes;
};

#endif /* BPFRL_LIMITER_H */
