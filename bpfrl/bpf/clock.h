/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A direction's virtual clock, and the rate at which one flow may go by it.
 *
 * `tat` is the theoretical arrival time of the generic cell rate algorithm
 * (ITU-T I.371), in ns of CLOCK_MONOTONIC: the time up to which the limit is
 * used up. A packet moves it on by its length at layer 3 divided by the rate;
 * D = tat - now is the backlog. It is virtual: nothing waits in it.
 *
 * It is kept as a sum, tat = origin + charged, so that CPUs need neither a lock nor a
 * compare-and-swap (which BPF has from Linux 5.12 on) to move it: what packets cost is added
 * to `charged`, and whoever sets the clock writes `origin` so that it comes out right for
 * the `charged` that it has read before. Several CPUs that do so at once write the same, and
 * what others are charged meanwhile is not lost.
 */
#ifndef BPFRL_CLOCK_H
#define BPFRL_CLOCK_H

#include "bpf_helpers.h"
#include "limiter.h"

/* Fraction bits of a ratio of rates, of which the largest has 50 bits. */
#define RESCALE_SHIFT 14
/* And of one of a fair rate in byte/s, of which the largest is 5/4 of an eighth. */
#define MEAN_RESCALE_SHIFT 16
/* Time constant of the means, 2^29 ns: longer than the pause of a sender and than
 * most round trips. They are taken in steps that cost little. */
#define MEAN_SHIFT 29
/* And twice as long without an ACK is silence. */
#define SILENCE_SHIFT 30
#define MEAN_COARSE 12
#define MEAN_STEP_NS 100000

/* All that CPUs write in common, in one cache line a direction. */
struct clock {
	__u64 origin;		/* tat without what was charged, ns */
	__u64 charged;		/* for all packets so far, ns */
	__u64 rate_bits;	/* of the limit under which tat has come about */
	__u64 mean_fair;	/* the fair rates of late, byte/s; a plain racy average */
	__s64 mean_backlog;	/* on ingress, ns */
	__u64 mean_ns;		/* when the means were taken */
	/* On egress, who sends: times in 2^20 ns. */
	__u32 paced_at;		/* when a paced socket has sent */
	__u32 unpaced;		/* cookie of the last other one */
	__u32 unpaced_at;	/* when that one has sent */
	__u32 others_at;	/* when one more has, shortly before or after it */
} __cacheline_aligned;

/*
 * The limit was changed since the last packet. Where it was raised the backlog keeps
 * its bytes and takes less time for them, or else a pod that comes from 1 kbit/s
 * would wait for minutes before its new rate means anything. Where it was lowered
 * the backlog keeps its time: a millisecond of the old limit is no debt of seconds.
 * Everything is read before the limit's mark, and written after it: a CPU that finds the old
 * mark has read nothing of what others have made of it. Where CPUs may see writes in another
 * order (arm64), a backlog may be scaled twice; it is shorter for a moment then.
 */
static __always_inline __s64 rescale(struct clock *clock, const struct bpfrl_limit *limit,
				     __u64 now)
{
	__u64 charged = READ_ONCE(clock->charged);
	__s64 backlog = READ_ONCE(clock->origin) + charged - now;
	__u64 mean_fair = READ_ONCE(clock->mean_fair);
	__s64 mean_backlog = READ_ONCE(clock->mean_backlog);
	__u64 old = READ_ONCE(clock->rate_bits), new = READ_ONCE(limit->rate_bits);
	__u64 ratio;

	if (!new || old == new)
		return backlog;
	WRITE_ONCE(clock->rate_bits, new);
	/* Shares stay what they are. */
	if (old) {
		mean_fair = (mean_fair << MEAN_RESCALE_SHIFT) / old;
		WRITE_ONCE(clock->mean_fair, max(mean_fair * new >> MEAN_RESCALE_SHIFT, 1));
	}
	if (old >= new)
		return backlog;
	ratio = (old << RESCALE_SHIFT) / new;
	if (mean_backlog > 0)
		WRITE_ONCE(clock->mean_backlog, (__u64)mean_backlog * ratio >> RESCALE_SHIFT);
	if (backlog <= 0)
		return backlog;
	backlog = (__u64)backlog * ratio >> RESCALE_SHIFT;
	WRITE_ONCE(clock->origin, now + backlog - charged);
	return backlog;
}

/* The backlog at `now`. */
static __always_inline __s64 backlog_at(struct clock *clock, const struct bpfrl_limit *limit,
					__u64 now)
{
	__u64 charged = READ_ONCE(clock->charged);

	if (unlikely(READ_ONCE(clock->rate_bits) != limit->rate_bits))
		return rescale(clock, limit, now);
	return READ_ONCE(clock->origin) + charged - now;
}

