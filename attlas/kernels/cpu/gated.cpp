// Linear attention whose state is gated, and the delta rule, forward and backward.
//
//     S_t = a_t S_{t-1} + k_t v_t^T                              o_t = q_t S_t        gated, a_t = exp(g_t)
//     S' = a_t S_{t-1},  S_t = S' + k_t beta_t (v_t - k_t S')^T   o_t = q_t S_t        delta
//
// Tokens are taken one after the other with a tile of the state in registers, CHUNK tokens long: three multiply-adds
// per token and number of the state, and no limit to how much a gate forgets. The form with products of chunks needs
// two, but also scores and, for gates by channel, their exponentials pair by pair.
//
// Gates near 1 are what long memories are made of, and rounded there they would be off by as much at every token. So
// not a but e = a - 1 is kept, and a S is S + e S.
//
// Everything gated is one routine, the pass, over token streams x, y (rows of the state) and z (columns), with gates by
// row or by column:
//
//     S <- a_t S + y_t z_t^T        out_t = x_t S
//
//     o    x = q    y = k    z = v    gates by row       S = state
//     dq   x = do   y = v    z = k    gates by column    S = state^T
//     dv   x = k    y = q    z = do   gates by row       S = d final       time backwards, gate behind the output
//     dk   x = v    y = do   z = q    gates by column    S = d final^T     time backwards, gate behind the output
//
// and dg_t = dg_{t+1} + q_t dq_t - k_t dk_t by channel, from <S_N, d final> behind the last token.
//
// The delta rule is the gated form with the stored differences w as values, once they are known: they and their
// gradients each take a recurrence of their own, the rest are passes. With u_t = k_t S', dw from that recurrence and
// du = -beta dw,
//
//     dq = do S      dk = w R + du S - 2 (du w) k      R: gradient of S, the pass with y z^T = do q^T + du k^T
//     dg_t = dg_{t+1} + q dq - k dk + 2 u du

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "simd.h"

namespace {

using namespace attlas;

// A register tile is ROWS rows of 2 vectors: with its operands it fits 32 registers, or the 16 of AVX2 and SSE.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif
constexpr int CHUNK = 32;  // tokens whose rows stay in the first-level cache
constexpr int PAD = 16;    // workspace rows are padded to this many floats, a multiple of LANES and of ROWS
static_assert(PAD % LANES == 0 && PAD % ROWS == 0);
constexpr int64_t WORTH_THREADS = 1 << 19;  // multiply-adds that take longer than waking the other threads
constexpr float LOG2_E = 1.44269504f;

int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

struct Problem {
    int64_t batch, heads, tokens, key_size, value_size, gates;  // gates: per token and head, 1 or key_size
    int32_t is_bf16, reversed, threads;  // reversed: time runs from the last token to the first

    int64_t streams() const { return batch * heads; }
};

struct Array {
    int64_t address, batch, head, token;  // strides in elements
};

// The rows of one sequence and head in the order of a pass.
template <class Byte>
struct Rows {
    Byte* first = nullptr;
    int64_t stride = 0;  // bytes
    bool is_bf16 = false;

