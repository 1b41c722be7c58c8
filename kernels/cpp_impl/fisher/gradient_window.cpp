// Dots of a window's rows with a vector, and combinations of its rows: reference/gradient_window.py. Each reads the
// windows once. WINDOW: float, bf16 or fp16.
//
// A thread takes a stretch of columns of all rows: what the rows share, the vector or the result, then stays in the
// second-level cache. Results do not depend on the number of threads.
#include "window.h"

namespace {

constexpr int64_t COLUMNS = 16384;
// products that are added up in fp32 before fp64 takes over
constexpr int64_t LANES = 1024;
constexpr int ROWS = 4;

// dots of R rows, whose sums do not wait for one another
template <int R>
void dots_of_rows(const WINDOW* __restrict w, const float* __restrict x, int64_t n, int64_t pitch, double* dots) {
    double total[R] = {};
    for (int64_t begin = 0; begin < n; begin += LANES) {
        const int64_t end = std::min(begin + LANES, n);
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t j = begin; j < end; ++j) {
            a += widen(w[j]) * x[j];
            if constexpr (R > 1) b += widen(w[pitch + j]) * x[j];
            if constexpr (R > 2) c += widen(w[2 * pitch + j]) * x[j];
            if constexpr (R > 3) d += widen(w[3 * pitch + j]) * x[j];
        }
        const float sums[4] = {a, b, c, d};
        for (int r = 0; r < R; ++r) total[r] += sums[r];
    }
    for (int r = 0; r < R; ++r) dots[r] = total[r];
}

template <int R>
void add_rows(const WINDOW* __restrict w, const float* c, int64_t n, int64_t pitch, float* __restrict out) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        float sum = out[j];
        for (int r = 0; r < R; ++r) sum += c[r] * widen(w[r * pitch + j]);
        out[j] = sum;
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
    const int64_t* owners, int64_t m, const float* coefficients, int threads
) {
    const auto columns = [](int64_t) { return COLUMNS; };
    for_blocks(count, sizes, threads, columns, [=](int64_t t, int64_t begin, int64_t end) {
        const WINDOW* w = windows[t] + begin;
        const float* c = coefficients + owners[t] * m;
        const int64_t n = end - begin, pitch = pitches[t];
        std::fill(out[t] + begin, out[t] + end, 0.0f);
        int64_t i = 0;
        for (; i + 2 * ROWS <= m; i += 2 * ROWS) {
            add_rows<2 * ROWS>(w + i * pitch, c + i, n, pitch, out[t] + begin);
        }
        for (; i < m; ++i) add_rows<1>(w + i * pitch, c + i, n, pitch, out[t] + begin);
    });
}
