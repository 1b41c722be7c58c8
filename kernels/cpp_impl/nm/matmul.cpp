// Products with a compressed N:M matrix: reference/nm/matmul.py. VALUE: float or bf16.
//
// With AVX-512 and few rows of x, the weights of a 2:4 matrix are expanded in registers; for other M of at most 32,
// stored weights select their entries of x. Otherwise WIDE or NARROW rows of x are laid side by side, so that a stored
// weight multiplies vectors. If x has one row, every row of the matrix gathers its entries.
#include "common.h"
#include "instructions.h"

namespace {

constexpr int64_t WIDE = 64, NARROW = 16;
// rows of a band of the matrix, and stored weights of a row before the next row's turn
constexpr int64_t ROWS = 64, WEIGHTS = 64;
// stored weights are prefetched this number of rows ahead
constexpr int64_t AHEAD = 4;

// a vector stays in registers; an array of floats would not
using Vec = float __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

struct Compressed {
    const VALUE* values;
    const uint8_t* indices;
    int64_t rows, groups, n, m;
    int64_t row_length() const { return groups * n; }
};

// sums of one row of the matrix over its groups begin..end; columns: [in][TOKENS]
template <int64_t TOKENS>
void add_row(const Compressed& w, int64_t row, int64_t begin, int64_t end, const float* columns, float* sums) {
    Vec local[TOKENS / LANES];
    std::memcpy(local, sums, sizeof local);
    const VALUE* v = w.values + row * w.row_length() + begin * w.n;
    const uint8_t* index = w.indices + row * w.row_length() + begin * w.n;
    for (int64_t g = begin; g < end; ++g) {
        for (int64_t k = 0; k < w.n; ++k) {
            const float value = widen(*v++);
            const float* column = columns + (g * w.m + *index++) * TOKENS;
#pragma GCC unroll 4
            for (int64_t block = 0; block < TOKENS / LANES; ++block) {
                Vec entries;
                std::memcpy(&entries, column + block * LANES, sizeof entries);
                local[block] += value * entries;
            }
        }
    }
    std::memcpy(sums, local, sizeof local);
}

// prefetches the stored weights of a row in `count` groups from `begin` on
void fetch_row(const Compressed& w, int64_t row, int64_t begin, int64_t count) {
    constexpr int64_t LINE = 64;
    const int64_t first = row * w.row_length() + begin * w.n, last = first + std::min(count, w.groups - begin) * w.n;
    for (int64_t k = first; k < last; k += LINE / static_cast<int64_t>(sizeof(VALUE))) {
        __builtin_prefetch(w.values + k);
    }
    for (int64_t k = first; k < last; k += LINE) __builtin_prefetch(w.indices + k);
}

// `count` rows of x, at most TOKENS; columns: room for [in][TOKENS]
template <int64_t TOKENS>
void multiply_tile(const Compressed& w, const VALUE* x, VALUE* out, int64_t count, float* columns, int threads) {
    const int64_t in = w.groups * w.m, bands = (w.rows + ROWS - 1) / ROWS;
    const int64_t step = std::max<int64_t>(1, WEIGHTS / std::max<int64_t>(1, w.n));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t c = 0; c < in; ++c) {
            for (int64_t t = 0; t < TOKENS; ++t) columns[c * TOKENS + t] = t < count ? widen(x[t * in + c]) : 0.0f;
        }
#pragma omp for schedule(static)
        for (int64_t band = 0; band < bands; ++band) {
            float sums[ROWS][TOKENS] = {};
            const int64_t from = band * ROWS, height = std::min(ROWS, w.rows - from);
            for (int64_t g = 0; g < w.groups; g += step) {
                for (int64_t r = 0; r < height; ++r) {
                    // the hardware does not prefetch pieces of long rows
                    fetch_row(w, from + (r + AHEAD) % height, r + AHEAD < height ? g : g + step, step);
                    add_row<TOKENS>(w, from + r, g, std::min(g + step, w.groups), columns, sums[r]);
                }
            }
            for (int64_t t = 0; t < count; ++t) {
                for (int64_t r = 0; r < height; ++r) narrow(sums[r][t], out[t * w.rows + from + r]);
            }
        }
    }
}

