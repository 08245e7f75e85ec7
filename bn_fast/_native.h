/* What Cython cannot say: the runtime functions of OpenMP where there may be none, how threads start
 * and wait, the instruction sets and caches of this CPU, the name of the compiler, prefetches and stores
 * past the caches. */
#ifndef BN_FAST_NATIVE_H
#define BN_FAST_NATIVE_H

#include <Python.h>
#include <string.h>

/* A build without OpenMP runs on one thread; the stubs keep the sources free of #ifdef. */
#ifdef _OPENMP
#include <omp.h>
#define BN_OPENMP 1
#else
#define BN_OPENMP 0
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_num_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_in_parallel(void) { return 0; }
#endif

/* Nanoseconds of a clock that only goes forward; 0 where there is none. */
#if !defined(_WIN32)
#include <time.h>
static inline long long bn_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}
#else
static inline long long bn_now(void) { return 0; }
#endif

/* Where another process has the core of one of our threads, the others wait for it for as long as the
 * system lets that process run, some milliseconds, at every barrier. So a wait that is long, and long
 * beside the work before it (a share of twice the size is no such thing), keeps the calls that follow
 * on one thread, for 20 ms at first and up to twenty times that while it happens again; but not the
 * first in a fifth of a second, which comes on a quiet machine too. Two threads beside a busy process,
 * float32 (16384, 64), forward and backward: 22 ms a turn without this, one thread's 5.5 with it. The
 * bits do not depend on how many threads there are. */
#define BN_LONG_WAIT 1000000LL
#define BN_FORGIVEN 200000000LL
#define BN_FIRST_PAUSE 20000000LL
#define BN_LAST_PAUSE 400000000LL
#if defined(__GNUC__) || defined(__clang__)
#define BN_LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define BN_STORE(x, value) __atomic_store_n(&(x), value, __ATOMIC_RELAXED)
#else
#define BN_LOAD(x) (x)
#define BN_STORE(x, value) ((x) = (value))
#endif
static long long bn_alone_until = 0, bn_pause_length = 0, bn_waited_at = 0;
static int bn_patient = 0; /* for tests of threads: no wait counts */

/* How many of n threads may be counted on. */
static inline int bn_coming(int n) {
    return n > 1 && !bn_patient && BN_LOAD(bn_alone_until) && bn_now() < BN_LOAD(bn_alone_until) ? 1 : n;
}

static inline void bn_note_wait(long long worked, long long waited) {
    long long now, last, pause, before;
    if (waited < BN_LONG_WAIT || waited < 2 * worked) return;
    now = bn_now(), last = BN_LOAD(bn_alone_until), pause = BN_LOAD(bn_pause_length);
    if (now < last) return; /* another thread of the call has said so */
    before = BN_LOAD(bn_waited_at);
    BN_STORE(bn_waited_at, now);
    if (now - last > 4 * pause) {
        if (now - before > BN_FORGIVEN || now - before < waited) return;
        pause = BN_FIRST_PAUSE;
    } else {
        pause = 2 * pause;
    }
    if (pause > BN_LAST_PAUSE) pause = BN_LAST_PAUSE;
    BN_STORE(bn_pause_length, pause);
    BN_STORE(bn_alone_until, now + pause);
}

/* The n threads of our own parallel region wait for one another; since: when this one began to work.
 * One thread waits for nobody: it may be in somebody else's region. */
static inline void bn_barrier(int n, long long *since) {
    if (n <= 1) return;
#ifdef _OPENMP
    long long began = *since, arrived = bn_now();
#pragma omp barrier
    *since = bn_now();
    bn_note_wait(arrived - began, *since - arrived);
#endif
}

#define BN_TEXT_(x) #x
#define BN_TEXT(x) BN_TEXT_(x)
#if defined(__clang__)
#define BN_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define BN_COMPILER "gcc " __VERSION__
#elif defined(_MSC_VER)
#define BN_COMPILER "msvc " BN_TEXT(_MSC_FULL_VER)
#else
#define BN_COMPILER "unknown"
#endif

/* Does this CPU, under this operating system, run x86-64-v3 (AVX2), x86-64-v4 (AVX-512) code?
 * The builtin asks both. Its level names are known from gcc 12 and clang 18 (Apple counts
 * otherwise); the older compilers get the features that the levels are made of and that they can
 * ask for. */
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#if defined(__apple_build_version__) || (defined(__clang__) && __clang_major__ < 18) || \
    (!defined(__clang__) && __GNUC__ < 12)
