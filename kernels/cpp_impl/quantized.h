// 8-bit codes of momenta and of averages of squares, with one fp32 scale for every 128 neighbours of a row:
// reference/quantization.py.
#pragma once

#include "common.h"
#include "vectors.h"

// FP8: whether codes of momenta are fp8 numbers. Those of squares are not.
#ifndef FP8
#define FP8 0
#endif

namespace {

enum class fp8 : uint8_t {};  // float8_e4m3fn: sign, 4 bits of exponent and 3 of mantissa; NaN where these are ones
using Code = std::conditional_t<FP8 != 0, fp8, int8_t>;

// entries with one scale, and blocks that are updated, then quantized, at a time: the latencies of their largest entries
// and inverse scales overlap
constexpr int64_t SCALED = 128, BLOCKS = 4, PIECE = BLOCKS * SCALED;
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

// codes of numbers below the smallest normal one, 2^-6, have the bits of their sum with it, but for the exponent
constexpr float LARGEST_FP8 = 448.0f;
// the largest value of a block in units of its scale, by the type of its codes
template <typename Any>
constexpr float MOST_UNITS =
    std::is_same_v<Any, fp8> ? LARGEST_FP8 : (std::is_same_v<Any, uint8_t> ? LARGEST_SQUARE : LARGEST) - 1.0f;
constexpr uint32_t SMALLEST_NORMAL = 0x3C800000u, EXPONENT_FP8 = 960;
constexpr int DROPPED_FP8 = 20;

inline float unit_of(fp8 code) {
    const uint32_t bits = static_cast<uint8_t>(code), magnitude = bits & 0x7Fu;
    const uint32_t small = magnitude < 8 ? ~0u : 0u;
    const float shifted = from_bits((magnitude + EXPONENT_FP8 + (small & 8u)) << DROPPED_FP8);
    return from_bits(to_bits(shifted - from_bits(small & SMALLEST_NORMAL)) | (bits & 0x80u) << 24);
}

inline float value_of(fp8 code, float scale) { return unit_of(code) * scale; }

// the code of a value, rounded up where 16 random bits are larger than the dropped bits. No clamp, as in code_of: the
// smallest error that would carry LARGEST_FP8 to NaN is 16 units in the last place.
inline uint32_t fp8_of(float value, float inverse, uint32_t random) {
    const float units = from_bits(to_bits(value) & 0x7FFFFFFFu) * inverse;
    const uint32_t small = units < from_bits(SMALLEST_NORMAL) ? ~0u : 0u;
    const uint32_t pattern = to_bits(units + from_bits(small & SMALLEST_NORMAL)) + (random << (DROPPED_FP8 - 16));
    return ((pattern >> DROPPED_FP8) - EXPONENT_FP8 - (small & 8u)) | (to_bits(value) >> 24 & 0x80u);
}

#if ISA >= 3
// the magnitudes of momenta's codes in units of their scales, as bytes of bf16 numbers, which hold them exactly
template <typename Any>
struct Magnitudes {
    alignas(64) uint8_t lower[128] = {}, upper[128] = {};

