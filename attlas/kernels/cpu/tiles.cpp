// Softmax attention over some of the pairs, forward and backward: a plan says which queries look at which keys.
//
//     s_nm = scale q_n . k_m + bias      o_n = sum_m softmax_m(s_nm) v_m      over the m that n sees
//
// A tile is up to 64 queries and the runs of keys that any of them sees; bits say which query sees which key, where not
// all see all. The lanes of a register are the queries of a tile, wherever they stand; keys and values are packed where
// they are met, so that nothing is permuted or gathered beforehand. The products are those of attention.cpp.
//
// Where a query is in one tile only, the tile finishes it. Where it is in several, they lie in one group, whose tiles
// are done one after the other, and what was summed so far is kept in the results.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include <omp.h>

#include "product.h"

namespace {

using namespace attlas;

constexpr int QUERIES = 64;  // of a tile
constexpr int KEYS = 96;     // taken at a time
constexpr int STRIP = 16;    // queries that are left out together where none of them sees a key
static_assert(QUERIES % STRIP == 0 && STRIP % LANES == 0 && KEYS % ROWS == 0);

// Of lists of lists, `x_start` has one entry more than there are things and says where those of each begin.
struct Plan {
    const int64_t* group_start;  // of a plan, groups
    const int64_t* tile_start;   // of a group, tiles
    const int32_t* query;         // tokens
    const int64_t* query_begin;   // of a tile, queries
    const int64_t* query_end;
    const int64_t* run_begin;     // of a tile, runs of keys
    const int64_t* run_end;
    const int32_t* run_first;   // token, and how many, `step` apart
    const int32_t* run_count;
    const int64_t* pattern;     // where a tile's bits begin in `seen`, key by key; -1 if every query sees every key
    const uint64_t* seen;       // which queries of the tile see a key
    const int32_t* entry;       // beside `seen`, for each of 64 queries: which bias
    int64_t plan_batch, plan_head;  // the plan of a head is batch * plan_batch + head * plan_head
    int32_t step, once;             // whether no query is in two tiles
};

struct Problem {
    Plan plan;
    int64_t batch, heads, groups, queries, keys, key_size, value_size;
    int64_t query_offset;  // position of the first query among the keys
    const uint8_t* keep;   // (batch, keys), 0 where a key is padding; null if none is
    const float* bias;     // (heads, biases), or null
    int64_t biases, shares, most_groups, work;
    float scale;
    int32_t causal, is_bf16, threads;

    int64_t plan_of(int64_t b, int64_t h) const { return b * plan.plan_batch + h * plan.plan_head; }
    bool parallel() const { return work >= WORTH_THREADS; }
};

// Rows of so many whole vectors; rows that are made in whole register tiles there are padded(n) of.
int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

struct Tile {
    const int32_t* query;
    int n;          // how many queries
    uint64_t full;  // their bits
    int64_t run, run_end, pattern;

    Tile(const Plan& plan, int64_t index)
        : query(plan.query + plan.query_begin[index]),
          n(int(plan.query_end[index] - plan.query_begin[index])),
          full(n == 64 ? ~uint64_t{} : (uint64_t{1} << n) - 1),
          run(plan.run_begin[index]),
          run_end(plan.run_end[index]),
          pattern(plan.pattern ? plan.pattern[index] : -1) {}
};

// Some of the keys that the tile's queries see, and the strips of queries that see them.
struct Chunk {
    int n, first, end;
    uint64_t full;  // the bits of the tile's queries in these strips
    int32_t token[KEYS];
    uint64_t seen[KEYS];
    int64_t place[KEYS];  // in the pattern
};

// Goes through the keys of a tile, without those that are padding or that no query sees.
struct Cursor {
    const Problem& p;
    const Tile& tile;
    const uint8_t* keep;
    int64_t run, place;
    int32_t next = 0;
    int64_t earliest = INT64_MAX;  // position among the tile's queries

    Cursor(const Problem& p, const Tile& tile, int64_t b)
        : p(p), tile(tile), keep(p.keep ? p.keep + b * p.keys : nullptr), run(tile.run), place(tile.pattern) {
        if (p.causal)
            for (int i = 0; i < tile.n; ++i) earliest = std::min(earliest, tile.query[i] + p.query_offset);
    }

