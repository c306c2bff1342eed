// A few rows times a weight matrix, y = x W^T + b, at the speed at which the weights can be read.
//
// Every worker takes an equal run of outputs. A weight is read once, for all rows.

#include <algorithm>

#include <omp.h>

#include "simd.h"

namespace {

using namespace attlas;

constexpr int AHEAD = 1024;  // numbers
constexpr int64_t WORTH_THREADS = 1 << 17;  // bytes of weights that take longer than waking the other threads

struct Problem {
    int64_t rows, inputs, outputs;
    const void *x, *weights, *bias;  // bias: null for none
    void* y;
    int32_t is_bf16, threads;
};

float sum_lanes(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

// Outputs [begin, end) of ROWS rows, one after the other: the weights are one stretch of memory, read from end to end.
// Several outputs at a time would be several stretches, and measured slower.
template <int ROWS, class T>
void multiply(const Problem& p, int64_t row, int64_t begin, int64_t end) {
    const T* const x = static_cast<const T*>(p.x) + row * p.inputs;
    const int64_t whole = p.inputs / LANES * LANES;
    const int left = int(p.inputs - whole);
    for (int64_t o = begin; o < end; ++o) {
        const T* const w = static_cast<const T*>(p.weights) + o * p.inputs;
        vec sums[ROWS] = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            __builtin_prefetch(w + i + AHEAD);
            const vec weight = load(w + i);
            for (int r = 0; r < ROWS; ++r) sums[r] += load(x + r * p.inputs + i) * weight;
        }
        for (int r = 0; r < ROWS; ++r) {
            if (left) sums[r] += load_first(x + r * p.inputs + whole, left) * load_first(w + whole, left);
            const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[o]) : 0.0f;
            store_first(static_cast<T*>(p.y) + (row + r) * p.outputs + o, spread(sum_lanes(sums[r]) + bias), 1);
        }
    }
}

template <class T>
void run(const Problem& p) {
    const bool parallel = p.inputs * p.outputs * int64_t(sizeof(T)) >= WORTH_THREADS;
    const int threads = parallel ? p.threads : 1;
#pragma omp parallel for num_threads(threads) if (parallel)
    for (int t = 0; t < threads; ++t) {
        const int64_t begin = p.outputs * t / threads, end = p.outputs * (t + 1) / threads;
        int64_t row = 0;
        for (; row + 4 <= p.rows; row += 4) multiply<4, T>(p, row, begin, end);
        for (; row + 2 <= p.rows; row += 2) multiply<2, T>(p, row, begin, end);
        for (; row < p.rows; ++row) multiply<1, T>(p, row, begin, end);
    }
}

}  // namespace

// x (rows, inputs), weights (outputs, inputs), bias (outputs), y (rows, outputs), all contiguous and of one type.
extern "C" void attlas_rows(const Problem* p) { p->is_bf16 ? run<bf16>(*p) : run<float>(*p); }
