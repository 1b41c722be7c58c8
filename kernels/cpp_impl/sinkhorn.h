// Square-root Sinkhorn scales of matrices: reference/matrices/sinkhorn.py. MAT: float or bf16.
//
// An iteration reads a matrix once. It computes a row's mean square, then adds the row divided by it to the column sums
// while the row is in the first-level cache. A matrix that fits the caches is read from memory once: it is prefetched
// during the iterations of the previous matrix. Nothing as large as a matrix is written.
#pragma once

#include "common.h"

namespace {

constexpr float TINY = std::numeric_limits<float>::min();
// the sums of this many rows are added to the total at once, which keeps rounding errors small
constexpr int64_t ROWS_OF_SUM = 128;
// All threads share a matrix of at least this many bytes. One thread takes a smaller matrix: it is prefetched during
// the iterations of the previous one and stays in the last-level cache.
constexpr int64_t LARGE = 4 << 20;

// 0 for 0; NaN stays NaN
inline float inverse(float mean) { return mean == 0.0f ? 0.0f : 1.0f / std::max(mean, TINY); }

// elements of a later row that are fetched ahead
constexpr int64_t ROW_FETCHED = 1024;

struct Matrix {
    int64_t index;  // in the list
    const MAT* data;
    int64_t m, n, stride;
    float* r0;       // 1, or a power of two where squares would leave the range of fp32
    float* inverse;  // 1 / mean square of each row of diag(r0) G diag(c)
    float* square;   // c^2

    int64_t bytes() const { return m * n * static_cast<int64_t>(sizeof(MAT)); }
};

// Prefetches part k of `parts` of the next matrix in small shares, so that requests do not queue
class Prefetch {
public:
    Prefetch() = default;  // nothing
    Prefetch(const Matrix& next, int64_t k, int64_t parts, int64_t shares) {
        if (next.stride != next.n) return;
        const int64_t lines = (next.bytes() + LINE - 1) / LINE;
        const char* data = reinterpret_cast<const char*>(next.data);
        at_ = data + lines * k / parts * LINE;
        end_ = std::min(data + lines * (k + 1) / parts * LINE, data + next.bytes());
        share_ = (end_ - at_ + shares * LINE - 1) / (shares * LINE) * LINE;
    }
    void fetch_share() {
        for (const char* to = std::min(at_ + share_, end_); at_ < to; at_ += LINE) __builtin_prefetch(at_, 0, 2);
    }

private:
    static constexpr int64_t LINE = 64;
    const char* at_ = nullptr;
    const char* end_ = nullptr;
    int64_t share_ = 0;
};

float inverse_of_largest(const MAT* __restrict row, int64_t n) {
    const float largest = largest_of(row, n);
    // half the smallest normal number is the smallest whose inverse is finite
    return largest == 0.0f ? 0.0f : 1.0f / std::max(largest, TINY / 2);
}

// 1 / 2^e for a largest entry in [2^e, 2^(e + 1)), so products with it are exact
float power_of_largest(const MAT* __restrict row, int64_t n) {
    const float largest = largest_of(row, n);
    return largest == 0.0f ? 0.0f : 1.0f / std::max(from_bits(to_bits(largest) & 0x7F800000u), TINY);
}

// rows processed together: their sums are independent, and they share the reads of the columns' squares and sums
constexpr int64_t ROWS = 4;

// Index of a column's sum. bf16 matrices are read in pairs, so their sums are stored as all even columns, then all odd
// ones. n columns take padded(n) floats either way.
constexpr bool PAIRED = all_bf16<MAT>;
inline int64_t column_index(int64_t j, int64_t n) { return PAIRED ? j / 2 + j % 2 * ((n + 1) / 2) : j; }

// h = (r0 * entry)^2; returns the row's sum with it. r0 is 1 unless `scaling`; the column's square is 1 if `alike`
template <bool scaling, bool alike>
inline float square_of(float entry, float r0, float square, float& h, float sum) {
    const float scaled = scaling ? entry * r0 : entry;
    h = scaled * scaled;
    return alike ? sum + h : fused(h, square, sum);
}

// h[k] = (r0[k] * row[k])^2, in the order of column_index; sums[k]: sum of h[k] * square
template <bool scaling, bool alike>
void squares(
    const MAT* const* rows, const float* r0, const float* __restrict square, float* __restrict h, int64_t n, float* sums
) {
    const int64_t stride = padded(n);
    const MAT *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    float *ha = h, *hb = h + stride, *hc = h + 2 * stride, *hd = h + 3 * stride;
    const float ra = r0[0], rb = r0[1], rc = r0[2], rd = r0[3];
    float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f, sum3 = 0.0f;
    int64_t done = 0;
    if constexpr (PAIRED) {
        const int64_t odd = column_index(1, n);
        done = n / 2 * 2;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
        for (int64_t j = 0; j < n / 2; ++j) {
            const Pair x0 = load_pair(a, j), x1 = load_pair(b, j), x2 = load_pair(c, j), x3 = load_pair(d, j);
            const float even_square = square[2 * j], odd_square = square[2 * j + 1];
            sum0 = square_of<scaling, alike>(x0.high, ra, odd_square, ha[j + odd], square_of<scaling, alike>(x0.low, ra, even_square, ha[j], sum0));
            sum1 = square_of<scaling, alike>(x1.high, rb, odd_square, hb[j + odd], square_of<scaling, alike>(x1.low, rb, even_square, hb[j], sum1));
            sum2 = square_of<scaling, alike>(x2.high, rc, odd_square, hc[j + odd], square_of<scaling, alike>(x2.low, rc, even_square, hc[j], sum2));
            sum3 = square_of<scaling, alike>(x3.high, rd, odd_square, hd[j + odd], square_of<scaling, alike>(x3.low, rd, even_square, hd[j], sum3));
        }
    }
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t j = done; j < n; ++j) {
        const int64_t at = PAIRED ? n / 2 : j;  // of pairs, at most the last even column is left
        sum0 = square_of<scaling, alike>(widen(a[j]), ra, square[j], ha[at], sum0);
        sum1 = square_of<scaling, alike>(widen(b[j]), rb, square[j], hb[at], sum1);
        sum2 = square_of<scaling, alike>(widen(c[j]), rc, square[j], hc[at], sum2);
        sum3 = square_of<scaling, alike>(widen(d[j]), rd, square[j], hd[at], sum3);
    }
    sums[0] = sum0;
    sums[1] = sum1;
    sums[2] = sum2;
    sums[3] = sum3;
}