void multiply_many(const Compressed& w, const VALUE* x, VALUE* out, int64_t tokens, int threads) {
    const int64_t in = w.groups * w.m;
    std::vector<float> columns(in * (tokens > NARROW ? WIDE : NARROW));
    for (int64_t first = 0; first < tokens;) {
        const int64_t left = tokens - first;
        if (left > NARROW) {
            multiply_tile<WIDE>(w, x + first * in, out + first * w.rows, std::min(WIDE, left), columns.data(), threads);
            first += WIDE;
        } else {
            multiply_tile<NARROW>(w, x + first * in, out + first * w.rows, left, columns.data(), threads);
            first += NARROW;
        }
    }
}

void multiply_one(const Compressed& w, const VALUE* x, VALUE* out, int threads) {
    const int64_t in = w.groups * w.m, length = w.row_length();
    std::vector<float> entries(in);
    for (int64_t i = 0; i < in; ++i) entries[i] = widen(x[i]);
    std::vector<int32_t> begin(length);
    for (int64_t k = 0; k < length; ++k) begin[k] = static_cast<int32_t>(k / w.n * w.m);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < w.rows; ++row) {
        const VALUE* v = w.values + row * length;
        const uint8_t* index = w.indices + row * length;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < length; ++k) sum += widen(v[k]) * entries[begin[k] + index[k]];
        narrow(sum, out[row]);
    }
}

#if ISA >= 2
// ---- few rows of x: M candidates of every stored weight lie in M vectors, and bits of its index select one of them

#if ISA == 3
constexpr bool PAIRS = all_bf16<VALUE>;
#else
constexpr bool PAIRS = false;
#endif
constexpr int64_t STORED = PAIRS ? 32 : 16;
using Entry = std::conditional_t<PAIRS, bf16, float>;
using Lanes = std::conditional_t<PAIRS, __mmask32, __mmask16>;
// rows of x that share the masks of a row of the matrix, and the largest M
constexpr int64_t TILE = 4, LARGEST = 32;
// most rows of x: from more on, rows of x side by side are faster (2:4 and 1:8, Zen 4)
constexpr int64_t FEW = PAIRS ? 8 : 4;
// bytes of values ahead of the current one: the processor's prefetcher stops at the end of a page
constexpr int64_t DISTANCE = 2048;

#if ISA == 3
inline __m512i load_entries(const bf16* x, __mmask32 lanes) { return _mm512_maskz_loadu_epi16(lanes, x); }
inline __m512i select(__mmask32 upper, __m512i low, __m512i high) { return _mm512_mask_blend_epi16(upper, low, high); }
inline __m512 multiply_add(__m512 sum, __m512i v, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(v), reinterpret_cast<__m512bh>(x));
}
#endif
inline __m512 load_entries(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
inline __m512 select(__mmask16 upper, __m512 low, __m512 high) { return _mm512_mask_blend_ps(upper, low, high); }
inline __m512 multiply_add(__m512 sum, __m512 v, __m512 x) { return _mm512_fmadd_ps(v, x, sum); }

#if ISA == 2
inline __m512 load_entries(const bf16* x, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
}
#endif

// lanes whose index has the bit
inline __mmask32 with_bit(const uint8_t* index, __mmask32 lanes, int bit) {
    return _mm256_test_epi8_mask(_mm256_maskz_loadu_epi8(lanes, index), _mm256_set1_epi8(static_cast<char>(1 << bit)));
}
inline __mmask16 with_bit(const uint8_t* index, __mmask16 lanes, int bit) {
    return _mm_test_epi8_mask(_mm_maskz_loadu_epi8(lanes, index), _mm_set1_epi8(static_cast<char>(1 << bit)));
}

constexpr int bits_of(int64_t m) { return m > 1 ? 1 + bits_of((m + 1) / 2) : 0; }

// of 2^BITS vectors, in every lane the one that its mask bits name
template <int BITS>
inline auto select_entries(const Entry* x, const Lanes* bits) {
    if constexpr (BITS == 0) {
        return load_entries(x, static_cast<Lanes>(~Lanes(0)));
    } else {
        const auto low = select_entries<BITS - 1>(x, bits);
        return select(bits[BITS - 1], low, select_entries<BITS - 1>(x + (STORED << (BITS - 1)), bits));
    }
}

// STORED weights, those of `lanes`, times TOKENS rows of x; x: [TOKENS][2^BITS][STORED]
template <int BITS, int TOKENS>
inline void add_stored(const VALUE* v, const uint8_t* index, Lanes lanes, const Entry* x, __m512 (&sums)[TOKENS]) {
    Lanes bits[BITS + 1];
#pragma GCC unroll 5
    for (int b = 0; b < BITS; ++b) bits[b] = with_bit(index, lanes, b);
    const auto weights = load_entries(v, lanes);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
        sums[t] = multiply_add(sums[t], weights, select_entries<BITS>(x + t * (STORED << BITS), bits));
    }
}