    Rows() = default;
    Rows(const Problem& p, const Array& array, int64_t stream, bool is_bf16, bool reversed) : is_bf16(is_bf16) {
        const int64_t size = is_bf16 ? sizeof(bf16) : sizeof(float);
        stride = array.token * size;
        const int64_t offset = stream / p.heads * array.batch + stream % p.heads * array.head;
        first = reinterpret_cast<Byte*>(array.address) + offset * size;
        if (reversed) first += (p.tokens - 1) * stride, stride = -stride;
    }
    template <class T>
    auto row(int64_t t) const {
        return reinterpret_cast<std::conditional_t<std::is_const_v<Byte>, const T*, T*>>(first + t * stride);
    }
    ATTLAS_INLINE_MEMBER vec read(int64_t t, int64_t column, int64_t left) const {
        return is_bf16 ? load_first(row<bf16>(t) + column, int(left)) : load_first(row<float>(t) + column, int(left));
    }
};

using Tokens = Rows<const char>;
using Results = Rows<char>;

// Calls part(row, column, left) for vectors that cover n rows of a width; left is what exists from the column on.
template <class F>
ATTLAS_INLINE void for_vectors(int n, int64_t width, F part) {
    const int64_t whole = width / LANES * LANES;
    for (int i = 0; i < n; ++i) {
        for (int64_t c = 0; c < whole; c += LANES) part(i, c, LANES);
        if (whole < width) part(i, whole, int(width - whole));
    }
}

template <class T, class F>
ATTLAS_INLINE void pack_as(const Tokens& tokens, int64_t t, int n, int64_t first_column, int64_t width, float* rows,
                           int64_t stride, F change) {
    for_vectors(n, width, [&](int i, int64_t c, int left) {
        store(rows + i * stride + c, change(load_first(tokens.row<T>(t + i) + first_column + c, left)));
    });
}

void pack(const Tokens& tokens, int64_t t, int n, int64_t first_column, int64_t width, float* rows, int64_t stride) {
    const auto as_it_is = [](vec x) { return x; };
    if (tokens.is_bf16) pack_as<bf16>(tokens, t, n, first_column, width, rows, stride, as_it_is);
    else pack_as<float>(tokens, t, n, first_column, width, rows, stride, as_it_is);
}

// e = exp(g) - 1 of the gates; one per token becomes one for every channel.
void pack_gates(const Tokens& gates, bool one, int64_t t, int n, int64_t first_column, int64_t width, float* rows,
                int64_t stride) {
    const auto change = [](vec g) { return exp2_less_1(g * LOG2_E); };
    if (!one) return pack_as<float>(gates, t, n, first_column, width, rows, stride, change);
    for (int i = 0; i < n; ++i) {
        const vec e = change(spread(*gates.row<float>(t + i)));
        for (int64_t c = 0; c < width; c += LANES) store(rows + i * stride + c, e);
    }
}

template <class T>
void write_as(const Results& results, bool adds, int64_t t, int n, int64_t first_column, int64_t width,
              const float* rows, int64_t stride) {
    for_vectors(n, width, [&](int i, int64_t c, int left) {
        T* const to = results.row<T>(t + i) + first_column + c;
        const vec value = load(rows + i * stride + c);
        store_first(to, adds ? value + load_first(to, left) : value, left);
    });
}

void write(const Results& results, bool adds, int64_t t, int n, int64_t first_column, int64_t width, const float* rows,
           int64_t stride) {
    if (results.is_bf16) write_as<bf16>(results, adds, t, n, first_column, width, rows, stride);
    else write_as<float>(results, adds, t, n, first_column, width, rows, stride);
}

// Calls tile(column, vectors) over [0, width): two vectors at a time, and one if one is left.
template <class F>
ATTLAS_INLINE void for_column_tiles(int64_t width, F tile) {
    int64_t c = 0;
    for (; c + LANES < width; c += 2 * LANES) tile(c, std::integral_constant<int, 2>());
    if (c < width) tile(c, std::integral_constant<int, 1>());
}

// A state (rows, columns) in memory, or its transpose; nothing without data.
struct State {
    float* data = nullptr;
    int64_t row = 0, column = 0;  // strides

    State() = default;
    State(const Problem& p, const Array& array, int64_t stream, bool transposed) {
        if (!array.address) return;
        data = reinterpret_cast<float*>(array.address) + stream / p.heads * array.batch + stream % p.heads * array.head;
        row = transposed ? 1 : array.token;
        column = transposed ? array.token : 1;
    }
    void read(int64_t rows, int64_t first_column, int64_t columns, float* to, int64_t stride) const {
        std::fill_n(to, padded(rows) * stride, 0.0f);
        if (!data) return;
        for (int64_t r = 0; r < rows; ++r)
            if (column == 1) std::copy_n(data + r * row + first_column, columns, to + r * stride);
            else
                for (int64_t c = 0; c < columns; ++c) to[r * stride + c] = data[r * row + (first_column + c) * column];
    }
    void write(int64_t rows, int64_t first_column, int64_t columns, const float* from, int64_t stride) const {
        if (data)  // never a transpose
            for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * stride, columns, data + r * row + first_column);
    }
};