#define BN_CPU_V3                                                            \
    (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&      \
     __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
#define BN_CPU_V4                                                            \
    (BN_CPU_V3 && __builtin_cpu_supports("avx512f") &&                       \
     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") && \
     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#else
#define BN_CPU_V3 __builtin_cpu_supports("x86-64-v3")
#define BN_CPU_V4 __builtin_cpu_supports("x86-64-v4")
#endif
static inline int bn_cpu_v3(void) { __builtin_cpu_init(); return BN_CPU_V3 != 0; }
static inline int bn_cpu_v4(void) { __builtin_cpu_init(); return BN_CPU_V4 != 0; }
#else
static inline int bn_cpu_v3(void) { return 0; }
static inline int bn_cpu_v4(void) { return 0; }
#endif

/* End the worker threads of the calling thread; the next parallel region makes new ones. A forked
 * child has no workers but libgomp's memory of them, and waits for them for ever (GCC PR 60035), so
 * this is called before a fork. The function is looked up at run time, because linking it would
 * demand a libgomp of OpenMP 5.0, while the one found may be another package's older copy.
 * Returns 1 if it was done, 0 if it could not be.
 *
 * LLVM's runtime readies the child itself, unless it is told not to, as by an import of joblib. Then
 * nothing helps: pausing does not end its workers ("hard", in libomp 14, where the child is readied
 * as well, fails an assertion). */
#if defined(_OPENMP) && !defined(_WIN32)
#include <dlfcn.h>
#include <stdlib.h>
static inline int bn_pause(void) {
    int (*pause_all)(int) = (int (*)(int))dlsym(RTLD_DEFAULT, "omp_pause_resource_all");
    const char *ready = getenv("KMP_INIT_AT_FORK");
    if (ready != 0 && strchr("1TtYy", ready[0]) == 0 && dlsym(RTLD_DEFAULT, "__kmpc_fork_call"))
        return 0;
    return pause_all != 0 && pause_all(1 /* omp_pause_soft */) == 0;
}
#else
static inline int bn_pause(void) { return !BN_OPENMP; }
#endif

/* How many of n threads a parallel region may have, n or 1. libgomp ends the process where it cannot
 * start a thread, as under a limit on processes or on the address space (containers, batch systems),
 * and a thread whose stack is too small for the engine overflows it. So before the calling thread's
 * first region, or a larger one than its last, as many threads are started and ended as OpenMP will
 * start, with stacks of that size: 30 us, once. */
#if defined(_OPENMP) && !defined(_WIN32)
#include <pthread.h>

#define BN_STACK_NEEDED ((size_t)128 << 10) /* the engine takes 75 KiB at most (gcc -fstack-usage) */

static size_t bn_stack = 0;        /* bytes that each of OpenMP's threads gets; set at import */
static __thread int bn_started = 1; /* threads of the calling thread's last region */

static void bn_forget_started(void) { bn_started = 1; }

/* OMP_STACKSIZE, else GOMP_STACKSIZE, as libgomp reads them when it is loaded, else the default of the
 * system: a number of KiB, or with a unit. Where it cannot be read, libgomp takes the default too. */
static size_t bn_stack_of(const char *text) {
    char *end;
    unsigned long long n;
    int shift = 10;
    if (text == 0) return 0;
    n = strtoull(text, &end, 10);
    if (end == text) return 0;
    while (*end == ' ') end++;
    switch (*end) {
    case 'b': case 'B': shift = 0; end++; break;
    case 'k': case 'K': shift = 10; end++; break;
    case 'm': case 'M': shift = 20; end++; break;
    case 'g': case 'G': shift = 30; end++; break;
    }
    while (*end == ' ') end++;
    return *end != 0 || n > (~(size_t)0 >> shift) ? 0 : (size_t)n << shift;
}

static void bn_read_stack(void) {
    pthread_attr_t attr;
    bn_stack = bn_stack_of(getenv("OMP_STACKSIZE"));
    if (bn_stack == 0) bn_stack = bn_stack_of(getenv("GOMP_STACKSIZE"));
    if (pthread_attr_init(&attr) == 0) {
        if (bn_stack == 0 || pthread_attr_setstacksize(&attr, bn_stack) != 0)
            pthread_attr_getstacksize(&attr, &bn_stack);
        pthread_attr_destroy(&attr);
    }
    pthread_atfork(bn_forget_started, 0, 0); /* a fork ends the workers, see bn_pause */
}

static void *bn_pass(void *gate) {
    pthread_mutex_lock((pthread_mutex_t *)gate);
    pthread_mutex_unlock((pthread_mutex_t *)gate);
    return 0;
}

static int bn_startable(int n) {
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attr;
    pthread_t *threads;
    int started = 1;
    if (n <= 1) return n;
    if (bn_stack < BN_STACK_NEEDED) return 1;
    if (n <= bn_started) return bn_started = n;
    threads = (pthread_t *)malloc((size_t)n * sizeof(pthread_t));
    if (threads == 0) return 1;
    if (pthread_attr_init(&attr) == 0) {
        pthread_attr_setstacksize(&attr, bn_stack);
        pthread_mutex_lock(&gate); /* all at once, as in a region */
        while (started < n && pthread_create(&threads[started], &attr, bn_pass, &gate) == 0) started++;
        pthread_mutex_unlock(&gate);
        for (int i = 1; i < started; i++) pthread_join(threads[i], 0);
        pthread_attr_destroy(&attr);
    }
    free(threads);
    if (started < n) return 1;
    return bn_started = n;
}
#else
static inline void bn_read_stack(void) {}
static inline int bn_startable(int n) { return n; }
#endif

/* Bytes of the caches that one CPU sees: its L1 for data, its L2, and L3, of which a share: a virtual
 * machine reports all of its host's, and 32 MiB is what a few cores have together. What the system
 * does not say is that of the machine on which the schedule was measured. */
#if defined(__linux__)
#include <unistd.h>
static inline Py_ssize_t bn_cache(int name, Py_ssize_t other) {
    long n = sysconf(name);
    return n > 0 ? (Py_ssize_t)n : other;
}
static inline void bn_ask_caches(Py_ssize_t *level) {
    Py_ssize_t most = (Py_ssize_t)32 << 20;
    level[0] = bn_cache(_SC_LEVEL1_DCACHE_SIZE, 32 << 10);
    level[1] = bn_cache(_SC_LEVEL2_CACHE_SIZE, 1 << 20);
    level[2] = bn_cache(_SC_LEVEL3_CACHE_SIZE, most);
    if (level[2] > most) level[2] = most;
}
#else
static inline void bn_ask_caches(Py_ssize_t *level) {
    level[0] = 32 << 10, level[1] = 1 << 20, level[2] = (Py_ssize_t)32 << 20;
}
#endif

/* x + y on the units that multiply, as x * 1 + y: rounded once like any sum, so the same bits. CPUs
 * whose adders are apart (Zen) have these units to spare in a sum of differences. The compiler must
 * not know the 1, or it adds. */
#if defined(__FMA__) && (defined(__GNUC__) || defined(__clang__))
static inline double bn_one(void) {
    double one = 1;
    __asm__("" : "+x"(one));
    return one;
}
#else
static inline double bn_one(void) { return 1; }
#endif

/* The sum of 16 values, by halves of 8, 4, 2. In vectors, as gcc 12 takes the halves value by value: a
 * row's sums of 128 values took a third longer. */
#if defined(__GNUC__) || defined(__clang__)
typedef double bn_two __attribute__((vector_size(16), aligned(8), may_alias));
typedef double bn_four __attribute__((vector_size(32), aligned(8), may_alias));
static inline double bn_fold_lanes(const double *values) {
    const bn_four *four = (const bn_four *)values;
    bn_four sums = (four[0] + four[2]) + (four[1] + four[3]);
    const bn_two *two = (const bn_two *)&sums;
    bn_two last = two[0] + two[1];
    return last[0] + last[1];
}
#else
static inline double bn_fold_lanes(const double *values) {
    double sums[4];
    for (int k = 0; k < 4; k++)
        sums[k] = (values[k] + values[8 + k]) + (values[4 + k] + values[12 + k]);
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}
#endif

/* Ask for n bytes before they are needed: the hardware does not follow a tile's rows, which lie a page
 * or more apart. A hint: any address is allowed. */
#if defined(__GNUC__) || defined(__clang__)
static inline void bn_prefetch(const char *address, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i += 64) __builtin_prefetch(address + i, 0, 2);
}
#else
static inline void bn_prefetch(const char *address, Py_ssize_t n) { (void)address; (void)n; }
#endif

/* Copy n bytes past the caches: an output larger than them would only push the input out, and each of
 * its lines would be read before it is written. Whole 64-byte lines go past, the ends do not.
 * bn_stream_end() orders them before what other threads read. */
#if defined(__SSE2__)
#include <immintrin.h>
static inline void bn_stream_lines(char *to, const char *from, Py_ssize_t n_lines) {
    for (; n_lines > 0; n_lines--, to += 64, from += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512((void *)to, _mm512_loadu_si512(from));
#elif defined(__AVX__)
        for (int i = 0; i < 64; i += 32)
            _mm256_stream_si256((__m256i *)(to + i), _mm256_loadu_si256((const __m256i *)(from + i)));
#else
        for (int i = 0; i < 64; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
#endif
    }
}
static inline void bn_stream(char *to, const char *from, Py_ssize_t n) {
    Py_ssize_t head = (Py_ssize_t)(-(size_t)to & 63);
    if (n < head + 64) {
        memcpy(to, from, (size_t)n);
        return;
    }
    memcpy(to, from, (size_t)head);
    to += head, from += head, n -= head;
    bn_stream_lines(to, from, n / 64);
    memcpy(to + n / 64 * 64, from + n / 64 * 64, (size_t)(n % 64));
}
static inline void bn_stream_end(void) { _mm_sfence(); }
#define BN_STREAMS 1
#else
static inline void bn_stream(char *to, const char *from, Py_ssize_t n) { memcpy(to, from, (size_t)n); }
static inline void bn_stream_end(void) {}
#define BN_STREAMS 0
#endif

#endif
