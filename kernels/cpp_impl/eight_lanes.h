// Vectors of 8 floats for bitmask.h, by AVX2 or by NEON: load numbers, move them to the columns of a mask, multiply and add.
#pragma once

#include "common.h"
#include "instructions.h"

#if ISA == 1
namespace {

using Sum = float __attribute__((vector_size(32)));

// For each 8 bits of a mask, a shuffle that moves values of VALUE bytes to the upper bytes of lanes of LANE bytes: lane j
// takes the value whose number is that of the set bits below j. Other bytes are 0x80, by which a shuffle writes zero.
// Numbers of one byte may have another first one and distance.
template <int LANE, int VALUE_BYTES, int FIRST = 0, int STEP = VALUE_BYTES>
struct Shuffles {
    alignas(32) uint8_t of[256][8 * LANE];
    constexpr Shuffles() : of{} {
        for (int mask = 0; mask < 256; ++mask) {
            for (int i = 0, next = FIRST; i < 8 * LANE; ++i) {
                const bool taken = mask >> (i / LANE) & 1, upper = i % LANE >= LANE - VALUE_BYTES;
                of[mask][i] = taken && upper ? next + i % LANE - (LANE - VALUE_BYTES) : 0x80;
                if (taken && i % LANE == LANE - 1) next += STEP;
            }
        }
    }
};
template <int... LAYOUT>
alignas(32) constexpr Shuffles<LAYOUT...> SHUFFLES;

// shifts that move the next codes of 4 bits of a word to the upper bits of lanes of 32; one by 0x80 leaves nothing
constexpr const auto& CODE_SHIFTS = SHUFFLES<1, 1, 28, -4>;

template <typename T>
inline Sum load_floats(const T* x) {
    Sum floats;
    for (int j = 0; j < 8; ++j) floats[j] = widen(x[j]);
    return floats;
}

#if defined(__x86_64__)

inline Sum load_floats(const float* x) { return reinterpret_cast<Sum>(_mm256_loadu_ps(x)); }
inline Sum load_floats(const bf16* x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return reinterpret_cast<Sum>(_mm256_slli_epi32(wide, 16));
}
#if defined(__F16C__)
inline Sum load_floats(const fp16* x) {
    return reinterpret_cast<Sum>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
#endif

inline Sum multiply_add(Sum a, Sum b, Sum plus) {
    return reinterpret_cast<Sum>(_mm256_fmadd_ps(
        reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(plus)
    ));
}

template <int... LAYOUT>
inline __m256i shuffle(uint32_t mask) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(SHUFFLES<LAYOUT...>.of[mask]));
}

// the next values, moved to the lanes of a mask; reads 16 bytes, of floats 32
inline Sum move_floats(const float* values, uint32_t mask) {
    const __m256i lanes = _mm256_srli_epi32(shuffle<4, 1>(mask), 24);
    const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
    // 0x80 in the upper byte of a lane, the sign, says that its column is zero
    const __m256 empty = reinterpret_cast<__m256>(shuffle<4, 1>(mask));
    return reinterpret_cast<Sum>(_mm256_blendv_ps(moved, _mm256_setzero_ps(), empty));
}
inline Sum move_floats(const bf16* values, uint32_t mask) {
    const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    return reinterpret_cast<Sum>(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(next), shuffle<4, 2>(mask)));
}
inline Sum move_floats(const fp16* values, uint32_t mask) {
    const __m128i lanes = _mm_load_si128(reinterpret_cast<const __m128i*>(SHUFFLES<2, 2>.of[mask]));
    fp16 moved[8];
    const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(moved), _mm_shuffle_epi8(next, lanes));
    return load_floats(moved);
}
inline Sum move_floats(const int8_t* values, uint32_t mask) {
    int64_t next;
    std::memcpy(&next, values, sizeof next);
    const __m256i moved = _mm256_shuffle_epi8(_mm256_set1_epi64x(next), shuffle<4, 1>(mask));
    return reinterpret_cast<Sum>(_mm256_cvtepi32_ps(_mm256_srai_epi32(moved, 24)));
}

// the same for the 8 codes of 4 bits in a word
inline Sum move_codes(uint64_t word, uint32_t mask) {
    const __m128i shifts = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(CODE_SHIFTS.of[mask]));
    const __m256i words = _mm256_set1_epi32(static_cast<int>(word));
    const __m256i moved = _mm256_sllv_epi32(words, _mm256_cvtepu8_epi32(shifts));
    return reinterpret_cast<Sum>(_mm256_cvtepi32_ps(_mm256_srai_epi32(moved, 28)));
}

// writes 32 codes of 4 bits to the upper halves of 32 bytes, so that they keep their signs
inline void spread_codes(const uint8_t* codes, int8_t* bytes) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), upper = _mm_set1_epi8(-16);
    const __m128i low = _mm_and_si128(_mm_slli_epi16(pairs, 4), upper), high = _mm_and_si128(pairs, upper);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm_unpacklo_epi8(low, high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes) + 1, _mm_unpackhi_epi8(low, high));
}

#else

