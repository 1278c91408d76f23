/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What each socket carries while its cgroup has a limiter: the limiter's own
 * map, which the program that gives sockets back opens too. */
#ifndef BPFRL_SOCKETS_H
#define BPFRL_SOCKETS_H

struct bpfrl_socket {
	__u64 tat;		/* not paced (UDP, raw): the socket's own clock */
	__u32 cwnd;		/* TCP: the window's limit that was set, segments; 0: none */
	__u32 own_pacing;	/* TCP: the application's SO_MAX_PACING_RATE, byte/s; 0: not paced yet */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct bpfrl_socket);
} sockets SEC(".maps");

#endif /* BPFRL_SOCKETS_H */