    constexpr Magnitudes() {
        for (uint32_t code = 1; code < 128; ++code) {
            // int8: z - 1 in units of 1/16, where z has the exponent code / 16 and the mantissa 16 + code % 16.
            // fp8: units of 2^-9, with the exponent max(code / 8 - 1, 0)
            constexpr bool floating = std::is_same_v<Any, fp8>;
            const uint32_t normal = (8 + code % 8) << (code / 8 - (code >= 8)), smallest = floating ? 118 : 123;
            const uint32_t units = floating ? (code < 8 ? code : normal) : ((16 + code % 16) << (code / 16)) - 16;
            uint32_t exponent = 0;
            while (units >> (exponent + 1)) ++exponent;
            const uint32_t mantissa = exponent > 7 ? units >> (exponent - 7) : units << (7 - exponent);
            const uint32_t pattern = (exponent + smallest) << 7 | (mantissa & 0x7F);
            lower[code] = static_cast<uint8_t>(pattern), upper[code] = static_cast<uint8_t>(pattern >> 8);
        }
    }
};
template <typename Any>
constexpr Magnitudes<Any> MAGNITUDES;

// the values of 64 codes of momenta in units of their scales, from a table of 128 entries in registers
template <typename Any>
inline void units_of(__m512i codes, __m512i* units) {
    const auto& magnitudes = MAGNITUDES<Any>;
    const __m512i lower[2] = {_mm512_load_si512(magnitudes.lower), _mm512_load_si512(magnitudes.lower + 64)};
    const __m512i upper[2] = {_mm512_load_si512(magnitudes.upper), _mm512_load_si512(magnitudes.upper + 64)};
    const __m512i signs = _mm512_set1_epi8(-128), order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    // unpacking interleaves within 128 bits
    const __m512i code = _mm512_permutexvar_epi64(order, codes);
    // permutations read 7 bits of an index: all of fp8's but the sign
    const __m512i magnitude = std::is_same_v<Any, fp8> ? code : _mm512_abs_epi8(code);
    const __m512i low = _mm512_permutex2var_epi8(lower[0], magnitude, lower[1]);
    __m512i high = _mm512_permutex2var_epi8(upper[0], magnitude, upper[1]);
    high = _mm512_ternarylogic_epi32(high, code, signs, 0xF8);  // high | (code & signs)
    units[0] = _mm512_unpacklo_epi8(low, high), units[1] = _mm512_unpackhi_epi8(low, high);
}

// 32 codes of squares in units of their scales
inline Lanes units_of_squares(const uint8_t* codes) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i sums = _mm512_add_epi16(words, _mm512_set1_epi16(ONE));
    const auto unit = [](__m512i pattern) { return _mm512_sub_ps(_mm512_castsi512_ps(pattern), _mm512_set1_ps(1.0f)); };
    return {unit(_mm512_slli_epi32(sums, DROPPED)),
            unit(_mm512_slli_epi32(_mm512_and_si512(sums, all(0xFFFF0000u)), DROPPED - 16))};
}

// writes momenta's codes in units of their scales
template <typename Any>
inline void stored_of(const Any* __restrict codes, int64_t n, bf16* __restrict units) {
    for (int64_t i = 0; i < n; i += 64) {
        const __mmask64 here = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
        __m512i vectors[2];
        units_of<Any>(_mm512_maskz_loadu_epi8(here, codes + i), vectors);
        _mm512_store_si512(units + i, vectors[0]);
        _mm512_store_si512(units + i + 32, vectors[1]);
    }
}

inline float unit_of(float stored) { return stored; }
#else
// writes codes in units of their scales, which bf16 numbers hold exactly
inline void stored_of(const fp8* __restrict codes, int64_t n, bf16* __restrict units) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) units[i] = static_cast<bf16>(static_cast<uint16_t>(to_bits(unit_of(codes[i])) >> 16));
}

// writes +-(1 + |value| / scale) of momenta's codes, which bf16 numbers hold exactly; the sign of 0 is plus. 16-bit lanes
// hold twice as many numbers as 32-bit lanes.
inline void stored_of(const int8_t* __restrict codes, int64_t n, bf16* __restrict z) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const int16_t code = codes[i];
        const int16_t magnitude = static_cast<int16_t>((std::abs(code) + ONE) << (DROPPED - 16));
        z[i] = static_cast<bf16>(static_cast<uint16_t>(magnitude | (code & 0x8000)));
    }
}

// the value of such a number in units of its scale, exactly; numbers of fp8 codes are these units
inline float unit_of(float z) { return FP8 ? z : z - from_bits(to_bits(1.0f) | (to_bits(z) & 0x80000000u)); }
#endif

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

#if ISA >= 3
// pairs of a block
struct PairIndices {
    alignas(64) uint32_t index[SCALED / 2] = {};

