// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A middlebox in front of a cgroup: TCP packets with an option of the kind that
 * RFC 6994 shares out do not arrive.
 */
#include "bpf_helpers.h"
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/tcp.h>

#define END 0
#define NOTHING 1
#define KIND 254
#define MOST_OPTIONS 40

#define PASS 1
#define DROP 0

SEC("cgroup_skb/ingress")
int middlebox(struct __sk_buff *skb)
{
	__u8 version, protocol, kind, length, offset;
	__u32 start, place, end;

	if (bpf_skb_load_bytes(skb, 0, &version, 1))
		return PASS;
	start = version >> 4 == 4 ? 20 : 40;
	if (bpf_skb_load_bytes(skb, start == 20 ? 9 : 6, &protocol, 1) || protocol != IPPROTO_TCP)
		return PASS;
	if (bpf_skb_load_bytes(skb, start + 12, &offset, 1))
		return PASS;
	end = start + (offset >> 4) * 4;
	place = start + sizeof(struct tcphdr);
	for (int i = 0; i < MOST_OPTIONS && place < end; i++) {
		if (bpf_skb_load_bytes(skb, place, &kind, 1) || kind == END)
			return PASS;
		if (kind == KIND)
			return DROP;
		if (kind == NOTHING) {
			place++;
			continue;
		}
		if (bpf_skb_load_bytes(skb, place + 1, &length, 1) || length < 2)
			return PASS;
		place += length;
	}
	return PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
