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

// writes +-(1 + |value| / scale) of momenta's codes, which bf16 numbers hold exactly; the sign of 0 is plus. 16-bit lanes
// hold twice as many numbers as 32-bit lanes.
inline void signed_z_of(const int8_t* __restrict codes, int64_t n, bf16* __restrict z) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const int16_t code = codes[i];
        const int16_t magnitude = static_cast<int16_t>((std::abs(code) + ONE) << (DROPPED - 16));
        z[i] = static_cast<bf16>(static_cast<uint16_t>(magnitude | (code & 0x8000)));
    }
}

// the value of such a number in units of its scale, exactly
inline float unit_of(float z) { return z - from_bits(to_bits(1.0f) | (to_bits(z) & 0x80000000u)); }

// the pattern of +-(1 + |value| / scale), rounded up where 16 random bits are larger than the dropped bits; squares above
// 0 have the sign bit
template <bool squares>
inline uint32_t code_pattern(float value, float inverse, uint32_t random) {
    const uint32_t sign = squares ? 0u : to_bits(value) & 0x80000000u;
    const uint32_t pattern = to_bits(from_bits(to_bits(1.0f) | sign) + value * inverse) + (random << (DROPPED - 16));
    return squares && value > 0.0f ? pattern | 0x80000000u : pattern;
}

// the code of the upper half of a pattern. No clamp: the rounding errors of scale, inverse and product are at most 6 units
// in the last place of z, and the smallest that would carry LARGEST to the next code are 8.
template <bool squares>
inline int16_t code_of(uint16_t half) {
    const int16_t magnitude = static_cast<int16_t>(((half & 0x7FFFu) >> (DROPPED - 16)) - ONE);
    // a square above 0 never has code 0
    if constexpr (squares) return std::max<int16_t>(magnitude, half >> 15);
    return static_cast<int16_t>(half) < 0 ? -magnitude : magnitude;
}

// momenta of a block, neighbours in two arrays: vectors then need no permutation
struct Momenta {
    alignas(64) float low[SCALED / 2], high[SCALED / 2];
    float largest;
};

inline uint32_t larger(uint32_t largest, float x) { return std::max(largest, to_bits(x) & 0x7FFFFFFFu); }

// calls one(i) for n entries of a block, and stores the momenta that it returns
template <typename One>
inline void for_entries(int64_t n, Momenta& momenta, One one) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n / 2; ++j) {
        momenta.low[j] = one(2 * j), momenta.high[j] = one(2 * j + 1);
        largest = larger(larger(largest, momenta.low[j]), momenta.high[j]);
    }
    if (n % 2) {
        momenta.low[n / 2] = one(n - 1), momenta.high[n / 2] = 0.0f;
        largest = larger(largest, momenta.low[n / 2]);
    }
    momenta.largest = from_bits(largest);
}

// makes the random bits of squares independent of those of momenta
constexpr uint32_t SQUARES = 0x5BD1E995u;

// writes the codes and the scale of n momenta, or of n squares where Code is unsigned
template <typename Code>
inline void quantize(
    const Momenta& momenta, int64_t n, Code* __restrict codes, float* scale, uint32_t first_pair, uint32_t given_seed
) {
    constexpr bool squares = std::is_unsigned_v<Code>;
    // blocks begin at multiples of 64 pairs, so the sum of this number and a pair of the block is their xor
    const uint32_t shared = first_shift(first_pair ^ ~(squares ? given_seed ^ SQUARES : given_seed));
    const float unit = momenta.largest * (1.0f / ((squares ? LARGEST_SQUARE : LARGEST) - 1.0f));
    if (!(is_finite(unit) && unit >= SMALLEST_SCALE)) {
        *scale = is_finite(unit) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::fill(codes, codes + n, Code{0});
        return;
    }
    *scale = unit;
    const float inverse = 1.0f / unit;
    const auto write = [&](int64_t size) {
        alignas(64) uint16_t halves[SCALED];
#pragma omp simd
        for (int64_t j = 0; j < (size + 1) / 2; ++j) {
            const uint32_t random = after_first_shift(shared ^ static_cast<uint32_t>(j));
            const uint32_t low = code_pattern<squares>(momenta.low[j], inverse, random & 0xFFFFu);
            const uint32_t high = code_pattern<squares>(momenta.high[j], inverse, random >> 16);
            const uint32_t word = (low >> 16) | (high & 0xFFFF0000u);
            std::memcpy(halves + 2 * j, &word, sizeof word);
        }
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<Code>(code_of<squares>(halves[i]));
    };
    // loops of a constant length have no remainder
    if (n == SCALED) {
        write(SCALED);
    } else {
        write(n);
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