    bool fill(Chunk& chunk) {
        const Plan& plan = p.plan;
        chunk.n = 0;
        while (run < tile.run_end && chunk.n < KEYS) {
            const int32_t count = plan.run_count[run];
            for (; next < count && chunk.n < KEYS; ++next) {
                const int32_t token = plan.run_first[run] + next * plan.step;
                uint64_t seen = tile.full;
                const int64_t here = place;
                if (tile.pattern >= 0) seen &= plan.seen[place++];
                if (token > earliest) {
                    uint64_t reached = 0;
                    for (int i = 0; i < tile.n; ++i)
                        reached |= uint64_t(tile.query[i] + p.query_offset >= token) << i;
                    seen &= reached;
                }
                if (!seen || (keep && !keep[token])) continue;
                const int first = __builtin_ctzll(seen) / STRIP * STRIP;
                const int end = (63 - __builtin_clzll(seen)) / STRIP * STRIP + STRIP;
                if (!chunk.n) {
                    chunk.first = first;
                    chunk.end = end;
                    chunk.full = tile.full & ~uint64_t{} << first & ~uint64_t{} >> (64 - end);
                } else if (first != chunk.first || end != chunk.end) {
                    place = here;  // it begins the next chunk
                    return true;
                }
                chunk.token[chunk.n] = token;
                chunk.seen[chunk.n] = seen;
                chunk.place[chunk.n++] = here;
            }
            if (next == count) {
                next = 0;
                ++run;
            }
        }
        return chunk.n;
    }
};

// x where the lane's bit is set, else `other`.
ATTLAS_INLINE vec where(uint64_t bits, vec x, vec other) {
#if defined(__AVX512F__)
    return (vec)_mm512_mask_mov_ps((__m512)other, __mmask16(bits), (__m512)x);
#else
    vec_u32 lane;
    for (int i = 0; i < LANES; ++i) lane[i] = uint32_t(bits >> i & 1);
    return lane != 0 ? x : other;
#endif
}

ATTLAS_INLINE vec gather(const float* table, const int32_t* index) {
#if defined(__AVX512F__)
    return (vec)_mm512_i32gather_ps(_mm512_loadu_si512(index), table, 4);
#else
    vec x;
    for (int i = 0; i < LANES; ++i) x[i] = table[index[i]];
    return x;
#endif
}

// Adds the biases to products and hides pairs; returns the factor that is left to make them scores in powers of two.
float shape(Matrix<float> scores, const Chunk& chunk, const Problem& p, const float* bias) {
    float factor = p.scale * LOG2_E;
    if (bias || factor <= 0.0f) {  // a factor that is left must leave -inf what it is
        for (int j = 0; j < chunk.n; ++j)
            for (int c = chunk.first; c < chunk.end; c += LANES) {
                vec x = load(scores[j] + c) * factor;
                if (bias) x += gather(bias, p.plan.entry + chunk.place[j] * QUERIES + c) * LOG2_E;
                store(scores[j] + c, x);
            }
        factor = 1.0f;
    }
    for (int j = 0; j < chunk.n; ++j)
        if (chunk.seen[j] != chunk.full)
            for (int c = chunk.first; c < chunk.end; c += LANES)
                store(scores[j] + c, where(chunk.seen[j] >> c, load(scores[j] + c), spread(-INFINITY)));
    return factor;
}

// Of the rows of all heads, (batch, groups, tokens): whether one is finite.
struct Finite {
    std::unique_ptr<uint8_t[]> flags;

