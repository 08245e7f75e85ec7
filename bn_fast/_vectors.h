#ifndef BN_VECTORS_H
#define BN_VECTORS_H
#include "_half.h"
#include "_native.h"

#if !defined(__GNUC__) && !defined(__clang__)
#error "bn_fast is compiled with gcc or clang (clang-cl on Windows): it computes in their vectors"
#endif

/* Vectors as wide as the machine's, with gcc's and clang's arithmetic lane by lane; what that lacks, by
 * intrinsics. All of it rounds as the same numbers one by one do. */
#if defined(__AVX512F__)
#define BN_VECTOR 64
#elif defined(__AVX__)
#define BN_VECTOR 32
#else
#define BN_VECTOR 16
#endif
typedef float bn_floats __attribute__((vector_size(BN_VECTOR), aligned(4), may_alias));
typedef double bn_doubles __attribute__((vector_size(BN_VECTOR), aligned(8), may_alias));
typedef float bn_half_floats __attribute__((vector_size(BN_VECTOR / 2)));
typedef int bn_ints __attribute__((vector_size(BN_VECTOR)));
typedef long long bn_longs __attribute__((vector_size(BN_VECTOR)));

/* x in all lanes: of a loop over them gcc 12 makes as many masked stores. */
static inline bn_floats bn_make_floats(double x) { return (float)x - (bn_floats){0}; }
static inline bn_doubles bn_make_doubles(double x) { return x - (bn_doubles){0}; }
/* a where z <= 0, else b. */
static inline bn_floats bn_choose_floats(bn_floats z, bn_floats a, bn_floats b) {
    bn_ints closed = z <= 0;
    return (bn_floats)((closed & (bn_ints)a) | (~closed & (bn_ints)b));
}
static inline bn_doubles bn_choose_doubles(bn_doubles z, bn_doubles a, bn_doubles b) {
    bn_longs closed = z <= 0;
    return (bn_doubles)((closed & (bn_longs)a) | (~closed & (bn_longs)b));
}
/* The first n lanes, of a vector or from memory, 0 in the others; and these to memory. */
#if defined(__AVX512F__)
static inline bn_floats bn_part_floats(bn_floats v, int n) {
    return (bn_floats)_mm512_maskz_mov_ps((__mmask16)((1 << n) - 1), (__m512)v);
}
static inline bn_doubles bn_part_doubles(bn_doubles v, int n) {
    return (bn_doubles)_mm512_maskz_mov_pd((__mmask8)((1 << n) - 1), (__m512d)v);
}
static inline bn_floats bn_load_floats(const void *from, int n) {
    return (bn_floats)_mm512_maskz_loadu_ps((__mmask16)((1 << n) - 1), from);
}
static inline bn_doubles bn_load_doubles(const void *from, int n) {
    return (bn_doubles)_mm512_maskz_loadu_pd((__mmask8)((1 << n) - 1), from);
}
static inline void bn_store_floats(void *to, bn_floats v, int n) {
    _mm512_mask_storeu_ps(to, (__mmask16)((1 << n) - 1), (__m512)v);
}
static inline void bn_store_doubles(void *to, bn_doubles v, int n) {
    _mm512_mask_storeu_pd(to, (__mmask8)((1 << n) - 1), (__m512d)v);
}
#else
static const int bn_lane_floats[] = {0, 1, 2, 3, 4, 5, 6, 7};
static const long long bn_lane_doubles[] = {0, 1, 2, 3};
static inline bn_ints bn_lanes_floats(int n) {
    bn_ints lane;
    memcpy(&lane, bn_lane_floats, sizeof(lane));
    return lane < n;
}
static inline bn_longs bn_lanes_doubles(int n) {
    bn_longs lane;
    memcpy(&lane, bn_lane_doubles, sizeof(lane));
    return lane < (long long)n;
}
static inline bn_floats bn_part_floats(bn_floats v, int n) {
    return (bn_floats)((bn_ints)v & bn_lanes_floats(n));
}
static inline bn_doubles bn_part_doubles(bn_doubles v, int n) {
    return (bn_doubles)((bn_longs)v & bn_lanes_doubles(n));
}
#if defined(__AVX__)
static inline bn_floats bn_load_floats(const void *from, int n) {
    return (bn_floats)_mm256_maskload_ps((const float *)from, (__m256i)bn_lanes_floats(n));
}
static inline bn_doubles bn_load_doubles(const void *from, int n) {
    return (bn_doubles)_mm256_maskload_pd((const double *)from, (__m256i)bn_lanes_doubles(n));
}
#else
static inline bn_floats bn_load_floats(const void *from, int n) {
    bn_floats v = {0};
    for (int i = 0; i < n; i++) v[i] = ((const float *)from)[i];
    return v;
}
static inline bn_doubles bn_load_doubles(const void *from, int n) {
    bn_doubles v = {0};
    for (int i = 0; i < n; i++) v[i] = ((const double *)from)[i];
    return v;
}
#endif
/* Value by value: with AVX's masked store (128, 33, 7, 7), rows of 1029, took 58 and 102 us for 47 and 84
 * (AMD EPYC, Zen 4). */