    constexpr PairIndices() {
        for (uint32_t j = 0; j < SCALED / 2; ++j) index[j] = j;
    }
};
constexpr PairIndices PAIRS;

// the upper halves of the patterns of 16 pairs, in order, whose bits are those of their codes, less a constant, and the
// sign; `shared` as in quantize
template <typename Any>
inline __m512i halves_of(const Momenta& momenta, int64_t j, __m512 inverse, __m512i shared) {
    constexpr bool floating = std::is_same_v<Any, fp8>, squares = std::is_same_v<Any, uint8_t>;
    constexpr int up = (floating ? DROPPED_FP8 : DROPPED) - 16;
    // of the random bits x ^ (x >> 16), 16 of each half, where the codes end
    const __m512i x = between_shifts(_mm512_xor_si512(shared, _mm512_load_si512(PAIRS.index + j)));
    const __m512i bits = all(0xFFFFu << up), upper = _mm512_srli_epi32(x, 16 - up);
    const __m512i low = _mm512_ternarylogic_epi32(_mm512_slli_epi32(x, up), upper, bits, 0x28);  // (a ^ b) & c
    const __m512i high = _mm512_and_si512(upper, bits);
    const auto pattern = [&](const float* values, __m512i random) {
        const __m512i value = _mm512_load_si512(values);
        const __m512 units = _mm512_mul_ps(_mm512_castsi512_ps(value), inverse);
        if constexpr (floating) {
            const __m512 smallest = _mm512_castsi512_ps(all(SMALLEST_NORMAL));
            __m512 magnitude = _mm512_abs_ps(units);
            const __mmask16 small = _mm512_cmp_ps_mask(magnitude, smallest, _CMP_LT_OQ);
            magnitude = _mm512_mask_add_ps(magnitude, small, magnitude, smallest);
            __m512i sum = _mm512_add_epi32(_mm512_castps_si512(magnitude), random);
            sum = _mm512_mask_sub_epi32(sum, small, sum, all(8u << DROPPED_FP8));
            return _mm512_ternarylogic_epi32(sum, value, all(SIGN), 0xF8);  // sum | (value & sign)
        } else if constexpr (squares) {
            const __mmask16 positive = _mm512_cmp_ps_mask(_mm512_castsi512_ps(value), _mm512_setzero_ps(), _CMP_GT_OQ);
            const __m512i z = _mm512_castps_si512(_mm512_add_ps(_mm512_set1_ps(1.0f), units));
            const __m512i sum = _mm512_add_epi32(z, random);
            return _mm512_mask_or_epi32(sum, positive, sum, all(SIGN));
        } else {
            // 1 | (value & sign)
            const __m512i signed_one = _mm512_ternarylogic_epi32(all(to_bits(1.0f)), value, all(SIGN), 0xF8);
            const __m512 z = _mm512_add_ps(_mm512_castsi512_ps(signed_one), units);
            return _mm512_add_epi32(_mm512_castps_si512(z), random);
        }
    };
    return upper_halves(pattern(momenta.low + j, low), pattern(momenta.high + j, high));
}

// which bytes of two vectors are the lower and the upper ones of their 16-bit lanes
struct Halves {
    alignas(64) uint8_t lower[64] = {}, upper[64] = {};

    constexpr Halves() {
        for (int i = 0; i < 64; ++i) {
            lower[i] = static_cast<uint8_t>(2 * i), upper[i] = static_cast<uint8_t>(2 * i + 1);
        }
    }
};
constexpr Halves HALVES;

