// Softmax attention of a few queries over a long cache of keys and values, at the speed at which the cache can be read.
//
//     o_n = sum_m softmax_m(scale q_n . k_m) v_m        m visible to n
//
// All query heads that share a key/value head are rows of one output, so that a key is read from memory once. The
// visible keys of all outputs are cut into tiles, numbered from the first output to the last, and every worker takes an
// equal run of tiles (stream-K): how many sequences and heads there are, and how long each sequence is, makes no
// difference to how evenly the work is spread. Where a run begins or ends within an output, the worker leaves a partial
// result (largest score, sum of weights, sum of weighted values); partial results merge associatively.
//
// A worker takes LANES keys at a time: their scores are one register. Sums are float32, and are rescaled only when a
// larger score is met.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include <omp.h>

#include "simd.h"

namespace {

using namespace attlas;

constexpr int64_t TILE = 256;  // keys
constexpr int GROUP = 4;       // rows that use a value while it is in a register
constexpr int STRETCH = 16384;         // numbers of keys, then of values, that are read in one go
constexpr int WEIGHTS = STRETCH / 64;  // room for those of a row and a block of keys
constexpr int KEYS_AHEAD = 16384, VALUES_AHEAD = 8192;  // bytes, at which a stretch is asked for before it is read
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr int64_t WORTH_THREADS = 1 << 17;  // bytes of cache that take longer than waking the other threads

int64_t padded(int64_t n) { return (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

struct Problem {
    int64_t batch, heads, groups, queries, keys, key_size, value_size;
    int64_t window, sinks, page_size, pages;  // pages: of a sequence, in the table
    const int64_t* lengths;                   // (batch)
    const int32_t* table;                     // (batch, pages): which page holds the next page_size keys; or null
    const uint8_t* keep;                      // (batch, keys), or null: all
    const float *key_scales, *value_scales;   // (batch, groups), of an int8 cache
    float scale;
    int32_t causal, query_is_bf16, cache_is_int8, threads;  // a cache that is not int8 has the type of the queries

    int64_t rows() const { return heads / groups * queries; }
};

struct Array {
    int64_t address, batch, head, token;

    template <class T>
    T* row(int64_t b, int64_t h, int64_t t) const {
        return reinterpret_cast<T*>(address) + b * batch + h * head + t * token;
    }
};

// The keys of one sequence that some query sees: the sinks and the window, or all.
struct Visible {
    int64_t length, first_query, sinks, start, count;

    Visible(const Problem& p, int64_t b)
        : length(p.lengths[b]), first_query(length - p.queries),
          start(p.causal ? std::max<int64_t>(0, first_query - p.window + 1) : 0) {
        sinks = std::min(p.sinks, start);
        count = sinks + length - start;
    }
    int64_t position(int64_t i) const { return i < sinks ? i : start + (i - sinks); }
};

bool sees(const Problem& p, int64_t query, int64_t key) {
    return !p.causal || (key <= query && (key > query - p.window || key < p.sinks));
}

// Whether queries first .. last all see every key from nearest to farthest.
bool all_see(const Problem& p, int64_t first, int64_t last, int64_t nearest, int64_t farthest) {
    return sees(p, first, farthest) && sees(p, last, nearest) && (nearest < p.sinks) == (farthest < p.sinks);
}

// Equal runs of tiles: the first workers take one more where they do not divide.
struct Schedule {
    int64_t tiles, workers;
    int64_t begin(int64_t worker) const { return tiles / workers * worker + std::min(worker, tiles % workers); }
    int64_t worker_of(int64_t tile) const {
        const int64_t most = tiles / workers + 1, full = tiles % workers;
        return tile < full * most ? tile / most : full + (tile - full * most) / (most - 1);
    }
};

// Of one output, over some of its keys: per row the largest score (in powers of 2), the sums of weights by lane, and
// the sum of weighted values.
struct Partial {
    float *largest, *total, *sum;
    int64_t rows, size;

    static int64_t floats(int64_t rows, int64_t size) { return rows * (LANES + LANES + size); }
    Partial(float* memory, int64_t rows, int64_t size)
        : largest(memory), total(memory + rows * LANES), sum(memory + 2 * rows * LANES), rows(rows), size(size) {}

    void clear() {
        std::fill_n(largest, rows, -INFINITY);
        std::fill_n(total, rows * (LANES + size), 0.0f);
    }
    void raise(int64_t row, float score) {
        const float rescale = std::exp2(largest[row] - score);
        largest[row] = score;
        store(total + row * LANES, load(total + row * LANES) * rescale);
        for (int64_t f = 0; f < size; f += LANES) store(sum + row * size + f, load(sum + row * size + f) * rescale);
    }
    void merge(const Partial& other) {
        for (int64_t row = 0; row < rows; ++row) {
            if (other.largest[row] == -INFINITY) continue;
            if (other.largest[row] > largest[row]) raise(row, other.largest[row]);
            const vec rescale = spread(std::exp2(other.largest[row] - largest[row]));
            store(total + row * LANES, load(total + row * LANES) + rescale * load(other.total + row * LANES));
            for (int64_t f = row * size; f < (row + 1) * size; f += LANES)
                store(sum + f, load(sum + f) + rescale * load(other.sum + f));
        }
    }
};

template <class Cache>
using Addresses = const Cache* [LANES];

// LANES keys: their rows, and their places in the sequence. Where fewer are left, the last is repeated.
template <class Rows>
struct Step {
    Rows k, v;
    int64_t position[LANES];
    int n;
};

template <class Cache>
struct Output {
    const Problem& p;
    const Array &k, &v;
    int64_t b, g;
    Visible visible;
    float scale;  // to powers of 2

    Output(const Problem& p, const Array* arrays, int64_t index)
        : p(p), k(arrays[1]), v(arrays[2]), b(index / p.groups), g(index % p.groups), visible(p, b),
          scale(p.scale * LOG2_E * (p.key_scales ? p.key_scales[index] : 1.0f)) {}

    // Whether keys and values of one head follow each other in memory, both of that size.
    bool is_near(int64_t size) const {
        return p.key_size == size && p.value_size == size && k.token == size && v.token == size && !p.keep && !p.table;
    }

    // The next keys from i on that are kept, before end; moves i behind them.
    void step(int64_t& i, int64_t end, Step<Addresses<Cache>>& s) const {
        s.n = 0;
        if (p.keep || p.table) {
            for (; i < end && s.n < LANES; ++i) {
                const int64_t place = visible.position(i);
                if (!p.keep || p.keep[b * p.keys + place]) s.position[s.n++] = place;
            }
        } else {  // neighbours
            const int64_t place = visible.position(i);
            const int64_t most = i < visible.sinks ? std::min(end, visible.sinks) - i : end - i;
            s.n = int(std::min<int64_t>(most, LANES));
            for (int j = 0; j < LANES; ++j) s.position[j] = place + j;
            i += s.n;
        }
        if (!s.n) return;
        for (int j = s.n; j < LANES; ++j) s.position[j] = s.position[s.n - 1];
        for (int j = 0; j < LANES; ++j) {
            int64_t sequence = b, token = s.position[j];
            if (p.table) {
                sequence = p.table[b * p.pages + token / p.page_size];
                token %= p.page_size;
            }
            s.k[j] = k.row<const Cache>(sequence, g, token);
            s.v[j] = v.row<const Cache>(sequence, g, token);
        }
    }
};

// Scratch of one worker beside its partial results.
struct Scratch {
    float *queries, *keys, *values, *weights;

    static int64_t floats(int64_t rows, int64_t d, int64_t e) { return rows * (d + WEIGHTS) + LANES * (d + e); }
    Scratch(float* memory, int64_t rows, int64_t d, int64_t e)
        : queries(memory), keys(queries + rows * d), values(keys + LANES * d), weights(values + LANES * e) {}
};

// Copies rows as floats, with zeros behind them, and lets the pointers point to the copies.
template <class Rows>
ATTLAS_INLINE void convert(const Rows& rows, int n, int64_t size, float* out, int64_t stride, const float** copies) {
    for (int j = 0; j < LANES; ++j) {
        copies[j] = out + j * stride;
        for (int64_t f = 0; j < n && f < size; f += LANES)
            store(out + j * stride + f, load_first(rows[j] + f, int(size - f)));
    }
}

template <class T>
ATTLAS_INLINE vec dot_step(vec sum, const float* query, const T* key) {
    return sum + load(query) * load(key);
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
constexpr bool HAS_DOT = true;

ATTLAS_INLINE vec dot_step(vec sum, const bf16* query, const bf16* key) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(query), (__m512bh)_mm512_loadu_si512(key));
}
#else
constexpr bool HAS_DOT = false;
#endif

// Rows that lie D apart, instead of their addresses.
template <class T, int D>
struct Near {
    const T* first;
    ATTLAS_INLINE_MEMBER const T* operator[](int j) const { return first + j * D; }
};

// The scores of LANES keys under one query; size is whole registers. after(j, f) is called on the way.
template <class Query, class Keys, class Size, class F>
ATTLAS_INLINE vec score(const Query* query, const Keys& keys, Size size, F after) {
    constexpr int64_t width = sizeof(vec) / sizeof(Query);
    vec sums[LANES] = {};
    for (int j = 0; j < LANES; ++j)
        for (int64_t f = 0; f < size; f += width) {
            sums[j] = dot_step(sums[j], query + f, keys[j] + f);
            after(j, f);
        }
    return sum_rows(sums);
}

// As score for GROUP neighbouring queries: what is loaded of a key serves them all.
template <class Query, class Keys, class Size, class F>
ATTLAS_INLINE void score_group(const Query* query, int64_t stride, const Keys& keys, Size size, vec (&scores)[GROUP],
                               F after) {
    constexpr int64_t width = sizeof(vec) / sizeof(Query);
    constexpr int PART = LANES / GROUP;  // keys at a time
#pragma GCC unroll 1
    for (int part = 0; part < GROUP; ++part) {
        vec sums[LANES] = {};
        for (int j = 0; j < PART; ++j)
#pragma GCC unroll 1
            for (int64_t f = 0; f < size; f += width) {
                for (int r = 0; r < GROUP; ++r)
                    sums[r * PART + j] =
                        dot_step(sums[r * PART + j], query + r * stride + f, keys[part * PART + j] + f);
                after(part * PART + j, f);
            }
        scores[part] = sum_rows(sums);  // lanes: query, key
    }
    // Blocks of PART lanes, by part and query, become those of a query by part.
    constexpr auto lanes = std::make_index_sequence<LANES>();
    exchange<LANES / 2>(scores[0], scores[2], lanes);
    exchange<LANES / 2>(scores[1], scores[3], lanes);
    exchange<LANES / 4>(scores[0], scores[1], lanes);
    exchange<LANES / 4>(scores[2], scores[3], lanes);
}

// Two registers of features. Those of bfloat16 are the even and the odd ones, which costs least.
template <class T>
ATTLAS_INLINE void load_two(const T* p, vec& first, vec& second) {
    first = load(p);
    second = load(p + LANES);
}

ATTLAS_INLINE void load_two(const bf16* p, vec& first, vec& second) {
    vec_u32 both;
    std::memcpy(&both, p, sizeof both);
    first = (vec)(both << 16);
    second = (vec)(both & 0xffff0000);
}

// sum[r] += sum_j weights[r][j] values[j] for ROWS rows and 2 PAIRS registers of features. Several rows of bfloat16 take
// two keys at a time, whose weights are rounded for it. Where values lie side by side, ASKS for those that follow.
template <int ROWS, int PAIRS, bool ASKS, class Values>
ATTLAS_INLINE void add_part(float* sum, int64_t stride, const float* weights, const Values& values, int n, int64_t f) {
    vec acc[ROWS][2 * PAIRS];
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < 2 * PAIRS; ++i) acc[r][i] = load(sum + r * stride + f + i * LANES);
    const auto ask = [&](const auto* pair) {
        if constexpr (ASKS)
            for (unsigned line = 0; line < 2 * LANES * sizeof *pair; line += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(pair) + VALUES_AHEAD + line);
    };
    int j = 0;
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    using Cache = std::remove_cv_t<std::remove_pointer_t<std::decay_t<decltype(values[0])>>>;
    if constexpr (ROWS > 1 && std::is_same_v<Cache, bf16>) {  // two keys at a time
        uint32_t both[ROWS][WEIGHTS / 2];  // their weights
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i + 1 < n; i += 2 * LANES) {
                const float* const row = weights + r * WEIGHTS + i;
                const auto pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(row + LANES), (__m512)load(row));
                std::memcpy(both[r] + i / 2, &pairs, sizeof pairs);
            }
#pragma GCC unroll 1
        for (; j + 1 < n; j += 2) {
            vec_u32 value[2 * PAIRS];
            for (int i = 0; i < PAIRS; ++i) {
                const bf16* const first = values[j] + f + 2 * i * LANES;
                const bf16* const next = values[j + 1] + f + 2 * i * LANES;
                vec_u32 low, high;
                std::memcpy(&low, first, sizeof low);
                std::memcpy(&high, next, sizeof high);
                value[2 * i] = (low & 0xffff) | (high << 16);
                value[2 * i + 1] = (low >> 16) | (high & 0xffff0000);
                ask(first);
                ask(next);
            }
            for (int r = 0; r < ROWS; ++r) {
                const auto weight = (__m512bh)_mm512_set1_epi32(int(both[r][j / 2]));
                for (int i = 0; i < 2 * PAIRS; ++i)
                    acc[r][i] = (vec)_mm512_dpbf16_ps((__m512)acc[r][i], weight, (__m512bh)value[i]);
            }
        }
    }
