/*
 * Preloaded into criu: has it end by SIGKILL at its n-th call of ptrace(2) or wait4(2).
 *
 * KILLED_AT      n, counted from 0 by these two together; unset: never
 * KILLED_COUNT   a file that receives the number of calls at the end
 * KILLED_RACE    microseconds: not criu itself but another process kills it, so much after call n began
 * KILLED_LATE    microseconds that criu waits before it kills itself
 * KILLED_STOPS   set: criu stops before it begins
 * KILLED_TRACKS  set: criu shall think that the kernel tracks written memory, so that it does not refuse a pre-dump
 *
 * A criu that needs it (patchelf --add-needed), as phauld starts it, has no such environment. What lies beside this
 * library counts then, and is read at the start: "at" holds n; if there is "count", each criu makes a "calls-PID" with
 * a line for each call. "killed" is made before criu ends so.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long at = -1, race = -1, late, calls;
static char counts[512], killed[512]; /* names of files; empty: none */
static pid_t self;
static volatile int *shot; /* shared with the killer */

static long number(const char *name, long otherwise)
{
	const char *text = getenv(name);
	return text ? atol(text) : otherwise;
}

static void wait_microseconds(long microseconds)
{
	struct timespec start, now;
	clock_gettime(CLOCK_MONOTONIC, &start);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while ((now.tv_sec - start.tv_sec) * 1000000 + (now.tv_nsec - start.tv_nsec) / 1000 < microseconds);
}

static void start_killer(void)
{
	int ready[2];
	char byte;
	shot = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (pipe(ready) || fork() == 0) {
		if (fork())
			_exit(0);
		struct sched_param first = { .sched_priority = 50 };
		cpu_set_t last;
		CPU_ZERO(&last);
		CPU_SET(number("KILLED_CPU", sysconf(_SC_NPROCESSORS_ONLN) - 1), &last);
		sched_setaffinity(0, sizeof(last), &last);
		sched_setscheduler(0, SCHED_FIFO, &first);
		if (write(ready[1], "x", 1) != 1)
			_exit(1);
		for (int left = 400000000; left && !*shot && !kill(self, 0); left--)
			for (int i = 0; i < 20 && !*shot; i++)
				__builtin_ia32_pause();
		if (*shot) {
			wait_microseconds(race);
			kill(self, SIGKILL);
		}
		_exit(0);
	}
	if (read(ready[0], &byte, 1) != 1)
		_exit(1);
	close(ready[0]);
	close(ready[1]);
	wait(NULL);
}

static void look_beside(void)
{
	Dl_info own;
	char name[512], text[32] = "";
	if (!dladdr((void *)look_beside, &own) || !strrchr(own.dli_fname, '/'))
		return;
	int length = strrchr(own.dli_fname, '/') - own.dli_fname;
	snprintf(name, sizeof(name), "%.*s/at", length, own.dli_fname);
	int file = open(name, O_RDONLY | O_CLOEXEC);
	if (file >= 0) {
		if (read(file, text, sizeof(text) - 1) > 0) {
			at = atol(text);
			snprintf(killed, sizeof(killed), "%.*s/killed", length, own.dli_fname);
		}
		close(file);
	}
	snprintf(name, sizeof(name), "%.*s/count", length, own.dli_fname);
	if (!access(name, F_OK))
		snprintf(counts, sizeof(counts), "%.*s/calls-%d", length, own.dli_fname, getpid());
}

__attribute__((constructor)) static void begin(void)
{
	char path[256] = "";
	if (readlink("/proc/self/exe", path, sizeof(path) - 1) < 0 || !strstr(path, "/criu"))
		return; /* what starts criu */
	self = getpid();
	at = number("KILLED_AT", -1);
	race = number("KILLED_RACE", -1);
	late = number("KILLED_LATE", 0);
	if (!getenv("LD_PRELOAD"))
		look_beside();
	if (getenv("KILLED_STOPS"))
		raise(SIGSTOP);
}

static void call(void)
{
	if (getpid() != self)
		return;
	if (race >= 0 && !shot)
		start_killer();
	if (calls++ != at)
		return;
	if (race >= 0) {
		*shot = 1;
		return;
	}
	if (late)
		usleep(late);
	if (*killed)
		close(open(killed, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
	syscall(SYS_kill, self, SIGKILL);
}

static void note(int is_wait, long detail)
{
	static int log = -2;
	if (getpid() != self)
		return;
	if (log == -2) {
		const char *path = *counts ? counts : getenv("KILLED_COUNT");
		log = path ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
		if (log >= 0)
			log = fcntl(log, F_DUPFD_CLOEXEC, 900);
	}
	if (log >= 0)
		dprintf(log, "%ld %c %ld\n", calls, is_wait ? 'w' : 'p', detail);
}

long ptrace(enum __ptrace_request request, ...)
{
	static long (*real)(enum __ptrace_request, pid_t, void *, void *);
	va_list rest;
	va_start(rest, request);
	pid_t pid = va_arg(rest, pid_t);
	void *address = va_arg(rest, void *), *data = va_arg(rest, void *);
	va_end(rest);
	if (!real)
		real = dlsym(RTLD_NEXT, "ptrace");
	note(0, request);
	call();
	return real(request, pid, address, data);
}

ssize_t read(int fd, void *buffer, size_t size)
{
	static ssize_t (*real)(int, void *, size_t);
	static const char pagemap[] = "/pagemap";
	if (!real)
		real = dlsym(RTLD_NEXT, "read");
	ssize_t got = real(fd, buffer, size);
	if (got == 8 && getenv("KILLED_TRACKS")) { /* criu/kerndat.c, kerndat_get_dirty_track */
		char path[64], name[256];
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		ssize_t length = readlink(path, name, sizeof(name));
		size_t end = sizeof(pagemap) - 1;
		if (length >= (ssize_t)end && !memcmp(name + length - end, pagemap, end))
			*(uint64_t *)buffer |= 1ull << 55;
	}
	return got;
}

pid_t wait4(pid_t pid, int *status, int options, struct rusage *usage)
{
	static pid_t (*real)(pid_t, int *, int, struct rusage *);
	if (!real)
		real = dlsym(RTLD_NEXT, "wait4");
	note(1, pid);
	call();
	return real(pid, status, options, usage);
}
