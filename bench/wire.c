// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A long wire between two network namespaces, for a kernel without netem.
 *
 *     wire NEAR_NS NEAR_DEVICE FAR_NS FAR_DEVICE ADDRESS=RTT...
 *
 * Makes a TUN device in each namespace and carries packets between them. A
 * packet to or from one of the ADDRESSes, which are the far end's (IPv4 or
 * IPv6), is on its way for half of that RTT, microseconds; any other goes
 * straight through. All packets of one address and direction stay in order.
 *
 * GSO packets cross whole and with their checksums yet to be made, as on a
 * veth: each is read with its virtio header and written with it again.
 *
 * Says "ready" on standard output when both devices are there, and what it
 * carried on standard error when SIGTERM ends it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

/* Newer than the headers of some distributions. */
#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif

#define NSEC_PER_SEC 1000000000ULL
#define NSEC_PER_USEC 1000ULL

/* While there is traffic the devices are looked at this often, and not for
 * each packet: it bounds both the wakeups and, halved, the error in time. */
#define QUANTUM_NS (50 * NSEC_PER_USEC)

/* Packets that are read from one device before the other has its turn. */
#define BATCH 256

/* What one address can have under way in one direction, byte; a power of two.
 * 1 Gbit/s of 1 s RTT. Memory is only used as packets fill it. */
#define QUEUE_BYTES (64ULL << 20)

/* An IP packet is no longer than this, whether GSO makes many of it or not. */
#define PACKET_MAX (sizeof(struct virtio_net_hdr) + 65535 + 40)

enum direction { TO_FAR, TO_NEAR, DIRECTIONS };

struct entry {
	uint64_t due;
	uint32_t length;
	uint32_t reserved;
	uint8_t packet[]; /* with its struct virtio_net_hdr */
};

/* First in, first out; head and tail only grow. */
struct queue {
	uint8_t *bytes;
	uint64_t head;
	uint64_t tail;
};

struct path {
	int family;
	uint8_t address[sizeof(struct in6_addr)];
	uint64_t delay_ns; /* one way */
	struct queue queues[DIRECTIONS];
};

struct counts {
	uint64_t packets;
	uint64_t bytes;
	uint64_t full;	  /* dropped: no room in the queue */
	uint64_t refused; /* dropped: the device did not take it */
	uint64_t peak;	  /* the longest that one queue was, byte */
	uint64_t late_ns; /* the longest that a packet left after its time */
};

static const char *const direction_names[DIRECTIONS] = { "to far", "to near" };

static struct path *paths;
static int path_count;
static int devices[DIRECTIONS]; /* that packets of a direction come from */
static struct counts counts[DIRECTIONS];
static volatile sig_atomic_t ended;

static void end(int signal)
{
	(void)signal;
	ended = 1;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * NSEC_PER_SEC + now.tv_nsec;
}

