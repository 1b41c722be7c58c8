// Blocks of 64 columns of 8-bit or 4-bit codes as bf16 numbers, with AVX-512 VBMI2: a part of sparse/linear.cpp.
//
// Codes are expanded to their columns as bytes, 64 in one instruction, and become bf16 numbers by tables in registers.
#pragma once

#include "bitmask.h"

#if ISA == 3
namespace {

// the bf16 pattern of an integer from -128 to 127
constexpr uint16_t bf16_pattern(int value) {
    const int magnitude = value < 0 ? -value : value;
    if (magnitude == 0) return 0;
    int exponent = 0;
    while (magnitude >> (exponent + 1)) ++exponent;
    const int fraction = (magnitude << (7 - exponent)) & 0x7F;
    return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (127 + exponent) << 7 | fraction);
}

// lower and upper bytes of bf16 patterns: of the magnitudes 0 to 127, or of 16 codes of 4 bits in every 128-bit lane
struct PatternBytes {
    alignas(64) uint8_t lower[128] = {}, upper[128] = {};

    constexpr PatternBytes() {
        for (int i = 0; i < 128; ++i) {
            const uint16_t pattern = bf16_pattern(BLOCKED ? ((i % 16) ^ 8) - 8 : i);
            lower[i] = static_cast<uint8_t>(pattern), upper[i] = static_cast<uint8_t>(pattern >> 8);
        }
    }
};
constexpr PatternBytes PATTERN_BYTES;

// 64 codes of 8 bits from an index on
inline __m512i load_code_bytes(const int8_t* codes, int64_t index) { return _mm512_loadu_si512(codes + index); }

// 64 codes of 4 bits from an index on, each in the lower half of a byte; reads 36 bytes
inline __m512i load_code_bytes(const int4* codes, int64_t index) {
    const __m512i packed = _mm512_maskz_loadu_epi32(0x1FF, codes + index / 2);
    // 64-bit lane q gets bytes 4 q to 4 q + 7, which hold its 8 codes from either half of a byte on
    const __m512i lanes = _mm512_setr_epi32(0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8);
    const int64_t shifts = 0x1C1814100C080400 + (index & 1) * 0x0404040404040404;
    const __m512i moved = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(shifts), _mm512_permutexvar_epi32(lanes, packed));
    return _mm512_and_si512(moved, _mm512_set1_epi8(15));
}

// as above; at the end of the codes (careful), zeros follow
template <bool careful, typename Code>
inline __m512i load_block(const Code* codes, int64_t index, int64_t count) {
    if constexpr (careful) {
        int8_t rest[64] = {};
        const int64_t left = std::max<int64_t>(0, std::min<int64_t>(64, count - index));
        for (int64_t j = 0; j < left; ++j) rest[j] = stored_at(codes, index + j) & (BLOCKED ? 15 : -1);
        return _mm512_loadu_si512(rest);
    }
    return load_code_bytes(codes, index);
}

// turns 64 bytes of codes into two vectors of 32 bf16 numbers
class Decoder {
public:
    void decode(__m512i codes, __m512i& first, __m512i& second) const {
        // unpacking interleaves within 128 bits
        codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), codes);
        __m512i low, high;
        if constexpr (BLOCKED) {
            low = _mm512_shuffle_epi8(lower_[0], codes);
            high = _mm512_shuffle_epi8(upper_[0], codes);
        } else {
            const __m512i magnitude = _mm512_abs_epi8(codes);
            low = _mm512_permutex2var_epi8(lower_[0], magnitude, lower_[1]);
            high = _mm512_permutex2var_epi8(upper_[0], magnitude, upper_[1]);
            high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xF8);  // high | (codes & sign)
        }
        first = _mm512_unpacklo_epi8(low, high);
        second = _mm512_unpackhi_epi8(low, high);
    }

private:
    __m512i lower_[2] = {_mm512_load_si512(PATTERN_BYTES.lower), _mm512_load_si512(PATTERN_BYTES.lower + 64)};
    __m512i upper_[2] = {_mm512_load_si512(PATTERN_BYTES.upper), _mm512_load_si512(PATTERN_BYTES.upper + 64)};
};

}  // namespace
#endif