#endif
#pragma GCC unroll 1
    for (; j < n; ++j) {
        vec value[2 * PAIRS];
        for (int i = 0; i < PAIRS; ++i) {
            const auto* const pair = values[j] + f + 2 * i * LANES;
            load_two(pair, value[2 * i], value[2 * i + 1]);
            ask(pair);
        }
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < 2 * PAIRS; ++i) acc[r][i] += weights[r * WEIGHTS + j] * value[i];
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < 2 * PAIRS; ++i) store(sum + r * stride + f + i * LANES, acc[r][i]);
}

template <int ROWS, bool ASKS = false, class Values>
ATTLAS_INLINE void add_values(float* sum, int64_t stride, const float* weights, const Values& values, int n) {
    int64_t f = 0;
    if constexpr (ROWS <= 2)  // whole values where the registers hold their sums: memory is read as it lies
        for (; f + 8 * LANES <= stride; f += 8 * LANES) add_part<ROWS, 4, ASKS>(sum, stride, weights, values, n, f);
    for (; f + 4 * LANES <= stride; f += 4 * LANES) add_part<ROWS, 2, ASKS>(sum, stride, weights, values, n, f);
    for (; f < stride; f += 2 * LANES) add_part<ROWS, 1, ASKS>(sum, stride, weights, values, n, f);
}

