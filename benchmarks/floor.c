/* The traffic of a norm without its arithmetic, by lines of 64 bytes; see floor.py. */

#include <omp.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

typedef long long line __attribute__((vector_size(64), aligned(16), may_alias));
enum { STEP = 512 }; /* lines: the second pass goes backwards by these, but forwards in each */

static inline void put(line *to, line value, int past_caches) {
#ifdef __SSE2__
    if (past_caches) { /* 16 bytes at a time, as NumPy's arrays begin at any multiple of these */
        const __m128i *parts = (const __m128i *)&value;
        for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)to + i, parts[i]);
        return;
    }
#endif
    *to = value;
}

static long long read(const line *x, long first, long end) {
    line sums[4] = {{0}};
    for (; first + 4 <= end; first += 4)
        for (int i = 0; i < 4; i++) sums[i] += x[first + i];
    for (; first < end; first++) sums[0] += x[first];
    line sum = sums[0] + sums[1] + sums[2] + sums[3];
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

static inline void write(const line *x, const line *z, line *out, long first, long end, int past_caches) {
    if (z)
        for (; first < end; first++) put(out + first, x[first] + z[first], past_caches);
    else
        for (; first < end; first++) put(out + first, x[first], past_caches);
}

/* x, and z if there is one, are read `passes` times, `chunk` lines at a time, and out is written. */
long long traffic(const line *x, const line *z, line *out, long n_lines, long chunk, int passes,
                  int n_threads, int past_caches) {
    long long sum = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : sum)
    {
        long me = omp_get_thread_num(), share_end = n_lines * (me + 1) / n_threads;
        for (long first = n_lines * me / n_threads; first < share_end; first += chunk) {
            long end = first + chunk < share_end ? first + chunk : share_end;
            if (passes == 2) {
                sum += read(x, first, end);
                if (z) sum += read(z, first, end);
            }
            for (; end > first; end -= STEP) {
                long from = end - STEP > first ? end - STEP : first;
                if (past_caches)
                    write(x, z, out, from, end, 1);
                else
                    write(x, z, out, from, end, 0);
            }
        }
#ifdef __SSE2__
        if (past_caches) _mm_sfence();
#endif
    }
    return sum;
}
