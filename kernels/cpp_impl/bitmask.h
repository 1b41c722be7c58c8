// Matrices of values and bit masks: reference/sparse/bitmask.py. X: float, bf16 or fp16. VALUE: X, or int8_t for codes of 8
// bits, or int4 for codes of 4 bits.
//
// A step loads the next LANES values of a row and moves them to the columns whose bits are set. instructions.h selects
// the instructions.
#pragma once

#include "common.h"
#include "eight_lanes.h"
#include "instructions.h"

namespace {

// two codes of 4 bits in two's complement, the first one in the lower fp16
enum int4 : uint8_t {};

constexpr int64_t WORD = 32;
// columns whose 4-bit codes share a scale
constexpr int64_t SCALED = 64;
// whether every SCALED columns of a row have a scale
constexpr bool BLOCKED = std::is_same_v<VALUE, int4>;

// the float of a stored value; the same for codes, whose scale is applied to sums
inline float widen(int8_t code) { return code; }

// the code of 4 bits at an index
inline int8_t code_at(const int4* codes, int64_t index) {
    return static_cast<int8_t>(static_cast<uint8_t>((codes[index / 2] >> (index % 2 * 4) & 15) ^ 8)) - 8;
}

// 16 codes of 4 bits from an index on; reads 9 bytes
inline uint64_t sixteen_codes(const int4* codes, int64_t index) {
    uint64_t word;
    std::memcpy(&word, codes + index / 2, sizeof word);
    const uint64_t next = codes[index / 2 + 8];
    return index % 2 ? word >> 4 | next << 60 : word;
}

// Number of set bits. A count stays a number: the compiler would put those of several rows together in a vector, which is
// slower than the additions that this saves.
inline int64_t set_bits(uint64_t mask) {
    int64_t count = __builtin_popcountll(mask);
    asm("" : "+r"(count));
    return count;
}

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
inline Sum add_scaled(Sum sum, float scale, Sum plus) { return _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), plus); }
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
    static PairVector load_codes(const int4* codes, int64_t index) {
        const __m128i words = _mm_set_epi64x(
            static_cast<int64_t>(sixteen_codes(codes, index + 16)), static_cast<int64_t>(sixteen_codes(codes, index))
        );
        const __m128i low = _mm_and_si128(words, _mm_set1_epi8(15));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(words, 4), _mm_set1_epi8(15));
        const __m256i nibbles = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
        // bf16 of 0 to 7 and of -8 to -1
        const __m256i numbers = _mm256_setr_epi16(
            0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, static_cast<int16_t>(0xC100),
            static_cast<int16_t>(0xC0E0), static_cast<int16_t>(0xC0C0), static_cast<int16_t>(0xC0A0),
            static_cast<int16_t>(0xC080), static_cast<int16_t>(0xC040), static_cast<int16_t>(0xC000),
            static_cast<int16_t>(0xBF80)
        );
        return {_mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(nibbles), _mm512_broadcast_i64x4(numbers))};
    }
    PairVector scaled(float scale) const {
        const __m512 factor = _mm512_set1_ps(scale);
        const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), factor);
        const __m512i upper = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
        const __m512 odd = _mm512_mul_ps(_mm512_castsi512_ps(upper), factor);
        const __m512i evens = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
        const __m512i odds = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
        return {_mm512_or_si512(evens, _mm512_slli_epi32(odds, 16))};
    }
    PairVector expand(uint32_t mask) const { return {expand_epi16(mask, bits)}; }
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
    static FloatVector load(const fp16* x) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
    }
    static FloatVector load(const int8_t* x) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))))};
    }
    static FloatVector load_codes(const int4* codes, int64_t index) {
        const uint64_t word = sixteen_codes(codes, index);
        const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
        const __m512i halves = _mm512_mask_set1_epi32(
            _mm512_set1_epi32(static_cast<int>(word)), 0xFF00, static_cast<int>(word >> 32)
        );
        // the code moves to the upper bits and back, with its sign
        const __m512i moved = _mm512_slli_epi32(_mm512_srlv_epi32(halves, lanes), 28);
        return {_mm512_cvtepi32_ps(_mm512_srai_epi32(moved, 28))};
    }
    FloatVector scaled(float scale) const { return {_mm512_mul_ps(floats, _mm512_set1_ps(scale))}; }
    FloatVector expand(uint32_t mask) const { return {expand_ps(static_cast<__mmask16>(mask), floats)}; }
    Sum times(FloatVector x, Sum plus) const { return _mm512_fmadd_ps(floats, x.floats, plus); }
    void store(float* out) const { _mm512_storeu_ps(out, floats); }
};
#else
constexpr int64_t LANES = 8;
#if ISA == 0
using Sum = float __attribute__((vector_size(32)));
#endif

