// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A plain token bucket on a cgroup, one for each direction: what everybody
 * writes first. Tokens come in at the rate until the bucket is full; a packet
 * takes its length out of it, and one for which there is not enough is dropped.
 *
 * Whoever loads it fills in the limits, and may change them later.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define NSEC_PER_SEC 1000000000ULL

/* IPv4 and TCP with timestamps: what each further segment of a GSO packet has
 * on the wire besides its payload. */
#define SEGMENT_HEADERS 52

/* As a full queue drops: to TCP it is a loss, and a datagram's sender does not
 * hear of it. With 0 both see an error, at which TCP stalls and many a program
 * of datagrams ends. Only egress has it. */
enum { DROP = 0, PASS = 1, DROP_QUIETLY = 2 };
enum { EGRESS, INGRESS, DIRECTIONS };

struct limit {
	__u64 rate;	/* byte/s */
	__u64 burst;	/* byte */
};

struct bucket {
	struct bpf_spin_lock lock;
	__u32 reserved;
	__u64 tokens;	 /* byte * NSEC_PER_SEC, so that nothing is lost in dividing */
	__u64 filled_ns; /* when tokens last came in */
	__u64 passed;	 /* byte */
	__u64 dropped;	 /* packets on the wire */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DIRECTIONS);
	__type(key, __u32);
	__type(value, struct limit);
} limits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DIRECTIONS);
	__type(key, __u32);
	__type(value, struct bucket);
} buckets SEC(".maps");

/* With the lock held. */
static __always_inline void fill(struct bucket *bucket, __u64 rate, __u64 burst, __u64 now)
{
	__u64 full = burst * NSEC_PER_SEC, elapsed;

	/* Another CPU may have read the clock later and come first. */
	if (now <= bucket->filled_ns)
		return;
	elapsed = now - bucket->filled_ns;
	bucket->filled_ns = now;
	if (elapsed >= (full - bucket->tokens) / rate)
		bucket->tokens = full;
	else
		bucket->tokens += elapsed * rate;
}

static __always_inline int police(struct __sk_buff *skb, __u32 direction, int dropped)
{
	struct limit *limit = bpf_map_lookup_elem(&limits, &direction);
	struct bucket *bucket = bpf_map_lookup_elem(&buckets, &direction);
	__u64 segments = skb->gso_segs ?: 1, now = bpf_ktime_get_ns(), rate, burst;
	__u64 length = skb->len + (segments - 1) * SEGMENT_HEADERS;
	int verdict = dropped;

	if (!limit || !bucket || !limit->rate)
		return PASS;
	rate = limit->rate;
	burst = limit->burst;
	bpf_spin_lock(&bucket->lock);
	fill(bucket, rate, burst, now);
	if (bucket->tokens >= length * NSEC_PER_SEC) {
		bucket->tokens -= length * NSEC_PER_SEC;
		bucket->passed += length;
		verdict = PASS;
	} else {
		bucket->dropped += segments;
	}
	bpf_spin_unlock(&bucket->lock);
	return verdict;
}

SEC("cgroup_skb/egress")
int bucket_egress(struct __sk_buff *skb)
{
	return police(skb, EGRESS, DROP_QUIETLY);
}

SEC("cgroup_skb/ingress")
int bucket_ingress(struct __sk_buff *skb)
{
	return police(skb, INGRESS, DROP);
}

char _license[] SEC("license") = "Dual BSD/GPL";
