// Matrix products of tiles, for kernels whose operands are packed into scratch once per block.
//
//     C[i][:] (+)= sum_k A[i][k] B[k][:]
//
// with scalars A that are spread over the lanes and rows B. A unit is what one multiply-add takes of the summed axis: a
// float, or where the processor has the instruction a pair of bfloat16. Sums are float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include <omp.h>

#include "simd.h"

namespace attlas {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 6, VECS = 4;  // of a register tile: 24 sums, 4 vectors and a scalar in 32 registers
#else
constexpr int ROWS = 6, VECS = 2;
#endif
constexpr int PAD = 48;  // scratch rows have multiples of this many elements
static_assert(PAD % LANES == 0 && PAD % ROWS == 0);

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr int64_t WORTH_THREADS = 1 << 19;  // multiply-adds that take longer than waking the other threads

inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

struct pair {
    uint32_t bits;  // two bfloat16, the first in the lower half
};

ATTLAS_INLINE vec multiply_add(vec sum, float a, vec b) { return sum + a * b; }

#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <class In>
using unit_of = std::conditional_t<std::is_same_v<In, bf16>, pair, float>;

ATTLAS_INLINE vec multiply_add(vec sum, pair a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a.bits)), (__m512bh)b);
}
#else
template <class In>
using unit_of = float;

ATTLAS_INLINE vec multiply_add(vec sum, pair, vec) { return sum; }  // never made
#endif

template <class Unit>
constexpr int STEP = std::is_same_v<Unit, pair> ? 2 : 1;

template <class Unit>
int64_t units(int64_t n) {
    return (n + STEP<Unit> - 1) / STEP<Unit>;
}