    template <class In>
    Finite(const Problem& p, const Array& array, int width, const In*)
        : flags(new uint8_t[p.batch * p.groups * p.keys]) {
#pragma omp parallel for num_threads(p.threads) if (p.parallel())
        for (int64_t i = 0; i < p.batch * p.groups * p.keys; ++i)
            flags[i] = finite(array.rows<const In>(i / p.keys / p.groups, i / p.keys % p.groups)[i % p.keys], width);
    }
    const uint8_t* of(const Problem& p, int64_t b, int64_t g) const { return flags.get() + (b * p.groups + g) * p.keys; }
};

// Whether a chunk's rows lie side by side, with room behind them for what a register tile reads beyond.
template <class In>
bool together(Rows<const In> rows, const Chunk& chunk, int width, int64_t keys) {
    const int64_t first = chunk.token[0], last = chunk.token[chunk.n - 1];
    return last - first == chunk.n - 1 && last + ROWS < keys && rows.stride == width && width >= ROWS;
}

// Units of features of the keys: the rows themselves where they can stay where they are, else packed into scratch.
template <class In, class Unit>
Matrix<const Unit> key_rows(Rows<const In> rows, const Chunk& chunk, int width, int64_t keys, Matrix<Unit> scratch) {
    if constexpr (std::is_same_v<In, Unit>)
        if (together(rows, chunk, width, keys)) return {rows[chunk.token[0]], rows.stride};
    for (int j = 0; j < chunk.n; ++j) pack_row(rows[chunk.token[j]], width, scratch[j]);
    return {scratch.data, scratch.stride};
}

// Likewise units of neighbouring keys, with zeros for those that use(j) excludes.
template <class In, class Unit, class F>
Matrix<const Unit> key_pairs(Rows<const In> rows, const Chunk& chunk, int width, int64_t keys, const In* zeros,
                             Matrix<Unit> scratch, F use) {
    if constexpr (std::is_same_v<In, Unit>) {
        bool all = together(rows, chunk, width, keys);
        for (int j = 0; all && j < chunk.n; ++j) all = use(j);
        if (all) return {rows[chunk.token[0]], rows.stride};
    }
    const auto row = [&](int j) { return j < chunk.n && use(j) ? rows[chunk.token[j]] : zeros; };
    for (int j = 0; j < chunk.n; j += STEP<Unit>) pack_rows(row(j), row(j + 1), width, scratch[j / STEP<Unit>]);
    return {scratch.data, scratch.stride};
}

// Units of the tile's rows, transposed: lanes are queries. `rows` is scratch.
template <class In, class Unit>
void pack_lanes(Rows<const In> in, const Tile& tile, int width, Matrix<Unit> rows, Matrix<Unit> out) {
    for (int r = 0; r < tile.n; ++r) pack_row(in[tile.query[r]], width, rows[r]);
    turn({(const float*)rows.data, rows.stride}, tile.n, int(units<Unit>(width)), {(float*)out.data, out.stride});
}

template <class Unit>
struct ForwardScratch {
    Matrix<Unit> rows, queries, keys, values, weights;
    Matrix<float> scores, sum, results, largest, total;
    Matrix<bf16> zeros;

