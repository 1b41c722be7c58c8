// Polynomial features of columns and their gradient: reference/poly/features.py, one pass each, with the tables of
// kernels/poly/tables.py.
//
// A thread processes LANES adjacent columns of one matrix, whose x and gradient stay in the first-level cache.
#include "common.h"

constexpr int64_t LANES = 64;

namespace {

inline void fill(float value, float* __restrict out, int64_t lanes) {
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) out[j] = value;
}

inline void feature(
    const float* __restrict above, const float* __restrict x, float weight, float* __restrict out, int64_t lanes
) {
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) out[j] = above[j] * x[j] * weight;
}

inline void gather(
    const float* __restrict grad, const float* __restrict f, float lift, float* __restrict out, int64_t lanes
) {
#pragma omp simd
    for (int64_t j = 0; j < lanes; ++j) out[j] = __builtin_fmaf(lift * f[j], grad[j], out[j]);
}

}  // namespace

// x [n, dim, columns] -> out [n, features, columns]
extern "C" void poly_features(
    const float* x, const int32_t* parent, const int32_t* last, const float* weight, float* out, int64_t n, int64_t dim,
    int64_t features, int64_t columns, int threads
) {
    const int64_t blocks = (columns + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < n * blocks; ++task) {
        const int64_t row = task / blocks, start = task % blocks * LANES;
        const int64_t lanes = std::min(LANES, columns - start);
        const float* in = x + row * dim * columns + start;
        float* f = out + row * features * columns + start;
        fill(1.0f, f, lanes);
        for (int64_t i = 1; i < features; ++i)
            feature(f + parent[i] * columns, in + last[i] * columns, weight[i], f + i * columns, lanes);
    }
}

// grad [n, features, columns], x [n, dim, columns] -> out [n, dim, columns]. `lower`: number of features below the
// highest degree. scratch: [threads, lower, LANES].
extern "C" void poly_features_backward(
    const float* grad, const float* x, const int32_t* parent, const int32_t* last, const float* weight,
    const int32_t* up, const float* lift, float* scratch, float* out, int64_t n, int64_t dim, int64_t features,
    int64_t lower, int64_t columns, int threads
) {
    const int64_t blocks = (columns + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < n * blocks; ++task) {
        const int64_t row = task / blocks, start = task % blocks * LANES;
        const int64_t lanes = std::min(LANES, columns - start);
        const float* in = x + row * dim * columns + start;
        const float* g = grad + row * features * columns + start;
        float* result = out + row * dim * columns + start;
        float* f = scratch + omp_get_thread_num() * lower * LANES;
        for (int64_t i = 0; i < dim; ++i) fill(0.0f, result + i * columns, lanes);
        for (int64_t b = 0; b < lower; ++b) {
            float* below = f + b * LANES;
            if (b == 0)
                fill(1.0f, below, lanes);
            else
                feature(f + parent[b] * LANES, in + last[b] * columns, weight[b], below, lanes);
            for (int64_t i = 0; i < dim; ++i)
                gather(g + up[b * dim + i] * columns, below, lift[b * dim + i], result + i * columns, lanes);
        }
    }
}
