/* A pass through a model: kernels one after the other, each by all threads together. */
#include "common.h"
#ifdef _OPENMP
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#endif

struct task {
    void (*run)(const void *args, i64 rows, int thread, int n_threads);
    const void *args;
};

#ifdef _OPENMP
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE()
#endif

/* Until all threads are here, for whom the counter has gone on to n_arrivals. One that waits for long gives its core to
 * whoever wants it, on a small machine the event loop and clients: OpenMP's own barrier keeps it for milliseconds.
 */
static void barrier(atomic_llong *arrived, i64 n_arrivals, int patience) {
    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < n_arrivals) {
        if (patience-- > 0) PAUSE();
        else patience = 0, sched_yield();
    }
}
#endif

i64 is_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* The tasks' scratch must do for n_threads; without OpenMP one thread does all. */
void run(const struct task *tasks, i64 n, i64 rows, int n_threads) {
#ifdef _OPENMP
    atomic_llong arrived = 0;
    int patience = n_threads > omp_get_num_procs() ? 0 : 2000;
#pragma omp parallel num_threads(n_threads)
    for (i64 i = 0; i < n; i++) {
        tasks[i].run(tasks[i].args, rows, omp_get_thread_num(), omp_get_num_threads());
        barrier(&arrived, (i + 1) * omp_get_num_threads(), patience);
    }
#else
    (void)n_threads;
    for (i64 i = 0; i < n; i++) tasks[i].run(tasks[i].args, rows, 0, 1);
#endif
}