    void place(Arena& arena, const Problem& p) {
        const int64_t d = whole(p.key_size), e = whole(p.value_size);
        arena.place(rows, QUERIES, d);
        arena.place(queries, padded(p.key_size), QUERIES);
        arena.place(keys, KEYS, d);
        arena.place(values, KEYS, e);
        arena.place(weights, KEYS, QUERIES);
        arena.place(scores, KEYS + 1, QUERIES);
        arena.place(sum, padded(p.value_size), QUERIES);
        arena.place(results, QUERIES, e);
        arena.place(largest, 1, QUERIES);
        arena.place(total, 1, QUERIES);
        arena.place(zeros, 2, e);
    }
};

// Adds what the tile's keys give to the sums of its queries.
template <class In, class Unit>
void attend(const Problem& p, const Tile& tile, int64_t b, Rows<const In> k_rows, Rows<const In> v_rows,
            const uint8_t* finite, const float* bias, const ForwardScratch<Unit>& w) {
    const int D = p.key_size, E = p.value_size;
    Cursor cursor(p, tile, b);
    for (Chunk chunk; cursor.fill(chunk);) {
        const int first = chunk.first, columns = chunk.end - first;
        const auto keys = key_rows(k_rows, chunk, D, p.keys, w.keys);
        multiply(w.scores.from(0, first), chunk.n, columns, keys.data, keys.stride, 1, w.queries.from(0, first),
                 int(units<Unit>(D)), false);
        const float factor = shape(w.scores, chunk, p, bias);
        const int n = int(units<Unit>(chunk.n)) * STEP<Unit>;
        if (n > chunk.n) std::fill_n(w.scores[chunk.n] + first, columns, -INFINITY);
        soften<Unit>(w, n, first, chunk.end, E, factor);

        // What is not finite must reach the queries that see it and no other: such rows are multiplied as zeros and
        // added pair by pair.
        const auto plain = [&](int j) { return chunk.seen[j] == tile.full || finite[chunk.token[j]]; };
        const auto values = key_pairs(v_rows, chunk, E, p.keys, (const In*)w.zeros.data, w.values, plain);
        multiply(w.sum.from(0, first), E, columns, values.data, 1, values.stride, w.weights.from(0, first),
                 n / STEP<Unit>, true);
        for (int j = 0; j < chunk.n; ++j)
            if (!plain(j))
                for (int f = 0; f < E; ++f)
                    for (int i = 0; i < tile.n; ++i)
                        if (chunk.seen[j] >> i & 1) w.sum[f][i] += w.scores[j][i] * to_float(v_rows[chunk.token[j]][f]);
    }
}

template <class Unit>
void normalise(const ForwardScratch<Unit>& w, int queries, int value_size) {
    for (int c = 0; c < queries; c += LANES) {
        const vec total = load(w.total[0] + c);
        const vec inverse = total == 0.0f ? vec{} : 1.0f / total;
        for (int f = 0; f < value_size; ++f) store(w.sum[f] + c, load(w.sum[f] + c) * inverse);
    }
}

// arrays: q, k, v; results o, lse. Where queries are in several tiles o is float and 0, lse -inf, and `totals` is
// (batch, heads, queries) and 0.
template <class In>
bool forward(const Problem& p, const Array* arrays, float* totals) {
    using Unit = unit_of<In>;
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &o = arrays[3], &lse = arrays[4];
    const int D = p.key_size, E = p.value_size;
    const int64_t shared = p.heads / p.groups;
    const Finite finite_values(p, v, E, (const In*)nullptr);
    if (p.plan.once)
        advise_huge_pages(reinterpret_cast<void*>(o.address), p.batch * p.heads * p.queries * E * sizeof(In));

    return for_all<ForwardScratch<Unit>>(p, p.batch * p.heads * p.most_groups, [&](int64_t i, auto& w) {
        const int64_t b = i / p.most_groups / p.heads, h = i / p.most_groups % p.heads, plan = p.plan_of(b, h);
        const int64_t group = p.plan.group_start[plan] + i % p.most_groups;
        if (group >= p.plan.group_start[plan + 1]) return;
        const auto k_rows = k.rows<const In>(b, h / shared), v_rows = v.rows<const In>(b, h / shared);
        const float* bias = p.bias ? p.bias + h * p.biases : nullptr;
        float* const logs = lse.rows<float>(b, h).first;
        float* const total_of = totals + (b * p.heads + h) * p.queries;

        for (int64_t index = p.plan.tile_start[group]; index < p.plan.tile_start[group + 1]; ++index) {
            const Tile tile(p.plan, index);
            pack_lanes(q.rows<const In>(b, h), tile, D, w.rows, w.queries);
            if (p.plan.once) {
                std::fill_n(w.largest[0], QUERIES, -INFINITY);
                std::fill_n(w.total[0], QUERIES, 0.0f);
                std::fill_n(w.sum[0], padded(E) * QUERIES, 0.0f);
                attend<In>(p, tile, b, k_rows, v_rows, finite_values.of(p, b, h / shared), bias, w);
                normalise(w, tile.n, E);
                turn_out(w.sum, tile.n, E, 1.0f, Rows<float>{w.results.data, w.results.stride});
                const auto o_rows = o.rows<In>(b, h);
                for (int r = 0; r < tile.n; ++r) {
                    for (int f = 0; f < E; f += LANES)
                        store_first(o_rows[tile.query[r]] + f, load(w.results[r] + f), E - f);
                    logs[tile.query[r]] = w.largest[0][r] + std::log2(w.total[0][r]);
                }
                continue;
            }
            const auto sums = o.rows<float>(b, h);
            for (int r = 0; r < tile.n; ++r) {
                std::copy_n(sums[tile.query[r]], E, w.results[r]);
                w.largest[0][r] = logs[tile.query[r]];
                w.total[0][r] = total_of[tile.query[r]];
            }
            turn({w.results.data, w.results.stride}, tile.n, E, w.sum);
            attend<In>(p, tile, b, k_rows, v_rows, finite_values.of(p, b, h / shared), bias, w);
            turn_out(w.sum, tile.n, E, 1.0f, Rows<float>{w.results.data, w.results.stride});
            for (int r = 0; r < tile.n; ++r) {
                std::copy_n(w.results[r], E, sums[tile.query[r]]);
                logs[tile.query[r]] = w.largest[0][r];
                total_of[tile.query[r]] = w.total[0][r];
            }
        }
    });
}

// After the last tile: sums become averages and largest scores the logarithm to base 2 of the sum of exp(s).
void finish(const Problem& p, const Array& o, const Array& lse, const float* totals) {
#pragma omp parallel for num_threads(p.threads) if (p.parallel())
    for (int64_t head = 0; head < p.batch * p.heads; ++head) {
        const int64_t b = head / p.heads, h = head % p.heads;
        const auto sums = o.rows<float>(b, h);
        float* const logs = lse.rows<float>(b, h).first;
        for (int64_t n = 0; n < p.queries; ++n) {
            const float total = totals[head * p.queries + n], inverse = total == 0.0f ? 0.0f : 1.0f / total;
            for (int64_t f = 0; f < p.value_size; ++f) sums[n][f] *= inverse;
            logs[n] += std::log2(total);
        }
    }
}

template <class Unit>
struct BackwardScratch {
    Matrix<Unit> rows, q_lanes, q_pairs, grad_lanes, grad_pairs, keys, key_pairs, values;
    Matrix<Unit> weight_rows, dscore_rows, dscores;
    Matrix<float> scores, dweights, dq, dq_rows, dk, dv, lse, delta;
    Matrix<bf16> zeros;