inline Sum zero() { return Sum{}; }
inline Sum add_scaled(Sum sum, float scale, Sum plus) { return sum * scale + plus; }
inline float total(Sum sum) { return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7])); }

struct FloatVector {
    Sum floats;
    static FloatVector load_codes(const int4* codes, int64_t index) {
        FloatVector vector;
        for (int64_t j = 0; j < LANES; ++j) vector.floats[j] = code_at(codes, index + j);
        return vector;
    }
    FloatVector scaled(float scale) const { return {floats * scale}; }
#if ISA == 1
    template <typename T>
    static FloatVector load(const T* x) { return {load_floats(x)}; }
    // the next values, moved to the lanes of a mask
    template <typename T>
    static FloatVector expand(const T* values, uint32_t mask) { return {move_floats(values, mask)}; }
    static FloatVector expand_codes(uint64_t word, uint32_t mask) { return {move_codes(word, mask)}; }
    Sum times(FloatVector x, Sum plus) const { return multiply_add(floats, x.floats, plus); }
#else
    template <typename T>
    static FloatVector load(const T* x) {
        FloatVector vector;
        for (int64_t j = 0; j < LANES; ++j) vector.floats[j] = widen(x[j]);
        return vector;
    }
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

// bytes of a row ahead of the current one: the processor's prefetcher stops at the end of a page
constexpr int64_t AHEAD = 2048, MASK_AHEAD = 512;

constexpr uint32_t PART_BITS = static_cast<uint32_t>((uint64_t{1} << LANES) - 1);

// values from an index on that a load may read
constexpr int64_t MOST_READ = 80;

struct Matrix {
    const VALUE* values;
    const uint32_t* mask;
    const int64_t* offsets;
    // of blocks, [rows, blocks()]; not read for other values
    const bf16* block_scales;
    int64_t count, rows, columns;
    // of the rows that are multiplied, by decode_codes
    const int8_t* decoded = nullptr;

