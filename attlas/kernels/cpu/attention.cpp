// Softmax and sigmoid attention over all visible pairs, forward and backward, in tiles.
//
//     s_nm = scale q_n . k_m + shift      w_nm = exp(s_nm - lse_n)  or  sigmoid(s_nm)      o_n = sum_m w_nm v_m
//
// The lanes of a register are queries, so that sums and maxima over keys need no shuffles. Everything is one product,
//
//     C[i][:] (+)= sum_k A[i][k] B[k][:]
//
// of scalars A and rows B of a block of queries or of features:
//
//     S^T  [key][query]       A = K                    B = Q^T
//     O^T  [feature][query]   A = V^T                  B = W^T
//     dW^T [key][query]       A = V                    B = dO^T
//     dV   [key][feature]     A = W^T                  B = dO
//     dK   [key][feature]     A = dS^T                 B = Q
//     dQ^T [feature][query]   A = K^T                  B = dS^T
//
// Keys that are padding are left out of the list of keys, so that they cost nothing and nothing of them is read.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include <omp.h>

#include "product.h"

namespace {

using namespace attlas;

constexpr int QUERIES = 64;  // of a block
constexpr int KEYS = 96;     // of a block
static_assert(QUERIES % LANES == 0 && KEYS % ROWS == 0);

// The keys that take part, in order: all, or those of a list.
struct Keys {
    const int32_t* list;
    int64_t count;
    int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

// Neighbouring queries of one head.
struct Block {
    int64_t first;
    int n, columns;  // how many, and that rounded up to whole vectors
    int64_t limit;   // the last key that the first query sees; each further query sees one more

    bool all_see(int64_t key) const { return key <= limit; }
    bool none_sees(int64_t key) const { return key > limit + n - 1; }
    // The first query that sees a key.
    int seen_from(int64_t key) const { return int(std::clamp<int64_t>(key - limit, 0, columns)); }
};

// Neighbouring keys of those that take part.
struct Chunk {
    Keys keys;
    int64_t first;
    int n;
    int64_t operator[](int j) const { return keys[first + j]; }
};

// Sets what hidden pairs hold. Keys are in order, so that they are among the last ones.
void hide(Matrix<float> x, const Chunk& chunk, const Block& block, float value) {
    for (int j = chunk.n - 1; j >= 0 && !block.all_see(chunk[j]); --j)
        std::fill(x[j], x[j] + block.seen_from(chunk[j]), value);
}

template <class In, class Unit>
void pack_chunk(Rows<const In> rows, const Chunk& chunk, int width, Matrix<Unit> out) {
    for (int j = 0; j < chunk.n; ++j) pack_row(rows[chunk[j]], width, out[j]);
}

// Units of neighbouring keys, with zeros for rows that use(j) excludes.
template <class In, class Unit, class F>
void pack_chunk_pairs(Rows<const In> rows, const Chunk& chunk, int width, const In* zeros, Matrix<Unit> out, F use) {
    const auto row = [&](int j) { return j < chunk.n && use(j) ? rows[chunk[j]] : zeros; };
    for (int j = 0; j < chunk.n; j += STEP<Unit>) pack_rows(row(j), row(j + 1), width, out[j / STEP<Unit>]);
}

struct Problem {
    int64_t batch, heads, groups, queries, keys, key_size, value_size;
    const int32_t* kept;        // (batch, keys), the keys that are no padding, in order; null if all are
    const int64_t* kept_count;  // (batch)
    float scale, shift;
    int32_t causal, normalised, is_bf16, threads;

    Keys keys_of(int64_t b) const { return kept ? Keys{kept + b * keys, kept_count[b]} : Keys{nullptr, keys}; }
    int64_t blocks() const { return (queries + QUERIES - 1) / QUERIES; }
    Block block(int64_t index) const {
        const int64_t first = index * QUERIES;
        const int n = int(std::min<int64_t>(QUERIES, queries - first));
        return {first, n, (n + LANES - 1) / LANES * LANES, causal ? first + keys - queries : keys};
    }
    bool parallel() const { return batch * heads * queries * keys * (key_size + value_size) >= WORTH_THREADS; }
};

// Units of a block's rows, transposed: lanes are queries. `rows` is scratch.
template <class In, class Unit>
void pack_lanes(Rows<const In> in, const Block& block, int width, Matrix<Unit> rows, Matrix<Unit> out) {
    for (int r = 0; r < block.n; ++r) pack_row(in[block.first + r], width, rows[r]);
    turn({(const float*)rows.data, rows.stride}, block.n, int(units<Unit>(width)), {(float*)out.data, out.stride});
}

template <class Unit>
struct ForwardScratch {
    Matrix<Unit> rows, queries, keys, values, weights;
    Matrix<float> scores, sum, largest, total;
    Matrix<bf16> zeros;

