/*
 * registers FILE PROCESSES THREADS SHIFT: beats in slots of FILE, each task in a way of its own.
 *
 * The sum of a task's number, its process's and SHIFT says how, modulo 4: 0 computes with all registers and checks the
 * sum, 1 sleeps, 2 reads from a pipe, 3 waits in a futex. The last two beat only when they are told to, as does a handler
 * on an alternate stack.
 */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct slot {
	_Atomic uint64_t beats, errors, asked, tid, handled, pad[3];
};

static struct slot *slots;
static int processes, threads, process, shift;

static void handle(int number)
{
	(void)number;
	atomic_fetch_add(&slots[process * threads].handled, 1);
}

/* Every general register, and vector registers, through many rounds: a wrong one makes a wrong sum. */
static void compute(struct slot *slot)
{
	volatile uint64_t seed = 0x9e3779b97f4a7c15u ^ slot->tid;
	uint64_t expected = 0;
	for (int first = 1;; first = 0) {
		uint64_t a = seed, b = a * 3, c = b * 5, d = c * 7, e = d * 11, f = e * 13, g = f * 17, h = g * 19, i = h * 23;
		__m128i x = _mm_set_epi64x(a, b), y = _mm_set_epi64x(c, d), z = _mm_set_epi64x(e, f);
		for (int n = 0; n < 20000; n++) {
			a += b ^ (a << 7), b += c ^ (b >> 3), c += d ^ (c << 5), d += e ^ (d >> 9), e += f ^ (e << 2);
			f += g ^ (f >> 5), g += h ^ (g << 1), h += i ^ (h >> 7), i += a ^ (i << 3);
			x = _mm_add_epi64(_mm_xor_si128(x, y), z), y = _mm_add_epi64(y, _mm_slli_epi64(z, 3));
			z = _mm_xor_si128(z, _mm_srli_epi64(x, 5));
		}
		x = _mm_add_epi64(_mm_add_epi64(x, y), z);
		uint64_t sum = a ^ b ^ c ^ d ^ e ^ f ^ g ^ h ^ i ^ _mm_cvtsi128_si64(x) ^ _mm_cvtsi128_si64(_mm_srli_si128(x, 8));
		if (first)
			expected = sum;
		if (sum != expected)
			slot->errors++;
		slot->beats++;
	}
}

static void nap(struct slot *slot)
{
	for (;;) {
		struct timespec pause = { 0, 3000000 };
		if (nanosleep(&pause, NULL) && errno != EINTR)
			slot->errors++;
		slot->beats++;
	}
}

static void listen(struct slot *slot, int input)
{
	char byte;
	for (;;) {
		ssize_t got = read(input, &byte, 1);
		if (got == 1)
			slot->beats++;
		else if (got == 0 || errno != EINTR)
			slot->errors++;
	}
}

static void wait_for_word(struct slot *slot)
{
	int *word = (int *)&slot->asked;
	for (int seen = 0;;) {
		if (syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0) && errno != EAGAIN && errno != EINTR)
			slot->errors++;
		int now = *(volatile int *)word;
		if (now != seen)
			slot->beats++;
		seen = now;
	}
}

static void *task(void *argument)
{
	int number = (int)(intptr_t)argument, kind = (number + process + shift) % 4, input = -1;
	struct slot *slot = &slots[process * threads + number];
	sigset_t blocked;
	sigemptyset(&blocked);
	sigaddset(&blocked, number % 2 ? SIGWINCH : SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	if (kind == 2) {
		char name[64];
		snprintf(name, sizeof(name), "pipe-%d", process * threads + number);
		input = open(name, O_RDWR);
		if (input < 0)
			_exit(3);
	}
	slot->tid = syscall(SYS_gettid);
	if (kind == 0)
		compute(slot);
	else if (kind == 1)
		nap(slot);
	else if (kind == 2)
		listen(slot, input);
	else
		wait_for_word(slot);
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	processes = atoi(argv[2]), threads = atoi(argv[3]), shift = atoi(argv[4]);
	int file = open(argv[1], O_RDWR);
	slots = mmap(NULL, sizeof(*slots) * processes * threads, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (file < 0 || slots == MAP_FAILED)
		return 3;
	close(file);
	for (int n = 1; n < processes; n++)
		if (fork() == 0) {
			process = n;
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			break;
		}
	stack_t stack = { .ss_sp = malloc(65536), .ss_size = 65536 };
	sigaltstack(&stack, NULL);
	struct sigaction action = { .sa_handler = handle, .sa_flags = SA_ONSTACK | SA_RESTART };
	sigaction(SIGUSR1, &action, NULL);
	for (int n = 1; n < threads; n++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, task, (void *)(intptr_t)n))
			return 4;
	}
	task(0);
	return 0;
}
