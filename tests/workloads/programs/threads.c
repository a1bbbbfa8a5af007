/* Threads that count, each in its own memory and its own thread-local storage, and compare the two all the time.
 *   threads BEATS_FILE [COUNT]     500 of them; until SIGTERM; the file's last line says how far, the longest gap in ms, and PASS or FAIL */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1000, WORDS = 2048 };
static int threads = 500;
static atomic_int stopped, failed;
static atomic_long counts[MOST];
static __thread long mine;

static void stop(int number) { (void)number; stopped = 1; }

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

/* Not kept open: preflight compares the sizes of open files, and both nodes see this one grow. */
static void note(const char *path, int beats, double longest, const char *word) {
    FILE *file = fopen(path, "a");
    fprintf(file, "%d %.1f %s\n", beats, longest, word);
    fclose(file);
}

static void *count(void *argument) {
    long number = (long)argument, *words = malloc(WORDS * sizeof *words);
    for (int i = 0; i < WORDS; i++) words[i] = number;
    while (!stopped) {
        mine++;
        for (int i = 0; i < WORDS; i++)
            if (words[i] != number + mine - 1) failed = 1;
        for (int i = 0; i < WORDS; i++) words[i]++;
        if (++counts[number] != mine) failed = 1;
        usleep(20000);
    }
    return words;
}

int main(int argc, char **argv) {
    pthread_t started[MOST];
    sigset_t term;
    double last, longest = 0;
    if (argc > 2) threads = atoi(argv[2]);
    if (argc < 2 || threads < 1 || threads > MOST) return 2;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    signal(SIGTERM, stop);
    pthread_sigmask(SIG_BLOCK, &term, NULL);
    for (long i = 0; i < threads; i++)
        if (pthread_create(&started[i], NULL, count, (void *)i)) { note(argv[1], 0, 0, "FAIL"); return 1; }
    pthread_sigmask(SIG_UNBLOCK, &term, NULL);
    last = now_ms();
    for (int beats = 0; !stopped; beats++) {
        usleep(1000);
        double now = now_ms();
        if (now - last > longest) longest = now - last;
        last = now;
        if (beats % 50 == 0) note(argv[1], beats, longest, failed ? "FAIL" : "RUNS");
    }
    for (int i = 0; i < threads; i++) pthread_join(started[i], NULL);
    note(argv[1], 0, longest, failed ? "FAIL" : "PASS");
    return failed;
}
