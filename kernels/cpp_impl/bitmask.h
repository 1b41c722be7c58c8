// Matrices of values and bit masks: reference/sparse/bitmask.py. X: float or bf16. VALUE: X, or int8_t for codes of 8 bits.
//
// A step loads the next LANES values of a row and moves them to the columns whose bits are set. instructions.h selects
// the instructions.
#pragma once

#include "common.h"
#include "instructions.h"

namespace {

constexpr int64_t WORD = 32;

// the float of a stored value; the same for codes, whose scale is applied to sums
inline float widen(int8_t code) { return code; }

// ---- vectors: load LANES values, expand them to the columns of a mask, multiply and add

// products of two bf16 numbers, two neighbours into each fp32 lane; codes are exact in bf16
#if ISA == 3
constexpr bool PAIRS = all_bf16<X>;
#else
constexpr bool PAIRS = false;
#endif

#if ISA >= 2
constexpr int64_t LANES = PAIRS ? 32 : 16;
using Sum = __m512;

inline Sum zero() { return _mm512_setzero_ps(); }
inline float total(Sum sum) { return _mm512_reduce_add_ps(sum); }

#if ISA == 3
struct PairVector {
    __m512i bits;
    static PairVector load(const bf16* x) { return {_mm512_loadu_si512(x)}; }
    static PairVector load(const int8_t* x) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
        return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low))};
    }
    PairVector expand(uint32_t mask) const {
        __m512i loaded = bits;
        asm("" : "+v"(loaded));  // as below
        return {_mm512_maskz_expand_epi16(mask, loaded)};
    }
    Sum times(PairVector x, Sum plus) const {
        return _mm512_dpbf16_ps(plus, reinterpret_cast<__m512bh>(bits), reinterpret_cast<__m512bh>(x.bits));
    }
    void store(void* out) const { _mm512_storeu_si512(out, bits); }
};
#endif

struct FloatVector {
    __m512 floats;
    static FloatVector load(const float* x) { return {_mm512_loadu_ps(x)}; }
    static FloatVector load(const bf16* x) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static FloatVector load(const int8_t* x) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))))};
    }
    FloatVector expand(uint32_t mask) const {
        // Keeps the load in an instruction of its own, so that the compiler does not make it one with the expansion.
        __m512 loaded = floats;
        asm("" : "+v"(loaded));
        return {_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), loaded)};
    }
    Sum times(FloatVector x, Sum plus) const { return _mm512_fmadd_ps(floats, x.floats, plus); }
    void store(float* out) const { _mm512_storeu_ps(out, floats); }
};
#else
constexpr int64_t LANES = 8;
using Sum = float __attribute__((vector_size(32)));

inline Sum zero() { return Sum{}; }
inline float total(Sum sum) { return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7])); }

#if ISA == 1
// the value that each lane takes, 4 bits a lane: lane j takes the number of set bits below j; 8 is a zero
struct Lookup {
    uint32_t lanes[256];
    constexpr Lookup() : lanes{} {
        for (uint32_t mask = 0; mask < 256; ++mask) {
            uint32_t next = 0;
            for (uint32_t j = 0; j < 8; ++j) lanes[mask] |= ((mask >> j) & 1u ? next++ : 8u) << (4 * j);
        }
    }
};
constexpr Lookup LOOKUP;
#endif

struct FloatVector {
    Sum floats;
    template <typename T>
    static FloatVector load(const T* x) {
        FloatVector vector;
        for (int64_t j = 0; j < LANES; ++j) vector.floats[j] = widen(x[j]);
        return vector;
    }
#if ISA == 1
    static FloatVector load(const float* x) { return {reinterpret_cast<Sum>(_mm256_loadu_ps(x))}; }
    static FloatVector load(const bf16* x) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        return {reinterpret_cast<Sum>(_mm256_slli_epi32(wide, 16))};
    }
    static FloatVector load(const int8_t* x) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
        return {reinterpret_cast<Sum>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))};
    }
    FloatVector expand(uint32_t mask) const {
        const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        const __m256i lanes = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(LOOKUP.lanes[mask])), shifts);
        const __m256 moved = _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(floats), lanes);
        // bit 3 of a lane's number, moved to the sign, says that its column is zero
        const __m256i empty = _mm256_srai_epi32(_mm256_slli_epi32(lanes, 28), 31);
        return {reinterpret_cast<Sum>(_mm256_andnot_ps(_mm256_castsi256_ps(empty), moved))};
    }
    Sum times(FloatVector x, Sum plus) const {
        return reinterpret_cast<Sum>(_mm256_fmadd_ps(
            reinterpret_cast<__m256>(floats), reinterpret_cast<__m256>(x.floats), reinterpret_cast<__m256>(plus)
        ));
    }
#else
    FloatVector expand(uint32_t mask) const {
        FloatVector vector = {Sum{}};
        for (int64_t j = 0, next = 0; j < LANES; ++j) {
            if ((mask >> j) & 1u) vector.floats[j] = floats[next++];
        }
        return vector;
    }
    Sum times(FloatVector x, Sum plus) const { return floats * x.floats + plus; }
#endif
    void store(float* out) const { std::memcpy(out, &floats, sizeof floats); }
};
#endif

#if ISA == 3
using Vector = std::conditional_t<PAIRS, PairVector, FloatVector>;
#else
using Vector = FloatVector;
#endif
// the numbers of x as the products take them
using Entry = std::conditional_t<PAIRS, bf16, float>;

constexpr uint32_t PART_BITS = static_cast<uint32_t>((uint64_t{1} << LANES) - 1);

struct Matrix {
    const VALUE* values;
    const uint32_t* mask;
    const int64_t* offsets;
    int64_t count, rows, columns;

    int64_t words() const { return (columns + WORD - 1) / WORD; }
    // where a row's values begin; damaged offsets read nothing
    int64_t begin(int64_t row) const {
        return offsets[row] < 0 || offsets[row] > count ? count : offsets[row];
    }
    // whether no load of this row can leave the values, whatever its mask says
    bool inside(int64_t row) const { return begin(row) + words() * WORD + LANES <= count; }
};

// the next LANES values from index `at` on; at the end of the values (careful), zeros follow
template <bool careful>
inline Vector load_values(const Matrix& w, int64_t at) {
    if constexpr (careful) {
        VALUE rest[LANES] = {};
        const int64_t left = std::max<int64_t>(0, std::min(LANES, w.count - at));
        std::copy(w.values + std::min(at, w.count), w.values + std::min(at, w.count) + left, rest);
        return Vector::load(rest);
    }
    return Vector::load(w.values + at);
}

// a number of x as the products take it
inline void copy_entry(X x, float& to) { to = widen(x); }
inline void copy_entry(bf16 x, bf16& to) { to = x; }

struct Output {
    const X* bias;
    const float* scales;
    X* out;
    int64_t rows;

    void store(float sum, int64_t token, int64_t row) const {
        if (scales) sum *= scales[row];
        if (bias) sum += widen(bias[row]);
        narrow(sum, out[token * rows + row]);
    }
    // the sums of `count` rows from `row` on
    void store_rows(float* sums, int64_t token, int64_t row, int64_t count) const {
        if (scales) {
            for (int64_t r = 0; r < count; ++r) sums[r] *= scales[row + r];
        }
        if (bias) {
            for (int64_t r = 0; r < count; ++r) sums[r] += widen(bias[row + r]);
        }
        for (int64_t r = 0; r < count; ++r) narrow(sums[r], out[token * rows + row + r]);
    }
};

}  // namespace