template <class Query, class Cache>
struct Worker {
    static constexpr bool CAN_DOT = HAS_DOT && std::is_same_v<Query, bf16> && std::is_same_v<Cache, bf16>;
    const Problem& p;
    const Array* arrays;
    Scratch scratch;

    int64_t d() const { return padded(p.key_size); }
    float* weights(int64_t row) const { return scratch.weights + row * WEIGHTS; }
    bool dots() const { return CAN_DOT && p.key_size % (2 * LANES) == 0; }

    // Attends to keys [begin, end) of those that an output sees.
    void attend(const Output<Cache>& output, int64_t begin, int64_t end, Partial& partial) const {
        pack_queries(output);
        if (output.is_near(64)) return attend_near<64>(output, begin, end, partial);
        if (output.is_near(128)) return attend_near<128>(output, begin, end, partial);
        attend_any(output, begin, end, partial);
    }

    // Keys and values that lie side by side and have a usual size: whole blocks of keys that all rows see need no list
    // of addresses, and have loops of known length. A block is so large that memory is read in long stretches, and what
    // follows is asked for on the way, the keys among the dot products and the values among the sums.
    template <int D>
    void attend_near(const Output<Cache>& output, int64_t begin, int64_t end, Partial& partial) const {
        constexpr int STEPS = STRETCH / (LANES * D);
        constexpr int KEYS = STEPS * LANES, AHEAD = KEYS_AHEAD / (LANES * D * sizeof(Cache));
        const int64_t first = output.visible.first_query, last = first + p.queries - 1;
        for (int64_t i = begin; i < end;) {
            const int64_t place = output.visible.position(i), final = place + KEYS - 1;
            if (i + KEYS > end || output.visible.position(i + KEYS - 1) != final ||
                !all_see(p, first, last, place, final)) {
                const int64_t stop = std::min(end, i + KEYS);
                attend_any(output, i, stop, partial);
                i = stop;
                continue;
            }
            const Cache* const k = output.k.template row<const Cache>(output.b, output.g, place);
            const Cache* const v = output.v.template row<const Cache>(output.b, output.g, place);
            const auto step = [&](int number) {
                const int64_t offset = int64_t(number) * LANES * D;
                return Step<Near<Cache, D>>{{k + offset}, {v + offset}, {}, LANES};
            };
            for (int number = 0; number < STEPS; ++number)
                take(output, step(number), step(number + AHEAD), std::integral_constant<int64_t, D>(), number);
            weigh<STEPS>(partial);
            add(output, Step<Near<Cache, D>>{{k}, {v}, {}, KEYS}, partial);
            i += KEYS;
        }
    }