inline Sum join(float32x4_t low, float32x4_t high) {
    const float32x4x2_t both = {{low, high}};
    Sum sum;
    std::memcpy(&sum, &both, sizeof sum);
    return sum;
}

inline float32x4x2_t halves(Sum sum) {
    float32x4x2_t both;
    std::memcpy(&both, &sum, sizeof sum);
    return both;
}

inline Sum load_floats(const float* x) { return join(vld1q_f32(x), vld1q_f32(x + 4)); }
inline Sum load_floats(const bf16* x) {
    const uint16x8_t bits = vld1q_u16(reinterpret_cast<const uint16_t*>(x));
    return join(vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
                vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16)));
}
inline Sum from_halves(uint8x16_t bits) {
    const float16x8_t numbers = vreinterpretq_f16_u8(bits);
    return join(vcvt_f32_f16(vget_low_f16(numbers)), vcvt_f32_f16(vget_high_f16(numbers)));
}
inline Sum load_floats(const fp16* x) { return from_halves(vld1q_u8(reinterpret_cast<const uint8_t*>(x))); }

inline Sum multiply_add(Sum a, Sum b, Sum plus) {
    const float32x4x2_t x = halves(a), y = halves(b), z = halves(plus);
    return join(vfmaq_f32(z.val[0], x.val[0], y.val[0]), vfmaq_f32(z.val[1], x.val[1], y.val[1]));
}

// bytes moved by a shuffle; TABLE: 16 or 32 bytes
template <int... LAYOUT, typename TABLE>
inline uint8x16x2_t shuffle(TABLE bytes, uint32_t mask) {
    const uint8_t* of = SHUFFLES<LAYOUT...>.of[mask];
    if constexpr (std::is_same_v<TABLE, uint8x16_t>) {
        return {{vqtbl1q_u8(bytes, vld1q_u8(of)), vqtbl1q_u8(bytes, vld1q_u8(of + 16))}};
    } else {
        return {{vqtbl2q_u8(bytes, vld1q_u8(of)), vqtbl2q_u8(bytes, vld1q_u8(of + 16))}};
    }
}

// the next values, moved to the lanes of a mask; reads 16 bytes, of floats 32
inline Sum move_floats(const float* values, uint32_t mask) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(values);
    const uint8x16x2_t moved = shuffle<4, 4>(uint8x16x2_t{{vld1q_u8(from), vld1q_u8(from + 16)}}, mask);
    return join(vreinterpretq_f32_u8(moved.val[0]), vreinterpretq_f32_u8(moved.val[1]));
}
inline Sum move_floats(const bf16* values, uint32_t mask) {
    const uint8x16x2_t moved = shuffle<4, 2>(vld1q_u8(reinterpret_cast<const uint8_t*>(values)), mask);
    return join(vreinterpretq_f32_u8(moved.val[0]), vreinterpretq_f32_u8(moved.val[1]));
}
inline Sum move_floats(const fp16* values, uint32_t mask) {
    const uint8x16_t next = vld1q_u8(reinterpret_cast<const uint8_t*>(values));
    return from_halves(vqtbl1q_u8(next, vld1q_u8(SHUFFLES<2, 2>.of[mask])));
}
inline Sum move_floats(const int8_t* values, uint32_t mask) {
    const uint8x8_t next = vld1_u8(reinterpret_cast<const uint8_t*>(values));
    const uint8x16x2_t moved = shuffle<4, 1>(vcombine_u8(next, next), mask);
    return join(vcvtq_n_f32_s32(vreinterpretq_s32_u8(moved.val[0]), 24),  // a number with 24 bits after the point
                vcvtq_n_f32_s32(vreinterpretq_s32_u8(moved.val[1]), 24));
}

// the same for the 8 codes of 4 bits in a word
inline Sum move_codes(uint64_t word, uint32_t mask) {
    const uint16x8_t shifts = vmovl_u8(vld1_u8(CODE_SHIFTS.of[mask]));  // of a lane's shift the lowest byte counts
    const uint32x4_t words = vdupq_n_u32(static_cast<uint32_t>(word));
    const auto moved = [&](uint16x4_t by) {
        const uint32x4_t lanes = vshlq_u32(words, vreinterpretq_s32_u32(vmovl_u16(by)));
        return vcvtq_f32_s32(vshrq_n_s32(vreinterpretq_s32_u32(lanes), 28));
    };
    return join(moved(vget_low_u16(shifts)), moved(vget_high_u16(shifts)));
}

// writes 32 codes of 4 bits to the upper halves of 32 bytes, so that they keep their signs
inline void spread_codes(const uint8_t* codes, int8_t* bytes) {
    const uint8x16_t pairs = vld1q_u8(codes);
    const uint8x16_t low = vshlq_n_u8(pairs, 4), high = vandq_u8(pairs, vdupq_n_u8(0xF0));
    vst1q_u8(reinterpret_cast<uint8_t*>(bytes), vzip1q_u8(low, high));
    vst1q_u8(reinterpret_cast<uint8_t*>(bytes) + 16, vzip2q_u8(low, high));
}

#endif

}  // namespace
#endif
