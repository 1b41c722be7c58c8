// DoRA's factor on columns: reference/lora/scale.py, one pass. VALUE: float or bf16. Factors and sums are fp32.
#include "common.h"

namespace {

// rows of a sum, so that sums do not depend on the number of threads; kernels/lora/scale.py has the same constant
constexpr int64_t ROWS = 64;

}  // namespace

extern "C" void lora_scale(
    int64_t rows, int64_t columns, VALUE* __restrict y, const float* __restrict c, const VALUE* __restrict bias,
    int threads
) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) {
        VALUE* __restrict row = y + i * columns;
        if (bias) {
#pragma omp simd
            for (int64_t j = 0; j < columns; ++j) {
                VALUE rounded;
                narrow(widen(row[j]) * c[j] + widen(bias[j]), rounded);
                row[j] = rounded;
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < columns; ++j) {
                VALUE rounded;
                narrow(widen(row[j]) * c[j], rounded);
                row[j] = rounded;
            }
        }
    }
}

// inner = g * c, where inner may be g; sums[b]: sum of g * y over the rows of block b
extern "C" void lora_scale_backward(
    int64_t rows, int64_t columns, const VALUE* g, const VALUE* __restrict y, const float* __restrict c, VALUE* inner,
    float* __restrict sums, int threads
) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks; ++b) {
        float* __restrict sum = sums + b * columns;
        std::fill(sum, sum + columns, 0.0f);
        for (int64_t i = b * ROWS; i < std::min(rows, (b + 1) * ROWS); ++i) {
            const VALUE* g_row = g + i * columns;
            const VALUE* __restrict y_row = y + i * columns;
            VALUE* inner_row = inner + i * columns;
#pragma omp simd
            for (int64_t j = 0; j < columns; ++j) {
                const float value = widen(g_row[j]);
                sum[j] += value * widen(y_row[j]);
                VALUE rounded;
                narrow(value * c[j], rounded);
                inner_row[j] = rounded;
            }
        }
    }
}