// writes the codes of 128 momenta or squares: those of 64 from the bytes of two vectors of halves
template <typename Any>
inline void encode(const Momenta& momenta, float inverse, uint32_t shared, Any* codes) {
    constexpr bool floating = std::is_same_v<Any, fp8>, squares = std::is_same_v<Any, uint8_t>;
    constexpr int dropped = (floating ? DROPPED_FP8 : DROPPED) - 16;
    const __m512i lower = _mm512_load_si512(HALVES.lower), upper = _mm512_load_si512(HALVES.upper);
    const __m512i zero = _mm512_set1_epi8(static_cast<int8_t>((floating ? EXPONENT_FP8 : ONE) & 0xFF));
    const __m512 inverses = _mm512_set1_ps(inverse);
    const __m512i seeds = all(shared);
#pragma GCC unroll 2
    for (int64_t j = 0; j < SCALED / 2; j += 32) {
        const __m512i first = halves_of<Any>(momenta, j, inverses, seeds);
        const __m512i second = halves_of<Any>(momenta, j + 16, inverses, seeds);
        __m512i code = _mm512_permutex2var_epi8(
            _mm512_srli_epi16(first, dropped), lower, _mm512_srli_epi16(second, dropped));
        code = _mm512_sub_epi8(code, zero);
        const __m512i signs = _mm512_permutex2var_epi8(first, upper, second);
        if constexpr (floating) {
            code = _mm512_ternarylogic_epi32(code, signs, _mm512_set1_epi8(-128), 0xF8);  // code | (signs & -128)
        } else if constexpr (squares) {
            // a square above 0 never has code 0
            code = _mm512_mask_max_epu8(code, _mm512_movepi8_mask(signs), code, _mm512_set1_epi8(1));
        } else {
            code = _mm512_mask_sub_epi8(code, _mm512_movepi8_mask(signs), _mm512_setzero_si512(), code);
        }
        _mm512_storeu_si512(codes + 2 * j, code);
    }
}
#endif

// makes the random bits of squares independent of those of momenta
constexpr uint32_t SQUARES = 0x5BD1E995u;

// writes the codes and the scale of n momenta, or of n squares where they are unsigned integers
template <typename Any>
inline void quantize(
    const Momenta& momenta, int64_t n, Any* __restrict codes, float* scale, uint32_t first_pair, uint32_t given_seed
) {
    constexpr bool squares = std::is_same_v<Any, uint8_t>, floating = std::is_same_v<Any, fp8>;
    // blocks begin at multiples of 64 pairs, so the index of pair j is first_pair ^ j
    const uint32_t shared = first_shift(first_pair ^ ~(squares ? given_seed ^ SQUARES : given_seed));
    const float unit = momenta.largest * (1.0f / MOST_UNITS<Any>);
    if (!(is_finite(unit) && unit >= SMALLEST_SCALE)) {
        *scale = is_finite(unit) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::fill(codes, codes + n, Any{0});
        return;
    }
    *scale = unit;
    const float inverse = 1.0f / unit;
    const auto write = [&](int64_t size) {
        alignas(64) uint16_t halves[SCALED];
#pragma omp simd
        for (int64_t j = 0; j < (size + 1) / 2; ++j) {
            const uint32_t random = after_first_shift(shared ^ static_cast<uint32_t>(j));
            uint32_t low, high;
            if constexpr (floating) {
                low = fp8_of(momenta.low[j], inverse, random & 0xFFFFu) << 16;
                high = fp8_of(momenta.high[j], inverse, random >> 16) << 16;
            } else {
                low = code_pattern<squares>(momenta.low[j], inverse, random & 0xFFFFu);
                high = code_pattern<squares>(momenta.high[j], inverse, random >> 16);
            }
            const uint32_t word = (low >> 16) | (high & 0xFFFF0000u);
            std::memcpy(halves + 2 * j, &word, sizeof word);
        }
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            if constexpr (floating) {
                codes[i] = static_cast<fp8>(static_cast<uint8_t>(halves[i]));
            } else {
                codes[i] = static_cast<Any>(code_of<squares>(halves[i]));
            }
        }
    };
    // loops of a constant length have no remainder
    if (n < SCALED) {
        write(n);
        return;
    }
#if ISA >= 3
    encode(momenta, inverse, shared, codes);
