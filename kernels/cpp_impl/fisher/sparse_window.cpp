// Dot products of a sparse window's rows with a vector, and combinations of its rows, as in
// reference/fisher/sparse_window.py. Each reads values and indices once. WINDOW: float, bf16 or fp16.
//
// Sums run in fp64, as in gradient_window.cpp. A thread processes a few blocks of all rows, so that the elements it
// gathers from, or adds to, stay in the cache. No two threads add to one element. Rows are added in order.
#include "window.h"

namespace {

// Entries of a row that are processed together, so that they fill whole cache lines; and the most elements of the dense
// vector that they point to, whose sums fit the second-level cache.
constexpr int64_t ENTRIES = 256, ELEMENTS = 1 << 15;

struct Window {
    const WINDOW* values;
    const int16_t* indices;
    int64_t numel, block, per_block, k;

    int64_t blocks() const { return (numel + block - 1) / block; }
    // entries of block b; the last block may have fewer
    int64_t entries(int64_t b) const { return std::min(per_block, k - b * per_block); }
    // number of blocks that are processed together
    int64_t together() const {
        return std::max<int64_t>(1, std::min(ENTRIES / std::max<int64_t>(1, per_block), ELEMENTS / block));
    }
};

std::vector<Window> windows_of(
    int64_t count, const WINDOW** values, const int16_t** indices, const int64_t* numel, const int64_t* block,
    const int64_t* per_block, const int64_t* k
) {
    std::vector<Window> windows;
    for (int64_t t = 0; t < count; ++t) windows.push_back({values[t], indices[t], numel[t], block[t], per_block[t], k[t]});
    return windows;
}

std::vector<int64_t> blocks_of(const std::vector<Window>& windows) {
    std::vector<int64_t> blocks;
    for (const Window& window : windows) blocks.push_back(window.blocks());
    return blocks;
}

double dot(const WINDOW* __restrict v, const int16_t* __restrict indices, const float* __restrict x, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t e = 0; e < n; ++e) sum = fused(double(widen(v[e])), double(x[indices[e]]), sum);
    return sum;
}

void add(const WINDOW* __restrict v, const int16_t* __restrict indices, double c, int64_t n, double* __restrict sums) {
    // no index occurs twice in a row
#pragma omp simd
    for (int64_t e = 0; e < n; ++e) sums[indices[e]] += c * widen(v[e]);
}

}  // namespace

// owners[t]: the window's group; dots: [groups, m], zeroed
extern "C" void row_dots(
    int64_t count, const WINDOW** values, const int16_t** indices, const float** vectors, const int64_t* numel,
    const int64_t* block, const int64_t* per_block, const int64_t* k, const int64_t* owners, int64_t m, double* dots,
    int threads
) {
    const std::vector<Window> windows = windows_of(count, values, indices, numel, block, per_block, k);
    const std::vector<int64_t> blocks = blocks_of(windows);
    std::vector<int64_t> first(count + 1, 0);
    for (int64_t t = 0; t < count; ++t) {
        first[t + 1] = first[t] + (blocks[t] + windows[t].together() - 1) / windows[t].together();
    }
    std::vector<double> partial(first[count] * m);
    const auto together = [&](int64_t t) { return windows[t].together(); };
    for_blocks(count, blocks.data(), threads, together, [&](int64_t t, int64_t begin, int64_t end) {
        const Window& window = windows[t];
        double* sums = partial.data() + (first[t] + begin / window.together()) * m;
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t b = begin; b < end; ++b) {
                const int64_t at = i * window.k + b * window.per_block;
                sums[i] += dot(window.values + at, window.indices + at, vectors[t] + b * window.block, window.entries(b));
            }
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
    int64_t count, const WINDOW** values, const int16_t** indices, float** out, const int64_t* numel,
    const int64_t* block, const int64_t* per_block, const int64_t* k, const int64_t* owners, int64_t m,
    const double* coefficients, int threads
) {
    const std::vector<Window> windows = windows_of(count, values, indices, numel, block, per_block, k);
    const std::vector<int64_t> blocks = blocks_of(windows);
    const auto together = [&](int64_t t) { return windows[t].together(); };
    for_blocks(count, blocks.data(), threads, together, [&](int64_t t, int64_t begin, int64_t end) {
        const Window& window = windows[t];
        const int64_t first = begin * window.block;
        std::vector<double> sums(std::min(end * window.block, window.numel) - first);
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t b = begin; b < end; ++b) {
                const int64_t at = i * window.k + b * window.per_block;
                add(window.values + at, window.indices + at, coefficients[owners[t] * m + i], window.entries(b),
                    sums.data() + b * window.block - first);
            }
        }
        std::copy(sums.begin(), sums.end(), out[t] + first);
    });
}
