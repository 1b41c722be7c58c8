// Products with matrices of values and bit masks: reference/sparse/linear.py. X, VALUE: as in bitmask.h.
//
// bitmask.h expands values to the columns whose bits are set; here they are multiplied by x. Codes that meet bf16 dot
// products are expanded by code_blocks.h.
#include <memory>

#include "bitmask.h"
#include "code_blocks.h"

namespace {

// ---- products with 1 to 8 rows of x

// rows of the matrix that share a loaded x
template <int TOKENS>
constexpr int SHARING = ISA == 0 || (BLOCKED && TOKENS > 2) ? 1 : ISA >= 2 && TOKENS <= 4 ? 4 : 2;
// whether even and odd parts of a row have their own sums, so that products need not wait for each other: as far as sums
// fit into registers
template <int TOKENS>
constexpr bool SPLIT_SUMS = TOKENS * SHARING<TOKENS> <= 8;

// adds word k of ROWS rows; x: [words * WORD / LANES][TOKENS][LANES]
template <int TOKENS, int ROWS, bool careful>
inline void add_word(
    const Matrix& w, const Rows& rows, int64_t k, const Entry* x, int64_t (&at)[ROWS], Sum (&sums)[ROWS][TOKENS]
) {
    if constexpr (ISA == 1) {
        // a row at a time, for which the processor has enough registers
        const Entry* entries = x + k * WORD * TOKENS;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t word = w.mask[rows[r] * w.words() + k];
#pragma GCC unroll 4
            for (int64_t part = 0; part < WORD / LANES; ++part) {
                const uint32_t bits = word >> (part * LANES) & PART_BITS;
                const Vector weights =
                    DECODED<careful> ? expand_decoded(w, at[r], bits) : expand_values<careful>(w, at[r], bits);
                at[r] += set_bits(bits);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) {
                    sums[r][t] = weights.times(Vector::load(entries + (part * TOKENS + t) * LANES), sums[r][t]);
                }
            }
        }
        return;
    }
#pragma GCC unroll 4
    for (int64_t part = 0; part < WORD / LANES; ++part) {
        Vector weights[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t bits = (w.mask[rows[r] * w.words() + k] >> (part * LANES)) & PART_BITS;
            weights[r] = expand_values<careful>(w, at[r], bits);
            at[r] += set_bits(bits);
        }
        const Entry* entries = x + (k * (WORD / LANES) + part) * TOKENS * LANES;
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const Vector columns = Vector::load(entries + t * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sums[r][t] = weights[r].times(columns, sums[r][t]);
        }
    }
}

// adds `count` words of a block from word k on, times the block's scale
template <int TOKENS, int ROWS, bool careful>
inline void add_block(
    const Matrix& w, const Rows& rows, int64_t k, int64_t count, const Entry* x, int64_t (&at)[ROWS],
    Sum (&sums)[ROWS][TOKENS]
) {
    Sum block[ROWS][TOKENS];
    for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < TOKENS; ++t) block[r][t] = zero();
    }
    for (int64_t word = k; word < k + count; ++word) add_word<TOKENS, ROWS, careful>(w, rows, word, x, at, block);
    for (int r = 0; r < ROWS; ++r) {
        const float scale = w.block_scale(rows[r], k) / (DECODED<careful> ? DECODED_UNIT : 1.0f);
        for (int t = 0; t < TOKENS; ++t) sums[r][t] = add_scaled(block[r][t], scale, sums[r][t]);
    }
}

#if ISA == 3
// whether rows are multiplied 64 columns at a time
constexpr bool CODE_BLOCKS = PAIRS && sizeof(VALUE) == 1;