static inline void bn_store_floats(void *to, bn_floats v, int n) {
    float lane[BN_VECTOR / 4];
    memcpy(lane, &v, sizeof(v));
    for (int i = 0; i < n; i++) ((float *)to)[i] = lane[i];
}
static inline void bn_store_doubles(void *to, bn_doubles v, int n) {
    double lane[BN_VECTOR / 8];
    memcpy(lane, &v, sizeof(v));
    for (int i = 0; i < n; i++) ((double *)to)[i] = lane[i];
}
#endif
/* s += v, in double; or the first n lanes of it. */
static inline void bn_add_floats(double *s, bn_floats v) {
    bn_doubles *sums = (bn_doubles *)s;
    union {
        bn_floats whole;
        bn_half_floats half[2];
    } parts = {v};
    for (int k = 0; k < 2; k++) {
#if defined(__AVX512F__) /* of convertvector gcc 12 makes two of half the width */
        sums[k] += (bn_doubles)_mm512_cvtps_pd((__m256)parts.half[k]);
#elif defined(__AVX__)
        sums[k] += (bn_doubles)_mm256_cvtps_pd((__m128)parts.half[k]);
#else
        for (int i = 0; i < BN_VECTOR / 8; i++) sums[k][i] += (double)parts.half[k][i];
#endif
    }
}
static inline void bn_add_doubles(double *s, bn_doubles v) { *(bn_doubles *)s += v; }
static inline void bn_add_part_floats(double *s, bn_floats v, int n) {
    for (int i = 0; i < n; i++) s[i] += (double)v[i];
}
static inline void bn_add_part_doubles(double *s, bn_doubles v, int n) {
    for (int i = 0; i < n; i++) s[i] += v[i];
}
/* Sums of 16 lanes, in registers, and their sum, as bn_fold_lanes has it. */
typedef struct {
    bn_doubles part[128 / BN_VECTOR];
} bn_line;
static inline bn_line bn_no_sums(void) {
    bn_line s;
    for (int i = 0; i < 128 / BN_VECTOR; i++) s.part[i] = (bn_doubles){0};
    return s;
}
static inline __attribute__((always_inline)) double bn_fold_line(bn_line *s) {
    union {
        bn_doubles whole;
        bn_two two[BN_VECTOR / 16];
    } last;
    for (int half = 64 / BN_VECTOR; half > 0; half /= 2)
        for (int i = 0; i < half; i++) s->part[i] += s->part[i + half];
    last.whole = s->part[0];
    for (int half = BN_VECTOR / 32; half > 0; half /= 2)
        for (int i = 0; i < half; i++) last.two[i] += last.two[i + half];
    return last.two[0][0] + last.two[0][1];
}
#if defined(__AVX512F__)
static inline bn_floats bn_plus_floats(bn_floats x, bn_floats y, bn_floats one) {
    return (bn_floats)_mm512_fmadd_ps((__m512)x, (__m512)one, (__m512)y);
}
static inline bn_doubles bn_plus_doubles(bn_doubles x, bn_doubles y, bn_doubles one) {
    return (bn_doubles)_mm512_fmadd_pd((__m512d)x, (__m512d)one, (__m512d)y);
}
#elif defined(__FMA__)
static inline bn_floats bn_plus_floats(bn_floats x, bn_floats y, bn_floats one) {
    return (bn_floats)_mm256_fmadd_ps((__m256)x, (__m256)one, (__m256)y);
}
static inline bn_doubles bn_plus_doubles(bn_doubles x, bn_doubles y, bn_doubles one) {
    return (bn_doubles)_mm256_fmadd_pd((__m256d)x, (__m256d)one, (__m256d)y);
}
#else
static inline bn_floats bn_plus_floats(bn_floats x, bn_floats y, bn_floats one) {
    return (void)one, x + y;
}
static inline bn_doubles bn_plus_doubles(bn_doubles x, bn_doubles y, bn_doubles one) {
    return (void)one, x + y;
}
#endif
#if defined(__AVX512F__)
#define BN_STREAM_FLOATS(to, v) _mm512_stream_ps(to, (__m512)(v))
#define BN_STREAM_DOUBLES(to, v) _mm512_stream_pd(to, (__m512d)(v))
#elif defined(__AVX__)
#define BN_STREAM_FLOATS(to, v) _mm256_stream_ps(to, (__m256)(v))
#define BN_STREAM_DOUBLES(to, v) _mm256_stream_pd(to, (__m256d)(v))
#elif BN_STREAMS
#define BN_STREAM_FLOATS(to, v) _mm_stream_ps(to, (__m128)(v))
#define BN_STREAM_DOUBLES(to, v) _mm_stream_pd(to, (__m128d)(v))
#else
#define BN_STREAM_FLOATS(to, v) (void)(*(bn_floats *)(to) = (v))
#define BN_STREAM_DOUBLES(to, v) (void)(*(bn_doubles *)(to) = (v))
#endif
static inline void bn_stream_floats(char *to, bn_floats v) { BN_STREAM_FLOATS((float *)to, v); }
static inline void bn_stream_doubles(char *to, bn_doubles v) { BN_STREAM_DOUBLES((double *)to, v); }

