// Products with a compressed N:M matrix: reference/nm/matmul.py. VALUE: float or bf16.
//
// WIDE or NARROW rows of x are laid side by side, so that a stored weight multiplies vectors. If x has one row, every
// row of the matrix gathers its entries.
#include "common.h"

namespace {

constexpr int64_t WIDE = 64, NARROW = 16;
// rows of a band of the matrix, and stored weights of a row before the next row's turn
constexpr int64_t ROWS = 64, WEIGHTS = 64;
// stored weights are prefetched this number of rows ahead
constexpr int64_t AHEAD = 4;

// a vector stays in registers; an array of floats would not
using Vec = float __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

struct Compressed {
    const VALUE* values;
    const uint8_t* indices;
    int64_t rows, groups, n, m;
    int64_t row_length() const { return groups * n; }
};

// sums of one row of the matrix over its groups begin..end; columns: [in][TOKENS]
template <int64_t TOKENS>
void add_row(const Compressed& w, int64_t row, int64_t begin, int64_t end, const float* columns, float* sums) {
    Vec local[TOKENS / LANES];
    std::memcpy(local, sums, sizeof local);
    const VALUE* v = w.values + row * w.row_length() + begin * w.n;
    const uint8_t* index = w.indices + row * w.row_length() + begin * w.n;
    for (int64_t g = begin; g < end; ++g) {
        for (int64_t k = 0; k < w.n; ++k) {
            const float value = widen(*v++);
            const float* column = columns + (g * w.m + *index++) * TOKENS;
#pragma GCC unroll 4
            for (int64_t block = 0; block < TOKENS / LANES; ++block) {
                Vec entries;
                std::memcpy(&entries, column + block * LANES, sizeof entries);
                local[block] += value * entries;
            }
        }
    }
    std::memcpy(sums, local, sizeof local);
}

// prefetches the stored weights of a row in `count` groups from `begin` on
void fetch_row(const Compressed& w, int64_t row, int64_t begin, int64_t count) {
    constexpr int64_t LINE = 64;
    const int64_t first = row * w.row_length() + begin * w.n, last = first + std::min(count, w.groups - begin) * w.n;
    for (int64_t k = first; k < last; k += LINE / static_cast<int64_t>(sizeof(VALUE))) {
        __builtin_prefetch(w.values + k);
    }
    for (int64_t k = first; k < last; k += LINE) __builtin_prefetch(w.indices + k);
}

// `count` rows of x, at most TOKENS; columns: room for [in][TOKENS]
template <int64_t TOKENS>
void multiply_tile(const Compressed& w, const VALUE* x, VALUE* out, int64_t count, float* columns, int threads) {
    const int64_t in = w.groups * w.m, bands = (w.rows + ROWS - 1) / ROWS;
    const int64_t step = std::max<int64_t>(1, WEIGHTS / std::max<int64_t>(1, w.n));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < in; ++c) {
            for (int64_t t = 0; t < TOKENS; ++t) columns[c * TOKENS + t] = t < count ? widen(x[t * in + c]) : 0.0f;
        }
#pragma omp for schedule(static)
        for (int64_t band = 0; band < bands; ++band) {
            float sums[ROWS][TOKENS] = {};
            const int64_t from = band * ROWS, height = std::min(ROWS, w.rows - from);
            for (int64_t g = 0; g < w.groups; g += step) {
                for (int64_t r = 0; r < height; ++r) {
                    // the hardware does not prefetch pieces of long rows
                    fetch_row(w, from + (r + AHEAD) % height, r + AHEAD < height ? g : g + step, step);
                    add_row<TOKENS>(w, from + r, g, std::min(g + step, w.groups), columns, sums[r]);
                }
            }
            for (int64_t t = 0; t < count; ++t) {
                for (int64_t r = 0; r < height; ++r) narrow(sums[r][t], out[t * w.rows + from + r]);
            }
        }
    }
}

void multiply_many(const Compressed& w, const VALUE* x, VALUE* out, int64_t tokens, int threads) {
    const int64_t in = w.groups * w.m;
    std::vector<float> columns(in * (tokens > NARROW ? WIDE : NARROW));
    for (int64_t first = 0; first < tokens;) {
        const int64_t left = tokens - first;
        if (left > NARROW) {
            multiply_tile<WIDE>(w, x + first * in, out + first * w.rows, std::min(WIDE, left), columns.data(), threads);
            first += WIDE;
        } else {
            multiply_tile<NARROW>(w, x + first * in, out + first * w.rows, left, columns.data(), threads);
            first += NARROW;
        }
    }
}

void multiply_one(const Compressed& w, const VALUE* x, VALUE* out, int threads) {
    const int64_t in = w.groups * w.m, length = w.row_length();
    std::vector<float> entries(in);
    for (int64_t i = 0; i < in; ++i) entries[i] = widen(x[i]);
    std::vector<int32_t> begin(length);
    for (int64_t k = 0; k < length; ++k) begin[k] = static_cast<int32_t>(k / w.n * w.m);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < w.rows; ++row) {
        const VALUE* v = w.values + row * length;
        const uint8_t* index = w.indices + row * length;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < length; ++k) sum += widen(v[k]) * entries[begin[k] + index[k]];
        narrow(sum, out[row]);
    }
}

}  // namespace

// x: [tokens, groups * m]; values, indices: [rows, groups, n]; out: [tokens, rows]
extern "C" void nm_matmul(
    const VALUE* x, const VALUE* values, const uint8_t* indices, VALUE* out, int64_t tokens, int64_t rows,
    int64_t groups, int64_t n, int64_t m, int threads
) {
    const Compressed w = {values, indices, rows, groups, n, m};
    if (tokens == 1) {
        multiply_one(w, x, out, threads);
    } else {
        multiply_many(w, x, out, tokens, threads);
    }
}