/* Pull an idle clock up to the burst's credit; the backlog afterwards. */
static __always_inline __s64 cap_credit(struct clock *clock, const struct bpfrl_limit *limit,
					__u64 now, __s64 backlog)
{
	__s64 credit = -limit->burst_ns;
	__u64 charged;

	if (backlog >= credit)
		return backlog;
	charged = READ_ONCE(clock->charged);
	/* Another CPU may just have done it. */
	if ((__s64)(READ_ONCE(clock->origin) + charged - now) < credit)
		WRITE_ONCE(clock->origin, now + credit - charged);
	return credit;
}

static __always_inline void charge(struct clock *clock, const struct bpfrl_limit *limit,
				   __u64 bytes)
{
	__u64 cost = READ_ONCE(limit->cost);
	__u64 shift = cost & ((1 << BPFRL_SHIFT_BITS) - 1);

	__sync_fetch_and_add(&clock->charged, (bytes * (cost >> BPFRL_SHIFT_BITS)) >> shift);
}

/*
 * The rate, byte/s, at which one flow may go while the backlog is D:
 *
 *     fair(D) = min(1.25 C, max(C (D0/D)^n, Q2/D)),    n = 2 for egress, 4 for ingress
 *
 * C the limit in byte/s; and what a burst that was asked for has left goes as fast as
 * it can. N backlogged flows settle where N fair(D) = C, without
 * anything counting the flows; one that goes idle gives its share back at once.
 */
static __always_inline __u64 fair_rate(const struct bpfrl_limit *limit, __s64 backlog)
{
	__u64 ratio, power, harmonic;

	if (backlog <= limit->fair_onset_ns)
		return unlikely(backlog < limit->reserve_ns) ? BPFRL_FASTEST : limit->fair_cap;
	ratio = limit->fair_d0 / (__u64)backlog;	/* D0 / D */
	power = (((limit->rate * ratio) >> BPFRL_RATIO_SHIFT) * ratio) >> BPFRL_RATIO_SHIFT;
	if (limit->fair_steep)
		power = (((power * ratio) >> BPFRL_RATIO_SHIFT) * ratio) >> BPFRL_RATIO_SHIFT;
	harmonic = (limit->fair_q2 * ratio) >> BPFRL_RATIO_SHIFT;
	return max(power, harmonic) + 1;
}

/* A low pass of first order: what a mean becomes when a value has lasted for some ns.
 * Coarser than ns, for 64 bits. */
static __always_inline __s64 averaged(__s64 mean, __s64 value, __u64 elapsed)
{
	return mean + (((value - mean) * (__s64)(elapsed >> MEAN_COARSE)) >>
		       (MEAN_SHIFT - MEAN_COARSE));
}

/*
 * The fair rate for those who follow it only a round trip later: it falls at once, but
 * to no less than a quarter of its mean, and rises to no more than an eighth above.
 * Without that, several flows at 100 ms all rise together, and fall together. While
 * the limit is not used up the mean rises by itself, and a pod that was silent for
 * a second begins anew.
 */
static __always_inline __u64 steady_rate(struct clock *clock, const struct bpfrl_limit *limit,
					 __u64 fair, __s64 backlog, __u64 now)
{
	__u64 mean = min(READ_ONCE(clock->mean_fair), limit->fair_cap);
	__u64 elapsed = now - READ_ONCE(clock->mean_ns), steady;

	if (unlikely(elapsed > 1ULL << SILENCE_SHIFT && (__s64)elapsed > 0))
		mean = limit->fair_cap;
	steady = max(min(fair, mean + (mean >> 3) + 1), mean >> 2);
	if (elapsed > MEAN_STEP_NS && (__s64)elapsed > 0) {
		/* A pause between two looks says little of what was. */
		__u64 lasting = min(elapsed, 1ULL << (MEAN_SHIFT - 2));
		__u64 next = backlog <= 0 ? min(2 * mean, limit->fair_cap) : steady;

		/* Rounded up where it rises, or from little it never would. */
		WRITE_ONCE(clock->mean_fair, averaged(mean, next, lasting) + (next > mean));
		WRITE_ONCE(clock->mean_backlog,
			   averaged(READ_ONCE(clock->mean_backlog), backlog, lasting));
		WRITE_ONCE(clock->mean_ns, now);
	}
	return unlikely(backlog < limit->reserve_ns) ? fair : steady;
}

#endif /* BPFRL_CLOCK_H */