struct Workspace {
    float *x, *y, *gates, *z, *out, *state;
    int64_t rows, columns;  // padded

    static int64_t floats(int64_t rows, int64_t columns) {
        const int64_t r = padded(rows), c = padded(columns);
        return (CHUNK + 1) * (2 * r + std::max(r, c) + 2 * c) + r * c;
    }
    Workspace(float* memory, int64_t rows_, int64_t columns_) : rows(padded(rows_)), columns(padded(columns_)) {
        x = memory;
        y = x + (CHUNK + 1) * rows;
        gates = y + (CHUNK + 1) * rows;
        z = gates + (CHUNK + 1) * std::max(rows, columns);
        out = z + (CHUNK + 1) * columns;
        state = out + (CHUNK + 1) * columns;
    }
};

enum Side { BY_ROW, BY_COLUMN };

struct Pass {
    Tokens x, y, z, gates;
    bool one_gate;
    Side side;
    int64_t rows, columns;
    bool gate_behind = false, adds = false;
    Results out = {};
    State start = {}, end = {};

    Pass& behind() { return gate_behind = true, *this; }
    Pass& adding() { return adds = true, *this; }
    Pass& from(const State& state) { return start = state, *this; }
    Pass& to(const Results& results, const State& state = {}) { return out = results, end = state, *this; }
};

template <Side SIDE, bool BEHIND, int NV>
ATTLAS_INLINE void run_tile(const Workspace& w, int64_t r0, int64_t c0, int n) {
    vec s[ROWS][NV];
    float* const state = w.state + r0 * w.columns + c0;
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < NV; ++j) s[r][j] = load(state + r * w.columns + j * LANES);
    for (int i = 0; i < n; ++i) {
        const float *const x = w.x + i * w.rows + r0, *const y = w.y + i * w.rows + r0;
        float* const out = w.out + i * w.columns + c0;
        vec z[NV], sum[NV], gate[NV];
        for (int j = 0; j < NV; ++j) {
            z[j] = load(w.z + i * w.columns + c0 + j * LANES);
            sum[j] = load(out + j * LANES);
            if (SIDE == BY_COLUMN) gate[j] = load(w.gates + i * w.columns + c0 + j * LANES);
        }
        for (int r = 0; r < ROWS; ++r)
            for (int j = 0; j < NV; ++j) {
                const vec e = SIDE == BY_ROW ? spread(w.gates[i * w.rows + r0 + r]) : gate[j];
                if (!BEHIND) s[r][j] += e * s[r][j];
                s[r][j] += y[r] * z[j];
                sum[j] += x[r] * s[r][j];
                if (BEHIND) s[r][j] += e * s[r][j];
            }
        for (int j = 0; j < NV; ++j) store(out + j * LANES, sum[j]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < NV; ++j) store(state + r * w.columns + j * LANES, s[r][j]);
}

template <Side SIDE, bool BEHIND>
void run_chunk(const Workspace& w, int64_t rows, int64_t columns, int n) {
    for_column_tiles(columns, [&](int64_t c, auto vectors) {
        for (int64_t r = 0; r < rows; r += ROWS) run_tile<SIDE, BEHIND, vectors()>(w, r, c, n);
    });
}