// A matrix of scratch; what it holds is said where it is filled.
template <class T>
struct Matrix {
    T* data;
    int64_t stride;
    T* operator[](int64_t row) const { return data + row * stride; }
    Matrix from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

template <class Unit, int NV>
ATTLAS_INLINE void tile(float* c, int64_t c_stride, const Unit* a, int64_t a_row, int64_t a_step, const float* b,
                        int64_t b_stride, int n, bool add) {
    vec sum[ROWS][NV];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < NV; ++j) sum[i][j] = add ? load(c + i * c_stride + j * LANES) : vec{};
    for (int k = 0; k < n; ++k) {
        vec row[NV];
        for (int j = 0; j < NV; ++j) row[j] = load(b + k * b_stride + j * LANES);
        for (int i = 0; i < ROWS; ++i) {
            const Unit scalar = a[i * a_row + k * a_step];
            for (int j = 0; j < NV; ++j) sum[i][j] = multiply_add(sum[i][j], scalar, row[j]);
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < NV; ++j) store(c + i * c_stride + j * LANES, sum[i][j]);
}

// c[i][:] (+)= sum_k a[i * a_row + k * a_step] b[k][:] for i < rows, k < n and `columns` columns, a multiple of LANES.
// Rows are made in whole register tiles: c and a have room for them.
template <class Unit>
void multiply(Matrix<float> c, int64_t rows, int64_t columns, const Unit* a, int64_t a_row, int64_t a_step,
              Matrix<Unit> b, int n, bool add) {
    for (int64_t i = 0; i < rows; i += ROWS) {
        int64_t j = 0;
        const auto part = [&](auto vectors) {
            constexpr int NV = decltype(vectors)::value;
            for (; j + NV * LANES <= columns; j += NV * LANES)
                tile<Unit, NV>(c[i] + j, c.stride, a + i * a_row, a_row, a_step, (const float*)b.data + j, b.stride, n,
                               add);
        };
        part(std::integral_constant<int, VECS>());
        part(std::integral_constant<int, 2>());
        part(std::integral_constant<int, 1>());
    }
}

// Rows of tokens in a caller's array.
template <class In>
struct Rows {
    In* first;
    int64_t stride;
    In* operator[](int64_t t) const { return first + t * stride; }
};

// Units of features: out[r] = row r. There is room for whole vectors in `out`.
template <class In, class Unit>
ATTLAS_INLINE void pack_row(const In* row, int width, Unit* out) {
    if constexpr (std::is_same_v<In, bf16> && std::is_same_v<Unit, pair>) {
        constexpr int STRIDE = 2 * LANES;
        int f = 0;
        for (; f + STRIDE <= width; f += STRIDE) store((float*)out + f / 2, load((const float*)(row + f)));
        if (f < width) {
            bf16 rest[STRIDE] = {};
            std::memcpy(rest, row + f, (width - f) * sizeof(bf16));
            store((float*)out + f / 2, load((const float*)rest));
        }
    } else {
        for (int f = 0; f < width; f += LANES) store((float*)out + f, load_first(row + f, width - f));
    }
}

// Units of two rows: out[f] holds feature f of both. The second may be missing.
template <class In, class Unit>
ATTLAS_INLINE void pack_rows(const In* row, const In* next, int width, Unit* out) {
    if constexpr (std::is_same_v<Unit, float>) {
        pack_row(row, width, out);
    } else {
        for (int f = 0; f < width; f += LANES) {
            const vec_u32 low = (vec_u32)load_first(row + f, width - f) >> 16;
            const vec_u32 high = next ? (vec_u32)load_first(next + f, width - f) : vec_u32{};
            store_first((float*)out + f, (vec)(low | high), width - f);
        }
    }
}

// out[u][r] = in[r][u], r < n and u < width; columns up to a multiple of LANES are 0.
inline void turn(Matrix<const float> in, int n, int width, Matrix<float> out) {
    for (int r = 0; r < n; r += LANES)
        for (int u = 0; u < width; u += LANES) {
            vec block[LANES];
            for (int i = 0; i < LANES; ++i) block[i] = r + i < n ? load_first(in[r + i] + u, width - u) : vec{};
            transpose(block);
            for (int i = 0; i < std::min(LANES, width - u); ++i) store(out[u + i] + r, block[i]);
        }
}

// As turn, into rows of a caller's array and in its type, times `scale`.
template <class Out>
void turn_out(Matrix<float> in, int n, int width, float scale, Rows<Out> out) {
    for (int r = 0; r < n; r += LANES)
        for (int u = 0; u < width; u += LANES) {
            vec block[LANES];
            for (int i = 0; i < LANES; ++i) block[i] = u + i < width ? load(in[u + i] + r) * scale : vec{};
            transpose(block);
            for (int i = 0; i < std::min(LANES, n - r); ++i) store_first(out[r + i] + u, block[i], width - u);
        }
}

// Weights of keys j and j + 1 as units, rounded to the nearest bfloat16 where a unit is a pair.
ATTLAS_INLINE void store_units(float* out, vec first, vec) { store(out, first); }

ATTLAS_INLINE void store_units(pair* out, vec first, vec second) {
    const vec_u32 low = ((vec_u32)first + 0x8000) >> 16;
    const vec_u32 high = ((vec_u32)second + 0x8000) & 0xffff0000;
    store((float*)out, (vec)(low | high));
}

// Weights of one key as units of neighbouring queries.
ATTLAS_INLINE void store_row(float* out, vec x) { store(out, x); }

ATTLAS_INLINE void store_row(pair* out, vec x) {
    const vec_u16 top = __builtin_convertvector(((vec_u32)x + 0x8000) >> 16, vec_u16);
    std::memcpy(out, &top, sizeof top);
}

template <class In>
ATTLAS_INLINE bool finite(const In* row, int width) {
    vec_i32 found{};
    for (int f = 0; f < width; f += LANES)
        found |= ((vec_u32)load_first(row + f, width - f) & 0x7f800000) == 0x7f800000;
    return !any(found);
}

// Of a scratch with (key, query) scores and weights, (feature, query) sums, and the largest score and total weight of
// each query, for the columns from `first` to `end`: turns scores into weights exp(s - largest score so far), which rescales the sums, and adds up their total.
template <class Unit, class Scratch>
void soften(const Scratch& w, int n, int first, int end, int value_size, float scale) {
    for (int c = first; c < end; c += LANES) {
        const vec before = load(w.largest[0] + c);
        vec largest = before;
        for (int j = 0; j < n; ++j) largest = max(largest, load(w.scores[j] + c) * scale);
        const vec subtract = largest == -INFINITY ? vec{} : largest;  // of a query that has seen nothing yet
        vec total = load(w.total[0] + c);
        if (any(largest != before)) {
            const vec rescale = exp2(before - subtract);
            total *= rescale;
            for (int f = 0; f < value_size; ++f) store(w.sum[f] + c, load(w.sum[f] + c) * rescale);
            store(w.largest[0] + c, largest);
        }
        for (int j = 0; j < n; j += STEP<Unit>) {
            vec weight[2];
            for (int i = 0; i < STEP<Unit>; ++i) {
                weight[i] = exp2(rounded(load(w.scores[j + i] + c) * scale) - subtract);
                store(w.scores[j + i] + c, weight[i]);
                total += weight[i];
            }
            store_units(w.weights[j / STEP<Unit>] + c, weight[0], weight[1]);
        }
        store(w.total[0] + c, total);
    }
}

// An array of the caller: address and strides of batch, head and token.
struct Array {
    int64_t address, batch, head, token;

    template <class T>
    Rows<T> rows(int64_t b, int64_t h) const {
        return {reinterpret_cast<T*>(address) + b * batch + h * head, token};
    }
};

// Hands out scratch, or counts it.
struct Arena {
    char* memory;
    int64_t used = 0;

    template <class T>
    void place(Matrix<T>& matrix, int64_t rows, int64_t stride) {
        matrix = {memory ? reinterpret_cast<T*>(memory + used) : nullptr, stride};
        used += (rows * stride * int64_t(sizeof(T)) + 63) / 64 * 64;
    }
};

// Calls task(i, scratch of the thread) for i < count. False if there is no memory for the scratch. A problem says whether
// it is worth its threads.
template <class Scratch, class Problem, class F>
bool for_all(const Problem& p, int64_t count, F task) {
    const int threads = p.parallel() ? p.threads : 1;
    Arena counting{nullptr};
    Scratch().place(counting, p);
    const int64_t bytes = counting.used;
    const std::unique_ptr<char, void (*)(void*)> memory(
        static_cast<char*>(std::aligned_alloc(64, std::max<int64_t>(64, threads * bytes))), std::free);
    if (!memory) return false;
    advise_huge_pages(memory.get(), threads * bytes);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Arena arena{memory.get() + omp_get_thread_num() * bytes};
        std::memset(arena.memory, 0, bytes);
        Scratch scratch;
        scratch.place(arena, p);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; ++i) task(i, scratch);
    }
    return true;
}

}  // namespace attlas