// one row of the matrix times TOKENS rows of x; x: [blocks][TOKENS][2^BITS][STORED]
template <int BITS, int TOKENS>
void select_row(const Compressed& w, int64_t row, const Entry* x, float* sums) {
    constexpr int64_t SIZE = TOKENS * (STORED << BITS);
    const int64_t length = w.row_length();
    const VALUE* v = w.values + row * length;
    const uint8_t* index = w.indices + row * length;
    __m512 even[TOKENS], odd[TOKENS];
    for (int t = 0; t < TOKENS; ++t) even[t] = odd[t] = _mm512_setzero_ps();
    constexpr Lanes ALL = static_cast<Lanes>(~Lanes(0));
    int64_t k = 0;
    for (; k + 2 * STORED <= length; k += 2 * STORED, x += 2 * SIZE) {
        const char* next = reinterpret_cast<const char*>(v + k) + DISTANCE;
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
        __builtin_prefetch(index + k + DISTANCE / 2);
        add_stored<BITS, TOKENS>(v + k, index + k, ALL, x, even);
        add_stored<BITS, TOKENS>(v + k + STORED, index + k + STORED, ALL, x + SIZE, odd);
    }
    for (; k < length; k += STORED, x += SIZE) {
        const Lanes lanes = static_cast<Lanes>((uint64_t{1} << std::min(STORED, length - k)) - 1);
        add_stored<BITS, TOKENS>(v + k, index + k, lanes, x, even);
    }
    for (int t = 0; t < TOKENS; ++t) sums[t] = _mm512_reduce_add_ps(_mm512_add_ps(even[t], odd[t]));
}

inline void copy_entry(VALUE x, float& to) { to = widen(x); }
inline void copy_entry(bf16 x, bf16& to) { to = x; }

// entry j of the group of every stored weight, for all j; zeros for rows of x that are missing, and from M on
template <int BITS, int TOKENS>
void lay_out(const Compressed& w, const VALUE* x, int64_t count, Entry* entries, int threads) {
    const int64_t in = w.groups * w.m, length = w.row_length();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < (length + STORED - 1) / STORED; ++block) {
        // where the group of each stored weight begins
        int64_t begin[STORED];
        const int64_t present = std::min(STORED, length - block * STORED);
        for (int64_t lane = 0; lane < present; ++lane) begin[lane] = (block * STORED + lane) / w.n * w.m;
        Entry* to = entries + block * TOKENS * (STORED << BITS);
        std::fill(to, to + TOKENS * (STORED << BITS), Entry(0));
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t j = 0; j < w.m; ++j) {
                Entry* lanes = to + ((t << BITS) + j) * STORED;
                for (int64_t lane = 0; lane < present; ++lane) copy_entry(x[t * in + begin[lane] + j], lanes[lane]);
            }
        }
    }
}

