/* What Cython cannot say: the runtime functions of OpenMP where there may be none, the instruction
 * sets of this CPU, and the name of the compiler. */
#ifndef BN_FAST_NATIVE_H
#define BN_FAST_NATIVE_H

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
 * Returns 1 if it was done, 0 if it could not be. */
#if defined(_OPENMP) && !defined(_WIN32)
#include <dlfcn.h>
static inline int bn_pause(void) {
    int (*pause_all)(int) = (int (*)(int))dlsym(RTLD_DEFAULT, "omp_pause_resource_all");
    return pause_all != 0 && pause_all(1 /* omp_pause_soft */) == 0;
}
#else
static inline int bn_pause(void) { return !BN_OPENMP; }
#endif

#endif