// Columns [first, first + columns) of a pass over all tokens.
void run_pass(const Pass& p, int64_t tokens, int64_t first, int64_t columns, float* memory) {
    const Workspace w(memory, p.rows, columns);
    p.start.read(p.rows, first, columns, w.state, w.columns);
    const auto chunk = p.side == BY_ROW ? (p.gate_behind ? run_chunk<BY_ROW, true> : run_chunk<BY_ROW, false>)
                                        : (p.gate_behind ? run_chunk<BY_COLUMN, true> : run_chunk<BY_COLUMN, false>);
    for (int64_t t = 0; t < tokens; t += CHUNK) {
        const int n = int(std::min<int64_t>(CHUNK, tokens - t));
        pack(p.x, t, n, 0, p.rows, w.x, w.rows);
        pack(p.y, t, n, 0, p.rows, w.y, w.rows);
        pack(p.z, t, n, first, columns, w.z, w.columns);
        if (p.side == BY_ROW) pack_gates(p.gates, p.one_gate, t, n, 0, p.rows, w.gates, w.rows);
        else pack_gates(p.gates, p.one_gate, t, n, first, columns, w.gates, w.columns);
        std::fill_n(w.out, n * w.columns, 0.0f);
        chunk(w, p.rows, columns, n);
        write(p.out, p.adds, t, n, first, columns, w.out, w.columns);
    }
    p.end.write(p.rows, first, columns, w.state, w.columns);
}

// Calls task(stream, first column, columns, memory of the thread) over all columns of all streams, cut up where there
// are too few streams for the threads. False if there is no memory.
template <class F>
bool for_columns(const Problem& p, int64_t rows, int64_t columns, F task) {
    const bool parallel = p.streams() * p.tokens * rows * columns >= WORTH_THREADS;
    const int threads = parallel ? p.threads : 1;
    const int64_t width = p.streams() < 2 * threads ? 2 * LANES : columns;
    const int64_t parts = (columns + width - 1) / width, floats = Workspace::floats(rows, width);
    constexpr std::align_val_t line{64};
    const auto release = [](float* memory) { ::operator delete[](memory, line); };
    const std::unique_ptr<float[], decltype(release)> memory(new (line, std::nothrow) float[threads * floats](),
                                                             release);
    if (!memory) return false;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (parallel)
    for (int64_t i = 0; i < p.streams() * parts; ++i) {
        const int64_t first = i % parts * width;
        task(i / parts, first, std::min(width, columns - first), memory.get() + omp_get_thread_num() * floats);
    }
    return true;
}

// The passes that make(stream) gives, one after the other, over all streams.
template <class F>
bool run_passes(const Problem& p, int64_t rows, int64_t columns, F make) {
    return for_columns(p, rows, columns, [&](int64_t stream, int64_t first, int64_t width, float* memory) {
        for (const Pass& pass : make(stream)) run_pass(pass, p.tokens, first, width, memory);
    });
}

// The arrays of one stream.
struct Reader {
    const Problem& p;
    int64_t stream;
    bool reversed = false;

    Tokens in(const Array& array) const { return {p, array, stream, bool(p.is_bf16), reversed}; }
    Tokens wide(const Array& array) const { return {p, array, stream, false, reversed}; }
    Results out(const Array& array) const { return {p, array, stream, bool(p.is_bf16), reversed}; }
    Results wide_out(const Array& array) const { return {p, array, stream, false, reversed}; }
    State state(const Array& array, bool transposed = false) const { return {p, array, stream, transposed}; }
    Pass pass(const Array& x, const Array& y, const Array& z, const Array& gates, Side side) const {
        const bool rows_are_keys = side == BY_ROW;
        return {in(x), in(y), in(z), wide(gates), p.gates == 1, side, rows_are_keys ? p.key_size : p.value_size,
                rows_are_keys ? p.value_size : p.key_size};
    }
};

