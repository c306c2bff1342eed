// The vector register of the machine that compiles this file, in compiler vector extensions: one source for AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

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
typedef uint16_t vec_u16 __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

#define ATTLAS_INLINE static inline __attribute__((always_inline))

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

ATTLAS_INLINE void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }

// Round to nearest even; NaN stays NaN, where the carry of the rounding could have made it infinite.
ATTLAS_INLINE void store(bf16* p, vec x) {
    vec_u32 bits = (vec_u32)x, nan = (vec_u32)(x != x);
    bits += 0x7fff + ((bits >> 16) & 1);
    bits = (bits & ~nan) | (nan & 0x7fc00000);
    vec_u16 top = __builtin_convertvector(bits >> 16, vec_u16);
    std::memcpy(p, &top, sizeof top);
}

// The first n lanes only; the others read as 0.
template <class T>
ATTLAS_INLINE vec load_part(const T* p, int n) {
    T lanes[LANES] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
}

template <class T>
ATTLAS_INLINE void store_part(T* p, vec x, int n) {
    T lanes[LANES];
    store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(T));
}

ATTLAS_INLINE float load_one(const float* p) { return *p; }

ATTLAS_INLINE float load_one(const bf16* p) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Exchanges the lanes of a whose index has bit HALF with the lanes of b whose index has not.
template <int HALF, std::size_t... I>
ATTLAS_INLINE void exchange(vec& a, vec& b, std::index_sequence<I...>) {
#if defined(__clang__)
    vec low = __builtin_shufflevector(a, b, (int(I) & HALF ? LANES + int(I) - HALF : int(I))...);
    vec high = __builtin_shufflevector(a, b, (int(I) & HALF ? LANES + int(I) : int(I) + HALF)...);
#else
    vec low = __builtin_shuffle(a, b, vec_u32{(I & HALF ? LANES + I - HALF : I)...});
    vec high = __builtin_shuffle(a, b, vec_u32{(I & HALF ? LANES + I : I + HALF)...});
#endif
    a = low;
    b = high;
}

// Transposes a square of LANES x LANES in registers, halving the blocks at each step.
template <int HALF = LANES / 2>
ATTLAS_INLINE void transpose(vec (&rows)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        if (!(i & HALF)) exchange<HALF>(rows[i], rows[i + HALF], std::make_index_sequence<LANES>());
    if constexpr (HALF > 1) transpose<HALF / 2>(rows);
}

}  // namespace attlas