/* Maps the same memory twice in a row, so that nothing wraps within an entry. */
static uint8_t *map_queue(void)
{
	int memory = memfd_create("queue", MFD_CLOEXEC);
	uint8_t *bytes;

	if (memory < 0 || ftruncate(memory, QUEUE_BYTES))
		err(1, "a queue's memory");
	bytes = mmap(NULL, 2 * QUEUE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (bytes == MAP_FAILED)
		err(1, "a queue's addresses");
	for (int half = 0; half < 2; half++)
		if (mmap(bytes + half * QUEUE_BYTES, QUEUE_BYTES, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_FIXED, memory, 0) == MAP_FAILED)
			err(1, "a queue's mapping");
	close(memory);
	return bytes;
}

static struct entry *entry_at(const struct queue *queue, uint64_t position)
{
	return (struct entry *)(queue->bytes + (position & (QUEUE_BYTES - 1)));
}

/* Entries stay aligned. */
static uint64_t entry_bytes(uint32_t length)
{
	return (sizeof(struct entry) + length + 7) & ~7ULL;
}

static void put(enum direction direction, struct queue *queue, uint64_t due,
		const uint8_t *packet, uint32_t length)
{
	struct counts *count = &counts[direction];
	struct entry *entry;

	if (queue->tail - queue->head + entry_bytes(length) > QUEUE_BYTES) {
		count->full++;
		return;
	}
	/* An empty queue starts over in memory that is warm. */
	if (queue->head == queue->tail)
		queue->head = queue->tail = 0;
	entry = entry_at(queue, queue->tail);
	entry->due = due;
	entry->length = length;
	memcpy(entry->packet, packet, length);
	queue->tail += entry_bytes(length);
	if (queue->tail - queue->head > count->peak)
		count->peak = queue->tail - queue->head;
}

static void deliver(enum direction direction, const uint8_t *packet, uint32_t length)
{
	if (write(devices[!direction], packet, length) != (ssize_t)length) {
		/* To a device that is not up yet there is nothing to lose. */
		if (errno != EIO)
			counts[direction].refused++;
		return;
	}
	counts[direction].packets++;
	counts[direction].bytes += length - sizeof(struct virtio_net_hdr);
}

/* The path of a packet by the address of its far end; NULL: none is listed. */
static struct path *path_of(enum direction direction, const uint8_t *packet, uint32_t length)
{
	const uint8_t *ip = packet + sizeof(struct virtio_net_hdr), *address;
	uint32_t ip_length = length - sizeof(struct virtio_net_hdr);
	size_t size;
	int family;

	if (ip_length >= 40 && ip[0] >> 4 == 6) {
		family = AF_INET6;
		size = 16;
		address = ip + (direction == TO_FAR ? 24 : 8);
	} else if (ip_length >= 20 && ip[0] >> 4 == 4) {
		family = AF_INET;
		size = 4;
		address = ip + (direction == TO_FAR ? 16 : 12);
	} else {
		return NULL;
	}
	for (struct path *path = paths; path < paths + path_count; path++)
		if (path->family == family && !memcmp(path->address, address, size))
			return path;
	return NULL;
}

/* Reads what a device has; returns the number of packets. */
static int take(enum direction direction, uint64_t arrived)
{
	static uint8_t packet[PACKET_MAX];
	int taken;

	for (taken = 0; taken < BATCH; taken++) {
		ssize_t length = read(devices[direction], packet, sizeof(packet));
		struct path *path;

		if (length < 0 && errno != EAGAIN && errno != EINTR)
			err(1, "read");
		if (length < (ssize_t)sizeof(struct virtio_net_hdr))
			break;
		path = path_of(direction, packet, length);
		if (path && path->delay_ns)
			put(direction, &path->queues[direction], arrived + path->delay_ns, packet,
			    length);
		else
			deliver(direction, packet, length);
	}
	return taken;
}

/*
 * Delivers what is due; returns the number of packets, and when the next one is.
 * What is due before half a quantum has passed leaves now: the next look may be
 * a whole quantum away, so that the error has no bias.
 */
static int release(uint64_t now, uint64_t *next)
{
	int released = 0;

	*next = UINT64_MAX;
	for (struct path *path = paths; path < paths + path_count; path++) {
		for (enum direction direction = 0; direction < DIRECTIONS; direction++) {
			struct queue *queue = &path->queues[direction];

			while (queue->head != queue->tail) {
				struct entry *entry = entry_at(queue, queue->head);

				if (entry->due > now + QUANTUM_NS / 2) {
					if (entry->due < *next)
						*next = entry->due;
					break;
				}
				if (now > entry->due + counts[direction].late_ns)
					counts[direction].late_ns = now - entry->due;
				deliver(direction, entry->packet, entry->length);
				queue->head += entry_bytes(entry->length);
				released++;
			}
		}
	}
	return released;
}

static void carry(const sigset_t *unblocked)
{
	struct pollfd polled[DIRECTIONS] = {
		{ .fd = devices[TO_FAR], .events = POLLIN },
		{ .fd = devices[TO_NEAR], .events = POLLIN },
	};
	struct timespec pause = { .tv_nsec = QUANTUM_NS };
	uint64_t looked = now_ns();

	while (!ended) {
		/* What is there came at some time since the last look. */
		uint64_t now = now_ns(), arrived = looked + (now - looked) / 2, next;
		int taken[DIRECTIONS], released;

		looked = now;
		for (enum direction direction = 0; direction < DIRECTIONS; direction++)
			taken[direction] = take(direction, arrived);
		now = now_ns();
		released = release(now, &next);
		if (taken[TO_FAR] == BATCH || taken[TO_NEAR] == BATCH)
			continue;
		if (taken[TO_FAR] || taken[TO_NEAR] || released) {
			/* Traffic: let some of it gather. SIGTERM is only let in here. */
			ppoll(NULL, 0, &pause, unblocked);
			continue;
		}
		if (next == UINT64_MAX) {
			ppoll(polled, DIRECTIONS, NULL, unblocked);
		} else {
			struct timespec until = {
				.tv_sec = (next - now) / NSEC_PER_SEC,
				.tv_nsec = (next - now) % NSEC_PER_SEC,
			};

			ppoll(polled, DIRECTIONS, &until, unblocked);
		}
		/* Nothing came before this wakeup. */
		looked = now_ns();
	}
}

static int open_device(const char *namespace, const char *name)
{
	const unsigned int offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
	struct ifreq request = { .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR };
	int header = sizeof(struct virtio_net_hdr), here, there, device;
	char file[256];

	snprintf(file, sizeof(file), "/run/netns/%s", namespace);
	here = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	there = open(file, O_RDONLY | O_CLOEXEC);
	if (here < 0 || there < 0 || setns(there, CLONE_NEWNET))
		err(1, "%s", file);
	device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (device < 0)
		err(1, "/dev/net/tun");
	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", name);
	if (ioctl(device, TUNSETIFF, &request) || ioctl(device, TUNSETVNETHDRSZ, &header))
		err(1, "%s in %s", name, namespace);
	/* Only kernels from 6.2 on can hand GSO packets of UDP over whole. */
	if (ioctl(device, TUNSETOFFLOAD, offloads | TUN_F_USO4 | TUN_F_USO6) &&
	    ioctl(device, TUNSETOFFLOAD, offloads))
		err(1, "offloads of %s in %s", name, namespace);
	if (setns(here, CLONE_NEWNET))
		err(1, "setns");
	close(here);
	close(there);
	return device;
}

static void add_path(char *argument)
{
	struct path *path = &paths[path_count++];
	char *rtt = strchr(argument, '='), *rest;

	if (!rtt)
		errx(2, "%s: not ADDRESS=MICROSECONDS", argument);
	*rtt++ = '\0';
	path->family = strchr(argument, ':') ? AF_INET6 : AF_INET;
	if (inet_pton(path->family, argument, path->address) != 1)
		errx(2, "%s: not an address", argument);
	errno = 0;
	path->delay_ns = strtoul(rtt, &rest, 10) * NSEC_PER_USEC / 2;
	if (errno || rest == rtt || *rest)
		errx(2, "%s: not microseconds", rtt);
	for (enum direction direction = 0; direction < DIRECTIONS; direction++)
		path->queues[direction].bytes = map_queue();
}

int main(int argc, char *argv[])
{
	const struct sched_param lowest = { .sched_priority = 1 };
	struct sigaction action = { .sa_handler = end };
	sigset_t blocked, unblocked;

	if (argc < 5)
		errx(2, "usage: wire NEAR_NS NEAR_DEVICE FAR_NS FAR_DEVICE ADDRESS=RTT...");
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGTERM);
	sigprocmask(SIG_BLOCK, &blocked, &unblocked);
	sigaction(SIGTERM, &action, NULL);
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	/* Whoever competes for the CPU must not lengthen the wire. It sleeps between
	 * two looks, so it cannot starve anyone; without the right to, do without. */
	prctl(PR_SET_TIMERSLACK, 1UL);
	sched_setscheduler(0, SCHED_FIFO, &lowest);

	paths = calloc(argc, sizeof(*paths));
	if (!paths)
		err(1, "memory");
	for (int index = 5; index < argc; index++)
		add_path(argv[index]);
	devices[TO_FAR] = open_device(argv[1], argv[2]);
	devices[TO_NEAR] = open_device(argv[3], argv[4]);
	puts("ready");
	fflush(stdout);

	carry(&unblocked);
	for (enum direction direction = 0; direction < DIRECTIONS; direction++) {
		const struct counts *count = &counts[direction];
		uint64_t late_us = count->late_ns / NSEC_PER_USEC;

		fprintf(stderr,
			"%s: %lu packets, %lu bytes; dropped %lu at a full queue, %lu at the device; "
			"at most %lu bytes queued, %lu us late\n",
			direction_names[direction], count->packets, count->bytes, count->full,
			count->refused, count->peak, late_us);
	}
	return 0;
}
