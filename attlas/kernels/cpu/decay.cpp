// Causal decayed linear attention, forward and backward.
//
//     S_t = lambda S_{t-1} + k_t v_t^T        o_t = q_t S_t        lambda = exp(-slope)
//
// Everything is one routine, the pass, over token streams x and y (D features) and z (E features) that carries a
// matrix S (D x E):
//
//     out_r = sum_{c <= r} lambda^(r-c) (x_r . y_c) z_c  +  lambda^(r+lead) x_r S          r, c = 0 .. n-1
//     S    <- sum_c lambda^(n-lead-c) y_c z_c^T          +  lambda^n S
//
//     o    x = q    y = k    z = v    S = state                   lead 1
//     dq   x = do   y = v    z = k    S = state^T                 lead 1
//     dv   x = k    y = q    z = do   S = d final_state           lead 0, time runs backwards; S ends as d state
//     dk   x = v    y = do   z = q    S = d final_state^T         lead 0, time runs backwards
//
// Where the outputs are averages, each is divided by the sum of its weights, x_r . sum_{c <= r} lambda^(r-c) y_c. That is
// one more column of S, for a z of ones, which is kept as a vector of its own.
//
// The lead is 0 backwards because S is then the gradient of the state *before* the token that follows: it is decayed
// already. The pass takes CHUNK tokens at a time with S in the first-level cache. All exponents of lambda are >= 0.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <new>
#include <type_traits>

#include <omp.h>

#include "simd.h"

namespace {

using namespace attlas;

// A register tile is TILE rows of 2 vectors: with its operands it fits 32 registers, or the 16 of AVX2 and SSE.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE = 8;
#else
constexpr int TILE = 4;
#endif
constexpr int CHUNK = 32;  // 32 measured faster than 64 and 128: the arithmetic above the diagonal grows with it
constexpr int PAD = 16;    // workspace rows are padded to this many floats, a multiple of LANES and of TILE
static_assert(PAD % LANES == 0 && PAD % TILE == 0 && CHUNK % PAD == 0);

constexpr int64_t WORTH_THREADS = 1 << 19;  // multiply-adds that take longer than waking the other threads
constexpr int64_t CACHES = 16 << 20;  // bytes of a result from which on it is written past the caches

int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

// lambda^tokens. Subnormals become 0: some processors take a hundred times longer over them.
float decay_over(float slope, int64_t tokens) {
    const float x = float(std::exp(-double(slope) * double(tokens)));
    return x < FLT_MIN ? 0.0f : x;
}

// Rows of features; a negative stride runs backwards in time.
template <class T>
struct Rows {
    T* first;
    int64_t stride;
    T* operator[](int64_t t) const { return first + t * stride; }
};

template <class T>
struct Stream {
    Rows<const T> x, y, z;
    Rows<T> out;
    int D, E, lead;
    float slope;
    int64_t length;
    float* totals;     // sums of the weights, by token; null if the outputs are not averages
    bool past_caches;  // out is too large to be found in a cache by whoever reads it
};

struct Workspace {
    float *x, *y_t, *z, *scores, *state, *sums, *powers;  // sums: of y, behind the state

    static int64_t state_floats(int64_t d, int64_t e) { return d * e + d; }

    static int64_t floats(int D, int E) {
        const int64_t d = padded(D), e = padded(E);
        return TILE * d + CHUNK * (d + e + TILE + 2) + state_floats(d, e);
    }

    Workspace(float* memory, int D, int E) {
        const int64_t d = padded(D), e = padded(E);
        x = memory;
        y_t = x + TILE * d;
        z = y_t + CHUNK * d;
        scores = z + CHUNK * e;
        state = scores + CHUNK * TILE;
        sums = state + d * e;
        powers = state + state_floats(d, e) + CHUNK;
    }

