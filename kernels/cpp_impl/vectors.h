// Pairs of bf16 neighbours in registers of 512 bits, by the instructions that ISA 3 of instructions.h names.
#pragma once

#include "common.h"
#include "instructions.h"

#if ISA >= 3
namespace {

constexpr uint32_t SIGN = 0x80000000u;

inline __m512i all(uint32_t bits) { return _mm512_set1_epi32(static_cast<int32_t>(bits)); }

// the even and the odd ones of 32 neighbours
struct Lanes {
    __m512 low, high;
};

inline Lanes widen(__m512i words) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, all(0xFFFF0000u)))};
}

// whether one of some multiple of 64 bf16 numbers is 2 or more in magnitude, or not finite: bit 14 says so, and costs less
// than any_nonfinite
template <int64_t count, typename T>
inline bool any_large(const T* x) {
    __m512i bits = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; i += 64) {
        bits = _mm512_ternarylogic_epi32(bits, _mm512_loadu_si512(x + i), _mm512_loadu_si512(x + i + 32), 0xFE);
    }
    return _mm512_test_epi16_mask(bits, all(0x40004000u));
}

// the upper halves of the 32-bit lanes of two vectors, as pairs
inline __m512i upper_halves(__m512i low, __m512i high) {
    const __m128i upper = _mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15);
    return _mm512_mask_shuffle_epi8(high, 0x3333333333333333ull, low, _mm512_broadcast_i32x4(upper));
}

// round_upper() of common.h
inline __m512i round_upper(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    // one sum of products of bytes: 255 * 127 + 191 * 2 + bit 16 = 0x7FFF + bit 16
    const __m512i bytes = _mm512_ternarylogic_epi32(bits, all(0x00010000u), all(0x0000BFFFu), 0xEA);  // (a & b) | c
    return _mm512_dpbusd_epi32(bits, bytes, all(0x0001027Fu));
}

// hash32() of common.h between its first shift and its last one
inline __m512i between_shifts(__m512i x) {
    x = _mm512_mullo_epi32(x, all(0x7FEB352Du));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    return _mm512_mullo_epi32(x, all(0x846CA68Bu));
}

inline __m512i hash32(__m512i x) {
    x = between_shifts(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// weights_of() of common.h, of 32 neighbours
template <int rounding, typename StateT>
inline Lanes weights_of(const bf16* param, const StateT* state) {
    const Lanes value = widen(_mm512_loadu_si512(param));
    if constexpr (rounding != SPLIT) return value;
    const __m512i differences = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(state)));
    const auto join = [](__m512 x, __m512i difference) {
        const __mmask16 special = _mm512_fpclass_ps_mask(x, 0x9F);  // zeros, infinities and NaN
        const __m512i bits = _mm512_castps_si512(x);
        return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_add_epi32(bits, difference), special, bits));
    };
    return {join(value.low, _mm512_srai_epi32(_mm512_slli_epi32(differences, 24), 16)),
            join(value.high, _mm512_and_si512(differences, all(0xFFFFFF00u)))};
}

// store_weights() of common.h, of 32 neighbours; weights are computed from bf16
template <int rounding, typename StateT>
inline void store_weights(Lanes weight, bf16* param, StateT* state, uint32_t index, uint32_t seed) {
    __m512i low = _mm512_castps_si512(weight.low), high = _mm512_castps_si512(weight.high);
    if constexpr (rounding == STOCHASTIC) {
        // the lower halves of infinities and NaN are 0, so no carry changes them
        const __m512i pairs = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i even = _mm512_add_epi32(all(index), pairs);
        const auto rounded = [&](__m512i x, __m512i i) {
            return _mm512_add_epi32(x, _mm512_and_si512(hash32(_mm512_xor_si512(i, all(seed))), all(0xFFFF)));
        };
        low = rounded(low, even), high = rounded(high, _mm512_add_epi32(even, all(1)));
    } else if constexpr (rounding == SPLIT) {
        low = _mm512_add_epi32(low, all(0x80)), high = _mm512_add_epi32(high, all(0x80));
        const __m512i bytes = _mm512_ternarylogic_epi32(all(0xFF), _mm512_srli_epi32(low, 8), high, 0xCA);  // a ? b : c
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(state), _mm512_cvtepi32_epi16(bytes));
        low = _mm512_add_epi32(low, all(0x8000)), high = _mm512_add_epi32(high, all(0x8000));
    } else {
        static_assert(rounding == NEAREST);
        low = round_upper(weight.low), high = round_upper(weight.high);
    }
    _mm512_storeu_si512(param, upper_halves(low, high));
}

}  // namespace
#endif