// Bounds of the mean square of rows that need no scaling: no square overflows, and entries of 1e-13 of the row's root
// mean square still have a normal square.
constexpr float LEAST = 0x1p-40f, MOST = 0x1p40f;

// squares() for the first iteration, with column scales of 1; computes r0 of `count` rows
void first_squares(
    const MAT* const* rows, int64_t count, float* r0, const float* square, float* h, int64_t n, float* sums
) {
    std::fill(r0, r0 + ROWS, 1.0f);
    squares<false, true>(rows, r0, square, h, n, sums);
    bool scaling = false;
    for (int64_t k = 0; k < count; ++k) {
        const float mean = sums[k] / static_cast<float>(n);
        if (mean >= LEAST && mean <= MOST) continue;
        r0[k] = power_of_largest(rows[k], n);
        scaling = true;
    }
    // Rows past the end repeat the last one with factor 0. Without its scale, infinite squares would then give NaN.
    std::fill(r0 + count, r0 + ROWS, r0[count - 1]);
    if (scaling) squares<true, true>(rows, r0, square, h, n, sums);
}

void add_rows(float* __restrict sums, const float* __restrict h, const float* factors, int64_t n) {
    const int64_t stride = padded(n);
    const float f0 = factors[0], f1 = factors[1], f2 = factors[2], f3 = factors[3];
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        const float low = fused(h[j], f0, h[j + stride] * f1);
        sums[j] += fused(h[j + 2 * stride], f2, fused(h[j + 3 * stride], f3, low));
    }
}

void add(float* __restrict sums, const float* __restrict part, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += part[j];
}

// Rows begin..end of one iteration: computes their inverse mean squares and, unless null, adds to column_sums.
// scratch: ROWS + 1 rows. prefetch: reads ahead in the next matrix meanwhile.
void pass(
    const Matrix& a, int64_t begin, int64_t end, bool first, float* scratch, float* column_sums, Prefetch prefetch
) {
    float* h = scratch;
    float* part = scratch + ROWS * padded(a.n);
    const bool far = first || a.bytes() >= LARGE;  // farther than the cache from which hardware prefetching suffices
    for (int64_t from = begin; from < end; from += ROWS_OF_SUM) {
        const int64_t to = std::min(from + ROWS_OF_SUM, end);
        std::fill(part, part + a.n, 0.0f);
        for (int64_t i = from; i < to; i += ROWS) {
            prefetch.fetch_share();
            const MAT* rows[ROWS];
            float r0[ROWS], sums[ROWS], factors[ROWS];
            const int64_t count = std::min(ROWS, to - i);
            for (int64_t k = 0; k < ROWS; ++k) {
                const int64_t row = i + std::min(k, count - 1);  // past the end: the last row again, with factor 0
                rows[k] = a.data + row * a.stride;
                if (far && i + k + ROWS < end) fetch(a.data + (i + k + ROWS) * a.stride, 0, std::min(a.n, ROW_FETCHED));
                if (!first) r0[k] = a.r0[row];
            }
            if (first) {
                first_squares(rows, count, r0, a.square, h, a.n, sums);
                std::copy(r0, r0 + count, a.r0 + i);
            } else {
                const bool scaling = std::any_of(r0, r0 + ROWS, [](float scale) { return scale != 1.0f; });
                (scaling ? squares<true, false> : squares<false, false>)(rows, r0, a.square, h, a.n, sums);
            }
            for (int64_t k = 0; k < ROWS; ++k) {
                factors[k] = k < count ? inverse(sums[k] / static_cast<float>(a.n)) : 0.0f;
                if (k < count) a.inverse[i + k] = factors[k];
            }
            if (column_sums) add_rows(part, h, factors, a.n);
        }
        if (column_sums) add(column_sums, part, a.n);
    }
}