    // powers[-i] = lambda^i for i = 0 .. CHUNK; powers[i] = 0 for i = 1 .. CHUNK - 1, which is the causal mask.
    void set_slope(float slope) {
        std::fill(powers, powers + CHUNK, 0.0f);
        for (int i = 0; i <= CHUNK; ++i) powers[-i] = decay_over(slope, i);
    }
};

// acc[i][:] += sum_k a[i * a_row + k * a_step] * b[k * b_row + :]
template <int NV>
ATTLAS_INLINE void multiply_add(vec (&acc)[TILE][NV], const float* a, int64_t a_row, int64_t a_step, const float* b,
                                int64_t b_row, int n) {
    for (int k = 0; k < n; ++k) {
        vec row[NV];
        for (int j = 0; j < NV; ++j) row[j] = load(b + k * b_row + j * LANES);
        for (int i = 0; i < TILE; ++i)
            for (int j = 0; j < NV; ++j) acc[i][j] += a[i * a_row + k * a_step] * row[j];
    }
}

// Calls tile(column, vectors) over [0, n), n a multiple of LANES: two vectors at a time, and one if one is left.
template <class F>
ATTLAS_INLINE void for_column_tiles(int n, F tile) {
    int c = 0;
    for (; c + 2 * LANES <= n; c += 2 * LANES) tile(c, std::integral_constant<int, 2>());
    if (c < n) tile(c, std::integral_constant<int, 1>());
}

// Calls part(column) for vectors that cover [0, width). The last one overlaps the one before rather than end early.
template <class F>
ATTLAS_INLINE void for_vectors(int width, F part) {
    for (int c = 0; c < width; c += LANES) part(std::max(0, std::min(c, width - LANES)));
}

template <class T>
void pack(Rows<const T> tokens, int n, int width, float* rows) {
    for (int r = 0; r < n; ++r)
        for_vectors(width, [&](int c) { store(rows + r * padded(width) + c, load_first(tokens[r] + c, width - c)); });
}

// As pack, transposed: a column is a token.
template <class T>
void pack_columns(Rows<const T> tokens, int n, int width, float* columns) {
    for (int r = 0; r < n; r += LANES)
        for_vectors(width, [&](int c) {
            vec tile[LANES];
            for (int i = 0; i < LANES; ++i)
                tile[i] = r + i < n ? load_first(tokens[r + i] + c, width - c) : vec{};
            transpose(tile);
            for (int i = 0; i < LANES; ++i) store(columns + (c + i) * CHUNK + r, tile[i]);
        });
}

template <class T, int NV>
ATTLAS_INLINE void store_tile(Rows<T> out, int column, int rows, int width, bool past_caches,
                              const vec (&acc)[TILE][NV]) {
    if (rows >= TILE && width >= column + NV * LANES) {
        if constexpr (std::is_same_v<T, float>)
            if (past_caches) {
                for (int i = 0; i < TILE; ++i)
                    for (int j = 0; j < NV; ++j) stream(out[i] + column + j * LANES, acc[i][j]);
                return;
            }
        for (int i = 0; i < TILE; ++i)
            for (int j = 0; j < NV; ++j) store(out[i] + column + j * LANES, acc[i][j]);
        return;
    }
    for (int i = 0; i < TILE; ++i)
        for (int j = 0; j < NV; ++j)
            if (const int c = column + j * LANES; i < rows && c < width)
                store_first(out[i] + c, acc[i][j], width - c);
}

// Reads the n tokens from t on into the workspace's y_t and z, ready for advance().
template <class T>
void read_keys(const Stream<T>& s, Workspace& w, int64_t t, int n) {
    pack_columns<T>({s.y[t], s.y.stride}, n, s.D, w.y_t);
    pack<T>({s.z[t], s.z.stride}, n, s.E, w.z);
}

float sum_lanes(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

// What divides the outputs of the rows of a tile; 1 where there are no weights. Their scores are in the workspace.
template <class T>
void find_totals(const Stream<T>& s, const Workspace& w, const float* x, int64_t x_row, int64_t t, int r, int n,
                 float (&factors)[TILE]) {
    for (int i = 0; i < TILE; ++i) {
        factors[i] = 1;
        if (r + i >= n) continue;
        vec before = {}, within = {};
        for (int d = 0; d < s.D; d += LANES) before += load_first(x + i * x_row + d, s.D - d) * load(w.sums + d);
        for (int c = 0; c < std::min(r + TILE, n); c += LANES) within += load(w.scores + i * CHUNK + c);
        const float total = w.powers[-(r + i + s.lead)] * sum_lanes(before) + sum_lanes(within);
        s.totals[t + r + i] = total;
        if (total > 0) factors[i] = 1 / total;
    }
}

// Writes the outputs of the n tokens from t on, from the state before them.
template <class T>
void write_outputs(const Stream<T>& s, Workspace& w, int64_t t, int n) {
    const int D = s.D, E = s.E, d_row = padded(D), e_row = padded(E);
    for (int r = 0; r < n; r += TILE) {
        for (int64_t next = t + n + r; next < std::min(t + n + r + TILE, s.length); ++next) {
            prefetch(s.x[next], D);
            prefetch(s.y[next], D);
            prefetch(s.z[next], E);
        }
        const float* x = w.x;
        int64_t x_row = d_row;
        if (std::is_same_v<T, float> && n - r >= TILE) {
            x = reinterpret_cast<const float*>(s.x[t + r]);
            x_row = s.x.stride;
        } else {
            pack<T>({s.x[t + r], s.x.stride}, std::min(TILE, n - r), D, w.x);
        }
        const int visible = std::min(r + TILE, n);
        for_column_tiles((visible + LANES - 1) / LANES * LANES, [&](int c, auto vectors) {
            vec acc[TILE][vectors()] = {};
            multiply_add(acc, x, x_row, 1, w.y_t + c, CHUNK, D);
            for (int i = 0; i < TILE; ++i)
                for (int j = 0; j < vectors(); ++j) {
                    const int column = c + j * LANES;
                    store(w.scores + i * CHUNK + column, acc[i][j] * load(w.powers + column - (r + i)));
                }
        });
        float factors[TILE];
        if (s.totals) find_totals(s, w, x, x_row, t, r, n, factors);
        for_column_tiles(e_row, [&](int e, auto vectors) {
            vec acc[TILE][vectors()] = {};
            multiply_add(acc, x, x_row, 1, w.state + e, e_row, D);
            for (int i = 0; i < TILE; ++i)
                for (int j = 0; j < vectors(); ++j) acc[i][j] *= w.powers[-(r + i + s.lead)];
            multiply_add(acc, w.scores, CHUNK, 1, w.z + e, e_row, visible);
            if (s.totals)
                for (int i = 0; i < TILE; ++i)
                    for (int j = 0; j < vectors(); ++j) acc[i][j] *= factors[i];
            store_tile<T>({s.out[t + r], s.out.stride}, e, n - r, E, s.past_caches, acc);
        });
    }
}

// Moves the state past the n tokens in the workspace, whose z is decayed in place.
void advance(Workspace& w, int D, int E, int lead, int n, bool sums) {
    const int e_row = padded(E);
    const float decay = w.powers[-n];
    if (sums) {
        float weights[CHUNK] = {};
        for (int c = 0; c < n; ++c) weights[c] = w.powers[-(n - lead - c)];
        for (int d = 0; d < D; ++d) {
            vec sum = {};
            for (int c = 0; c < n; c += LANES) sum += load(weights + c) * load(w.y_t + d * CHUNK + c);
            w.sums[d] = decay * w.sums[d] + sum_lanes(sum);
        }
    }
    for (int c = 0; c < n; ++c)
        for (int e = 0; e < e_row; e += LANES) {
            float* const part = w.z + c * e_row + e;
            store(part, w.powers[-(n - lead - c)] * load(part));
        }
    for (int d = 0; d < D; d += TILE)
        for_column_tiles(e_row, [&](int e, auto vectors) {
            vec acc[TILE][vectors()];
            float* tile = w.state + d * e_row + e;
            for (int i = 0; i < TILE; ++i)
                for (int j = 0; j < vectors(); ++j) acc[i][j] = decay * load(tile + i * e_row + j * LANES);
            multiply_add(acc, w.y_t + d * CHUNK, CHUNK, 1, w.z + e, e_row, n);
            for (int i = 0; i < TILE; ++i)
                for (int j = 0; j < vectors(); ++j) store(tile + i * e_row + j * LANES, acc[i][j]);
        });
}

template <class T>
void run_tokens(const Stream<T>& s, Workspace& w, int64_t begin, int64_t end, bool outputs) {
    for (int64_t t = begin; t < end; t += CHUNK) {
        const int n = int(std::min<int64_t>(CHUNK, end - t));
        read_keys(s, w, t, n);
        if (outputs) write_outputs(s, w, t, n);
        advance(w, s.D, s.E, s.lead, n, s.totals);
    }
    if (s.past_caches) end_streaming();
}

}  // namespace

extern "C" {

// An array of four axes, the last one contiguous; strides in elements.
struct attlas_array {
    void* data;
    int64_t strides[3];
};

struct attlas_decay {
    int64_t batch, heads, tokens, key_size, value_size;
    const float* slopes;     // (heads)
    const int64_t* lengths;  // (batch), or null: tokens from lengths[b] on do not exist
    int32_t is_bf16, averages, threads;  // averages: the states have one more column, for values of 1
    float* totals;                       // (batch, heads, tokens) of averages
};
}

namespace {

using Array = attlas_array;
using Problem = attlas_decay;

struct Pass {
    const Array &x, &y, &z, &out;
    int D, E, lead;
    bool backwards;
    const Array& state;  // float (batch, heads, D, E), or (batch, heads, E, D) if transposed; zeros without data
    bool transposed;
    const Array* final_state;  // float (batch, heads, D, E); null if nobody wants it
};

template <class T>
Rows<T> rows_of(const Array& x, int64_t b, int64_t h) {
    return {static_cast<T*>(x.data) + b * x.strides[0] + h * x.strides[1], x.strides[2]};
}

int64_t length_of(const Problem& p, int64_t b) {
    return p.lengths ? std::clamp<int64_t>(p.lengths[b], 0, p.tokens) : p.tokens;
}

template <class T>
Stream<T> stream_of(const Problem& p, const Pass& pass, int64_t b, int64_t h) {
    const int64_t length = length_of(p, b);
    const auto out = rows_of<T>(pass.out, b, h);
    const bool past_caches = p.batch * p.heads * p.tokens * pass.E * int64_t(sizeof(T)) > CACHES &&
                             can_stream(out[0]) && can_stream(out[1]);
    const auto in_order = [&](auto rows) {
        return pass.backwards ? decltype(rows){rows[length - 1], -rows.stride} : rows;
    };
    return {in_order(rows_of<const T>(pass.x, b, h)),
            in_order(rows_of<const T>(pass.y, b, h)),
            in_order(rows_of<const T>(pass.z, b, h)),
            in_order(out),
            pass.D,
            pass.E,
            pass.lead,
            p.slopes[h],
            length,
            p.averages ? p.totals + (b * p.heads + h) * p.tokens : nullptr,
            past_caches};
}

void read_state(const Pass& pass, int64_t b, int64_t h, Workspace& w, bool sums) {
    const int e_row = padded(pass.E);
    float* const state = w.state;
    std::fill_n(state, Workspace::state_floats(padded(pass.D), e_row), 0.0f);
    if (!pass.state.data) return;
    const auto rows = rows_of<const float>(pass.state, b, h);
    for (int d = 0; d < pass.D; ++d)
        for (int e = 0; e < pass.E; ++e) state[d * e_row + e] = pass.transposed ? rows[e][d] : rows[d][e];
    if (sums)
        for (int d = 0; d < pass.D; ++d) w.sums[d] = rows[d][pass.E];
}

// Into how many segments to cut each stream so that the threads finish soonest: all segments run the pass, and all
// but the last run its state part beforehand, a third of the work. A segment has four chunks or more.
int count_segments(int64_t streams, int64_t tokens, int threads) {
    const auto rounds = [&](int64_t tasks) { return double((tasks + threads - 1) / threads); };
    int best = 1;
    double least = rounds(streams);
    for (int g = 2; g <= std::min<int64_t>(2 * threads, tokens / (4 * CHUNK)); ++g) {
        const double cost = (rounds(streams * g) + rounds(streams * (g - 1)) / 3) / g;
        if (cost < least) least = cost, best = g;
    }
    return best;
}

int64_t segment_start(int64_t segment, int segments, int64_t tokens) {
    const int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
    return std::min(chunks * segment / segments * CHUNK, tokens);
}

// Runs the passes over all sequences and heads. False if there is no memory for the workspace.
template <class T>
bool run(const Problem& p, std::initializer_list<Pass> passes) {
    const int64_t heads = p.batch * p.heads, streams = heads * int64_t(passes.size());
    const int64_t D = padded(p.key_size), E = padded(p.value_size);
    const bool parallel = streams * p.tokens * D * E >= WORTH_THREADS;
    const int threads = parallel ? p.threads : 1;
    const int segments = count_segments(streams, p.tokens, threads);

    for (const Pass& pass : passes) advise_huge_pages(pass.out.data, heads * p.tokens * pass.E * sizeof(T));

    const int64_t per_thread = std::max(Workspace::floats(D, E), Workspace::floats(E, D)), per_state = Workspace::state_floats(std::max(D, E), std::min(D, E));
    const int64_t floats = threads * per_thread + streams * (segments - 1) * per_state;
    constexpr std::align_val_t line{64};
    const auto release = [](float* memory) { ::operator delete[](memory, line); };
    const std::unique_ptr<float[], decltype(release)> memory(new (line, std::nothrow) float[floats](), release);
    if (!memory) return false;
    float* const segment_states = memory.get() + threads * per_thread;

    // Calls task(stream, pass, b, h, segment, memory of the thread) for the first `count` segments of every stream.
    const auto for_segments = [&](int count, auto task) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (parallel)
        for (int64_t i = 0; i < streams * count; ++i) {
            const int64_t stream = i / count, head = stream % heads;
            float* const thread_memory = memory.get() + omp_get_thread_num() * per_thread;
            task(stream, passes.begin()[stream / heads], head / p.heads, head % p.heads, i % count, thread_memory);
        }
    };
    const auto state_of = [&](int64_t stream, int64_t segment) {
        return segment_states + (stream * (segments - 1) + segment) * per_state;
    };