    void place(Arena& arena, const Problem& p) {
        const int64_t d = padded(p.key_size), e = padded(p.value_size);
        arena.place(rows, QUERIES, d);
        arena.place(queries, d, QUERIES);
        arena.place(keys, KEYS, d);
        arena.place(values, KEYS, e);
        arena.place(weights, KEYS, QUERIES);
        arena.place(scores, KEYS + 1, QUERIES);
        arena.place(sum, e, QUERIES);
        arena.place(largest, 1, QUERIES);
        arena.place(total, 1, QUERIES);
        arena.place(zeros, 2, e);
    }
};

ATTLAS_INLINE vec sigmoid(vec score, float scale, float shift) {
    vec x = score * scale + shift;
    const vec e = exp2(x < 126.0f ? x : spread(126.0f));
    return e / (e + 1.0f);
}

template <class Unit>
void gate(const ForwardScratch<Unit>& w, int n, const Block& block, float scale, float shift) {
    for (int j = 0; j < n; j += STEP<Unit>)
        for (int c = 0; c < block.columns; c += LANES) {
            vec weight[2];
            for (int i = 0; i < STEP<Unit>; ++i) {
                weight[i] = sigmoid(load(w.scores[j + i] + c), scale, shift);
                store(w.scores[j + i] + c, weight[i]);
            }
            store_units(w.weights[j / STEP<Unit>] + c, weight[0], weight[1]);
        }
}

template <class In>
bool forward(const Problem& p, const Array* arrays) {
    using Unit = unit_of<In>;
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &o = arrays[3], &lse = arrays[4];
    const int D = p.key_size, E = p.value_size;
    const float scale = p.scale * LOG2_E, shift = p.shift * LOG2_E;
    const int64_t shared = p.heads / p.groups, blocks = p.blocks();
    advise_huge_pages(reinterpret_cast<void*>(o.address), p.batch * p.heads * p.queries * E * sizeof(In));

    return for_all<ForwardScratch<Unit>>(p, blocks * p.batch * p.heads, [&](int64_t i, ForwardScratch<Unit>& w) {
        // The last block of a causal head sees most: it comes first.
        const int64_t b = i / blocks / p.heads, h = i / blocks % p.heads;
        const Block block = p.block(blocks - 1 - i % blocks);
        const auto k_rows = k.rows<const In>(b, h / shared), v_rows = v.rows<const In>(b, h / shared);
        const Keys keys = p.keys_of(b);
        pack_lanes(q.rows<const In>(b, h), block, D, w.rows, w.queries);
        std::fill_n(w.largest[0], QUERIES, -INFINITY);
        std::fill_n(w.total[0], QUERIES, 0.0f);
        std::fill_n(w.sum[0], padded(E) * QUERIES, 0.0f);

        for (int64_t first = 0; first < keys.count && !block.none_sees(keys[first]); first += KEYS) {
            Chunk chunk{keys, first, int(std::min<int64_t>(KEYS, keys.count - first))};
            while (block.none_sees(chunk[chunk.n - 1])) --chunk.n;
            pack_chunk(k_rows, chunk, D, w.keys);
            multiply(w.scores, chunk.n, block.columns, w.keys.data, w.keys.stride, 1, w.queries, int(units<Unit>(D)),
                     false);
            hide(w.scores, chunk, block, -INFINITY);
            const int n = int(units<Unit>(chunk.n)) * STEP<Unit>;
            if (n > chunk.n) std::fill_n(w.scores[chunk.n], block.columns, -INFINITY);
            if (p.normalised) soften<Unit>(w, n, 0, block.columns, E, scale);
            else gate(w, n, block, scale, shift);

            // What is not finite must reach the queries that see it and no other: 0 * inf would take it to all. Such
            // rows are multiplied as zeros and added pair by pair.
            const auto plain = [&](int j) { return block.all_see(chunk[j]) || finite(v_rows[chunk[j]], E); };
            pack_chunk_pairs(v_rows, chunk, E, (const In*)w.zeros.data, w.values, plain);
            multiply(w.sum, E, block.columns, w.values.data, 1, w.values.stride, w.weights, n / STEP<Unit>, true);
            for (int j = chunk.n - 1; j >= 0 && !block.all_see(chunk[j]); --j)
                if (!plain(j))
                    for (int f = 0; f < E; ++f)
                        for (int query = block.seen_from(chunk[j]); query < block.n; ++query)
                            w.sum[f][query] += w.scores[j][query] * to_float(v_rows[chunk[j]][f]);
        }

        if (p.normalised)
            for (int c = 0; c < block.columns; c += LANES) {
                const vec total = load(w.total[0] + c);
                const vec inverse = total == 0.0f ? vec{} : 1.0f / total;
                for (int f = 0; f < E; ++f) store(w.sum[f] + c, load(w.sum[f] + c) * inverse);
            }
        turn_out(w.sum, block.n, E, 1.0f, Rows<In>{o.rows<In>(b, h)[block.first], o.token});
        if (p.normalised)
            for (int query = 0; query < block.n; ++query)
                *lse.rows<float>(b, h)[block.first + query] =
                    w.largest[0][query] + std::log2(w.total[0][query]);
    });
}

template <class Unit>
struct BackwardScratch {
    // Of all blocks of a head:
    Matrix<Unit> q_lanes, q_pairs, grad_lanes, grad_pairs;
    Matrix<float> dq, lse, delta;
    // Of a chunk of keys, and a block of queries:
    Matrix<Unit> rows, keys, key_pairs, values, weight_rows, dscore_rows, dscores;
    Matrix<float> scores, dweights;
    // Of all keys of a unit of work:
    Matrix<float> dk, dv;
    Matrix<bf16> zeros;