template <int BITS, int TOKENS>
void select_tile(const Compressed& w, const VALUE* x, VALUE* out, int64_t count, int threads) {
    const int64_t blocks = (w.row_length() + STORED - 1) / STORED;
    Buffer memory(blocks * TOKENS * (STORED << BITS) * static_cast<int64_t>(sizeof(Entry)) / 4);
    Entry* entries = reinterpret_cast<Entry*>(memory.data());
    lay_out<BITS, TOKENS>(w, x, count, entries, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < w.rows; ++row) {
        float sums[TOKENS];
        select_row<BITS, TOKENS>(w, row, entries, sums);
        for (int64_t t = 0; t < count; ++t) narrow(sums[t], out[t * w.rows + row]);
    }
}

template <int BITS>
void select_few(const Compressed& w, const VALUE* x, VALUE* out, int64_t tokens, int threads) {
    const int64_t in = w.groups * w.m;
    for (int64_t t = 0; t < tokens; t += TILE) {
        const int64_t count = std::min(TILE, tokens - t);
        const auto multiply = count == 1 ? select_tile<BITS, 1> : count == 2 ? select_tile<BITS, 2> : select_tile<BITS, TILE>;
        multiply(w, x + t * in, out + t * w.rows, count, threads);
    }
}

void select_few(const Compressed& w, const VALUE* x, VALUE* out, int64_t tokens, int threads) {
    switch (bits_of(w.m)) {
        case 0: return select_few<0>(w, x, out, tokens, threads);
        case 1: return select_few<1>(w, x, out, tokens, threads);
        case 2: return select_few<2>(w, x, out, tokens, threads);
        case 3: return select_few<3>(w, x, out, tokens, threads);
        case 4: return select_few<4>(w, x, out, tokens, threads);
        default: return select_few<5>(w, x, out, tokens, threads);
    }
}
// ---- few rows of x and a 2:4 matrix: stored weights are expanded to their columns

// columns and stored weights of a step, and most rows of x
constexpr int64_t COLUMNS = 64, HALF = COLUMNS / 2, MOST_EXPANDED = 8;

// bits of the columns that 32 indices name, and whether all pairs ascend; 0xFF names no column
inline uint64_t columns_of(__m256i indices, __mmask32& ascending) {
    const __m256i bits = _mm256_setr_epi8(
        1, 2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    // sums of two bits are groups of 4, sums of two groups are bytes
    const __m256i groups = _mm256_maddubs_epi16(_mm256_shuffle_epi8(bits, indices), _mm256_set1_epi8(1));
    const __m256i bytes = _mm256_madd_epi16(groups, _mm256_set1_epi32(0x00100001));
    ascending &= _mm256_cmplt_epu8_mask(indices, _mm256_srli_epi16(indices, 8));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm256_cvtepi32_epi8(bytes)));
}

// as columns_of, for the last `count` indices of a row
inline uint64_t last_columns(const uint8_t* index, int64_t count, __mmask32& ascending, __m256i& largest) {
    uint8_t present[HALF];
    std::fill(present, present + HALF, uint8_t{0xFF});
    std::copy(index, index + count, present);
    const __mmask32 lanes = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    const __m256i indices = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(present));
    largest = _mm256_max_epu8(largest, _mm256_maskz_mov_epi8(lanes, indices));
    __mmask32 pairs = ~__mmask32{0};
    const uint64_t columns = columns_of(indices, pairs);
    ascending &= pairs | ~lanes;
    return columns;
}

#if ISA == 3
inline __m512i expand(uint64_t columns, int64_t part, const bf16* v) {
    const __m512i loaded = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + part * 16)));
    return expand_epi16(static_cast<__mmask32>(columns >> (32 * part)), loaded);
}
#else
inline __m512 expand(uint64_t columns, int64_t part, const bf16* v) {
    const __m512 loaded = load_entries(v + part * 8, __mmask16(0xFF));
    return expand_ps(static_cast<__mmask16>(columns >> (16 * part)), loaded);
}
#endif
inline __m512 expand(uint64_t columns, int64_t part, const float* v) {
    const __m512 loaded = _mm512_castps256_ps512(_mm256_loadu_ps(v + part * 8));
    return expand_ps(static_cast<__mmask16>(columns >> (16 * part)), loaded);
}