    for_segments(segments - 1, [&](int64_t stream, auto& pass, int64_t b, int64_t h, int64_t segment, float* own) {
        const auto s = stream_of<T>(p, pass, b, h);
        Workspace w(own, s.D, s.E);
        w.state = state_of(stream, segment);
        w.sums = w.state + padded(s.D) * padded(s.E);
        w.set_slope(s.slope);
        const int64_t begin = segment_start(segment, segments, s.length);
        run_tokens(s, w, begin, segment_start(segment + 1, segments, s.length), false);
    });

    for_segments(segments, [&](int64_t stream, auto& pass, int64_t b, int64_t h, int64_t segment, float* own) {
        const auto s = stream_of<T>(p, pass, b, h);
        Workspace w(own, s.D, s.E);
        w.set_slope(s.slope);
        read_state(pass, b, h, w, s.totals);
        int64_t begin = 0;
        for (int64_t g = 0; g < segment; ++g) {
            const int64_t end = segment_start(g + 1, segments, s.length);
            const float decay = decay_over(s.slope, end - begin);
            const float* gained = state_of(stream, g);
            const int64_t floats = Workspace::state_floats(padded(s.D), padded(s.E));
            for (int64_t j = 0; j < floats; ++j) w.state[j] = decay * w.state[j] + gained[j];
            begin = end;
        }
        run_tokens(s, w, begin, segment_start(segment + 1, segments, s.length), true);

        if (segment < segments - 1) return;
        if (pass.final_state) {
            const auto rows = rows_of<float>(*pass.final_state, b, h);
            for (int d = 0; d < s.D; ++d) std::copy_n(w.state + d * padded(s.E), s.E, rows[d]);
            if (s.totals)
                for (int d = 0; d < s.D; ++d) rows[d][s.E] = w.sums[d];
        }
        const auto out = rows_of<T>(pass.out, b, h);
        for (int64_t t = s.length; t < p.tokens; ++t) std::fill_n(out[t], s.E, T{});
    });
    return true;
}

// One token of one head by the recurrence, the state in place.
template <class T>
void step(const T* q, const T* k, const T* v, T* o, Rows<float> state, float decay, int D, int E) {
    const auto columns = [&](int e, auto vectors) {
        const int width = E - e;
        vec value[vectors()], acc[vectors()] = {};
        for (int j = 0; j < vectors(); ++j) value[j] = load_first(v + e + j * LANES, width - j * LANES);
        for (int d = 0; d < D; ++d) {
            const float key = to_float(k[d]), query = to_float(q[d]);
            float* const row = state[d] + e;
            for (int j = 0; j < vectors(); ++j) {
                const vec after = decay * load_first(row + j * LANES, width - j * LANES) + key * value[j];
                store_first(row + j * LANES, after, width - j * LANES);
                acc[j] += query * after;
            }
        }
        for (int j = 0; j < vectors(); ++j) store_first(o + e + j * LANES, acc[j], width - j * LANES);
    };
    int e = 0;
    for (; e + 4 * LANES <= E; e += 4 * LANES) columns(e, std::integral_constant<int, 4>());
    for (; e < E; e += LANES) columns(e, std::integral_constant<int, 1>());
}

// Moves the sums of the keys, the last column of the state, on to the token and divides its output.
template <class T>
void divide(const T* q, const T* k, T* o, Rows<float> state, float decay, int D, int E, float& total) {
    total = 0;
    for (int d = 0; d < D; ++d) {
        float& sum = state[d][E];
        sum = decay * sum + to_float(k[d]);
        total += to_float(q[d]) * sum;
    }
    for (int e = 0; e < E && total > 0; e += LANES) store_first(o + e, load_first(o + e, E - e) / total, E - e);
}

template <class T>
void run_steps(const Problem& p, const Array& q, const Array& k, const Array& v, const Array& state, const Array& o,
               const Array& final_state) {
    const int D = p.key_size, E = p.value_size;
    advise_huge_pages(final_state.data, p.batch * p.heads * D * E * sizeof(float));
#pragma omp parallel for collapse(2) num_threads(p.threads) if (p.batch * p.heads * D * E >= WORTH_THREADS)
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.heads; ++h) {
            const auto S = rows_of<float>(final_state, b, h);
            for (int d = 0; d < D; ++d)
                if (state.data) std::copy_n(rows_of<const float>(state, b, h)[d], E + p.averages, S[d]);
                else std::fill_n(S[d], E + p.averages, 0.0f);
            const auto q_h = rows_of<const T>(q, b, h), k_h = rows_of<const T>(k, b, h);
            const auto v_h = rows_of<const T>(v, b, h);
            const auto o_h = rows_of<T>(o, b, h);
            const int64_t length = length_of(p, b);
            const float decay = decay_over(p.slopes[h], 1);
            for (int64_t t = 0; t < length; ++t) {
                step(q_h[t], k_h[t], v_h[t], o_h[t], S, decay, D, E);
                if (p.averages)
                    divide(q_h[t], k_h[t], o_h[t], S, decay, D, E, p.totals[(b * p.heads + h) * p.tokens + t]);
            }
            for (int64_t t = length; t < p.tokens; ++t) std::fill_n(o_h[t], E, T{});
        }
}