    int64_t words() const { return (columns + WORD - 1) / WORD; }
    int64_t blocks() const { return (columns + SCALED - 1) / SCALED; }
    float block_scale(int64_t row, int64_t word) const {
        return widen(block_scales[row * blocks() + word / (SCALED / WORD)]);
    }
    // where a row's values begin; damaged offsets read nothing
    int64_t begin(int64_t row) const {
        return offsets[row] < 0 || offsets[row] > count ? count : offsets[row];
    }
    // whether no load of this row can leave the values, whatever its mask says
    bool inside(int64_t row) const { return begin(row) + words() * WORD + MOST_READ <= count; }
    // the element of memory that holds a value
    const VALUE* address(int64_t at) const { return values + (BLOCKED ? at / 2 : at); }
    // prefetches the mask and, unless these were decoded, the values some columns after word k of a row, whose values begin
    // at `at`
    template <bool decoded = false>
    void fetch_ahead(int64_t row, int64_t k, int64_t at) const {
        const char* next = reinterpret_cast<const char*>(address(at)) + AHEAD;
        if constexpr (!decoded) __builtin_prefetch(next);
        if constexpr (sizeof(VALUE) == 4) __builtin_prefetch(next + 64);
        __builtin_prefetch(reinterpret_cast<const char*>(mask + row * words() + k) + MASK_AHEAD);
    }
};

template <typename T>
inline T stored_at(const T* values, int64_t index) { return values[index]; }
inline int8_t stored_at(const int4* values, int64_t index) { return code_at(values, index); }

template <typename T>
inline Vector load_at(const T* values, int64_t index) { return Vector::load(values + index); }
inline Vector load_at(const int4* values, int64_t index) { return Vector::load_codes(values, index); }

#if ISA == 1
template <typename T>
inline Vector expand_at(const T* values, int64_t at, uint32_t mask) { return Vector::expand(values + at, mask); }
inline Vector expand_at(const int4* codes, int64_t at, uint32_t mask) {
    uint64_t word;
    std::memcpy(&word, codes + (at >> 1), sizeof word);
    return Vector::expand_codes(word >> (at & 1) * 4, mask);
}
#else
template <typename T>
inline Vector expand_at(const T* values, int64_t at, uint32_t mask) { return load_at(values, at).expand(mask); }
#endif

// the next LANES values from index `at` on, moved to the lanes of a mask; past the end of the values (careful) are zeros
template <bool careful>
inline Vector expand_values(const Matrix& w, int64_t at, uint32_t mask) {
    if (careful && (ISA != 1 || w.count - at < MOST_READ)) {
        decltype(stored_at(w.values, at)) rest[std::max<int64_t>(LANES, 16)] = {};
        const int64_t left = std::max<int64_t>(0, std::min(LANES, w.count - at));
        for (int64_t j = 0; j < left; ++j) rest[j] = stored_at(w.values, at + j);
        return expand_at(rest, 0, mask);
    }
    return expand_at(w.values, at, mask);
}

// Whether products of a row first write its codes as bytes: these are then moved to their columns as codes of 8 bits are.
template <bool careful>
constexpr bool DECODED = ISA == 1 && BLOCKED && !careful;
// what such a byte is of its code
constexpr float DECODED_UNIT = 16.0f;

#if ISA == 1
// Writes the codes of a row and returns the index of its first one in `bytes`, which has room for `columns` and MOST_READ
// more. Damaged offsets leave bytes as they are.
inline int64_t decode_codes(const Matrix& w, int64_t row, int8_t* bytes) {
    const int64_t begin = w.begin(row), count = std::min(w.begin(row + 1) - begin, w.columns);
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(w.values);
    for (int64_t i = 0; i <= count; i += 32, bytes += 32) {
        const uint8_t* from = codes + (begin + i) / 2;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD);
        spread_codes(from, bytes);
    }
    return begin & 1;
}

inline Vector expand_decoded(const Matrix& w, int64_t at, uint32_t mask) { return Vector::expand(w.decoded + at, mask); }
#else
inline int64_t decode_codes(const Matrix&, int64_t, int8_t*) { return 0; }
inline Vector expand_decoded(const Matrix&, int64_t, uint32_t) { return Vector(); }
#endif

// a number of x as the products take it
inline void copy_entry(X x, float& to) { to = widen(x); }
inline void copy_entry(bf16 x, bf16& to) { to = x; }

// x laid out in tiles of TOKENS rows, [width / LANES][TOKENS][LANES], with zeros for missing rows and columns
template <int TOKENS>
void lay_out(const X* x, int64_t tokens, int64_t columns, int64_t width, Entry* entries, int threads) {
    const int64_t parts = width / LANES, tiles = (tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * columns > BLOCK)
    for (int64_t s = 0; s < tiles * parts; ++s) {
        const int64_t tile = s / parts, first = s % parts * LANES;
        for (int64_t t = 0; t < TOKENS; ++t) {
            Entry* to = entries + (s * TOKENS + t) * LANES;
            const int64_t token = tile * TOKENS + t;
            const int64_t count = token < tokens ? std::max<int64_t>(0, std::min(LANES, columns - first)) : 0;
            for (int64_t j = 0; j < count; ++j) copy_entry(x[token * columns + first + j], to[j]);
            for (int64_t j = count; j < LANES; ++j) to[j] = Entry(0);
        }
    }
}

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