// as multiply_rows, for codes; x: [blocks][2][TOKENS][LANES]
template <int TOKENS, int ROWS, bool careful>
void multiply_codes(const Matrix& w, const Rows& rows, const bf16* x, float (&out)[ROWS][TOKENS]) {
    const Decoder decoder;
    Sum even[ROWS][TOKENS], odd[ROWS][TOKENS];
    int64_t at[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        at[r] = w.begin(rows[r]);
        for (int t = 0; t < TOKENS; ++t) even[r][t] = odd[r][t] = zero();
    }
    for (int64_t k = 0; k < w.words(); k += 2, x += 2 * TOKENS * LANES) {
        PairVector first[ROWS], second[ROWS];
        float scales[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t* mask = w.mask + rows[r] * w.words() + k;
            const uint64_t bits = mask[0] | (k + 1 < w.words() ? static_cast<uint64_t>(mask[1]) << 32 : 0);
            w.fetch_ahead(rows[r], k, at[r]);
            const __m512i codes = load_block<careful>(w.values, at[r], w.count);
            decoder.decode(expand_epi8(bits, codes), first[r].bits, second[r].bits);
            at[r] += set_bits(bits);
            if constexpr (BLOCKED) scales[r] = w.block_scale(rows[r], k);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const PairVector low = PairVector::load(x + t * LANES), high = PairVector::load(x + (TOKENS + t) * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                if constexpr (BLOCKED) {
                    const Sum block = second[r].times(high, first[r].times(low, zero()));
                    even[r][t] = add_scaled(block, scales[r], even[r][t]);
                } else if constexpr (!SPLIT_SUMS<TOKENS>) {
                    even[r][t] = second[r].times(high, first[r].times(low, even[r][t]));
                } else {
                    even[r][t] = first[r].times(low, even[r][t]);
                    odd[r][t] = second[r].times(high, odd[r][t]);
                }
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < TOKENS; ++t) out[r][t] = total(even[r][t] + odd[r][t]);
    }
}
#else
constexpr bool CODE_BLOCKS = false;
#endif

template <int TOKENS, int ROWS, bool careful>
void multiply_rows(Matrix w, const Rows& rows, const Entry* x, float (&out)[ROWS][TOKENS]) {
#if ISA == 3
    if constexpr (CODE_BLOCKS) return multiply_codes<TOKENS, ROWS, careful>(w, rows, x, out);
#endif
    Sum even[ROWS][TOKENS], odd[ROWS][TOKENS];
    int64_t at[ROWS];
    const int64_t room = w.columns + MOST_READ;
    const std::unique_ptr<int8_t[]> decoded(DECODED<careful> ? new int8_t[ROWS * room] : nullptr);  // not cleared
    w.decoded = decoded.get();
    for (int r = 0; r < ROWS; ++r) {
        at[r] = DECODED<careful> ? r * room + decode_codes(w, rows[r], decoded.get() + r * room) : w.begin(rows[r]);
        for (int t = 0; t < TOKENS; ++t) even[r][t] = odd[r][t] = zero();
    }
    const int64_t words = w.words();
    int64_t k = 0;
    for (; k + 1 < words; k += 2) {
        for (int r = 0; r < ROWS; ++r) w.fetch_ahead<DECODED<careful>>(rows[r], k, at[r]);
        if constexpr (BLOCKED) {
            add_block<TOKENS, ROWS, careful>(w, rows, k, 2, x, at, even);
            continue;
        }
        add_word<TOKENS, ROWS, careful>(w, rows, k, x, at, even);
        add_word<TOKENS, ROWS, careful>(w, rows, k + 1, x, at, SPLIT_SUMS<TOKENS> ? odd : even);
    }
    if constexpr (BLOCKED) {
        if (k < words) add_block<TOKENS, ROWS, careful>(w, rows, k, 1, x, at, even);
    } else {
        if (k < words) add_word<TOKENS, ROWS, careful>(w, rows, k, x, at, even);
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < TOKENS; ++t) out[r][t] = total(even[r][t] + odd[r][t]);
    }
}

// ROWS rows times `count` rows of x from `token` on
template <int TOKENS, int ROWS>
void multiply_block(
    const Matrix& w, const Rows& rows, const Entry* x, int64_t token, int64_t count, const Output& output
) {
    bool inside = true;
    for (int r = 0; r < ROWS; ++r) inside &= w.inside(rows[r]);
    float sums[ROWS][TOKENS];
    if (inside) {
        multiply_rows<TOKENS, ROWS, false>(w, rows, x, sums);
    } else if constexpr (ROWS == 1) {
        multiply_rows<TOKENS, 1, true>(w, rows, x, sums);
    } else {  // few of a matrix: a program for several careful rows takes long to compile
        for (int r = 0; r < ROWS; ++r) multiply_block<TOKENS, 1>(w, {rows[r], 1}, x, token, count, output);
        return;
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < std::min<int64_t>(TOKENS, count); ++t) output.store(sums[r][t], token + t, rows[r]);
    }
}