template <class T>
bool forward(const Problem& p, const Array* arrays) {
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &state = arrays[3];
    const Array &o = arrays[4], &final_state = arrays[5];
    const int D = p.key_size, E = p.value_size;
    if (2 * p.tokens >= TILE) return run<T>(p, {{q, k, v, o, D, E, 1, false, state, false, &final_state}});
    run_steps<T>(p, q, k, v, state, o, final_state);  // too few tokens to fill half a register tile
    return true;
}

template <class T>
bool backward(const Problem& p, const Array* arrays) {
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &state = arrays[3];
    const Array &grad_o = arrays[4], &grad_final = arrays[5];
    const Array &grad_q = arrays[6], &grad_k = arrays[7], &grad_v = arrays[8], &grad_state = arrays[9];
    const int D = p.key_size, E = p.value_size;
    return run<T>(p, {{grad_o, v, k, grad_q, E, D, 1, false, state, true, nullptr},
                      {k, q, grad_o, grad_v, D, E, 0, true, grad_final, false, &grad_state},
                      {v, grad_o, q, grad_k, E, D, 0, true, grad_final, true, nullptr}});
}

}  // namespace

// Both write their results in full and return 0, or 1 if there is no memory for the workspace.
// Tokens are bf16 or float (batch, heads, tokens, size); states are float (batch, heads, key_size, value_size).
extern "C" {

// arrays: q, k, v, state (no data for zeros); results o, final state.
int attlas_decay_forward(const Problem* p, const Array* arrays) {
    return !(p->is_bf16 ? forward<bf16>(*p, arrays) : forward<float>(*p, arrays));
}

// arrays: q, k, v, state (no data for zeros), gradients of o and final state; results gradients of q, k, v, state.
int attlas_decay_backward(const Problem* p, const Array* arrays) {
    return !(p->is_bf16 ? backward<bf16>(*p, arrays) : backward<float>(*p, arrays));
}
}
