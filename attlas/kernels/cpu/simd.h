// One vector register of the machine that compiles this, in compiler vector extensions: the same source serves
// AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define ATTLAS_INLINE static inline __attribute__((always_inline))
#define ATTLAS_INLINE_MEMBER inline __attribute__((always_inline))
#define ATTLAS_NOINLINE static __attribute__((noinline))

namespace attlas {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t vec_u32 __attribute__((vector_size(LANES * 4)));
typedef int32_t vec_i32 __attribute__((vector_size(LANES * 4)));  // what comparisons give
typedef uint16_t vec_u16 __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

ATTLAS_INLINE float to_float(float x) { return x; }

ATTLAS_INLINE float to_float(int8_t x) { return x; }

ATTLAS_INLINE float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

ATTLAS_INLINE vec load(const float* p) {
    vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

ATTLAS_INLINE vec load(const bf16* p) {
    vec_u16 bits;
    std::memcpy(&bits, p, sizeof bits);
    return (vec)(__builtin_convertvector(bits, vec_u32) << 16);
}

ATTLAS_INLINE vec load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    vec x;
    for (int i = 0; i < LANES; ++i) x[i] = p[i];
    return x;
#endif
}

ATTLAS_INLINE void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }

// As store to an address that is a multiple of the vector's size, past the caches where the processor can: for results
// larger than the caches, whose lines would otherwise be read only to be overwritten.
ATTLAS_INLINE void stream(float* p, vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)x);
#else
    store(p, x);
#endif
}

ATTLAS_INLINE bool can_stream(const void* p) { return std::uintptr_t(p) % sizeof(vec) == 0; }

// Before other threads are told that streamed results are there.
ATTLAS_INLINE void end_streaming() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

// Rounds to nearest, ties to even. NaNs become the quiet NaN: the carry of the rounding could make one infinite.
ATTLAS_INLINE void store(bf16* p, vec x) {
    const vec_u32 nan = (vec_u32)(x != x);
    vec_u32 bits = (vec_u32)x;
    bits += 0x7fff + ((bits >> 16) & 1);
    bits = (bits & ~nan) | (nan & 0x7fc00000);
    const vec_u16 top = __builtin_convertvector(bits >> 16, vec_u16);
    std::memcpy(p, &top, sizeof top);
}

ATTLAS_INLINE vec spread(float x) { return vec{} + x; }

// x itself, as a number of float's precision: what the compiler may not merge with a sum that follows. The difference of
// two large products is exact only if both were rounded.
ATTLAS_INLINE vec rounded(vec x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__SSE__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

ATTLAS_INLINE vec max(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

// NaN where b is.
ATTLAS_INLINE vec min(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return a < b ? a : b;
#endif
}

ATTLAS_INLINE bool any(vec_i32 mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)mask);
#else
    int32_t all = 0;
    for (int i = 0; i < LANES; ++i) all |= mask[i];
    return all;
#endif
}

ATTLAS_INLINE float largest_lane(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float largest = x[0];
    for (int i = 1; i < LANES; ++i) largest = x[i] > largest ? x[i] : largest;
    return largest;
#endif
}

// 2^x in two factors, 2^n and 1 + p with -1/4 < p < 1/2; x is at most 127 and at least -126, or NaN.
struct Power {
    vec_u32 n;
    vec p;
};

ATTLAS_INLINE Power power(vec x) {
    const vec magic = spread(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the lowest bits
    const vec whole = x + magic;
    const vec f = x - (whole - magic);
    vec y = spread(1.3333558e-3f);
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    return {(vec_u32)whole << 23, y * f};
}

// 2^x to 3e-7; 0 below the normal numbers. x is at most 127, or NaN, which stays NaN.
ATTLAS_INLINE vec exp2(vec x) {
    const Power power_of = power(x);
    const vec y = (vec)((vec_u32)(power_of.p + 1.0f) + power_of.n);
    return x < -126.0f ? vec{} : y;
}

// 2^x - 1 to 3e-7 of itself, however near x is to 0; -1 where 2^x is below the normal numbers. x as for exp2.
ATTLAS_INLINE vec exp2_less_1(vec x) {
    const Power power_of = power(x);
    const vec scale = (vec)(power_of.n + 0x3f800000);
    const vec y = scale * power_of.p + (scale - 1.0f);
    return x < -126.0f ? spread(-1.0f) : y;
}

// As load, but only the first n elements exist; the other lanes are 0.
template <class T>
ATTLAS_INLINE vec load_first(const T* p, int n) {
    if (n >= LANES) return load(p);
    T lanes[LANES] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}

template <class T>
ATTLAS_INLINE void store_first(T* p, vec x, int n) {
    if (n >= LANES) return store(p, x);
    T lanes[LANES];
    store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(T));
}