float sum_lanes(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

// Gradients of the gates from behind the last token on: running sums of q dq - k dk + more(t).
template <class F>
void add_up_gates(const Problem& p, const Reader& r, const Array& q, const Array& k, const Array& dq, const Array& dk,
                  const Array& final_state, const Array& grad_final, const Array& out, F more) {
    const Tokens query = r.in(q), key = r.in(k), grad_query = r.wide(dq), grad_key = r.wide(dk);
    const Results result = r.wide_out(out);
    const State end = r.state(final_state), grad_end = r.state(grad_final);
    float whole = 0;
    for (int64_t c = 0; c < p.key_size; c += LANES) {
        vec sum = {}, lost = {};
        if (end.data && grad_end.data)
            for (int lane = 0; lane < std::min<int64_t>(LANES, p.key_size - c); ++lane)
                for (int64_t e = 0; e < p.value_size; ++e)
                    sum[lane] += end.data[(c + lane) * end.row + e] * grad_end.data[(c + lane) * grad_end.row + e];
        for (int64_t t = p.tokens - 1; t >= 0; --t) {
            const int left = int(p.key_size - c);
            const vec change = query.read(t, c, left) * grad_query.read(t, c, left) -
                               key.read(t, c, left) * grad_key.read(t, c, left);
            // The sum telescopes over the whole sequence, so what rounding loses of it is carried along.
            const vec term = change - lost, next = sum + term;
            lost = (next - sum) - term;
            sum = next;
            if (p.gates != 1) {
                store_first(result.row<float>(t) + c, sum, left);
                continue;
            }
            float* const gate = result.row<float>(t);
            if (c == 0) *gate = whole += more(t);
            *gate += sum_lanes(sum);
        }
    }
}

// What a token stores under the delta rule: one routine for the forward recurrence and for the gradients of what is
// stored, which run backwards in time,
//
//     u = a k S      w = beta (v - u)      S <- a S + k w      o = q S
//     R <- R + q do      dw = k R      R <- a (R - beta k dw)
//
// Each token's products with the next token's rows are taken while the state is at hand.
struct Delta {
    Tokens q, k, v, beta, gates;  // v: do of the gradients
    Results out;                  // o; or u where it is recalled; or dw
    State start, end;
};

enum class Want { OUTPUT, RECALL, GRADIENT };

constexpr int UNROLL = 4;  // rows; their sums are independent, and hide the time that an addition takes

// sums[j] = the sum over rows d of value(d, d % UNROLL, j)
template <int NV, class F>
ATTLAS_INLINE void sum_over_rows(int64_t rows, vec (&sums)[NV], F value) {
    vec parts[UNROLL][NV] = {};
    for (int64_t d = 0; d < rows; d += UNROLL)
        for (int i = 0; i < UNROLL; ++i)
            for (int j = 0; j < NV; ++j) parts[i][j] += value(d + i, i, j);
    for (int j = 0; j < NV; ++j) sums[j] = (parts[0][j] + parts[1][j]) + (parts[2][j] + parts[3][j]);
}

// x holds q, y holds k, each with a row of zeros behind the last token; gates holds (e, beta) of each token.
template <Want WANT, int NV>
ATTLAS_INLINE void run_delta_tile(const Workspace& w, int64_t rows, int64_t c0, int n) {
    float* const state = w.state + c0;
    const auto row = [&](int64_t d, int j) { return state + d * w.columns + j * LANES; };
    vec found[NV];
    if (WANT != Want::GRADIENT) sum_over_rows(rows, found, [&](int64_t d, int, int j) { return w.y[d] * load(row(d, j)); });
    float e = 0;
    vec stored[NV] = {};
    const float* k = w.y + n * w.rows;
    for (int i = 0; i < n; ++i) {
        const float *const q = w.x + i * w.rows, *const next = w.y + (i + 1) * w.rows;
        const float beta = w.gates[2 * i + 1];
        vec v[NV], sums[NV];
        for (int j = 0; j < NV; ++j) v[j] = load(w.z + i * w.columns + c0 + j * LANES);
        if (WANT == Want::GRADIENT) {
            const float* const now = w.y + i * w.rows;
            sum_over_rows(rows, sums, [&](int64_t d, int, int j) {
                const vec before = load(row(d, j));
                const vec s = before + e * before - k[d] * stored[j] + q[d] * v[j];
                store(row(d, j), s);
                return now[d] * s;
            });
            e = w.gates[2 * i];
            k = now;
            for (int j = 0; j < NV; ++j) stored[j] = (1 + e) * beta * sums[j];
        } else {
            e = w.gates[2 * i];
            k = w.y + i * w.rows;
            for (int j = 0; j < NV; ++j) {
                found[j] += e * found[j];
                stored[j] = beta * (v[j] - found[j]);
                if (WANT == Want::RECALL) sums[j] = found[j];
            }
            vec output[UNROLL][NV] = {};
            sum_over_rows(rows, found, [&](int64_t d, int part, int j) {
                const vec before = load(row(d, j));
                const vec s = before + e * before + k[d] * stored[j];
                store(row(d, j), s);
                if (WANT == Want::OUTPUT) output[part][j] += q[d] * s;
                return next[d] * s;
            });
            if (WANT == Want::OUTPUT)
                for (int j = 0; j < NV; ++j)
                    sums[j] = (output[0][j] + output[1][j]) + (output[2][j] + output[3][j]);
        }
        for (int j = 0; j < NV; ++j) store(w.out + i * w.columns + c0 + j * LANES, sums[j]);
    }
    if (WANT == Want::GRADIENT)
        for (int64_t d = 0; d < rows; ++d)
            for (int j = 0; j < NV; ++j) {
                const vec before = load(row(d, j));
                store(row(d, j), before + e * before - k[d] * stored[j]);
            }
}

template <Want WANT>
void run_delta(const Problem& p, const Delta& delta, int64_t first, int64_t columns, float* memory) {
    const int64_t rows = p.key_size;
    const Workspace w(memory, rows, columns);
    delta.start.read(rows, first, columns, w.state, w.columns);
    for (int64_t t = 0; t < p.tokens; t += CHUNK) {
        const int n = int(std::min<int64_t>(CHUNK, p.tokens - t));
        pack(delta.q, t, n, 0, rows, w.x, w.rows);
        pack(delta.k, t, n, 0, rows, w.y, w.rows);
        std::fill_n(w.y + n * w.rows, w.rows, 0.0f);
        pack(delta.v, t, n, first, columns, w.z, w.columns);
        for (int i = 0; i < n; ++i) {
            w.gates[2 * i] = exp2_less_1(spread(*delta.gates.row<float>(t + i) * LOG2_E))[0];
            w.gates[2 * i + 1] = *delta.beta.row<float>(t + i);
        }
        for_column_tiles(columns, [&](int64_t c, auto vectors) {
            run_delta_tile<WANT, vectors()>(w, (rows + UNROLL - 1) / UNROLL * UNROLL, c, n);
        });
        write(delta.out, false, t, n, first, columns, w.out, w.columns);
    }
    delta.end.write(rows, first, columns, w.state, w.columns);
}

template <Want WANT, class F>
bool run_deltas(const Problem& p, F make) {
    return for_columns(p, p.key_size, p.value_size, [&](int64_t stream, int64_t first, int64_t width, float* memory) {
        run_delta<WANT>(p, make(stream), first, width, memory);
    });
}

// Calls task(stream) on the threads.
template <class F>
void for_streams(const Problem& p, F task) {
#pragma omp parallel for num_threads(p.threads) if (p.streams() * p.tokens * p.key_size >= WORTH_THREADS)
    for (int64_t stream = 0; stream < p.streams(); ++stream) task(stream);
}

}  // namespace

