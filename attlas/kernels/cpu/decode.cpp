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

constexpr int64_t TILE = 256;    // keys
constexpr int GROUP = 4;         // rows that use a key while it is in a register
constexpr int STRETCH = 131072;  // bytes of keys, then of values, that are read in one go
constexpr int WEIGHTS = 512;     // room for those of a row and a block of keys
constexpr int NEARBY = 32;       // values that several rows use in turn: few, so that the memory has no time to rest
template <class Cache>
constexpr int AHEAD = std::is_same_v<Cache, bf16> ? 8192 : 6144;  // bytes, at which a stretch is asked for before
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
constexpr int64_t WORTH_THREADS = 1 << 17;  // bytes of cache that take longer than waking the other threads

int64_t padded(int64_t n) { return (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

struct Problem {
    int64_t batch, heads, groups, queries, keys, key_size, value_size;
    int64_t window, sinks, page_size, pages;  // pages: of a sequence, in the table
    const int64_t* lengths;                   // (batch), or null: all keys
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
        : length(p.lengths ? p.lengths[b] : p.table ? p.pages * p.page_size : p.keys),
          first_query(length - p.queries),
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

// Up to LANES keys that lie anywhere, and their places in the sequence.
template <class Cache>
struct Step {
    const Cache *k[LANES], *v[LANES];
    int64_t position[LANES];
    int n;
};

// Rows that lie `stride` apart, and where to ask while they are read if they lie without gaps.
template <class T>
struct Rows {
    const T* first;
    int64_t stride;
    const char* ahead;

    Rows from(int64_t j) const { return {first + j * stride, stride, ahead + j * stride * int64_t(sizeof(T))}; }
};

// The stride of rows of a size, which the compiler then knows where there are no gaps and it knows the size.
template <bool GAPLESS, class T, class Size>
ATTLAS_INLINE auto stride_of(const Rows<T>& rows, Size size) {
    if constexpr (GAPLESS) return size;
    else return rows.stride;
}

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

    // Row of the key or the value at a place of the sequence.
    const Cache* row(const Array& array, int64_t place) const {
        if (!p.table) return array.row<const Cache>(b, g, place);
        return array.row<const Cache>(p.table[b * p.pages + place / p.page_size], g, place % p.page_size);
    }
    // Those from a place on, before those from the next are read.
    Rows<Cache> rows(const Array& array, int64_t place, int64_t next) const {
        const Cache* const first = row(array, place);
        const char* const ahead = p.table ? reinterpret_cast<const char*>(row(array, next))
                                          : reinterpret_cast<const char*>(first) + AHEAD<Cache>;
        return {first, array.token, ahead};
    }
    bool keeps(int64_t place) const { return !p.keep || p.keep[b * p.keys + place]; }
    bool keeps_all(int64_t place, int64_t n) const {
        return !p.keep || !std::memchr(p.keep + b * p.keys + place, 0, std::size_t(n));
    }

    // How many keys from i on, at most `most`, lie one stride apart, are kept and are seen by all queries: whole steps.
    int in_step(int64_t i, int64_t most) const {
        const int64_t place = visible.position(i);
        if (p.table) most = std::min(most, p.page_size - place % p.page_size);
        for (int64_t n = most / LANES * LANES; n; n = n > LANES ? LANES : 0)  // all of them, or one step
            if (all_see(p, visible.first_query, visible.length - 1, place, place + n - 1) && keeps_all(place, n))
                return int(n);
        return 0;
    }

    // The next keys from i on that are kept, before end; moves i behind them.
    void step(int64_t& i, int64_t end, Step<Cache>& s) const {
        for (s.n = 0; i < end && s.n < LANES; ++i) {
            const int64_t place = visible.position(i);
            if (!keeps(place)) continue;
            s.k[s.n] = row(k, place);
            s.v[s.n] = row(v, place);
            s.position[s.n++] = place;
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

#if defined(__AVX512BF16__) && defined(__AVX512F__)
constexpr bool HAS_DOT = true;

ATTLAS_INLINE vec multiply_add(vec sum, const bf16* query, const bf16* key) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(query), (__m512bh)_mm512_loadu_si512(key));
}
#else
constexpr bool HAS_DOT = false;
#endif

ATTLAS_INLINE vec multiply_add(vec sum, const float* query, const float* key) { return sum + load(query) * load(key); }

// What products take: bfloat16 where the processor has dot products of it, else float.
template <class Query>
using Element = std::conditional_t<HAS_DOT && std::is_same_v<Query, bf16>, bf16, float>;

// Copies a row of numbers that Element holds exactly.
template <class Element, class Cache>
ATTLAS_INLINE void copy_row(const Cache* row, int64_t size, Element* out) {
    for (int64_t f = 0; f < size; f += LANES) {
        const vec x = load_first(row + f, int(size - f));
        if constexpr (std::is_same_v<Element, float>) {
            store(out + f, x);
        } else {
            const vec_u16 top = __builtin_convertvector((vec_u32)x >> 16, vec_u16);
            std::memcpy(out + f, &top, sizeof top);
        }
    }
}

// Asks for what will be read next, a line at a time and in the order of memory: many requests at once would hold up
// what follows, and none at all would leave the memory idle.
template <bool ASKS>
struct Asker {
    const char* next;
    ATTLAS_INLINE_MEMBER void operator()() {
        if constexpr (!ASKS) return;
        __builtin_prefetch(next, 0, 0);  // for once: the other caches keep what the rest of the model needs
        next += sizeof(vec);
    }
};

// The scores of LANES keys under one query, of a size of whole registers. ask() is called for each register of keys.
template <class Element, class Stride, class Size, class F>
ATTLAS_INLINE vec score(const Element* query, const Element* keys, Stride stride, Size size, F& ask) {
    constexpr int64_t width = sizeof(vec) / sizeof(Element);
    vec sums[LANES] = {};
    for (int j = 0; j < LANES; ++j)
        for (int64_t f = 0; f < size; f += width) {
            sums[j] = multiply_add(sums[j], query + f, keys + j * stride + f);
            ask();
        }
    return sum_rows(sums);
}

// Hides a number from the compiler: unrolled, a loop of that length would need more registers than there are.
ATTLAS_INLINE int64_t unknown(int64_t x) {
    asm("" : "+r"(x));
    return x;
}

// As score for GROUP queries: what is loaded of a key serves them all.
template <class Element, class Stride, class Size, class F>
ATTLAS_INLINE void score_group(const Element* queries, const Element* keys, Stride stride, Size size,
                               vec (&scores)[GROUP], F& ask) {
    constexpr int64_t width = sizeof(vec) / sizeof(Element);
    constexpr int PART = LANES / GROUP;  // keys at a time
#pragma GCC unroll 1
    for (int part = 0; part < GROUP; ++part) {
        vec sums[LANES] = {};
        for (int64_t f = 0, end = unknown(size); f < end; f += width) {
            const Element* const first = keys + part * PART * stride + f;
            for (int j = 0; j < PART; ++j) ask();
            for (int r = 0; r < GROUP; ++r)
                for (int j = 0; j < PART; ++j)
                    sums[r * PART + j] =
                        multiply_add(sums[r * PART + j], queries + r * size + f, first + j * stride);
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

// scores[r * WEIGHTS + j] = scale query_r . key_j for n keys, a multiple of LANES. Where they lie without gaps, what
// lies ahead is asked for.
template <bool GAPLESS, class Element, class Size>
ATTLAS_NOINLINE void score_rows(const Element* queries, int64_t rows, Rows<Element> keys, int n, Size size, float scale,
                                float* scores) {
    const auto stride = stride_of<GAPLESS>(keys, size);
    Asker<GAPLESS> ask{keys.ahead};
    Asker<false> no_one{};
    for (int j = 0; j < n; j += LANES) {
        const Element* const step = keys.first + j * stride;
        int64_t row = 0;
        const auto group = [&](auto& how) {
            vec of_group[GROUP];
            score_group(queries + row * size, step, stride, size, of_group, how);
            for (int r = 0; r < GROUP; ++r, ++row) store(scores + row * WEIGHTS + j, of_group[r] * scale);
        };
        const auto one = [&](auto& how) {
            store(scores + row * WEIGHTS + j, score(queries + row * size, step, stride, size, how) * scale);
            ++row;
        };
        if (rows >= GROUP) group(ask);
        else one(ask);
        while (row + GROUP <= rows) group(no_one);
        while (row < rows) one(no_one);
    }
}

// Two registers of features. Those of bfloat16 are the first and the last four of every eight, which costs least.
template <class T>
ATTLAS_INLINE void load_two(const T* p, vec& first, vec& second) {
    first = load(p);
    second = load(p + LANES);
}

typedef uint16_t words __attribute__((vector_size(LANES * 4)));

// The first four of every eight words of low and of high in turn, and the last four: each pair of words one lane.
template <std::size_t... I>
ATTLAS_INLINE void pair_words(words low, words high, vec& first, vec& last, std::index_sequence<I...>) {
    constexpr auto from = [](std::size_t i) { return i / 8 * 8 + i % 8 / 2 + i % 2 * 2 * LANES; };
#if defined(__clang__)
    first = (vec)__builtin_shufflevector(low, high, int(from(I))...);
    last = (vec)__builtin_shufflevector(low, high, int(from(I) + 4)...);
#else
    first = (vec)__builtin_shuffle(low, high, words{uint16_t(from(I))...});
    last = (vec)__builtin_shuffle(low, high, words{uint16_t(from(I) + 4)...});
#endif
}

ATTLAS_INLINE words load_words(const bf16* p) {
    words x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

ATTLAS_INLINE void load_two(const bf16* p, vec& first, vec& second) {
    pair_words(words{}, load_words(p), first, second, std::make_index_sequence<2 * LANES>());
}

// sum[r] += sum_j weights[r][j] values[j] for ROWS rows and 2 PAIRS registers of features of n values, an even number.
// Those of bfloat16 are taken two at a time, and their weights are rounded for it.
template <int ROWS, int PAIRS, class Element, class Stride, class F>
ATTLAS_INLINE void add_part(float* sum, int64_t size, const float* weights, const Element* values, Stride stride, int n,
                            F& ask) {
    vec acc[ROWS][2 * PAIRS];
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < 2 * PAIRS; ++i) acc[r][i] = load(sum + r * size + i * LANES);
    if constexpr (std::is_same_v<Element, float>) {
#pragma GCC unroll 1
        for (int j = 0; j < n; ++j, values += stride) {
            vec value[2 * PAIRS];
            for (int i = 0; i < 2 * PAIRS; ++i) {
                value[i] = load(values + i * LANES);
                ask();
            }
            for (int r = 0; r < ROWS; ++r)
                for (int i = 0; i < 2 * PAIRS; ++i) acc[r][i] += weights[r * WEIGHTS + j] * value[i];
        }
    } else {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
        uint32_t both[ROWS][WEIGHTS / 2];  // weights of two keys
        for (int r = 0; r < ROWS; ++r)
            for (int j = 0; j < n; j += 2 * LANES) {
                const float* const row = weights + r * WEIGHTS + j;
                const auto pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(row + LANES), (__m512)load(row));
                std::memcpy(both[r] + j / 2, &pairs, sizeof pairs);
            }
#pragma GCC unroll 1
        for (int j = 0; j < n; j += 2, values += 2 * stride) {
            vec value[2 * PAIRS];
            for (int i = 0; i < PAIRS; ++i) {
                const Element* const first = values + 2 * i * LANES;
                pair_words(load_words(first), load_words(first + stride), value[2 * i], value[2 * i + 1],
                           std::make_index_sequence<2 * LANES>());
                ask();
                ask();
            }
            for (int r = 0; r < ROWS; ++r) {
                const auto weight = (__m512bh)_mm512_set1_epi32(int(both[r][j / 2]));
                for (int i = 0; i < 2 * PAIRS; ++i)
                    acc[r][i] = (vec)_mm512_dpbf16_ps((__m512)acc[r][i], weight, (__m512bh)value[i]);
            }
        }
#endif
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < 2 * PAIRS; ++i) store(sum + r * size + i * LANES, acc[r][i]);
}

// As many features at once as there are registers for their sums.
template <int ROWS, int PAIRS, class Element, class Stride, class Size, class F>
ATTLAS_INLINE void add_wide(float* sum, Size size, const float* weights, const Element* values, Stride stride, int n,
                            F& ask, int64_t f = 0) {
    for (; f + 2 * PAIRS * LANES <= size; f += 2 * PAIRS * LANES)
        add_part<ROWS, PAIRS>(sum + f, size, weights, values + f, stride, n, ask);
    if constexpr (PAIRS > 1) add_wide<ROWS, PAIRS / 2>(sum, size, weights, values, stride, n, ask, f);
}

// sum[r] += sum_j weights[r][j] values[j] for n values, a multiple of LANES, of a size of whole pairs of
// registers. As for keys, what lies ahead is asked for.
template <bool GAPLESS, class Element, class Size>
ATTLAS_NOINLINE void add_rows(float* sum, int64_t rows, const float* weights, Rows<Element> values, int n, Size size) {
    const auto stride = stride_of<GAPLESS>(values, size);
    Asker<GAPLESS> ask{values.ahead};
    Asker<false> no_one{};
    int64_t row = 0;
    const auto add = [&](auto count, auto& how) {
        constexpr int PAIRS = std::min(4, (LANES == 16 ? 8 : 4) / count());
        add_wide<count(), PAIRS>(sum + row * size, size, weights + row * WEIGHTS, values.first, stride, n, how);
        row += count();
    };
    constexpr std::integral_constant<int, 4> four;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 1> one;
    if (rows >= 4) add(four, ask);
    else if (rows >= 2) add(two, ask);
    else add(one, ask);
    while (row + 4 <= rows) add(four, no_one);
    if (row + 2 <= rows) add(two, no_one);
    if (row < rows) add(one, no_one);
}

template <class Query, class Cache>
struct Worker {
    using E = Element<Query>;
    const Problem& p;
    const Array* arrays;
    Scratch scratch;

    int64_t d() const { return padded(p.key_size); }
    float* weights(int64_t row) const { return scratch.weights + row * WEIGHTS; }
    E* queries() const { return reinterpret_cast<E*>(scratch.queries); }
    E* keys() const { return reinterpret_cast<E*>(scratch.keys); }
    E* values() const { return reinterpret_cast<E*>(scratch.values); }

    // Attends to keys [begin, end) of those that an output sees.
    void attend(const Output<Cache>& output, int64_t begin, int64_t end, Partial& partial) const {
        constexpr std::integral_constant<int64_t, 64> usual;
        constexpr std::integral_constant<int64_t, 128> large;
        pack_queries(output);
        if (p.key_size != d() || p.value_size != partial.size) attend_any(output, begin, end, partial);
        else if (d() == 64 && partial.size == 64) attend_near(output, begin, end, partial, usual, usual);
        else if (d() == 128 && partial.size == 128) attend_near(output, begin, end, partial, large, large);
        else attend_near(output, begin, end, partial, d(), partial.size);
    }

    // Keys and values of a size of whole registers: those that all rows see are read where they are, and in such blocks
    // that memory is read in long stretches. What follows is asked for on the way, the keys among the dot products and
    // the values among the sums.
    template <class KeySize, class ValueSize>
    void attend_near(const Output<Cache>& output, int64_t begin, int64_t end, Partial& partial, KeySize key_size,
                     ValueSize value_size) const {
        const int64_t most = std::min<int64_t>(WEIGHTS, STRETCH / sizeof(Cache) / std::max(d(), partial.size));
        const auto score = [&](auto gapless, const Rows<E>& rows, int j, int n) {
            score_rows<gapless()>(queries(), p.rows(), rows, n, key_size, output.scale, weights(0) + j);
        };
        const auto add = [&](auto gapless, const Rows<E>& rows, int j, int n) {
            weigh(j, n, partial);
            add_rows<gapless()>(partial.sum, p.rows(), weights(0) + j, rows, n, value_size);
        };
        for (int64_t i = begin; i < end;) {
            const int n = output.in_step(i, std::min(end - i, most));
            if (n) {
                const int64_t place = output.visible.position(i);
                const int64_t next = output.visible.position(std::min(i + n, end - 1));
                in_parts(output.rows(output.k, place, next), n, key_size, keys(), score);
                raise(n, partial);
                in_parts(output.rows(output.v, place, next), n, value_size, values(), add);
            } else {
                attend_any(output, i, std::min(end, i + LANES), partial);
            }
            i += n ? n : LANES;
        }
    }

    // Calls run with parts of n rows, or with copies of them.
    template <class Size, class F>
    ATTLAS_INLINE_MEMBER void in_parts(const Rows<Cache>& rows, int n, Size size, E* copies, F run) const {
        if constexpr (std::is_same_v<Cache, E>) {
            const int part = p.rows() > 2 ? NEARBY : n;
            for (int j = 0; j < n; j += part)
                if (rows.stride == size) run(std::true_type(), rows.from(j), j, std::min(part, n - j));
                else run(std::false_type(), rows.from(j), j, std::min(part, n - j));
        } else {
            for (int j = 0; j < n; j += LANES) {
                for (int i = 0; i < LANES; ++i) {
                    const auto [row, stride, ahead] = rows.from(j + i);
                    copy_row(row, size, copies + i * size);
                    for (std::size_t line = 0; line < size * sizeof(Cache); line += 64)
                        __builtin_prefetch(ahead + line, 0, 0);
                }
                run(std::false_type(), Rows<E>{copies, size, nullptr}, j, LANES);
            }
        }
    }

    // Keys that lie anywhere, or that not all rows see.
    void attend_any(const Output<Cache>& output, int64_t begin, int64_t end, Partial& partial) const {
        const int64_t rows = p.rows(), first = output.visible.first_query, last = first + p.queries - 1;
        Step<Cache> steps[2];
        int64_t i = begin;
        output.step(i, end, steps[0]);
        for (int turn = 0; steps[turn].n; turn = 1 - turn) {
            const Step<Cache>&now = steps[turn], &next = steps[1 - turn];
            output.step(i, end, steps[1 - turn]);
            gather(now.k, now.n, next.k, next.n, p.key_size, d(), keys());
            gather(now.v, now.n, next.v, next.n, p.value_size, partial.size, values());
            score_rows<false>(queries(), rows, Rows<E>{keys(), d(), nullptr}, LANES, d(), output.scale, weights(0));
            const bool open = all_see(p, first, last, now.position[0], now.position[now.n - 1]);
            const auto hidden = [&](int64_t row, int j) {
                return j >= now.n || !sees(p, first + row % p.queries, now.position[j]);
            };
            if (!open || now.n < LANES)
                for (int64_t row = 0; row < rows; ++row)
                    for (int j = 0; j < LANES; ++j)
                        if (hidden(row, j)) weights(row)[j] = -INFINITY;
            raise(LANES, partial);
            weigh(0, LANES, partial);
            if (open) {
                const Rows<E> copies{values(), partial.size, nullptr};
                add_rows<false>(partial.sum, rows, weights(0), copies, LANES, partial.size);
                continue;
            }
            for (int64_t row = 0; row < rows; ++row)  // what a row may not see is not multiplied: it may be infinite
                for (int j = 0; j < now.n; ++j)
                    if (!hidden(row, j))
                        add_value(partial.sum + row * partial.size, weights(row)[j], values() + j * partial.size,
                                  partial.size);
        }
    }

    // Copies n rows that lie anywhere to where they lie `stride` apart, with zeros behind, and asks for others.
    void gather(const Cache* const* rows, int n, const Cache* const* others, int count, int64_t size, int64_t stride,
                E* out) const {
        for (int j = 0; j < n; ++j) {
            copy_row(rows[j], size, out + j * stride);
            if (j < count) prefetch(others[j], int(size));
        }
        std::memset(out + n * stride, 0, (LANES - n) * stride * sizeof(E));
    }

    // sum += weight value
    static void add_value(float* sum, float weight, const E* value, int64_t size) {
        for (int64_t f = 0; f < size; f += 2 * LANES) {
            vec first, second;
            load_two(value + f, first, second);
            store(sum + f, load(sum + f) + weight * first);
            store(sum + f + LANES, load(sum + f + LANES) + weight * second);
        }
    }

    // Rows are the queries of the heads of the group.
    void pack_queries(const Output<Cache>& output) const {
        for (int64_t row = 0; row < p.rows(); ++row) {
            const int64_t h = output.g * (p.heads / p.groups) + row / p.queries;
            copy_row(arrays[0].row<const Query>(output.b, h, row % p.queries), p.key_size, queries() + row * d());
        }
    }

    // Makes the largest scores so far those of n further keys, where these are larger.
    void raise(int n, Partial& partial) const {
        for (int64_t row = 0; row < p.rows(); ++row) {
            const float* const block = weights(row);
            vec most = load(block);
            for (int j = LANES; j < n; j += LANES) most = max(most, load(block + j));
            if (any(most > partial.largest[row])) partial.raise(row, largest_lane(most));
        }
    }

    // Turns the scores of n keys from j on into weights, relative to the largest score so far of each row.
    void weigh(int j, int n, Partial& partial) const {
        for (int64_t row = 0; row < p.rows(); ++row) {
            const float largest = partial.largest[row] == -INFINITY ? 0.0f : partial.largest[row];
            vec total = load(partial.total + row * LANES);
            for (float* score = weights(row) + j; score < weights(row) + j + n; score += LANES) {
                const vec weight = exp2(load(score) - largest);
                store(score, weight);
                total += weight;
            }
            store(partial.total + row * LANES, total);
        }
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
        if (std::is_same_v<Element<Query>, bf16>)  // as load_two has them
            for (int64_t f = 0; f < partial.size; f += 2 * LANES) {
                float paired[2 * LANES];
                std::copy_n(sum + f, 2 * LANES, paired);
                for (int i = 0; i < 2 * LANES; ++i) sum[f + i] = paired[i / 8 * 4 + i % 4 + i % 8 / 4 * LANES];
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
