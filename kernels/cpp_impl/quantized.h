// 8-bit codes of momenta and of averages of squares, with one fp32 scale for every 128 neighbours of a row:
// reference/quantization.py.
#pragma once

#include "common.h"

namespace {

// entries with one scale, and blocks that are updated, then quantized, at a time: the latencies of their largest entries
// and inverse scales overlap
constexpr int64_t SCALED = 128, BLOCKS = 8, PIECE = BLOCKS * SCALED;
constexpr float SMALLEST_SCALE = 0x1p-100f;
// codes are bits 19 to 25 (squares: 26) of the fp32 pattern of 1 + |value| / scale, which is at most LARGEST
constexpr float LARGEST = 248.0f, LARGEST_SQUARE = 63488.0f;
constexpr int DROPPED = 19;
constexpr uint32_t ONE = 0x3F800000u >> DROPPED;

inline float value_of(int32_t code, float scale) {
    const uint32_t pattern = (static_cast<uint32_t>(std::abs(code)) + ONE) << DROPPED;
    const float magnitude = (from_bits(pattern) - 1.0f) * scale;
    return from_bits(to_bits(magnitude) ^ (static_cast<uint32_t>(code) & 0x80000000u));
}

// rounds up where 16 random bits are larger than the dropped bits
template <bool squares>
inline int32_t code_of(float value, float inverse, uint32_t random) {
    const uint32_t pattern = to_bits(1.0f + std::fabs(value) * inverse) + (random << (DROPPED - 16));
    const int32_t code = std::min<int32_t>(static_cast<int32_t>((pattern >> DROPPED) - ONE), squares ? 255 : 127);
    if constexpr (squares) return std::max<int32_t>(code, value > 0.0f);
    return value < 0.0f ? -code : code;
}

// momenta of a block, neighbours in two arrays: vectors then need no permutation
struct Momenta {
    alignas(64) float low[SCALED / 2], high[SCALED / 2];
    float largest;
};

// makes the random bits of squares independent of those of momenta
constexpr uint32_t SQUARES = 0x5BD1E995u;

// writes the codes and the scale of n momenta, or of n squares where Code is unsigned
template <typename Code>
inline void quantize(
    const Momenta& momenta, int64_t n, Code* __restrict codes, float* scale, uint32_t first_pair, uint32_t given_seed
) {
    constexpr bool squares = std::is_unsigned_v<Code>;
    const uint32_t seed = squares ? given_seed ^ SQUARES : given_seed;
    const float unit = momenta.largest * (1.0f / ((squares ? LARGEST_SQUARE : LARGEST) - 1.0f));
    if (!(is_finite(unit) && unit >= SMALLEST_SCALE)) {
        *scale = is_finite(unit) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::fill(codes, codes + n, Code{0});
        return;
    }
    *scale = unit;
    const float inverse = 1.0f / unit;
#pragma omp simd
    for (int64_t j = 0; j < n / 2; ++j) {
        const uint32_t random = hash32((first_pair + static_cast<uint32_t>(j)) ^ ~seed);
        const int32_t low = code_of<squares>(momenta.low[j], inverse, random & 0xFFFFu);
        const int32_t high = code_of<squares>(momenta.high[j], inverse, random >> 16);
        const uint16_t word = static_cast<uint16_t>((low & 0xFF) | (high << 8));
        std::memcpy(codes + 2 * j, &word, sizeof word);
    }
    if (n % 2) {
        const uint32_t random = hash32((first_pair + static_cast<uint32_t>(n / 2)) ^ ~seed);
        codes[n - 1] = static_cast<Code>(code_of<squares>(momenta.low[n / 2], inverse, random & 0xFFFFu));
    }
}

inline int64_t blocks_of(int64_t columns) { return (columns + SCALED - 1) / SCALED; }

// calls work(t, first block, first entry, entries) for adjacent blocks of every tensor [rows, columns]
template <typename Work>
void for_pieces(int64_t count, const int64_t* rows, const int64_t* columns, int threads, Work work) {
    std::vector<int64_t> blocks(count);
    for (int64_t t = 0; t < count; ++t) blocks[t] = rows[t] * blocks_of(columns[t]);
    const auto share = [](int64_t) { return BLOCK / SCALED; };
    for_blocks(count, blocks.data(), threads, share, [&](int64_t t, int64_t begin, int64_t end) {
        // the blocks of several rows are adjacent if none is short
        const bool whole = columns[t] % SCALED == 0;
        const int64_t width = whole ? rows[t] * columns[t] : columns[t], per_row = blocks_of(width);
        for (int64_t block = begin; block < end;) {
            const int64_t column = block % per_row * SCALED, most = std::min(PIECE, (end - block) * SCALED);
            const int64_t n = std::min(most, width - column);
            work(t, block, block / per_row * width + column, n);
            block += blocks_of(n);
        }
    });
}

}  // namespace
