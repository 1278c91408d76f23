/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What a packet is charged for: its bytes at layer 3 as they leave the machine. */
#ifndef BPFRL_PACKET_H
#define BPFRL_PACKET_H

#include "bpf_helpers.h"
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

/* A packet up to this length, byte, is never the bulk of a transfer. */
#define SHORT_PACKET 128

/* A packet that is longer than this and no GSO packet leaves in fragments: 1500
 * byte each, in which IPv4 has 1480 and IPv6, with its fragment header, 1448
 * byte of payload. With a larger MTU this charges up to 3 % too much. */
#define UNFRAGMENTED 1500
#define FRAGMENT_IPV4 1480
#define FRAGMENT_IPV6 1448
#define FRAGMENT_HEADER_IPV6 8

/* More is charged for no packet, so that a product stays in 64 bits (charge()): 512 KB in
 * segments of a few bytes would be 5 MB. */
#define LONGEST_PACKET ((1ULL << 21) - 1)

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
	packet.bytes = min(packet.bytes, LONGEST_PACKET);
	return packet;
}

#endif /* BPFRL_PACKET_H */