// rows of the matrix that share a loaded x
template <int TOKENS>
constexpr int SHARING = TOKENS > 4 ? 2 : 4;

template <int TOKENS, int ROWS>
inline void add_expanded(
    const VALUE* const (&v)[ROWS], const uint64_t (&columns)[ROWS], const Entry* x, __m512 (&sums)[ROWS][TOKENS]
) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < COLUMNS / STORED; ++part) {
        decltype(expand(0, 0, v[0])) weights[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) weights[r] = expand(columns[r], part, v[r]);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            const auto entries = load_entries(x + (part * TOKENS + t) * STORED, Lanes(~Lanes(0)));
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sums[r][t] = multiply_add(sums[r][t], weights[r], entries);
        }
    }
}

// ROWS rows of the matrix times TOKENS rows of x; x: [blocks of COLUMNS][COLUMNS / STORED][TOKENS][STORED]. Returns
// whether all indices ascend and are below 4; the sums are wrong otherwise.
template <int TOKENS, int ROWS>
bool expand_rows(const Compressed& w, const Rows& rows, const Entry* x, float (&out)[ROWS][TOKENS]) {
    const int64_t length = w.row_length();
    constexpr __mmask32 FIRST = 0x55555555;
    __mmask32 ascending = FIRST;
    __m256i largest = _mm256_setzero_si256();
    __m512 sums[ROWS][TOKENS];
    for (auto& of_row : sums) {
        for (__m512& sum : of_row) sum = _mm512_setzero_ps();
    }
    int64_t k = 0;
    for (; k + HALF <= length; k += HALF, x += TOKENS * COLUMNS) {
        const VALUE* v[ROWS];
        uint64_t columns[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const int64_t first = rows[r] * length + k;
            v[r] = w.values + first;
            const char* next = reinterpret_cast<const char*>(v[r]) + DISTANCE;
            __builtin_prefetch(next);
            if constexpr (sizeof(VALUE) == 4) __builtin_prefetch(next + 64);
            __builtin_prefetch(w.indices + first + DISTANCE / 2);
            const __m256i indices = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.indices + first));
            largest = _mm256_max_epu8(largest, indices);
            columns[r] = columns_of(indices, ascending);
        }
        add_expanded<TOKENS, ROWS>(v, columns, x, sums);
    }
    if (k < length) {
        VALUE rest[ROWS][HALF] = {};
        const VALUE* v[ROWS];
        uint64_t columns[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            const int64_t first = rows[r] * length;
            std::copy(w.values + first + k, w.values + first + length, rest[r]);
            v[r] = rest[r];
            columns[r] = last_columns(w.indices + first + k, length - k, ascending, largest);
        }
        add_expanded<TOKENS, ROWS>(v, columns, x, sums);
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int t = 0; t < TOKENS; ++t) out[r][t] = _mm512_reduce_add_ps(sums[r][t]);
    }
    return ascending == FIRST && !_mm256_cmpgt_epu8_mask(largest, _mm256_set1_epi8(3));
}

// the definition, for indices in any order
inline float sum_of(const Compressed& w, int64_t row, const VALUE* x) {
    float sum = 0.0f;
    for (int64_t k = 0; k < w.row_length(); ++k) {
        const int64_t stored = row * w.row_length() + k;
        sum += widen(w.values[stored]) * widen(x[k / w.n * w.m + w.indices[stored]]);
    }
    return sum;
}

// `count` rows of x, also laid out as `entries`
template <int TOKENS, int ROWS>
void expand_block(
    const Compressed& w, const Rows& rows, const Entry* entries, const VALUE* x, VALUE* out, int64_t count
) {
    float sums[ROWS][TOKENS];
    const bool ascending = expand_rows<TOKENS, ROWS>(w, rows, entries, sums);
    for (int64_t t = 0; t < count; ++t) {
        for (int r = 0; r < ROWS; ++r) {
            const float sum = ascending ? sums[r][t] : sum_of(w, rows[r], x + t * w.groups * w.m);
            narrow(sum, out[t * w.rows + rows[r]]);
        }
    }
}

