// SPDX-License-Identifier: Apache-2.0
/*
 * A wall clock that can be set for some processes alone: preloaded, it shifts what the C library says of CLOCK_REALTIME
 * by as many seconds as stand in a file, which may change at any moment. What waits until a time of day waits until the
 * kernel's, so such times are shifted back on their way down. Steady clocks stay as they are.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* No steady clock gets there: that is a machine which has run for thirty years. */
#define WALL_SECONDS 1000000000

static int64_t none;
static volatile int64_t *ahead = &none;

__attribute__((constructor)) static void map_state(void)
{
	const char *path = getenv("CLOCK_STATE");
	int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *state = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(*ahead), PROT_READ, MAP_SHARED, file, 0);

	if (state != MAP_FAILED)
		ahead = state;
	if (file >= 0)
		close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	static int (*real)(clockid_t, struct timespec *);
	int result;

	if (!real)
		real = dlsym(RTLD_NEXT, "clock_gettime");
	result = real(clock, now);
	if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		now->tv_sec += *ahead;
	return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	struct timespec time;

	(void)zone;
	clock_gettime(CLOCK_REALTIME, &time);
	now->tv_sec = time.tv_sec;
	now->tv_usec = time.tv_nsec / 1000;
	return 0;
}

time_t time(time_t *now)
{
	struct timespec time;

	clock_gettime(CLOCK_REALTIME, &time);
	if (now)
		*now = time.tv_sec;
	return time.tv_sec;
}

static struct timespec shifted(const struct timespec *until)
{
	struct timespec time = *until;

	if (time.tv_sec > WALL_SECONDS)
		time.tv_sec -= *ahead;
	return time;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
			   const struct timespec *restrict until)
{
	static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
	struct timespec time = shifted(until);

	if (!real)
		real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
	return real(condition, mutex, &time);
}

long syscall(long number, ...)
{
	static long (*real)(long, ...);
	long values[6];
	struct timespec time;
	va_list list;

	if (!real)
		real = dlsym(RTLD_NEXT, "syscall");
	va_start(list, number);
	for (int i = 0; i < 6; i++)
		values[i] = va_arg(list, long);
	va_end(list);
	if (number == SYS_futex && values[1] & FUTEX_CLOCK_REALTIME && values[3]) {
		time = shifted((const struct timespec *)values[3]);
		values[3] = (long)&time;
	}
	return real(number, values[0], values[1], values[2], values[3], values[4], values[5]);
}