#else
    write(SCALED);
#endif
}

#if ISA >= 3
// the largest lane of each of BLOCKS vectors
inline __m128 largest_lanes(const __m512* x) {
    const auto halves = [](__m512 a, __m512 b) {
        return _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    };
    // lanes of 128 bits: two of each of two vectors, then one of each of four
    const __m512 first = halves(x[0], x[1]), second = halves(x[2], x[3]);
    __m512 lanes = _mm512_max_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xDD));
    lanes = _mm512_max_ps(lanes, _mm512_shuffle_ps(lanes, lanes, 0x4E));
    lanes = _mm512_max_ps(lanes, _mm512_shuffle_ps(lanes, lanes, 0xB1));
    const __m512i one_of_each = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(one_of_each, lanes));
}

// new momenta of BLOCKS whole blocks, and what their codes are made with
struct NewMomenta {
    Momenta momenta[BLOCKS];
    alignas(16) float inverses[BLOCKS];  // of the scales
    __mmask8 usable;                     // blocks; the codes of others are 0
    uint32_t first_pair;
};

// the first half of quantize(): writes the scales of blocks with these largest magnitudes
template <typename Any>
inline void scale(NewMomenta& updated, __m128 largest, float* scales) {
    const __m128 unit = _mm_mul_ps(largest, _mm_set1_ps(1.0f / MOST_UNITS<Any>));
    const __mmask8 finite = _mm_cmp_ps_mask(unit, _mm_set1_ps(std::numeric_limits<float>::infinity()), _CMP_LT_OQ);
    updated.usable = finite & _mm_cmp_ps_mask(unit, _mm_set1_ps(SMALLEST_SCALE), _CMP_GE_OQ);
    const __m128 nan = _mm_set1_ps(std::numeric_limits<float>::quiet_NaN());
    _mm_storeu_ps(scales, _mm_mask_blend_ps(finite, nan, _mm_maskz_mov_ps(updated.usable, unit)));
    _mm_store_ps(updated.inverses, _mm_maskz_div_ps(updated.usable, _mm_set1_ps(1.0f), unit));
}

// its second half: writes the codes
template <typename Any>
inline void encode(const NewMomenta& updated, uint32_t seed, Any* codes) {
    for (int b = 0; b < BLOCKS; ++b) {
        const uint32_t pair = updated.first_pair + static_cast<uint32_t>(b * (SCALED / 2));
        Any* of_block = codes + b * SCALED;
        encode(updated.momenta[b], updated.inverses[b], first_shift(pair ^ ~seed), of_block);
        if (!(updated.usable >> b & 1)) std::fill(of_block, of_block + SCALED, Any{0});
    }
}
#endif

inline int64_t blocks_of(int64_t columns) { return (columns + SCALED - 1) / SCALED; }

// calls work(t, first block, first entry, entries) for adjacent blocks of every tensor [rows, columns], for at most
// `longest` entries
template <int64_t longest = PIECE, typename Work>
void for_pieces(int64_t count, const int64_t* rows, const int64_t* columns, int threads, Work work) {
    std::vector<int64_t> blocks(count);
    for (int64_t t = 0; t < count; ++t) blocks[t] = rows[t] * blocks_of(columns[t]);
    const auto share = [](int64_t) { return BLOCK / SCALED; };
    for_blocks(count, blocks.data(), threads, share, [&](int64_t t, int64_t begin, int64_t end) {
        // the blocks of several rows are adjacent if none is short
        const bool whole = columns[t] % SCALED == 0;
        const int64_t width = whole ? rows[t] * columns[t] : columns[t], per_row = blocks_of(width);
        for (int64_t block = begin; block < end;) {
            const int64_t column = block % per_row * SCALED, most = std::min(longest, (end - block) * SCALED);
            const int64_t n = std::min(most, width - column);
            work(t, block, block / per_row * width + column, n);
            block += blocks_of(n);
        }
    });
}

}  // namespace
