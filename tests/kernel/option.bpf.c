// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Somebody else's sockops program, which writes a TCP option into every packet of
 * a connection: of the same experimental kind as bpfrl's, under another identifier.
 */
#include "bpf_helpers.h"

#define KIND 254
#define ID 0x1234

struct option {
	__u8 kind;
	__u8 length;
	__be16 id;
	__be32 content;
};

SEC("sockops")
int option(struct bpf_sock_ops *ops)
{
	struct option option = {
		.kind = KIND,
		.length = sizeof(option),
		.id = bpf_htons(ID),
		.content = bpf_htonl(0x01020304),
	};

	switch (ops->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags |
						       BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		bpf_reserve_hdr_opt(ops, sizeof(option), 0);
		break;
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		bpf_store_hdr_opt(ops, &option, sizeof(option), 0);
		break;
	}
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