// All write their results in full and return 0, or 1 if there is no memory for the workspace. Tokens are bf16 or float
// (batch, heads, tokens, size); gates, beta, states and the gradients other than of o are float. An array without
// data is a state of zeros that nobody asks for, or a gradient of zeros.
extern "C" {

// arrays: q, k, v, g, state; results o, final state.
int attlas_gated_forward(const Problem* problem, const Array* arrays) {
    const Problem& p = *problem;
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &g = arrays[3];
    return !run_passes(p, p.key_size, p.value_size, [&](int64_t stream) {
        const Reader r{p, stream};
        return std::vector{r.pass(q, k, v, g, BY_ROW).from(r.state(arrays[4])).to(r.out(arrays[5]), r.state(arrays[6]))};
    });
}

// arrays: q, k, v, gates of the two directions; result o, float.
int attlas_gated_both_ways(const Problem* problem, const Array* arrays) {
    const Problem& p = *problem;
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2];
    return !run_passes(p, p.key_size, p.value_size, [&](int64_t stream) {
        const Reader ahead{p, stream}, back{p, stream, true};
        return std::vector{ahead.pass(q, k, v, arrays[3], BY_ROW).to(ahead.wide_out(arrays[5])),
                           back.pass(q, k, v, arrays[4], BY_ROW).to(back.wide_out(arrays[5])).adding()};
    });
}

