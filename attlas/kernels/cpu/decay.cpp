#include <algorithm>
#include <cfloat>
#include <cmath>
#include <new>

#include <omp.h>

#include "simd.h"

namespace attlas {
namespace {

#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int ROWS = 4;
#else
constexpr int ROWS = 8;
#endif
#ifndef CHUNK_
#define CHUNK_ 64
#endif
constexpr int CHUNK = CHUNK_;
constexpr int PAD = 16;

constexpr int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

float decayed(float slope, int64_t tokens) {
    float x = float(std::exp(-double(slope) * double(tokens)));
    return x < FLT_MIN ? 0.0f : x;
}

template <class T>
struct Rows {
    T* data;
    int64_t stride;
    T* operator[](int64_t t) const { return data + t * stride; }
};

template <class T>
struct Stream {
    Rows<const T> x, y, z;
    Rows<T> out;
    int D, E, lead;
    const float* state;
    int64_t state_row, state_col;
    float* final_state;
    float slope;
    int64_t length;
};

struct Workspace {
    float *x, *y, *yt, *z, *scores, *state, *table;
    static size_t floats(int D, int E) {
        size_t d = padded(D), e = padded(E);
        return CHUNK * (3 * d + e + ROWS + 2 + 14) + d * e + 64;
    }
    Workspace(float* base, int D, int E) {
        size_t d = padded(D), e = padded(E);
        x = base; y = x + CHUNK * d; yt = y + CHUNK * d; z = yt + CHUNK * d; scores = z + CHUNK * e;
        state = scores + CHUNK * ROWS; table = state + d * e;
    }
};

template <int NV>
ATTLAS_INLINE void multiply_add(vec (&acc)[ROWS][NV], const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row, int n) {
    for (int k = 0; k < n; ++k) {
        vec row[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) row[j] = load(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < NV; ++j) acc[i][j] += a[i * a_row] * row[j];
        a += a_col;
        b += b_row;
    }
}

template <class F>
ATTLAS_INLINE void column_tiles(int n, F f) {
    int c = 0;
    for (; c + 2 * LANES <= n; c += 2 * LANES) f(c, std::integral_constant<int, 2>());
    for (; c < n; c += LANES) f(c, std::integral_constant<int, 1>());
}

template <class T>
ATTLAS_INLINE vec load_some(const T* p, int n) { return n >= LANES ? load(p) : load_part(p, n); }
template <class T>
ATTLAS_INLINE void store_some(T* p, vec x, int n) { if (n >= LANES) store(p, x); else store_part(p, x, n); }

template <class T>
void pack(Rows<const T> src, int64_t t0, int m, int width, float* dst) {
    int ld = padded(width);
    for (int r = 0; r < m; ++r)
        for (int c = 0; c < width; c += LANES) store(dst + r * ld + c, load_some(src[t0 + r] + c, width - c));
}

template <class T>
void pack_keys(Rows<const T> src, int64_t t0, int m, int width, const float* weight, float* dst, float* dst_t) {
    int ld = padded(width);
    for (int r = 0; r < m; r += LANES)
        for (int c = 0; c < width; c += LANES) {
            vec tile[LANES];
            for (int i = 0; i < LANES; ++i) {
                tile[i] = r + i < m ? load_some(src[t0 + r + i] + c, width - c) : vec{};
                store(dst + (r + i) * ld + c, tile[i] * weight[r + i]);
            }
            if (dst_t) {
            transpose(tile);
            for (int i = 0; i < LANES; ++i) store(dst_t + (c + i) * CHUNK + r, tile[i]);
            }
        }
}

template <class T>
void chunk(const Stream<T>& s, Workspace& w, int64_t t0, int m, bool outputs) {
    const float* power = w.table + CHUNK;  // power[-i] = lambda^i, 0 for i < 0
    const int D = s.D, E = s.E, d_ld = padded(D), e_ld = padded(E);
    pack_keys(s.y, t0, m, D, power - (m - s.lead), w.y, outputs ? w.yt : nullptr);
    pack(s.z, t0, m, E, w.z);
    if (outputs) {
        pack(s.x, t0, m, D, w.x);
        for (int r0 = 0; r0 < m; r0 += ROWS) {
            const float* x = w.x + r0 * d_ld;
            const int visible = std::min(r0 + ROWS, m);
            column_tiles((visible + LANES - 1) / LANES * LANES, [&](int c0, auto nv) {
                vec acc[ROWS][nv()] = {};
                multiply_add(acc, x, d_ld, 1, w.yt + c0, CHUNK, D);
                for (int i = 0; i < ROWS; ++i)
                    for (int j = 0; j < nv(); ++j)
                        store(w.scores + i * CHUNK + c0 + j * LANES, acc[i][j] * load(power - (r0 + i) + c0 + j * LANES));
            });
            column_tiles(e_ld, [&](int e0, auto nv) {
                vec acc[ROWS][nv()] = {};
                multiply_add(acc, x, d_ld, 1, w.state + e0, e_ld, D);
                for (int i = 0; i < ROWS; ++i)
                    for (int j = 0; j < nv(); ++j) acc[i][j] *= power[-(r0 + i + s.lead)];
                multiply_add(acc, w.scores, CHUNK, 1, w.z + e0, e_ld, visible);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
                    for (int j = 0; j < nv(); ++j)
                        if (r0 + i < m && e0 + j * LANES < E)
                            store_some(s.out[t0 + r0 + i] + e0 + j * LANES, acc[i][j], E - e0 - j * LANES);
            });
        }
    }
    const float decay = power[-m];
    for (int d0 = 0; d0 < d_ld; d0 += ROWS)
        column_tiles(e_ld, [&](int e0, auto nv) {
            vec acc[ROWS][nv()];
            float* state = w.state + d0 * e_ld + e0;
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < nv(); ++j) acc[i][j] = decay * load(state + i * e_ld + j * LANES);
            multiply_add(acc, w.y + d0, 1, d_ld, w.z + e0, e_ld, m);
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < nv(); ++j) store(state + i * e_ld + j * LANES, acc[i][j]);
        });
}

template <class T>
void run(const T* q, const T* k, const T* v, T* o, const float* slopes, int BH, int64_t N, int D, int E, int threads) {
    size_t fl = Workspace::floats(D, E);
    float* all = new (std::align_val_t(64)) float[fl * threads]();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int t = 0; t < BH; ++t) {
        Workspace w(all + fl * omp_get_thread_num(), D, E);
        for (int i = 0; i <= CHUNK; ++i) w.table[CHUNK - i] = decayed(slopes[t], i);
        std::fill(w.state, w.state + padded(D) * padded(E), 0.f);
        Stream<T> s{{q + t * N * D, D}, {k + t * N * D, D}, {v + t * N * E, E}, {o + t * N * E, E}, D, E, 1, nullptr, 0, 0, nullptr, slopes[t], N};
        for (int64_t t0 = 0; t0 < N; t0 += CHUNK) chunk(s, w, t0, int(std::min<int64_t>(CHUNK, N - t0)), true);
    }
    ::operator delete[](all, std::align_val_t(64));
}
}  // namespace
}  // namespace attlas
extern "C" void proto(const void* q, const void* k, const void* v, void* o, const float* s, int BH, int64_t N, int D, int E, int threads, int bf) {
    using namespace attlas;
    if (bf) run((const bf16*)q, (const bf16*)k, (const bf16*)v, (bf16*)o, s, BH, N, D, E, threads);
    else run((const float*)q, (const float*)k, (const float*)v, (float*)o, s, BH, N, D, E, threads);
}
