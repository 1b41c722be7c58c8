// Products with a compressed N:M matrix: reference/nm_matmul.py. VALUE: float or bf16.
//
// Of many rows of x, TOKENS at a time lie side by side, so that a kept weight multiplies vectors. Of few, every row of
// the matrix gathers what it needs of each.
#include "common.h"

namespace {

constexpr int64_t TOKENS = 64;
// rows of the matrix whose sums are at hand, and kept weights of a row that are taken between two visits to them
constexpr int64_t ROWS = 64, KEPT = 32;

inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

struct Compressed {
    const VALUE* values;
    const uint8_t* indices;
    int64_t rows, groups, n, m;
    int64_t row_length() const { return groups * n; }
};

// sums of one row of the matrix, over its groups `begin` to `end`; columns: [in][TOKENS]
void add_row(const Compressed& w, int64_t row, int64_t begin, int64_t end, const float* columns, float* sums) {
    float local[TOKENS];
    std::copy(sums, sums + TOKENS, local);
    const VALUE* v = w.values + row * w.row_length() + begin * w.n;
    const uint8_t* places = w.indices + row * w.row_length() + begin * w.n;
    for (int64_t g = begin; g < end; ++g) {
        for (int64_t k = 0; k < w.n; ++k) {
            const float value = widen(*v++);
            const float* column = columns + (g * w.m + *places++) * TOKENS;
#pragma omp simd
            for (int64_t t = 0; t < TOKENS; ++t) local[t] = multiply_add(value, column[t], local[t]);
        }
    }
    std::copy(local, local + TOKENS, sums);
}

void multiply_many(const Compressed& w, const VALUE* x, VALUE* out, int64_t tokens, int threads) {
    const int64_t in = w.groups * w.m, tiles = (tokens + TOKENS - 1) / TOKENS;
    const int64_t bands = (w.rows + ROWS - 1) / ROWS;
    const int64_t step = std::max<int64_t>(1, KEPT / std::max<int64_t>(1, w.n));
    std::vector<float> columns(in * TOKENS);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = tile * TOKENS, count = std::min(TOKENS, tokens - first);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t c = 0; c < in; ++c) {
                for (int64_t t = 0; t < TOKENS; ++t) {
                    columns[c * TOKENS + t] = t < count ? widen(x[(first + t) * in + c]) : 0.0f;
                }
            }
#pragma omp for schedule(static)
            for (int64_t band = 0; band < bands; ++band) {
                float sums[ROWS][TOKENS] = {};
                const int64_t from = band * ROWS, height = std::min(ROWS, w.rows - from);
                for (int64_t g = 0; g < w.groups; g += step) {
                    for (int64_t r = 0; r < height; ++r) {
                        add_row(w, from + r, g, std::min(g + step, w.groups), columns.data(), sums[r]);
                    }
                }
                for (int64_t t = 0; t < count; ++t) {
                    for (int64_t r = 0; r < height; ++r) narrow(sums[r][t], out[(first + t) * w.rows + from + r]);
                }
            }
        }
    }
}

void multiply_few(const Compressed& w, const VALUE* x, VALUE* out, int64_t tokens, int threads) {
    const int64_t in = w.groups * w.m, length = w.row_length();
    std::vector<float> wide(tokens * in);
    for (int64_t i = 0; i < tokens * in; ++i) wide[i] = widen(x[i]);
    std::vector<int32_t> begin(length);
    for (int64_t k = 0; k < length; ++k) begin[k] = static_cast<int32_t>(k / w.n * w.m);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < w.rows; ++row) {
        const VALUE* v = w.values + row * length;
        const uint8_t* places = w.indices + row * length;
        for (int64_t t = 0; t < tokens; ++t) {
            const float* entries = wide.data() + t * in;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < length; ++k) sum += widen(v[k]) * entries[begin[k] + places[k]];
            narrow(sum, out[t * w.rows + row]);
        }
    }
}

}  // namespace

// x: [tokens, groups * m]; values, indices: [rows, groups, n]; out: [tokens, rows]
extern "C" void nm_matmul(
    const VALUE* x, const VALUE* values, const uint8_t* indices, VALUE* out, int64_t tokens, int64_t rows,
    int64_t groups, int64_t n, int64_t m, int64_t few, int threads
) {
    const Compressed w = {values, indices, rows, groups, n, m};
    (tokens <= few ? multiply_few : multiply_many)(w, x, out, tokens, threads);
}