    void attend_any(const Output<Cache>& output, int64_t begin, int64_t end, Partial& partial) const {
        Step<Addresses<Cache>> steps[2];
        int64_t i = begin;
        output.step(i, end, steps[0]);
        for (int now = 0; steps[now].n; now = 1 - now) {
            output.step(i, end, steps[1 - now]);
            take(output, steps[now], steps[1 - now], (p.key_size + LANES - 1) / LANES * LANES, 0);
            weigh<1>(partial);
            add(output, steps[now], partial);
        }
    }

    int64_t row_position(const Output<Cache>& output, int64_t row) const {
        return output.visible.first_query + row % p.queries;
    }

    // Rows are the queries of the heads of the group. For dot products of bfloat16 they stay as they are.
    void pack_queries(const Output<Cache>& output) const {
        for (int64_t row = 0; row < p.rows(); ++row) {
            const int64_t h = output.g * (p.heads / p.groups) + row / p.queries;
            const Query* query = arrays[0].row<const Query>(output.b, h, row % p.queries);
            float* out = scratch.queries + row * d();
            if (dots()) std::memcpy(out, query, p.key_size * sizeof(Query));
            else
                for (int64_t f = 0; f < d(); f += LANES)
                    store(out + f, f < p.key_size ? load_first(query + f, int(p.key_size - f)) : vec{});
        }
    }

