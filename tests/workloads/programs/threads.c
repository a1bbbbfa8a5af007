/* 500 threads that count, each in its own memory and its own thread-local storage, and compare the two all the time.
 *   threads BEATS_FILE     until SIGTERM; the file's last line says how far, the longest gap in ms, and PASS or FAIL */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { THREADS = 500, WORDS = 2048 };
static atomic_int stopped, failed;
static atomic_long counts[THREADS];
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
    pthread_t threads[THREADS];
    sigset_t term;
    double last, longest = 0;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    signal(SIGTERM, stop);
    pthread_sigmask(SIG_BLOCK, &term, NULL);
    for (long i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, count, (void *)i)) { note(argv[argc - 1], 0, 0, "FAIL"); return 1; }
    pthread_sigmask(SIG_UNBLOCK, &term, NULL);
    last = now_ms();
    for (int beats = 0; !stopped; beats++) {
        usleep(1000);
        double now = now_ms();
        if (now - last > longest) longest = now - last;
        last = now;
        if (beats % 50 == 0) note(argv[argc - 1], beats, longest, failed ? "FAIL" : "RUNS");
    }
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    note(argv[argc - 1], 0, longest, failed ? "FAIL" : "PASS");
    return failed;
}