    void place(Arena& arena, const Problem& p) {
        const int64_t d = padded(p.key_size), e = padded(p.value_size), blocks = p.blocks();
        const int64_t keys_padded = (p.keys + KEYS - 1) / KEYS * KEYS;
        arena.place(q_lanes, blocks * units<Unit>(d), QUERIES);
        arena.place(q_pairs, blocks * units<Unit>(QUERIES), d);
        arena.place(grad_lanes, blocks * units<Unit>(e), QUERIES);
        arena.place(grad_pairs, blocks * units<Unit>(QUERIES), e);
        arena.place(dq, blocks * d, QUERIES);
        arena.place(lse, blocks, QUERIES);
        arena.place(delta, blocks, QUERIES);
        arena.place(rows, QUERIES, std::max(d, e));
        arena.place(keys, KEYS, d);
        arena.place(key_pairs, KEYS, d);
        arena.place(values, KEYS, e);
        arena.place(weight_rows, KEYS, QUERIES);
        arena.place(dscore_rows, KEYS, QUERIES);
        arena.place(dscores, KEYS, QUERIES);
        arena.place(scores, KEYS + 1, QUERIES);
        arena.place(dweights, KEYS + 1, QUERIES);
        arena.place(dk, keys_padded, d);
        arena.place(dv, keys_padded, e);
        arena.place(zeros, 2, std::max(d, e));
    }
};

template <class T>
Matrix<T> part(Matrix<T> whole, int64_t index, int64_t rows) {
    return {whole[index * rows], whole.stride};
}

// Weights and the gradients of scores, as units of neighbouring queries and of neighbouring keys.
template <class Unit>
void differentiate(const BackwardScratch<Unit>& w, const Problem& p, int n, const Block& block, int64_t index) {
    const float scale = p.scale * LOG2_E, shift = p.shift * LOG2_E;
    for (int j = 0; j < n; j += STEP<Unit>)
        for (int c = 0; c < block.columns; c += LANES) {
            vec dscore[2];
            for (int i = 0; i < STEP<Unit>; ++i) {
                const vec score = load(w.scores[j + i] + c), dweight = load(w.dweights[j + i] + c);
                vec weight;
                if (p.normalised) {
                    weight = exp2(min(vec{}, rounded(score * scale) - load(w.lse[index] + c)));
                    dscore[i] = weight * (dweight - load(w.delta[index] + c));
                } else {
                    weight = sigmoid(score, scale, shift);
                    dscore[i] = weight * (1.0f - weight) * dweight;
                }
                store_row(w.weight_rows[j + i] + c / STEP<Unit>, weight);
                store_row(w.dscore_rows[j + i] + c / STEP<Unit>, dscore[i]);
            }
            store_units(w.dscores[j / STEP<Unit>] + c, dscore[0], dscore[1]);
        }
}

// arrays: q, k, v, o, lse, do; results dq, dk, dv. A unit of work is a share of the keys under one key/value head: it
// owns the gradients of these keys, and makes a part of dq, which is added up afterwards where there are several.
template <class In>
bool backward(const Problem& p, const Array* arrays) {
    using Unit = unit_of<In>;
    const Array &q = arrays[0], &k = arrays[1], &v = arrays[2], &o = arrays[3], &lse = arrays[4], &grad = arrays[5];
    const Array &dq = arrays[6], &dk = arrays[7], &dv = arrays[8];
    const int D = p.key_size, E = p.value_size;
    const int64_t shared = p.heads / p.groups, blocks = p.blocks(), owners = p.batch * p.groups;
    const int64_t chunks = (p.keys + KEYS - 1) / KEYS, d = padded(D), e = padded(E);
    const int64_t wanted = p.parallel() && owners % p.threads && owners < 4 * p.threads ? 2 * p.threads : 1;
    const int64_t shares = std::max<int64_t>(1, std::min(chunks, (wanted + owners - 1) / owners));
    const int64_t dq_size = p.batch * p.heads * p.queries * D;
    std::unique_ptr<float, void (*)(void*)> parts(nullptr, std::free);
    if (shares > 1) {
        parts.reset(static_cast<float*>(std::malloc(shares * dq_size * sizeof(float))));
        if (!parts) return false;
        advise_huge_pages(parts.get(), shares * dq_size * sizeof(float));
    }
    const auto part_of = [&](int64_t share, int64_t b, int64_t h) {
        return Rows<float>{parts.get() + share * dq_size + (b * p.heads + h) * p.queries * D, D};
    };

    const bool done = for_all<BackwardScratch<Unit>>(p, owners * shares, [&](int64_t i, BackwardScratch<Unit>& w) {
        const int64_t b = i / shares / p.groups, g = i / shares % p.groups, share = i % shares;
        const auto k_rows = k.rows<const In>(b, g), v_rows = v.rows<const In>(b, g);
        const Keys keys = p.keys_of(b);
        const auto zeros = (const In*)w.zeros.data;
        std::fill_n(w.dk[0], chunks * KEYS * d, 0.0f);
        std::fill_n(w.dv[0], chunks * KEYS * e, 0.0f);

        for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
            const auto q_rows = q.rows<const In>(b, h), o_rows = o.rows<const In>(b, h);
            const auto grad_rows = grad.rows<const In>(b, h);
            for (int64_t index = 0; index < blocks; ++index) {
                const Block block = p.block(index);
                pack_lanes(q_rows, block, D, w.rows, part(w.q_lanes, index, units<Unit>(d)));
                pack_lanes(grad_rows, block, E, w.rows, part(w.grad_lanes, index, units<Unit>(e)));
                const auto pack_pairs = [&](Rows<const In> in, int width, Matrix<Unit> out) {
                    for (int r = 0; r < block.n; r += STEP<Unit>) {
                        const In* next = r + 1 < block.n ? in[block.first + r + 1] : zeros;
                        pack_rows(in[block.first + r], next, width, out[r / STEP<Unit>]);
                    }
                };
                pack_pairs(q_rows, D, part(w.q_pairs, index, units<Unit>(QUERIES)));
                pack_pairs(grad_rows, E, part(w.grad_pairs, index, units<Unit>(QUERIES)));
                for (int r = 0; r < QUERIES && p.normalised; ++r) {
                    const bool real = r < block.n;
                    const float known = real ? *lse.rows<const float>(b, h)[block.first + r] : -INFINITY;
                    // A query that sees nothing has no weights.
                    w.lse[index][r] = known == -INFINITY ? INFINITY : known;
                    float sum = 0;
                    for (int f = 0; real && f < E; ++f)
                        sum += to_float(o_rows[block.first + r][f]) * to_float(grad_rows[block.first + r][f]);
                    w.delta[index][r] = sum;
                }
            }
            std::fill_n(w.dq[0], blocks * d * QUERIES, 0.0f);

            for (int64_t first = share * KEYS; first < keys.count; first += shares * KEYS) {
                const Chunk chunk{keys, first, int(std::min<int64_t>(KEYS, keys.count - first))};
                const int n = int(units<Unit>(chunk.n)) * STEP<Unit>;
                const Matrix<float> dk_chunk{w.dk[first], d}, dv_chunk{w.dv[first], e};
                pack_chunk(k_rows, chunk, D, w.keys);
                pack_chunk(v_rows, chunk, E, w.values);
                // A key that is not finite makes the weights of those who see it so; to others it must be nothing.
                pack_chunk_pairs(k_rows, chunk, D, zeros, w.key_pairs,
                                 [&](int j) { return finite(k_rows[chunk[j]], D); });
                for (int64_t index = 0; index < blocks; ++index) {
                    const Block block = p.block(index);
                    if (block.none_sees(chunk[0])) continue;
                    multiply(w.scores, chunk.n, block.columns, w.keys.data, d, 1,
                             part(w.q_lanes, index, units<Unit>(d)), int(units<Unit>(D)), false);
                    multiply(w.dweights, chunk.n, block.columns, w.values.data, e, 1,
                             part(w.grad_lanes, index, units<Unit>(e)), int(units<Unit>(E)), false);
                    hide(w.scores, chunk, block, -INFINITY);
                    hide(w.dweights, chunk, block, 0.0f);
                    if (n > chunk.n) {
                        std::fill_n(w.scores[chunk.n], block.columns, -INFINITY);
                        std::fill_n(w.dweights[chunk.n], block.columns, 0.0f);
                    }
                    differentiate(w, p, n, block, index);
                    const int query_units = int(units<Unit>(block.n));
                    multiply(dv_chunk, chunk.n, (E + LANES - 1) / LANES * LANES, w.weight_rows.data, QUERIES, 1,
                             part(w.grad_pairs, index, units<Unit>(QUERIES)), query_units, true);
                    multiply(dk_chunk, chunk.n, (D + LANES - 1) / LANES * LANES, w.dscore_rows.data, QUERIES, 1,
                             part(w.q_pairs, index, units<Unit>(QUERIES)), query_units, true);
                    multiply(part(w.dq, index, d), D, block.columns, w.key_pairs.data, 1, d, w.dscores,
                             n / STEP<Unit>, true);
                }
            }
            for (int64_t index = 0; index < blocks; ++index) {
                const Block block = p.block(index);
                const auto turned = part(w.dq, index, d);
                if (shares == 1) {
                    turn_out(turned, block.n, D, p.scale, Rows<In>{dq.rows<In>(b, h)[block.first], dq.token});
                } else {
                    turn_out(turned, block.n, D, p.scale, Rows<float>{part_of(share, b, h)[block.first], D});
                }
            }
        }

        const auto dk_rows = dk.rows<In>(b, g), dv_rows = dv.rows<In>(b, g);
        const auto write = [&](const float* sum, float factor, int width, In* out) {
            for (int f = 0; f < width; f += LANES) store_first(out + f, load(sum + f) * factor, width - f);
        };
        int64_t position = 0;  // keys between those that take part get 0; the first share writes them
        const auto clear_until = [&](int64_t key) {
            for (; position < key; ++position) {
                std::fill_n(dk_rows[position], D, In{});
                std::fill_n(dv_rows[position], E, In{});
            }
            ++position;
        };
        for (int64_t j = 0; j < keys.count; ++j) {
            if (share == 0) clear_until(keys[j]);
            if (j / KEYS % shares != share) continue;
            write(w.dk[j], p.scale, D, dk_rows[keys[j]]);
            write(w.dv[j], 1.0f, E, dv_rows[keys[j]]);
        }
        if (share == 0) clear_until(p.keys);
    });
    if (!done || shares == 1) return done;

#pragma omp parallel for collapse(2) num_threads(p.threads)
    for (int64_t head = 0; head < p.batch * p.heads; ++head)
        for (int64_t n = 0; n < p.queries; ++n) {
            const int64_t b = head / p.heads, h = head % p.heads;
            In* const out = dq.rows<In>(b, h)[n];
            for (int f = 0; f < D; f += LANES) {
                vec sum{};
                for (int64_t share = 0; share < shares; ++share) sum += load_first(part_of(share, b, h)[n] + f, D - f);
                store_first(out + f, sum, D - f);
            }
        }
    return true;
}

}  // namespace

// Both write their results in full and return 0, or 1 if there is no memory for their scratch. All arrays are bf16 or
// float (batch, heads or groups, tokens, size); lse, the logarithm to base 2 of the sum of exp(s), is float
// (batch, heads, queries), and not used where weights are not normalised.
extern "C" {

// arrays: q, k, v; results o, lse.
int attlas_attention_forward(const Problem* p, const Array* arrays) {
    return !(p->is_bf16 ? forward<bf16>(*p, arrays) : forward<float>(*p, arrays));
}

// arrays: q, k, v, o, lse, gradient of o; results gradients of q, k, v.
int attlas_attention_backward(const Problem* p, const Array* arrays) {
    return !(p->is_bf16 ? backward<bf16>(*p, arrays) : backward<float>(*p, arrays));
}
}