    // The scores of a step's keys, as the step of that number within a block.
    template <class Keys, class Size>
    ATTLAS_INLINE_MEMBER void take(const Output<Cache>& output, const Step<Keys>& step, const Step<Keys>& next,
                                   Size size, int number) const {
        if constexpr (CAN_DOT) {
            if (dots()) {
                const auto queries = reinterpret_cast<const bf16*>(scratch.queries);
                return score_rows(output, step, next, queries, 2 * d(), step.k, size, number);
            }
        }
        // Where several rows need it, a key is converted once.
        if (p.key_size % LANES || (p.rows() > 2 && !std::is_same_v<Cache, float>)) {
            const float* copies[LANES];
            convert(step.k, step.n, p.key_size, scratch.keys, d(), copies);
            score_rows(output, step, next, scratch.queries, d(), copies, size, number);
        } else {
            score_rows(output, step, next, scratch.queries, d(), step.k, size, number);
        }
    }

    // Whether every row sees every key of the step.
    bool open(const Output<Cache>& output, const Step<Addresses<Cache>>& step) const {
        const int64_t first = output.visible.first_query;
        return all_see(p, first, first + p.queries - 1, step.position[0], step.position[step.n - 1]);
    }
    template <int D>
    bool open(const Output<Cache>&, const Step<Near<Cache, D>>&) const {
        return true;
    }