    void place(Arena& arena, const Problem& p) {
        const int64_t d = whole(p.key_size), e = whole(p.value_size), largest = std::max(d, e);
        arena.place(rows, QUERIES, largest);
        arena.place(q_lanes, padded(p.key_size), QUERIES);
        arena.place(q_pairs, QUERIES, d);
        arena.place(grad_lanes, padded(p.value_size), QUERIES);
        arena.place(grad_pairs, QUERIES, e);
        arena.place(keys, KEYS, d);
        arena.place(key_pairs, KEYS, d);
        arena.place(values, KEYS, e);
        arena.place(weight_rows, KEYS, QUERIES);
        arena.place(dscore_rows, KEYS, QUERIES);
        arena.place(dscores, KEYS, QUERIES);
        arena.place(scores, KEYS + 1, QUERIES);
        arena.place(dweights, KEYS + 1, QUERIES);
        arena.place(dq, padded(p.key_size), QUERIES);
        arena.place(dq_rows, QUERIES, d);
        arena.place(dk, KEYS, d);
        arena.place(dv, KEYS, e);
        arena.place(lse, 1, QUERIES);
        arena.place(delta, 1, QUERIES);
        arena.place(zeros, 2, largest);
    }
};

// Weights and the gradients of scores, as units of neighbouring queries and of neighbouring keys. Those of hidden pairs
// are 0, whatever the query or the key holds.
template <class Unit>
void differentiate(const BackwardScratch<Unit>& w, const Chunk& chunk, float factor) {
    for (int j = 0; j < chunk.n; j += STEP<Unit>)
        for (int c = chunk.first; c < chunk.end; c += LANES) {
            vec dscore[2]{};
            for (int i = 0; i < STEP<Unit> && j + i < chunk.n; ++i) {
                vec weight = rounded(load(w.scores[j + i] + c) * factor) - load(w.lse[0] + c);
                weight = exp2(min(vec{}, weight));
                dscore[i] = weight * (load(w.dweights[j + i] + c) - load(w.delta[0] + c));
                if (chunk.seen[j + i] != chunk.full) {
                    weight = where(chunk.seen[j + i] >> c, weight, vec{});
                    dscore[i] = where(chunk.seen[j + i] >> c, dscore[i], vec{});
                }
                store_row(w.weight_rows[j + i] + c / STEP<Unit>, weight);
                store_row(w.dscore_rows[j + i] + c / STEP<Unit>, dscore[i]);
                store(w.scores[j + i] + c, dscore[i]);
            }
            store_units(w.dscores[j / STEP<Unit>] + c, dscore[0], dscore[1]);
        }
}

ATTLAS_INLINE void add_row(float* out, const float* x, float factor, int width) {
    for (int f = 0; f < width; f += LANES)
        store_first(out + f, load_first(out + f, width - f) + load(x + f) * factor, width - f);
}

// Sets so many floats to 0, which are dense in memory, and most likely fresh.
void clear(const Problem& p, const Array& array, int64_t count) {
    auto* const data = reinterpret_cast<float*>(array.address);
    advise_huge_pages(data, count * sizeof(float));
    constexpr int64_t PIECE = 1 << 16;
#pragma omp parallel for num_threads(p.threads) if (p.parallel())
    for (int64_t i = 0; i < count; i += PIECE) std::fill_n(data + i, std::min(PIECE, count - i), 0.0f);
}

// arrays: q, k, v, o, lse, do; results dq, dk, dv, dbias, all float; dbias is 0 before. dk and dv have a leading axis of
// `shares`, dbias is (batch * shares, heads, biases); the caller adds these up.
template <class In>
bool backward(const Problem& p, const Array* arrays) {
    using Unit = unit_of<In>;
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &o = arrays[3], &lse = arrays[4], &grad = arrays[5];
    const Array &dq = arrays[6], &dk = arrays[7], &dv = arrays[8], &dbias = arrays[9];
    const int D = p.key_size, E = p.value_size;
    const int64_t shared = p.heads / p.groups;

    const Finite finite_keys(p, k, D, (const In*)nullptr);
    clear(p, dq, p.batch * p.heads * p.queries * D);
    clear(p, dk, p.shares * p.batch * p.groups * p.keys * D);
    clear(p, dv, p.shares * p.batch * p.groups * p.keys * E);

    return for_all<BackwardScratch<Unit>>(p, p.batch * p.groups * p.shares, [&](int64_t i, auto& w) {
        const int64_t b = i / p.shares / p.groups, g = i / p.shares % p.groups, share = i % p.shares;
        const auto k_rows = k.rows<const In>(b, g), v_rows = v.rows<const In>(b, g);
        const auto dk_rows = dk.rows<float>(share * p.batch + b, g), dv_rows = dv.rows<float>(share * p.batch + b, g);
        const auto zeros = (const In*)w.zeros.data;
        const uint8_t* const finite = finite_keys.of(p, b, g);

        for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
            const auto q_rows = q.rows<const In>(b, h), o_rows = o.rows<const In>(b, h);
            const auto grad_rows = grad.rows<const In>(b, h);
            const auto dq_rows = dq.rows<float>(b, h);
            const float* const logs = lse.rows<const float>(b, h).first;
            const float* bias = p.bias ? p.bias + h * p.biases : nullptr;
            float* const dbias_of = p.bias ? dbias.rows<float>(b * p.shares + share, h).first : nullptr;
            const int64_t plan = p.plan_of(b, h);
            for (int64_t group = p.plan.group_start[plan] + share; group < p.plan.group_start[plan + 1];
                 group += p.shares)
                for (int64_t index = p.plan.tile_start[group]; index < p.plan.tile_start[group + 1]; ++index) {
                    const Tile tile(p.plan, index);
                    pack_lanes(q_rows, tile, D, w.rows, w.q_lanes);
                    pack_lanes(grad_rows, tile, E, w.rows, w.grad_lanes);
                    const auto pack_pairs = [&](Rows<const In> in, int width, Matrix<Unit> out, auto use) {
                        const auto row = [&](int r) {
                            return r < tile.n && use(in[tile.query[r]]) ? in[tile.query[r]] : zeros;
                        };
                        for (int r = 0; r < tile.n; r += STEP<Unit>)
                            pack_rows(row(r), row(r + 1), width, out[r / STEP<Unit>]);
                    };
                    // The weights of a query that is not finite are not either, and to keys that it does not see it is
                    // nothing.
                    pack_pairs(q_rows, D, w.q_pairs, [&](const In* query) { return attlas::finite(query, D); });
                    pack_pairs(grad_rows, E, w.grad_pairs, [](const In*) { return true; });
                    for (int r = 0; r < QUERIES; ++r) {
                        const bool real = r < tile.n;
                        const int64_t token = real ? tile.query[r] : 0;
                        // A query that sees nothing has no weights.
                        w.lse[0][r] = real && logs[token] != -INFINITY ? logs[token] : INFINITY;
                        float sum = 0;
                        for (int f = 0; real && f < E; ++f)
                            sum += to_float(o_rows[token][f]) * to_float(grad_rows[token][f]);
                        w.delta[0][r] = sum;
                    }
                    std::fill_n(w.dq[0], padded(D) * QUERIES, 0.0f);

                    Cursor cursor(p, tile, b);
                    for (Chunk chunk; cursor.fill(chunk);) {
                        const auto keys = key_rows(k_rows, chunk, D, p.keys, w.keys);
                        const auto values = key_rows(v_rows, chunk, E, p.keys, w.values);
                        // A key that is not finite makes the weights of those who see it so; to others it is nothing.
                        const auto pairs = key_pairs(k_rows, chunk, D, p.keys, zeros, w.key_pairs, [&](int j) {
                            return chunk.seen[j] == tile.full || finite[chunk.token[j]];
                        });
                        const int first = chunk.first, columns = chunk.end - first;
                        multiply(w.scores.from(0, first), chunk.n, columns, keys.data, keys.stride, 1,
                                 w.q_lanes.from(0, first), int(units<Unit>(D)), false);
                        multiply(w.dweights.from(0, first), chunk.n, columns, values.data, values.stride, 1,
                                 w.grad_lanes.from(0, first), int(units<Unit>(E)), false);
                        differentiate(w, chunk, shape(w.scores, chunk, p, bias));
                        const int last = std::min(chunk.end, tile.n);
                        if (bias)
                            for (int j = 0; j < chunk.n; ++j)
                                for (int r = first; r < last; ++r)
                                    dbias_of[p.plan.entry[chunk.place[j] * QUERIES + r]] += w.scores[j][r];
                        const int unit = first / STEP<Unit>, query_units = int(units<Unit>(last - first));
                        multiply(w.dv, chunk.n, whole(E), w.weight_rows[0] + unit, QUERIES, 1,
                                 w.grad_pairs.from(unit, 0), query_units, false);
                        multiply(w.dk, chunk.n, whole(D), w.dscore_rows[0] + unit, QUERIES, 1,
                                 w.q_pairs.from(unit, 0), query_units, false);
                        multiply(w.dq.from(0, first), D, columns, pairs.data, 1, pairs.stride, w.dscores.from(0, first),
                                 int(units<Unit>(chunk.n)), true);
                        for (int j = 0; j < chunk.n; ++j) {
                            add_row(dk_rows[chunk.token[j]], w.dk[j], p.scale, D);
                            add_row(dv_rows[chunk.token[j]], w.dv[j], 1.0f, E);
                        }
                    }
                    turn_out(w.dq, tile.n, D, p.scale, Rows<float>{w.dq_rows.data, w.dq_rows.stride});
                    for (int r = 0; r < tile.n; ++r) add_row(dq_rows[tile.query[r]], w.dq_rows[r], 1.0f, D);
                }
        }
    });
}

}  // namespace

// Both return 0, or 1 if there is no memory for their scratch. Inputs are bf16 or float (batch, heads or groups, tokens,
// size); lse, the logarithm to base 2 of the sum of exp(s), is float (batch, heads, queries).
extern "C" {

// arrays: q, k, v; results o, lse.
int attlas_tiles_forward(const Problem* p, const Array* arrays, float* totals) {
    if (!(p->is_bf16 ? forward<bf16>(*p, arrays, totals) : forward<float>(*p, arrays, totals))) return 1;
    if (!p->plan.once) finish(*p, arrays[3], arrays[4], totals);
    return 0;
}

// arrays: q, k, v, o, lse, gradient of o; results gradients of q, k, v and the bias.
int attlas_tiles_backward(const Problem* p, const Array* arrays) {
    return !(p->is_bf16 ? backward<bf16>(*p, arrays) : backward<float>(*p, arrays));
}
}
