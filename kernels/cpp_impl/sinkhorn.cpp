// Square-root Sinkhorn scales of a list of matrices: reference/sinkhorn.py. MAT: float or bf16.
//
// An iteration reads a matrix once: a row's mean square is complete before the row leaves the first-level cache, and is
// at once added, inverted, to the sums of the columns. A matrix that fits the second-level cache is read from memory in
// the first iteration only. Nothing as large as a matrix is written.
#include "common.h"

namespace {

constexpr float TINY = std::numeric_limits<float>::min();
// columns are summed over this many rows before they are added to the total: rounding grows with the longer of both
constexpr int64_t ROWS_OF_SUM = 128;
// larger matrices are shared by all threads, smaller ones taken whole
constexpr int64_t LARGE = 1 << 22;

// 0 for 0; NaN stays NaN
inline float inverse(float mean) { return mean == 0.0f ? 0.0f : 1.0f / std::max(mean, TINY); }

struct Matrix {
    const MAT* data;
    int64_t m, n, stride;
    float* r0;       // 1 / max|row|
    float* inverse;  // of the mean squares of the rows of diag(r0) G diag(c)
    float* square;   // c^2
};

float inverse_of_largest(const MAT* __restrict row, int64_t n) {
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; ++j) largest = std::max(largest, std::fabs(widen(row[j])));
    // half the smallest normal number is the smallest whose inverse is finite
    return largest == 0.0f ? 0.0f : 1.0f / std::max(largest, TINY / 2);
}

// h = (r0 * row)^2; returns the sum of h * square
float squares(const MAT* __restrict row, float* __restrict h, const float* __restrict square, float r0, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
        const float scaled = widen(row[j]) * r0;
        h[j] = scaled * scaled;
        sum += h[j] * square[j];
    }
    return sum;
}

void add_scaled(float* __restrict sums, const float* __restrict h, float factor, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += h[j] * factor;
}

// rows begin..end of one iteration: their inverse mean squares, and their part of the column sums (null: not wanted)
void pass(const Matrix& a, int64_t begin, int64_t end, bool first, float* scratch, float* column_sums) {
    float* h = scratch;
    float* part = scratch + a.n;
    for (int64_t from = begin; from < end; from += ROWS_OF_SUM) {
        const int64_t to = std::min(from + ROWS_OF_SUM, end);
        std::fill(part, part + a.n, 0.0f);
        for (int64_t i = from; i < to; ++i) {
            const MAT* row = a.data + i * a.stride;
            if (first) a.r0[i] = inverse_of_largest(row, a.n);
            a.inverse[i] = inverse(squares(row, h, a.square, a.r0[i], a.n) / static_cast<float>(a.n));
            if (column_sums) add_scaled(part, h, a.inverse[i], a.n);
        }
        if (column_sums) add_scaled(column_sums, part, 1.0f, a.n);
    }
}

void invert_columns(const Matrix& a, const float* sums) {
    for (int64_t j = 0; j < a.n; ++j) a.square[j] = inverse(sums[j] / static_cast<float>(a.m));
}

void finish(const Matrix& a, bool iterated) {
    for (int64_t j = 0; j < a.n; ++j) a.square[j] = std::sqrt(a.square[j]);
    for (int64_t i = 0; i < a.m; ++i) {
        if (!iterated) a.r0[i] = inverse_of_largest(a.data + i * a.stride, a.n);
        const float scale = iterated ? a.r0[i] * std::sqrt(a.inverse[i]) : a.r0[i];
        a.r0[i] = scale > std::numeric_limits<float>::max() ? std::numeric_limits<float>::max() : scale;
    }
}

void alone(const Matrix& a, int64_t num_iters, bool end_with_rows) {
    std::vector<float> scratch(2 * a.n), sums(a.n);
    for (int64_t k = 0; k < num_iters + end_with_rows; ++k) {
        const bool columns = k < num_iters;
        std::fill(sums.begin(), sums.end(), 0.0f);
        pass(a, 0, a.m, k == 0, scratch.data(), columns ? sums.data() : nullptr);
        if (columns) invert_columns(a, sums.data());
    }
    finish(a, num_iters + end_with_rows > 0);
}

void together(const Matrix& a, int64_t num_iters, bool end_with_rows, int threads) {
    // cut by rows, not by threads: the same sums whatever their number
    const int64_t pieces = 64, height = (a.m + pieces - 1) / pieces;
    std::vector<float> sums(pieces * a.n), total(a.n);
    for (int64_t k = 0; k < num_iters + end_with_rows; ++k) {
        const bool columns = k < num_iters;
        std::fill(sums.begin(), sums.end(), 0.0f);
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> scratch(2 * a.n);
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < pieces; ++piece) {
                pass(a, std::min(piece * height, a.m), std::min((piece + 1) * height, a.m), k == 0, scratch.data(),
                     columns ? sums.data() + piece * a.n : nullptr);
            }
        }
        if (!columns) continue;
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t piece = 0; piece < pieces; ++piece) add_scaled(total.data(), sums.data() + piece * a.n, 1.0f, a.n);
        invert_columns(a, total.data());
    }
    finish(a, num_iters + end_with_rows > 0);
}

}  // namespace

// rows[t] [m] and cols[t] [n] receive the scales
extern "C" void sinkhorn(
    int64_t count, const MAT** mats, const int64_t* heights, const int64_t* widths, const int64_t* strides,
    float** rows, float** cols, int64_t num_iters, int end_with_rows, int threads
) {
    std::vector<Matrix> small;
    std::vector<float> inverses;
    int64_t total = 0;
    for (int64_t t = 0; t < count; ++t) total += heights[t];
    inverses.resize(total);
    float* next = inverses.data();
    for (int64_t t = 0; t < count; ++t) {
        const Matrix a{mats[t], heights[t], widths[t], strides[t], rows[t], next, cols[t]};
        next += a.m;
        std::fill(a.square, a.square + a.n, 1.0f);
        if (a.m * a.n >= LARGE) {
            together(a, num_iters, end_with_rows, threads);
        } else {
            small.push_back(a);
        }
    }
    // the largest first: what is left at the end is short
    std::stable_sort(small.begin(), small.end(), [](const Matrix& a, const Matrix& b) { return a.m * a.n > b.m * b.n; });
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (size_t t = 0; t < small.size(); ++t) alone(small[t], num_iters, end_with_rows);
}
