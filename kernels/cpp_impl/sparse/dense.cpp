// Products of few tokens with dense matrices, which read the matrix once. X, VALUE: as in bitmask.h, VALUE the same as X.
#include "bitmask.h"

namespace {

// one row of the matrix times TOKENS rows of x; x: [width / LANES][TOKENS][LANES]
template <int TOKENS>
void multiply_row(const X* weights, int64_t columns, const Entry* x, float (&out)[TOKENS]) {
    // more sums than registers would be slower
    constexpr int CHAINS = TOKENS > 2 ? 2 : 4;
    Sum sums[CHAINS][TOKENS];
    for (auto& chain : sums) {
        for (Sum& sum : chain) sum = zero();
    }
    const auto add = [&](const X* part, const Entry* entries, Sum (&chain)[TOKENS]) {
        const Vector loaded = Vector::load(part);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) chain[t] = loaded.times(Vector::load(entries + t * LANES), chain[t]);
    };
    int64_t column = 0;
    for (; column + CHAINS * LANES <= columns; column += CHAINS * LANES) {
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) {
            __builtin_prefetch(reinterpret_cast<const char*>(weights + column + c * LANES) + AHEAD);
            add(weights + column + c * LANES, x + (column + c * LANES) * TOKENS, sums[c]);
        }
    }
    for (; column < columns; column += LANES) {
        X rest[LANES] = {};
        std::copy(weights + column, weights + std::min(columns, column + LANES), rest);
        add(rest, x + column * TOKENS, sums[0]);
    }
    for (int t = 0; t < TOKENS; ++t) {
        for (int c = 1; c < CHAINS; ++c) sums[0][t] = sums[0][t] + sums[c][t];
        out[t] = total(sums[0][t]);
    }
}

template <int TOKENS>
void multiply(const X* x, const X* weight, int64_t tokens, int64_t columns, const Output& output, int threads) {
    const int64_t width = (columns + LANES - 1) / LANES * LANES, tiles = (tokens + TOKENS - 1) / TOKENS;
    Buffer memory(tiles * TOKENS * width);
    Entry* entries = reinterpret_cast<Entry*>(memory.data());
    lay_out<TOKENS>(x, tokens, columns, width, entries, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < output.rows; ++row) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            float sums[TOKENS];
            multiply_row<TOKENS>(weight + row * columns, columns, entries + tile * TOKENS * width, sums);
            const int64_t first = tile * TOKENS, count = std::min<int64_t>(TOKENS, tokens - first);
            for (int64_t t = 0; t < count; ++t) output.store(sums[t], first + t, row);
        }
    }
}

}  // namespace

// x: [tokens, columns]; weight: [rows, columns]; bias: [rows] or null; out: [tokens, rows]
extern "C" void dense_linear(
    const X* x, const X* weight, const X* bias, X* out, int64_t tokens, int64_t rows, int64_t columns, int threads
) {
    const Output output = {bias, nullptr, out, rows};
    if (tokens == 1) return multiply<1>(x, weight, tokens, columns, output, threads);
    if (tokens == 2) return multiply<2>(x, weight, tokens, columns, output, threads);
    if (tokens <= 4) return multiply<4>(x, weight, tokens, columns, output, threads);
    multiply<8>(x, weight, tokens, columns, output, threads);
}
