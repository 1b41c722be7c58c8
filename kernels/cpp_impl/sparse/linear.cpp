// Products with matrices of values and bit masks: reference/sparse/linear.py. X: float or bf16. VALUE: X, or int8_t for
// codes of 8 bits.
//
// A step loads the next LANES values of a row, moves them to the columns whose bits are set, and multiplies them by x.
// instructions.h selects the instructions.
#include "common.h"
#include "instructions.h"

namespace {

constexpr int64_t WORD = 32;
// bytes of a row's values ahead of the current one: the processor's prefetcher stops at the end of a page
constexpr int64_t AHEAD = 2048;

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

// ---- products with 1 to 8 rows of x

// rows of x that share an expanded row of the matrix, and rows of the matrix that share a loaded x
template <int TOKENS>
constexpr int SHARING = ISA >= 2 && !(PAIRS && TOKENS == 1) ? 2 : 1;

// adds word k of ROWS rows; x: [words * WORD / LANES][TOKENS][LANES]
template <int TOKENS, int ROWS, bool careful>
inline void add_word(
    const Matrix& w, int64_t row, int64_t k, const Entry* x, int64_t (&at)[ROWS], Sum (&sums)[ROWS][TOKENS]
) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < WORD / LANES; ++part) {
        Vector weights[ROWS];
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t bits = (w.mask[(row + r) * w.words() + k] >> (part * LANES)) & PART_BITS;
            weights[r] = load_values<careful>(w, at[r]).expand(bits);
            at[r] += __builtin_popcount(bits);
        }
        const Entry* entries = x + (k * (WORD / LANES) + part) * TOKENS * LANES;
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const Vector columns = Vector::load(entries + t * LANES);
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; ++r) sums[r][t] = weights[r].times(columns, sums[r][t]);
        }
    }
}

template <int TOKENS, int ROWS, bool careful>
void multiply_rows(const Matrix& w, int64_t row, const Entry* x, float (&out)[ROWS][TOKENS]) {
    // even and odd words have sums of their own, so that products need not wait for each other
    Sum even[ROWS][TOKENS], odd[ROWS][TOKENS];
    int64_t at[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        at[r] = w.begin(row + r);
        for (int t = 0; t < TOKENS; ++t) even[r][t] = odd[r][t] = zero();
    }
    const int64_t words = w.words();
    int64_t k = 0;
    for (; k + 1 < words; k += 2) {
        for (int r = 0; r < ROWS; ++r) {
            const char* next = reinterpret_cast<const char*>(w.values + at[r]) + AHEAD;
            __builtin_prefetch(next);
            if constexpr (sizeof(VALUE) == 4) __builtin_prefetch(next + 64);
        }
        add_word<TOKENS, ROWS, careful>(w, row, k, x, at, even);
        // more sums than registers would be slower
        if constexpr (TOKENS * ROWS > 4) {
            add_word<TOKENS, ROWS, careful>(w, row, k + 1, x, at, even);
        } else {
            add_word<TOKENS, ROWS, careful>(w, row, k + 1, x, at, odd);
        }
    }
    if (k < words) add_word<TOKENS, ROWS, careful>(w, row, k, x, at, even);
    for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < TOKENS; ++t) out[r][t] = total(even[r][t] + odd[r][t]);
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
};

// ROWS rows from `row` on times `count` rows of x from `token` on
template <int TOKENS, int ROWS>
void multiply_block(const Matrix& w, int64_t row, const Entry* x, int64_t token, int64_t count, const Output& output) {
    float sums[ROWS][TOKENS];
    bool inside = true;
    for (int r = 0; r < ROWS; ++r) inside &= w.inside(row + r);
    if (inside) {
        multiply_rows<TOKENS, ROWS, false>(w, row, x, sums);
    } else {
        multiply_rows<TOKENS, ROWS, true>(w, row, x, sums);
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < std::min<int64_t>(TOKENS, count); ++t) output.store(sums[r][t], token + t, row + r);
    }
}

inline void copy_entry(X x, float& to) { to = widen(x); }
inline void copy_entry(bf16 x, bf16& to) { to = x; }

// x laid out in tiles of TOKENS rows as add_word takes them, with zeros for missing rows and columns
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

template <int TOKENS>
void multiply(const Matrix& w, const X* x, int64_t tokens, const Output& output, int threads) {
    constexpr int ROWS = SHARING<TOKENS>;
    const int64_t width = w.words() * WORD, tiles = (tokens + TOKENS - 1) / TOKENS;
    Buffer memory(tiles * TOKENS * width);
    Entry* entries = reinterpret_cast<Entry*>(memory.data());
    lay_out<TOKENS>(x, tokens, w.columns, width, entries, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < (w.rows + ROWS - 1) / ROWS; ++block) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const Entry* inputs = entries + tile * TOKENS * width;
            const int64_t row = block * ROWS, first = tile * TOKENS;
            if (row + ROWS <= w.rows) {
                multiply_block<TOKENS, ROWS>(w, row, inputs, first, tokens - first, output);
            } else {
                multiply_block<TOKENS, 1>(w, row, inputs, first, tokens - first, output);
            }
        }
    }
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
        const Vector weights = load_values<careful>(w, at).expand(bits);
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

// x: [tokens, columns]; values: [count]; mask: [rows, words]; offsets: [rows + 1]; bias, scales: [rows] or null;
// out: [tokens, rows]
extern "C" void bitmask_linear(
    const X* x, const VALUE* values, const uint32_t* mask, const int64_t* offsets, const X* bias, const float* scales,
    X* out, int64_t tokens, int64_t count, int64_t rows, int64_t columns, int threads
) {
    const Matrix w = {values, mask, offsets, count, rows, columns};
    const Output output = {bias, scales, out, rows};
    if (tokens == 1) return multiply<1>(w, x, tokens, output, threads);
    if (tokens == 2) return multiply<2>(w, x, tokens, output, threads);
    if (tokens <= 4) return multiply<4>(w, x, tokens, output, threads);
    multiply<8>(w, x, tokens, output, threads);
}

// writes rows begin..end of the matrix to out [end - begin, columns]
extern "C" void bitmask_expand(
    const VALUE* values, const uint32_t* mask, const int64_t* offsets, const float* scales, X* out, int64_t count,
    int64_t rows, int64_t columns, int64_t begin, int64_t end, int threads
) {
    const Matrix w = {values, mask, offsets, count, rows, columns};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = begin; row < end; ++row) {
        X* to = out + (row - begin) * columns;
        const float scale = scales ? scales[row] : 1.0f;
        w.inside(row) ? expand_row<false>(w, row, scale, to) : expand_row<true>(w, row, scale, to);
    }
}