void invert_columns(const Matrix& a, const float* sums) {
    for (int64_t j = 0; j < a.n; ++j) a.square[j] = inverse(sums[column_index(j, a.n)] / static_cast<float>(a.m));
}

void finish(const Matrix& a, bool iterated) {
    for (int64_t j = 0; j < a.n; ++j) a.square[j] = std::sqrt(a.square[j]);
    for (int64_t i = 0; i < a.m; ++i) {
        if (!iterated) a.r0[i] = inverse_of_largest(a.data + i * a.stride, a.n);
        const float scale = iterated ? a.r0[i] * std::sqrt(a.inverse[i]) : a.r0[i];
        a.r0[i] = scale > std::numeric_limits<float>::max() ? std::numeric_limits<float>::max() : scale;
    }
}

template <typename Done>
void alone(const Matrix& a, const Matrix* next, int64_t num_iters, bool end_with_rows, Done done) {
    Buffer scratch((ROWS + 1) * padded(a.n)), sums(a.n);
    const int64_t passes = num_iters + end_with_rows;
    for (int64_t k = 0; k < passes; ++k) {
        const bool columns = k < num_iters;
        std::fill(sums.data(), sums.data() + a.n, 0.0f);
        // the first iteration reads its own matrix from memory
        Prefetch prefetch;
        if (next && k > 0) prefetch = Prefetch(*next, k - 1, passes - 1, (a.m + ROWS - 1) / ROWS);
        pass(a, 0, a.m, k == 0, scratch.data(), columns ? sums.data() : nullptr, prefetch);
        if (columns) invert_columns(a, sums.data());
    }
    finish(a, passes > 0);
    done(a, 0, a.m);
}

template <typename Done>
void together(const Matrix& a, int64_t num_iters, bool end_with_rows, int threads, Done done) {
    // pieces depend on the rows only, so that sums do not depend on the number of threads
    const int64_t height = std::max(ROWS_OF_SUM, (a.m + 63) / 64), pieces = (a.m + height - 1) / height;
    const int64_t passes = num_iters + end_with_rows;
    Buffer sums(pieces * padded(a.n)), total(a.n);
    for (int64_t k = 0; k < passes; ++k) {
        const bool columns = k < num_iters;
        std::fill(sums.data(), sums.data() + pieces * padded(a.n), 0.0f);
#pragma omp parallel num_threads(threads)
        {
            Buffer scratch((ROWS + 1) * padded(a.n));
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < pieces; ++piece) {
                pass(a, piece * height, std::min((piece + 1) * height, a.m), k == 0, scratch.data(),
                     columns ? sums.data() + piece * padded(a.n) : nullptr, Prefetch());
            }
        }
        if (!columns) continue;
        std::fill(total.data(), total.data() + a.n, 0.0f);
        for (int64_t piece = 0; piece < pieces; ++piece) add(total.data(), sums.data() + piece * padded(a.n), a.n);
        invert_columns(a, total.data());
    }
    finish(a, passes > 0);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        done(a, piece * height, std::min((piece + 1) * height, a.m));
    }
}

// writes the scales of matrix t to rows[t] [m] and cols[t] [n], then calls done(matrix, begin, end) for all its rows
template <typename Done>
void sinkhorn_all(
    int64_t count, const MAT** mats, const int64_t* heights, const int64_t* widths, const int64_t* strides,
    float** rows, float** cols, int64_t num_iters, bool end_with_rows, int threads, Done done
) {
    std::vector<Matrix> small;
    std::vector<float> inverses(std::accumulate(heights, heights + count, int64_t{0}));
    float* next = inverses.data();
    for (int64_t t = 0; t < count; ++t) {
        const Matrix a{t, mats[t], heights[t], widths[t], strides[t], rows[t], next, cols[t]};
        next += a.m;
        std::fill(a.square, a.square + a.n, 1.0f);
        if (a.bytes() >= LARGE) {
            together(a, num_iters, end_with_rows, threads, done);
        } else {
            small.push_back(a);
        }
    }
    // the largest first, so that threads finish at about the same time
    std::stable_sort(small.begin(), small.end(), [](const Matrix& a, const Matrix& b) { return a.bytes() > b.bytes(); });
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (size_t t = 0; t < small.size(); ++t) {
        const size_t later = t + threads;  // other threads take the matrices in between
        alone(small[t], later < small.size() ? &small[later] : nullptr, num_iters, end_with_rows, done);
    }
}

}  // namespace