// arrays: q, k, v, g, state, final state, gradients of o and of the final state; results, all float, gradients of q,
// k, v, g, state.
int attlas_gated_backward(const Problem* problem, const Array* arrays) {
    const Problem& p = *problem;
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &g = arrays[3], &state = arrays[4];
    const Array &final_state = arrays[5], &grad_o = arrays[6], &grad_final = arrays[7];
    const Array &dq = arrays[8], &dk = arrays[9], &dv = arrays[10], &dg = arrays[11], &grad_state = arrays[12];
    const bool reversed = p.reversed;
    const bool done = run_passes(p, p.value_size, p.key_size, [&](int64_t stream) {
        const Reader ahead{p, stream, reversed}, back{p, stream, !reversed};
        return std::vector{
            ahead.pass(grad_o, v, k, g, BY_COLUMN).from(ahead.state(state, true)).to(ahead.wide_out(dq)),
            back.pass(v, grad_o, q, g, BY_COLUMN).behind().from(back.state(grad_final, true)).to(back.wide_out(dk))};
    }) && run_passes(p, p.key_size, p.value_size, [&](int64_t stream) {
        const Reader back{p, stream, !reversed};
        return std::vector{back.pass(k, q, grad_o, g, BY_ROW)
                               .behind()
                               .from(back.state(grad_final))
                               .to(back.wide_out(dv), back.state(grad_state))};
    });
    if (!done) return 1;
    for_streams(p, [&](int64_t stream) {
        add_up_gates(p, {p, stream, reversed}, q, k, dq, dk, final_state, grad_final, dg, [](int64_t) { return 0.0f; });
    });
    return 0;
}

// arrays: q, k, v, beta, g, state; results o, final state.
int attlas_delta_forward(const Problem* problem, const Array* arrays) {
    const Problem& p = *problem;
    return !run_deltas<Want::OUTPUT>(p, [&](int64_t stream) {
        const Reader r{p, stream};
        return Delta{r.in(arrays[0]),    r.in(arrays[1]),  r.in(arrays[2]),    r.wide(arrays[3]),
                     r.wide(arrays[4]),  r.out(arrays[6]), r.state(arrays[5]), r.state(arrays[7])};
    });
}

