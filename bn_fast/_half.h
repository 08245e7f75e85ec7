/* The two 16-bit formats, to float and back: IEEE half precision (float16) and the upper half of a
 * float (bfloat16).  Rounding is to the nearest, ties to even; too large becomes infinite; NaN
 * keeps its sign and the upper bits of its payload, and becomes quiet.  The hardware's instructions for
 * float16 do just that, and what stands here for other CPUs gives the same bits: in integers, free
 * of branches, so that compilers vectorize it. */
#ifndef BN_FAST_HALF_H
#define BN_FAST_HALF_H

#include <Python.h>
#include <numpy/ndarraytypes.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif

/* Of a dtype of 2 bytes, by the name of its scalars, as _types.py has it. */
static inline int bn_is_bfloat16(const void *dtype) {
    const char *name = ((const PyArray_Descr *)dtype)->typeobj->tp_name, *last = strrchr(name, '.');
    return strcmp(last ? last + 1 : name, "bfloat16") == 0;
}

static inline uint32_t bn_bits(float value) { uint32_t u; memcpy(&u, &value, 4); return u; }
static inline float bn_value(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }

#if !defined(__F16C__)
static inline float bn_float16_value(uint16_t h) {
    uint32_t size = (uint32_t)(h & 0x7fff) << 13; /* exponent and mantissa in a float's places */
    uint32_t finite = size + (112u << 23);        /* 112: the difference of the exponents' biases */
    uint32_t special = (size + (224u << 23)) | (size > 0x0f800000u ? 1u << 22 : 0); /* inf, NaN */
    /* m 2^-24 as (2^-14 + m 2^-24) - 2^-14, as a subnormal has no leading 1 */
    uint32_t small = bn_bits(bn_value(size + (113u << 23)) - bn_value(113u << 23));
    uint32_t u = size < (1u << 23) ? small : size < 0x0f800000u ? finite : special;
    return bn_value(u | (uint32_t)(h & 0x8000) << 16);
}
static inline uint16_t bn_float16_bits(float value) {
    uint32_t u = bn_bits(value), size = u & 0x7fffffffu;
    /* adding just below a half unit, or that and the last bit kept, rounds; it may carry */
    uint32_t finite = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    uint32_t special = size > 0x7f800000u ? 0x7e00 | (size >> 13 & 0x1ff) : 0x7c00;
    /* a unit in the last place of 0.5 is 2^-24, that of float16's subnormals */
    uint32_t small = bn_bits(bn_value(size) + 0.5f) - bn_bits(0.5f);
    uint32_t h = size < (113u << 23) ? small : size < (143u << 23) ? finite : special;
    return (uint16_t)(h | (u >> 16 & 0x8000));
}
#endif

static inline uint16_t bn_bfloat16_bits(float value) {
    uint32_t u = bn_bits(value);
    uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? u >> 16 | 0x40 : rounded);
}

static inline void bn_widen_float16(
    const uint16_t *__restrict from, float *__restrict to, Py_ssize_t n) {
    Py_ssize_t i = 0;
#if defined(__F16C__)
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
#endif
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    if (i < n && n >= 8) { /* the last 8, some of them again: no copy of a length unknown */
        i = n - 8;
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    } else if (i < n) {
        uint16_t last[8] = {0};
        float wide[8];
        memcpy(last, from + i, (size_t)(n - i) * 2);
        _mm256_storeu_ps(wide, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)last)));
        memcpy(to + i, wide, (size_t)(n - i) * 4);
    }
#else
    for (; i < n; i++) to[i] = bn_float16_value(from[i]);
#endif
}

static inline void bn_narrow_float16(
    const float *__restrict from, uint16_t *__restrict to, Py_ssize_t n) {
    Py_ssize_t i = 0;
#if defined(__F16C__)
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#endif
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    if (i < n && n >= 8) {
        i = n - 8;
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    } else if (i < n) {
        float last[8] = {0};
        uint16_t narrow[8];
        memcpy(last, from + i, (size_t)(n - i) * 4);
        _mm_storeu_si128((__m128i *)narrow, _mm256_cvtps_ph(_mm256_loadu_ps(last), 0));
        memcpy(to + i, narrow, (size_t)(n - i) * 2);
    }
#else
    for (; i < n; i++) to[i] = bn_float16_bits(from[i]);
#endif
}

static inline void bn_widen_bfloat16(
    const uint16_t *__restrict from, float *__restrict to, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) to[i] = bn_value((uint32_t)from[i] << 16);
}

#if defined(__AVX512BW__)
/* bn_bfloat16_bits of 16 floats, still in the upper halves: 60, not 88 ps per element (Zen 4). */
static inline __m512i bn_bfloat16_upper(__m512 value) {
    __m512i u = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
    __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_add_epi32(
        rounded, _mm512_test_epi32_mask(u, _mm512_slli_epi32(one, 16)), rounded, one);
    return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), u,
                                _mm512_set1_epi32(0x400000));
}
#endif

static inline void bn_narrow_bfloat16(
    const float *__restrict from, uint16_t *__restrict to, Py_ssize_t n) {
    Py_ssize_t i = 0;
#if defined(__AVX512BW__)
    /* every other 16 bits of two vectors */
    const __m512i upper = _mm512_add_epi16(
        _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                         24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0),
        _mm512_set1_epi16(1));
    for (; i + 32 <= n; i += 32)
        _mm512_storeu_si512(
            to + i, _mm512_permutex2var_epi16(bn_bfloat16_upper(_mm512_loadu_ps(from + i)), upper,
                                              bn_bfloat16_upper(_mm512_loadu_ps(from + i + 16))));
#endif
    for (; i < n; i++) to[i] = bn_bfloat16_bits(from[i]);
}

#endif