template <int TOKENS>
void expand_tile(const Compressed& w, const VALUE* x, VALUE* out, int64_t count, int threads) {
    const int64_t in = w.groups * w.m, parts = (in + COLUMNS - 1) / COLUMNS * (COLUMNS / STORED);
    Buffer memory(parts * TOKENS * STORED);
    Entry* entries = reinterpret_cast<Entry*>(memory.data());
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts; ++part) {
        for (int64_t t = 0; t < TOKENS; ++t) {
            Entry* to = entries + (part * TOKENS + t) * STORED;
            const int64_t present = t < count ? std::max<int64_t>(0, std::min(STORED, in - part * STORED)) : 0;
            for (int64_t j = 0; j < present; ++j) copy_entry(x[t * in + part * STORED + j], to[j]);
            for (int64_t j = present; j < STORED; ++j) to[j] = Entry(0);
        }
    }
    for_rows<SHARING<TOKENS>>(w.rows, threads, [&](auto height, const Rows& rows) {
        expand_block<TOKENS, height>(w, rows, entries, x, out, count);
    });
}

// at most MOST_EXPANDED tokens
void expand_few(const Compressed& w, const VALUE* x, VALUE* out, int64_t tokens, int threads) {
    const auto few = tokens == 1 ? expand_tile<1> : expand_tile<2>;
    const auto multiply = tokens <= 2 ? few : tokens <= 4 ? expand_tile<4> : expand_tile<MOST_EXPANDED>;
    multiply(w, x, out, tokens, threads);
}
#endif

}  // namespace

// x: [tokens, groups * m]; values, indices: [rows, groups, n]; out: [tokens, rows]
extern "C" void nm_matmul(
    const VALUE* x, const VALUE* values, const uint8_t* indices, VALUE* out, int64_t tokens, int64_t rows,
    int64_t groups, int64_t n, int64_t m, int threads
) {
    const Compressed w = {values, indices, rows, groups, n, m};
#if ISA >= 2
    if (tokens <= MOST_EXPANDED && n == 2 && m == 4) return expand_few(w, x, out, tokens, threads);
    if (tokens <= FEW && m <= LARGEST) return select_few(w, x, out, tokens, threads);
#endif
    if (tokens == 1) {
        multiply_one(w, x, out, threads);
    } else {
        multiply_many(w, x, out, tokens, threads);
    }
}

// the bit mask of a 2:4 matrix, [rows, ceil(groups / 8)]; valid becomes 0 unless all pairs of indices ascend below 4
extern "C" void nm_bits(
    const uint8_t* indices, uint32_t* mask, int32_t* valid, int64_t rows, int64_t groups, int threads
) {
    constexpr int64_t GROUPS = 8;
    const int64_t words = (groups + GROUPS - 1) / GROUPS;
    uint32_t invalid = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : invalid)
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* index = indices + row * groups * 2;
        uint32_t* bits = mask + row * words;
        int64_t word = 0;
#if ISA >= 2
        __mmask32 ascending = 0x55555555;
        __m256i largest = _mm256_setzero_si256();
        for (; (word + 2) * GROUPS <= groups; word += 2) {
            const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + word * GROUPS * 2));
            largest = _mm256_max_epu8(largest, pairs);
            const uint64_t columns = columns_of(pairs, ascending);
            std::memcpy(bits + word, &columns, sizeof columns);
        }
        invalid |= (ascending ^ 0x55555555) | _mm256_cmpgt_epu8_mask(largest, _mm256_set1_epi8(3));
#endif
        for (; word < words; ++word) {
            bits[word] = 0;
            for (int64_t g = word * GROUPS; g < std::min(groups, (word + 1) * GROUPS); ++g) {
                const uint32_t low = index[2 * g], high = index[2 * g + 1];
                invalid |= static_cast<uint32_t>(low >= high || high > 3);
                bits[word] |= (1u << (low & 3) | 1u << (high & 3)) << (g % GROUPS * 4);
            }
        }
    }
    *valid = invalid == 0;
}