// arrays: q, k, v, beta, g, state, final state, gradients of o and of the final state; scratch u, w and du of the size
// of v; results, all float, gradients of q, k, v, beta, g, state.
int attlas_delta_backward(const Problem* problem, const Array* arrays) {
    const Problem& p = *problem;
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &beta = arrays[3], &g = arrays[4], &state = arrays[5];
    const Array &final_state = arrays[6], &grad_o = arrays[7], &grad_final = arrays[8];
    const Array &u = arrays[9], &w = arrays[10], &du = arrays[11];
    const Array &dq = arrays[12], &dk = arrays[13], &dv = arrays[14], &dbeta = arrays[15], &dg = arrays[16];
    const Array& grad_state = arrays[17];

    if (!run_deltas<Want::RECALL>(p, [&](int64_t stream) {
            const Reader r{p, stream};
            return Delta{r.in(q), r.in(k), r.in(v), r.wide(beta), r.wide(g), r.wide_out(u), r.state(state), State()};
        }) ||
        !run_deltas<Want::GRADIENT>(p, [&](int64_t stream) {  // dw, which becomes du below
            const Reader r{p, stream, true};
            return Delta{r.in(q),          r.in(k),  r.in(grad_o), r.wide(beta), r.wide(g), r.wide_out(du),
                         r.state(grad_final), r.state(grad_state)};
        }))
        return 1;
    for_streams(p, [&](int64_t stream) {
        const Reader r{p, stream};
        const Tokens value = r.in(v), recalled = r.wide(u), rate = r.wide(beta), grad_stored = r.wide(du);
        const Results stored = r.wide_out(w), change = r.wide_out(du), grad_value = r.wide_out(dv);
        const Results grad_rate = r.wide_out(dbeta);
        for (int64_t t = 0; t < p.tokens; ++t) {
            const float b = *rate.row<float>(t);
            vec sum = {};
            for (int64_t e = 0; e < p.value_size; e += LANES) {
                const int left = int(p.value_size - e);
                const vec surprise = value.read(t, e, left) - recalled.read(t, e, left);
                const vec grad = grad_stored.read(t, e, left);
                sum += surprise * grad;
                store_first(stored.row<float>(t) + e, b * surprise, left);
                store_first(grad_value.row<float>(t) + e, b * grad, left);
                store_first(change.row<float>(t) + e, -b * grad, left);
            }
            *grad_rate.row<float>(t) = sum_lanes(sum);
        }
    });
    if (!run_passes(p, p.value_size, p.key_size, [&](int64_t stream) {
            const Reader ahead{p, stream}, back{p, stream, true};
            const auto pass = [&](const Reader& r, const Tokens& x, const Tokens& y, const Array& z) {
                return Pass{x, y, r.in(z), r.wide(g), p.gates == 1, BY_COLUMN, p.value_size, p.key_size};
            };
            return std::vector{
                pass(ahead, ahead.in(grad_o), ahead.wide(w), k).from(ahead.state(state, true)).to(ahead.wide_out(dq)),
                pass(ahead, ahead.wide(du), ahead.wide(w), k).from(ahead.state(state, true)).to(ahead.wide_out(dk)),
                pass(back, back.wide(w), back.in(grad_o), q)
                    .behind()
                    .from(back.state(grad_final, true))
                    .to(back.wide_out(dk))
                    .adding(),
                pass(back, back.wide(w), back.wide(du), k).behind().to(back.wide_out(dk)).adding()};
        }))
        return 1;
    for_streams(p, [&](int64_t stream) {
        const Reader r{p, stream};
        const Tokens key = r.in(k), recalled = r.wide(u), stored = r.wide(w), change = r.wide(du);
        const Results grad_key = r.wide_out(dk);
        const auto product = [&](const Tokens& a, int64_t t) {
            vec sum = {};
            for (int64_t e = 0; e < p.value_size; e += LANES)
                sum += a.read(t, e, p.value_size - e) * change.read(t, e, p.value_size - e);
            return 2 * sum_lanes(sum);
        };
        for (int64_t t = 0; t < p.tokens; ++t) {
            const float twice = product(stored, t);
            float* const row = grad_key.row<float>(t);
            for (int64_t d = 0; d < p.key_size; d += LANES) {
                const int left = int(p.key_size - d);
                store_first(row + d, load_first(row + d, left) - twice * key.read(t, d, left), left);
            }
        }
        add_up_gates(p, r, q, k, dq, dk, final_state, grad_final, dg, [&](int64_t t) { return product(recalled, t); });
    });
    return 0;
}
}
