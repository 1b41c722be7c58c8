// Dot products of a window's rows with a vector, and combinations of its rows: reference/fisher/gradient_window.py.
// Each reads the windows once. WINDOW: float, bf16 or fp16.
//
// Sums run in fp64, where products of two such numbers are exact. If rows hardly differ, only the last bits of their
// dot products distinguish them, and they cancel in a combination. A thread processes some columns of all rows, so the
// vector or the sums, which all rows share, stay in the second-level cache. Results do not depend on the number of
// threads.
#include "window.h"

namespace {

constexpr int64_t COLUMNS = 16384, SUMS = 2048;
constexpr int ROWS = 4;

// dot products of R rows, with independent sums
template <int R>
void dots_of_rows(const WINDOW* __restrict w, const float* __restrict x, int64_t n, int64_t pitch, double* dots) {
    double a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t j = 0; j < n; ++j) {
        const double y = x[j];
        a = fused(double(widen(w[j])), y, a);
        if constexpr (R > 1) b = fused(double(widen(w[pitch + j])), y, b);
        if constexpr (R > 2) c = fused(double(widen(w[2 * pitch + j])), y, c);
        if constexpr (R > 3) d = fused(double(widen(w[3 * pitch + j])), y, d);
    }
    const double sums[4] = {a, b, c, d};
    std::copy(sums, sums + R, dots);
}

template <int R>
void add_rows(const WINDOW* __restrict w, const double* c, int64_t n, int64_t pitch, double* __restrict sums) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        double sum = sums[j];
        for (int r = 0; r < R; ++r) sum += c[r] * widen(w[r * pitch + j]);
        sums[j] = sum;
    }
}

}  // namespace

// windows[t]: m rows of sizes[t] columns, pitches[t] apart; dots: [groups, m], zeroed; owners[t]: the window's group
extern "C" void row_dots(
    int64_t count, const WINDOW** windows, const float** vectors, const int64_t* sizes, const int64_t* pitches,
    const int64_t* owners, int64_t m, double* dots, int threads
) {
    std::vector<int64_t> first(count + 1, 0);
    for (int64_t t = 0; t < count; ++t) first[t + 1] = first[t] + (sizes[t] + COLUMNS - 1) / COLUMNS;
    std::vector<double> partial(first[count] * m);
    const auto columns = [](int64_t) { return COLUMNS; };
    for_blocks(count, sizes, threads, columns, [&](int64_t t, int64_t begin, int64_t end) {
        const WINDOW* w = windows[t] + begin;
        double* sums = partial.data() + (first[t] + begin / COLUMNS) * m;
        int64_t i = 0;
        for (; i + ROWS <= m; i += ROWS) {
            dots_of_rows<ROWS>(w + i * pitches[t], vectors[t] + begin, end - begin, pitches[t], sums + i);
        }
        for (; i < m; ++i) {
            dots_of_rows<1>(w + i * pitches[t], vectors[t] + begin, end - begin, pitches[t], sums + i);
        }
    });
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t piece = first[t]; piece < first[t + 1]; ++piece) {
            for (int64_t i = 0; i < m; ++i) dots[owners[t] * m + i] += partial[piece * m + i];
        }
    }
}

// coefficients: [groups, m]
extern "C" void linear_combination(
    int64_t count, const WINDOW** windows, float** out, const int64_t* sizes, const int64_t* pitches,
    const int64_t* owners, int64_t m, const double* coefficients, int threads
) {
    const auto columns = [](int64_t) { return SUMS; };
    for_blocks(count, sizes, threads, columns, [=](int64_t t, int64_t begin, int64_t end) {
        const WINDOW* w = windows[t] + begin;
        const double* c = coefficients + owners[t] * m;
        const int64_t n = end - begin, pitch = pitches[t];
        std::vector<double> sums(n);
        int64_t i = 0;
        for (; i + 2 * ROWS <= m; i += 2 * ROWS) {
            add_rows<2 * ROWS>(w + i * pitch, c + i, n, pitch, sums.data());
        }
        for (; i < m; ++i) add_rows<1>(w + i * pitch, c + i, n, pitch, sums.data());
        std::copy(sums.begin(), sums.end(), out[t] + begin);
    });
}