    // On the way the keys of the step `next` are asked for, a line at a time (and its values, where they lie anywhere):
    // many requests at once would hold up what follows.
    template <class Q, class Given, class Keys, class Size>
    ATTLAS_INLINE_MEMBER void score_rows(const Output<Cache>& output, const Step<Given>& step, const Step<Given>& next,
                                         const Q* queries, int64_t stride, const Keys& keys, Size size,
                                         int number) const {
        const bool hides = step.n < LANES || !open(output, step);
        const auto finish = [&](int64_t row, vec scores) {
            scores *= output.scale;
            if (hides)
                for (int j = 0; j < LANES; ++j)
                    if (j >= step.n || !sees(p, row_position(output, row), step.position[j])) scores[j] = -INFINITY;
            store(weights(row) + number * LANES, scores);
        };
        const auto ask = [&](int j, int64_t f) {
            __builtin_prefetch(next.k[j] + f);
            if constexpr (std::is_same_v<Given, Addresses<Cache>>) __builtin_prefetch(next.v[j] + f);
        };
        const auto nothing = [](int, int64_t) {};
        int64_t row = 0;
        const auto group = [&](auto after) {
            vec scores[GROUP];
            score_group(queries + row * stride, stride, keys, size, scores, after);
            for (int r = 0; r < GROUP; ++r) finish(row + r, scores[r]);
            row += GROUP;
        };
        if (p.rows() >= GROUP) group(ask);
        else finish(row++, score(queries, keys, size, ask));
        while (row + GROUP <= p.rows()) group(nothing);
        for (; row < p.rows(); ++row) finish(row, score(queries + row * stride, keys, size, nothing));
    }

    // Turns the scores of a block into weights, relative to the largest score so far of each row.
    template <int STEPS>
    ATTLAS_INLINE_MEMBER void weigh(Partial& partial) const {
        for (int64_t row = 0; row < p.rows(); ++row) {
            float* const block = weights(row);
            vec most = load(block);
            for (int i = 1; i < STEPS; ++i) most = max(most, load(block + i * LANES));
            if (any(most > partial.largest[row])) partial.raise(row, largest_lane(most));
            const float largest = partial.largest[row];
            vec total = load(partial.total + row * LANES);
            for (int i = 0; i < STEPS; ++i) {
                const vec weight = exp2(load(block + i * LANES) - (largest == -INFINITY ? 0.0f : largest));
                store(block + i * LANES, weight);
                total += weight;
            }
            store(partial.total + row * LANES, total);
        }
    }

