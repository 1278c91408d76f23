// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Programs that only let everything pass. What the kernel says they cost is
 * what its measuring costs: the floor under the limiter's own figures.
 */
#define SEC(name) __attribute__((section(name), used))

SEC("cgroup_skb/egress")
int empty_egress(void *context)
{
	return 1;
}

SEC("cgroup_skb/ingress")
int empty_ingress(void *context)
{
	return 1;
}

SEC("sockops")
int empty_sockops(void *context)
{
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