template <int TOKENS>
void multiply(const Matrix& w, const X* x, int64_t tokens, const Output& output, int threads) {
    constexpr int64_t UNIT = CODE_BLOCKS ? 2 * WORD : WORD;
    const int64_t width = (w.columns + UNIT - 1) / UNIT * UNIT, tiles = (tokens + TOKENS - 1) / TOKENS;
    Buffer memory(tiles * TOKENS * width);
    Entry* entries = reinterpret_cast<Entry*>(memory.data());
    lay_out<TOKENS>(x, tokens, w.columns, width, entries, threads);
    for_rows<SHARING<TOKENS>>(w.rows, threads, [&](auto count, const Rows& rows) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t token = tile * TOKENS;
            multiply_block<TOKENS, count>(w, rows, entries + token * width, token, tokens - token, output);
        }
    });
}

// ---- expanded rows

// the first `count` columns of a part of a row
#if ISA == 3
inline void store_part(PairVector weights, float scale, int64_t count, bf16* out) {
    bf16 entries[WORD];
    weights.store(entries);
    if (std::is_same_v<VALUE, bf16>) {
        std::copy(entries, entries + count, out);
    } else {
        for (int64_t j = 0; j < count; ++j) narrow(widen(entries[j]) * scale, out[j]);
    }
}
#endif

inline void store_part(FloatVector weights, float scale, int64_t count, X* out) {
    float entries[LANES];
    weights.store(entries);
    for (int64_t j = 0; j < count; ++j) narrow(entries[j] * scale, out[j]);
}

template <bool careful>
void expand_row(const Matrix& w, int64_t row, float scale, X* out) {
    int64_t at = w.begin(row);
    for (int64_t column = 0; column < w.columns; column += LANES) {
        const uint32_t bits = (w.mask[row * w.words() + column / WORD] >> (column % WORD)) & PART_BITS;
        const Vector weights = expand_values<careful>(w, at, bits);
        if constexpr (BLOCKED) scale = w.block_scale(row, column / WORD);
        at += __builtin_popcount(bits);
        // a constant count lets the compiler write whole vectors
        if (column + LANES <= w.columns) {
            store_part(weights, scale, LANES, out + column);
        } else {
            store_part(weights, scale, w.columns - column, out + column);
        }
    }
}

}  // namespace

// x: [tokens, columns]; values: [count]; mask: [rows, words]; offsets: [rows + 1]; bias, scales: [rows] or null; blocks:
// scales of blocks, [rows, ceil(columns / SCALED)], or null; out: [tokens, rows]
extern "C" void bitmask_linear(
    const X* x, const VALUE* values, const uint32_t* mask, const int64_t* offsets, const X* bias, const float* scales,
    const bf16* blocks, X* out, int64_t tokens, int64_t count, int64_t rows, int64_t columns, int threads
) {
    const Matrix w = {values, mask, offsets, blocks, count, rows, columns};
    const Output output = {bias, scales, out, rows};
    if (tokens == 1) return multiply<1>(w, x, tokens, output, threads);
    if (tokens == 2) return multiply<2>(w, x, tokens, output, threads);
    if (tokens <= 4) return multiply<4>(w, x, tokens, output, threads);
    multiply<8>(w, x, tokens, output, threads);
}

// writes rows begin..end of the matrix to out [end - begin, columns]
extern "C" void bitmask_expand(
    const VALUE* values, const uint32_t* mask, const int64_t* offsets, const float* scales, const bf16* blocks, X* out,
    int64_t count, int64_t rows, int64_t columns, int64_t begin, int64_t end, int threads
) {
    const Matrix w = {values, mask, offsets, blocks, count, rows, columns};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = begin; row < end; ++row) {
        X* to = out + (row - begin) * columns;
        const float scale = scales ? scales[row] : 1.0f;
        w.inside(row) ? expand_row<false>(w, row, scale, to) : expand_row<true>(w, row, scale, to);
    }
}
