// Products of few tokens with dense matrices, which read the matrix once. X, VALUE: as in bitmask.h, VALUE the same as X.
#include "bitmask.h"

namespace {

// rows of the matrix that share a loaded x
constexpr int SHARING = ISA >= 2 ? 4 : 2;

// ROWS rows of the matrix times TOKENS rows of x; x: [width / LANES][TOKENS][LANES]
template <int TOKENS, int ROWS>
void multiply_rows(const X* weight, const Rows& rows, int64_t columns, const Entry* x, float (&out)[ROWS][TOKENS]) {
    Sum sums[ROWS][TOKENS];
    for (auto& of_row : sums) {
        for (Sum& sum : of_row) sum = zero();
    }
    const auto add = [&](const X* const (&parts)[ROWS], const Entry* entries) {
        Vector loaded[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) loaded[r] = Vector::load(parts[r]);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const Vector columns = Vector::load(entries + t * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sums[r][t] = loaded[r].times(columns, sums[r][t]);
        }
    };
    const X* parts[ROWS];
    int64_t column = 0;
    for (; column + LANES <= columns; column += LANES) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            parts[r] = weight + rows[r] * columns + column;
            __builtin_prefetch(reinterpret_cast<const char*>(parts[r]) + AHEAD);
        }
        add(parts, x + column * TOKENS);
    }
    if (column < columns) {
        X rest[ROWS][LANES] = {};
        for (int r = 0; r < ROWS; ++r) {
            const X* row = weight + rows[r] * columns;
            std::copy(row + column, row + columns, rest[r]);
            parts[r] = rest[r];
        }
        add(parts, x + column * TOKENS);
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < TOKENS; ++t) out[r][t] = total(sums[r][t]);
    }
}

template <int TOKENS>
void multiply(const X* x, const X* weight, int64_t tokens, int64_t columns, const Output& output, int threads) {
    const int64_t width = (columns + LANES - 1) / LANES * LANES, tiles = (tokens + TOKENS - 1) / TOKENS;
    Buffer memory(tiles * TOKENS * width);
    Entry* entries = reinterpret_cast<Entry*>(memory.data());
    lay_out<TOKENS>(x, tokens, columns, width, entries, threads);
    for_rows<SHARING>(output.rows, threads, [&](auto height, const Rows& rows) {
        for (int64_t token = 0; token < tokens; token += TOKENS) {
            float sums[height][TOKENS];
            multiply_rows<TOKENS, height>(weight, rows, columns, entries + token * width, sums);
            for (int r = 0; r < height; ++r) {
                for (int t = 0; t < std::min<int64_t>(TOKENS, tokens - token); ++t) {
                    output.store(sums[r][t], token + t, rows[r]);
                }
            }
        }
    });
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