    template <class Given>
    ATTLAS_INLINE_MEMBER void add(const Output<Cache>& output, const Step<Given>& step, Partial& partial) const {
        if (p.value_size % (2 * LANES) == 0) return add(output, step, step.v, partial);
        const float* copies[LANES];
        convert(step.v, step.n, p.value_size, scratch.values, partial.size, copies);
        add(output, step, copies, partial);
    }

    template <class Given, class Values>
    ATTLAS_INLINE_MEMBER void add(const Output<Cache>& output, const Step<Given>& step, const Values& values,
                                  Partial& partial) const {
        const auto sum = [&](int64_t row) { return partial.sum + row * partial.size; };
        int64_t row = 0;
        if constexpr (std::is_same_v<Given, Addresses<Cache>>)
            if (!open(output, step))  // what a query may not see is not multiplied at all: it may be infinite
                for (; row < p.rows(); ++row)
                    for (int j = 0; j < step.n; ++j)
                        if (sees(p, row_position(output, row), step.position[j]))
                            add_values<1>(sum(row), partial.size, weights(row) + j, values + j, 1);
        constexpr bool NEAR = !std::is_same_v<Given, Addresses<Cache>>;
        const auto add_rows = [&](auto rows, auto asks) {
            add_values<rows(), asks()>(sum(row), partial.size, weights(row), values, step.n);
            row += rows();
        };
        constexpr int TOGETHER = NEAR && CAN_DOT ? 2 : GROUP;  // of two rows the registers hold all sums
        constexpr std::integral_constant<int, TOGETHER> group;
        constexpr std::integral_constant<int, 1> one;
        if (NEAR && p.rows() >= TOGETHER) add_rows(group, std::bool_constant<NEAR>());  // the first rows ask for all
        else if (NEAR) add_rows(one, std::bool_constant<NEAR>());
        while (row + TOGETHER <= p.rows()) add_rows(group, std::false_type());
        while (row < p.rows()) add_rows(one, std::false_type());
    }
};

// Divides by the sums of weights and writes the rows of an output.
template <class Query, class Cache>
void finish(const Problem& p, const Array* arrays, int64_t index, const Partial& partial) {
    const int64_t b = index / p.groups, g = index % p.groups, shared = p.heads / p.groups;
    const float value_scale = p.value_scales ? p.value_scales[index] : 1.0f;
    for (int64_t row = 0; row < partial.rows; ++row) {
        const int64_t h = g * shared + row / p.queries, n = row % p.queries;
        float total = 0;
        for (int j = 0; j < LANES; ++j) total += partial.total[row * LANES + j];
        const float factor = total == 0 ? 0 : value_scale / total;
        Query* const o = arrays[3].row<Query>(b, h, n);
        float* const sum = partial.sum + row * partial.size;
        if (std::is_same_v<Cache, bf16> && p.value_size % (2 * LANES) == 0)  // as load_two has them
            for (int64_t f = 0; f < p.value_size; f += 2 * LANES) {
                float even[2 * LANES];
                std::copy_n(sum + f, 2 * LANES, even);
                for (int i = 0; i < 2 * LANES; ++i) sum[f + i] = even[i / 2 + i % 2 * LANES];
            }
        for (int64_t f = 0; f < p.value_size; f += LANES)
            store_first(o + f, load(sum + f) * factor, int(p.value_size - f));
        *arrays[4].row<float>(b, h, n) = partial.largest[row] * LN_2 + std::log(total);
    }
}

template <class Query>
void write_nothing(const Problem& p, const Array* arrays, int64_t index) {
    const int64_t b = index / p.groups, g = index % p.groups, shared = p.heads / p.groups;
    for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
        for (int64_t n = 0; n < p.queries; ++n) {
            std::fill_n(arrays[3].row<Query>(b, h, n), p.value_size, Query{});
            *arrays[4].row<float>(b, h, n) = -INFINITY;
        }
}