/* Vectors of floats that lie in memory in 16 bits, as bfloat16 (brain) or float16: loads and stores, and
 * of the first n lanes. */
typedef bn_floats bn_halves;
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)
#define BN_HALVES 1
typedef __m256i bn_bits16;
static inline bn_bits16 bn_load_bits(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline bn_bits16 bn_load_bits_part(const void *from, int n) {
    return _mm256_maskz_loadu_epi16((__mmask16)((1 << n) - 1), from);
}
static inline void bn_store_bits(void *to, bn_bits16 h) { _mm256_storeu_si256((__m256i *)to, h); }
static inline void bn_store_bits_part(void *to, bn_bits16 h, int n) {
    _mm256_mask_storeu_epi16(to, (__mmask16)((1 << n) - 1), h);
}
static inline void bn_stream_bits(void *to, bn_bits16 h) { _mm256_stream_si256((__m256i *)to, h); }
static inline bn_halves bn_of_bits(bn_bits16 h, int brain) {
    return (bn_halves)(brain ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))
                             : _mm512_cvtph_ps(h));
}
static inline bn_bits16 bn_to_bits(bn_halves v, int brain) {
    return brain ? _mm512_cvtepi32_epi16(_mm512_srli_epi32(bn_bfloat16_upper((__m512)v), 16))
                 : _mm512_cvtps_ph((__m512)v, 0);
}
#elif defined(__AVX2__) && defined(__F16C__) && BN_VECTOR == 32
#define BN_HALVES 1
typedef __m128i bn_bits16;
static inline bn_bits16 bn_load_bits(const void *from) { return _mm_loadu_si128((const __m128i *)from); }
static inline bn_bits16 bn_load_bits_part(const void *from, int n) {
    uint16_t lane[8] = {0};
    for (int i = 0; i < n; i++) lane[i] = ((const uint16_t *)from)[i];
    return bn_load_bits(lane);
}
static inline void bn_store_bits(void *to, bn_bits16 h) { _mm_storeu_si128((__m128i *)to, h); }
static inline void bn_store_bits_part(void *to, bn_bits16 h, int n) {
    uint16_t lane[8];
    bn_store_bits(lane, h);
    for (int i = 0; i < n; i++) ((uint16_t *)to)[i] = lane[i];
}
static inline void bn_stream_bits(void *to, bn_bits16 h) { _mm_stream_si128((__m128i *)to, h); }
static inline bn_halves bn_of_bits(bn_bits16 h, int brain) {
    return (bn_halves)(brain ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))
                             : _mm256_cvtph_ps(h));
}
static inline bn_bits16 bn_to_bits(bn_halves v, int brain) {
    if (!brain) return _mm256_cvtps_ph((__m256)v, 0);
    __m256i u = (__m256i)v, one = _mm256_set1_epi32(1), rounded;
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
    rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)),
                               _mm256_and_si256(_mm256_srli_epi32(u, 16), one));
    u = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    u = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, u, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
}
#else /* rows of a half type come through a buffer, by loops that are longer than a vector */
#define BN_HALVES 0
typedef struct {
    uint16_t lane[BN_VECTOR / 4];
} bn_bits16;
static inline bn_bits16 bn_load_bits_part(const void *from, int n) {
    bn_bits16 h = {{0}};
    memcpy(&h, from, 2 * (size_t)n);
    return h;
}
static inline bn_bits16 bn_load_bits(const void *from) { return bn_load_bits_part(from, BN_VECTOR / 4); }
static inline void bn_store_bits_part(void *to, bn_bits16 h, int n) { memcpy(to, &h, 2 * (size_t)n); }
static inline void bn_store_bits(void *to, bn_bits16 h) { bn_store_bits_part(to, h, BN_VECTOR / 4); }
static inline void bn_stream_bits(void *to, bn_bits16 h) { bn_store_bits(to, h); }
static inline bn_halves bn_of_bits(bn_bits16 h, int brain) {
    bn_halves v;
    (brain ? bn_widen_bfloat16 : bn_widen_float16)(h.lane, (float *)&v, BN_VECTOR / 4);
    return v;
}
static inline bn_bits16 bn_to_bits(bn_halves v, int brain) {
    bn_bits16 h;
    (brain ? bn_narrow_bfloat16 : bn_narrow_float16)((const float *)&v, h.lane, BN_VECTOR / 4);
    return h;
}
#endif
static inline bn_halves bn_load_halves(const char *from, int brain) {
    return bn_of_bits(bn_load_bits(from), brain);
}
static inline bn_halves bn_load_halves_part(const char *from, int n, int brain) {
    return bn_of_bits(bn_load_bits_part(from, n), brain);
}
static inline void bn_store_halves(char *to, bn_halves v, int brain) {
    bn_store_bits(to, bn_to_bits(v, brain));
}
static inline void bn_store_halves_part(char *to, bn_halves v, int n, int brain) {
    bn_store_bits_part(to, bn_to_bits(v, brain), n);
}
static inline void bn_stream_halves(char *to, bn_halves v, int brain) {
    bn_stream_bits(to, bn_to_bits(v, brain));
}

/* Of vectors of either. */
#define BN_OF(v, name) _Generic((v), bn_floats: name##_floats, bn_doubles: name##_doubles)
#define bn_plus(x, y, one) BN_OF(one, bn_plus)(x, y, one)
#define bn_choose(z, a, b) BN_OF(z, bn_choose)(z, a, b)
#define bn_like(v, x) BN_OF(v, bn_make)(x)
#define bn_load_part(v, from, n) BN_OF(v, bn_load)(from, n)
#define bn_store_part(to, v, n) BN_OF(v, bn_store)(to, v, n)
#define bn_part(v, n) BN_OF(v, bn_part)(v, n)
#define bn_add_lanes(s, v) BN_OF(v, bn_add)(s, v)
#define bn_add_part(s, v, n) BN_OF(v, bn_add_part)(s, v, n)
#define bn_stream_vector(to, v) BN_OF(v, bn_stream)(to, v)

#endif