template <class T>
ATTLAS_INLINE void prefetch(const T* p, int n) {
    constexpr int line = 64 / sizeof(T);
    for (int i = 0; i < n; i += line) __builtin_prefetch(p + i);
}

// Exchanges the lanes of a whose index has the bit HALF with the lanes of b whose index has not.
template <int HALF, std::size_t... I>
ATTLAS_INLINE void exchange(vec& a, vec& b, std::index_sequence<I...>) {
#if defined(__clang__)
    const vec low = __builtin_shufflevector(a, b, (I & HALF ? LANES + I - HALF : I)...);
    const vec high = __builtin_shufflevector(a, b, (I & HALF ? LANES + I : I + HALF)...);
#else
    const vec low = __builtin_shuffle(a, b, vec_u32{(I & HALF ? LANES + I - HALF : I)...});
    const vec high = __builtin_shuffle(a, b, vec_u32{(I & HALF ? LANES + I : I + HALF)...});
#endif
    a = low;
    b = high;
}

// Transposes LANES x LANES floats in registers, by blocks of half the size at each step.
template <int HALF = LANES / 2>
ATTLAS_INLINE void transpose(vec (&rows)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        if (!(i & HALF)) exchange<HALF>(rows[i], rows[i + HALF], std::make_index_sequence<LANES>());
    if constexpr (HALF > 1) transpose<HALF / 2>(rows);
}

// Within every four lanes: the first two of a and of b in turn, and the last two. UNIT: how many lanes stay together.
template <int UNIT, std::size_t... I>
ATTLAS_INLINE void zip(vec& a, vec& b, std::index_sequence<I...>) {
    constexpr auto from = [](std::size_t i) {  // of the first half; the lanes of b are numbered behind those of a
        return i / 4 * 4 + (UNIT == 1 ? i % 4 / 2 + i % 2 * LANES : i % 2 + i % 4 / 2 * LANES);
    };
#if defined(__clang__)
    const vec first = __builtin_shufflevector(a, b, int(from(I))...);
    const vec last = __builtin_shufflevector(a, b, int(from(I) + 2)...);
#else
    const vec first = __builtin_shuffle(a, b, vec_u32{uint32_t(from(I))...});
    const vec last = __builtin_shuffle(a, b, vec_u32{uint32_t(from(I) + 2)...});
#endif
    a = first;
    b = last;
}

// Lane i of the result is the sum over the lanes of rows[i]. What crosses groups of four lanes costs most and comes
// last, when few registers are left.
ATTLAS_INLINE vec sum_rows(vec (&rows)[LANES]) {
    constexpr auto lanes = std::make_index_sequence<LANES>();
    const auto halve = [&](int count, auto mix) {
        for (int i = 0; i < count; ++i) {
            mix(rows[2 * i], rows[2 * i + 1]);
            rows[i] = rows[2 * i] + rows[2 * i + 1];
        }
    };
    halve(LANES / 2, [&](vec& a, vec& b) { zip<1>(a, b, lanes); });
    halve(LANES / 4, [&](vec& a, vec& b) { zip<2>(a, b, lanes); });
    if constexpr (LANES >= 8) halve(LANES / 8, [&](vec& a, vec& b) { exchange<4>(a, b, lanes); });
    if constexpr (LANES >= 16) halve(LANES / 16, [&](vec& a, vec& b) { exchange<8>(a, b, lanes); });
    return rows[0];
}

// Asks for huge pages under a large fresh buffer: touching it one small page at a time can cost as much as the
// arithmetic that fills it.
ATTLAS_INLINE void advise_huge_pages(void* data, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t huge = 2 << 20;
    const std::uintptr_t begin = (std::uintptr_t(data) + huge - 1) & -huge;
    const std::uintptr_t end = (std::uintptr_t(data) + bytes) & -huge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace attlas