template <class Query, class Cache>
bool decode(const Problem& p, const Array* arrays) {
    const int64_t outputs = p.batch * p.groups, rows = p.rows();
    const int64_t d = padded(p.key_size), e = padded(p.value_size);
    const std::unique_ptr<int64_t[]> first_tile(new (std::nothrow) int64_t[outputs + 1]);
    if (!first_tile) return false;
    first_tile[0] = 0;
    int64_t keys = 0;
    for (int64_t i = 0; i < outputs; ++i) {
        const int64_t count = Visible(p, i / p.groups).count;
        first_tile[i + 1] = first_tile[i] + (count + TILE - 1) / TILE;
        keys += count;
    }
    const bool parallel = keys * (p.key_size + p.value_size) * int64_t(sizeof(Cache)) >= WORTH_THREADS;
    const Schedule schedule{first_tile[outputs], parallel ? p.threads : 1};
    // Of each worker: scratch, and the partial results of the output where its run begins and of that where it ends.
    const int64_t partial_floats = Partial::floats(rows, e), own = Scratch::floats(rows, d, e) + 2 * partial_floats;
    const std::unique_ptr<float, void (*)(void*)> memory(
        static_cast<float*>(std::aligned_alloc(64, (schedule.workers * own * sizeof(float) + 63) / 64 * 64)),
        std::free);
    if (!memory) return false;
    std::fill_n(memory.get(), schedule.workers * own, 0.0f);  // the padding of rows stays zero
    const auto partial_of = [&](int64_t worker, bool continues) {
        return Partial(memory.get() + worker * own + continues * partial_floats, rows, e);
    };

#pragma omp parallel num_threads(int(schedule.workers)) if (schedule.workers > 1)
    {
#pragma omp for schedule(static, 1)
        for (int64_t w = 0; w < schedule.workers; ++w) {
            const Worker<Query, Cache> worker{
                p, arrays, Scratch(memory.get() + w * own + 2 * partial_floats, rows, d, e)};
            const int64_t end = schedule.begin(w + 1);
            int64_t tile = schedule.begin(w);
            int64_t index = std::upper_bound(first_tile.get(), first_tile.get() + outputs, tile) - first_tile.get() - 1;
            for (; tile < end; tile = first_tile[++index]) {
                const Output<Cache> output(p, arrays, index);
                const int64_t from = tile - first_tile[index];
                const int64_t to = std::min(end, first_tile[index + 1]) - first_tile[index];
                Partial partial = partial_of(w, from > 0);
                partial.clear();
                worker.attend(output, from * TILE, std::min(to * TILE, output.visible.count), partial);
                if (from == 0 && end >= first_tile[index + 1]) finish<Query, Cache>(p, arrays, index, partial);
            }
        }
        // Outputs that several workers shared, and those that see nothing.
#pragma omp for schedule(static)
        for (int64_t index = 0; index < outputs; ++index) {
            const int64_t begin = first_tile[index], end = first_tile[index + 1];
            if (begin == end) {
                write_nothing<Query>(p, arrays, index);
                continue;
            }
            const int64_t host = schedule.worker_of(begin), last = schedule.worker_of(end - 1);
            if (host == last) continue;
            Partial whole = partial_of(host, false);
            for (int64_t w = host + 1; w <= last; ++w) whole.merge(partial_of(w, true));
            finish<Query, Cache>(p, arrays, index, whole);
        }
    }
    return true;
}

}  // namespace

// arrays: q, k, v; results o in the type of q, and float lse. k and v are (batch, groups, keys, size), or with a table
// (pages of all sequences, groups, page_size, size). Writes its results in full and returns 0, or 1 if there is no
// memory for its scratch.
extern "C" int attlas_decode(const Problem* p, const Array* arrays) {
    const auto run = p->query_is_bf16 ? (p->cache_is_int8 ? decode<bf16, int8_t> : decode<bf16, bf16>)
                                      : (p->cache_is_int8 ? decode<float, int8_t> : decode<float, float>);
    return !run(*p, arrays);
}
