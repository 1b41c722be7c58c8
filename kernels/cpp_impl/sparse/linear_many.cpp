// Products of many tokens with matrices of values and bit masks: reference/sparse/linear.py. X, VALUE: as in bitmask.h.
//
// A tile of rows of the matrix is expanded into the cache, KEPT columns at a time, and multiplied by all of x, which is
// laid out with tokens in the lanes of vectors. Expanding costs one load and one store per entry and is shared by all
// tokens; the matrix is never expanded as a whole.
#include "bitmask.h"

#if ISA >= 2
namespace {

// the columns that a lane multiplies at a time
constexpr int64_t STEP = PAIRS ? 2 : 1;
// tokens of a vector, and tokens of a panel of x
constexpr int64_t WIDTH = 16, PANEL = 2 * WIDTH;
// rows of the matrix whose sums are in registers, and rows of a tile
constexpr int64_t HEIGHT = 12, TILE = 48;
// expanded columns: a tile stays in the second-level cache
constexpr int64_t KEPT = 2048 / sizeof(Entry);
// entries between two expanded rows: not a power of two, so that the rows do not compete for the same lines of the cache
constexpr int64_t PITCH = KEPT + 64 / sizeof(Entry);

struct Dimensions {
    int64_t tokens, rows, columns, words;

    int64_t width() const { return words * WORD; }
    int64_t panels() const { return (tokens + PANEL - 1) / PANEL; }
};

inline __m512 multiply_step(__m512 plus, __m512 weight, __m512 x) {
#if ISA == 3
    if constexpr (PAIRS) {
        return _mm512_dpbf16_ps(plus, reinterpret_cast<__m512bh>(weight), reinterpret_cast<__m512bh>(x));
    }
#endif
    return _mm512_fmadd_ps(weight, x, plus);
}

// STEP columns of one row of the matrix, in every lane
inline __m512 broadcast(const Entry* weight) {
    float columns;
    std::memcpy(&columns, weight, sizeof columns);
    return _mm512_set1_ps(columns);
}

// adds HEIGHT rows times VECTORS * WIDTH tokens. weights: [HEIGHT][PITCH]; x: [steps][PANEL][STEP]; sums: [HEIGHT][PANEL]
template <int VECTORS>
void multiply_rows(const Entry* weights, const Entry* x, int64_t steps, bool first, float* sums) {
    __m512 local[HEIGHT][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            local[r][v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * PANEL + v * WIDTH);
        }
    }
    for (int64_t k = 0; k < steps; ++k) {
        __m512 columns[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) columns[v] = _mm512_loadu_ps(x + (k * PANEL + v * WIDTH) * STEP);
#pragma GCC unroll 12
        for (int r = 0; r < HEIGHT; ++r) {
            const __m512 weight = broadcast(weights + r * PITCH + k * STEP);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) local[r][v] = multiply_step(local[r][v], weight, columns[v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < HEIGHT; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(sums + r * PANEL + v * WIDTH, local[r][v]);
    }
}

// columns become rows: 16 vectors of 16
inline void transpose(__m512 (&rows)[WIDTH]) {
#pragma GCC unroll 4
    for (int step = 1; step < 16; step *= 2) {
        alignas(64) int32_t even[16], odd[16];
        for (int j = 0; j < 16; ++j) {
            even[j] = j & step ? 16 + j - step : j;
            odd[j] = j & step ? 16 + j : j + step;
        }
        const __m512i first = _mm512_load_si512(even), second = _mm512_load_si512(odd);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            if (i & step) continue;
            const __m512 low = rows[i], high = rows[i + step];
            rows[i] = _mm512_permutex2var_ps(low, first, high);
            rows[i + step] = _mm512_permutex2var_ps(low, second, high);
        }
    }
}

// the next WIDTH steps of a token, from `column` on; zeros follow the last column
inline __m512 load_steps(const X* x, int64_t column, int64_t columns) {
    Entry entries[WIDTH * STEP] = {};
    const int64_t count = std::min(WIDTH * STEP, columns - column);
    for (int64_t j = 0; j < count; ++j) copy_entry(x[column + j], entries[j]);
    return _mm512_loadu_ps(entries);
}

// lays out x as [panels][width / STEP][PANEL][STEP], with zeros for missing tokens and columns
void lay_out(const X* x, const Dimensions& size, Entry* entries, int threads) {
    const int64_t width = size.width(), steps = width / STEP, blocks = steps / WIDTH;
    constexpr int64_t SIDES = PANEL / WIDTH;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t s = 0; s < size.panels() * SIDES * blocks; ++s) {
        const int64_t side = s / blocks, first = s % blocks * WIDTH, column = first * STEP;
        __m512 block[WIDTH];
        for (int64_t t = 0; t < WIDTH; ++t) {
            const int64_t token = side * WIDTH + t;
            const X* row = x + token * size.columns;
            if (token >= size.tokens) {
                block[t] = _mm512_setzero_ps();
            } else if (std::is_same_v<X, Entry> && column + WIDTH * STEP <= size.columns) {
                block[t] = _mm512_loadu_ps(row + column);
            } else {
                block[t] = load_steps(row, column, size.columns);
            }
        }
        transpose(block);
        Entry* to = entries + side / SIDES * PANEL * width + (first * PANEL + side % SIDES * WIDTH) * STEP;
        for (int64_t k = 0; k < WIDTH; ++k) _mm512_storeu_ps(to + k * PANEL * STEP, block[k]);
    }
}

// words begin..end of a row to out, from value `at` on; returns where the values of the next word begin
template <bool careful>
int64_t expand_words(const Matrix& w, int64_t row, int64_t begin, int64_t end, int64_t at, Entry* out) {
    const int64_t first = at;
    for (int64_t k = begin; k < end; ++k) {
        const uint32_t word = w.mask[row * w.words() + k];
#pragma GCC unroll 4
        for (int64_t part = 0; part < WORD / LANES; ++part) {
            const uint32_t bits = (word >> (part * LANES)) & PART_BITS;
            Vector weights = expand_values<careful>(w, at, bits);
            if constexpr (BLOCKED) weights = weights.scaled(w.block_scale(row, k));
            weights.store(out + (k - begin) * WORD + part * LANES);
            at += __builtin_popcount(bits);
        }
    }
    // those of the next words are in the cache when they are needed
    fetch(w.address(0), w.address(at) - w.values, w.address(std::min(2 * at - first, w.count)) - w.values);
    return at;
}

// writes the sums of a tile, [panels][TILE][PANEL], from `row` on
void store_tile(const float* sums, int64_t row, const Dimensions& size, const Output& output) {
    const int64_t height = std::min(TILE, size.rows - row);
    for (int64_t first = 0; first < size.tokens; first += WIDTH) {
        const float* from = sums + first / PANEL * TILE * PANEL + first % PANEL;
        for (int64_t r = 0; r < height; r += WIDTH) {
            __m512 block[WIDTH];
            for (int64_t i = 0; i < WIDTH; ++i) block[i] = _mm512_loadu_ps(from + (r + i) * PANEL);
            transpose(block);
            const int64_t tokens = std::min(WIDTH, size.tokens - first), rows = std::min(WIDTH, height - r);
            for (int64_t t = 0; t < tokens; ++t) {
                float token[WIDTH];
                _mm512_storeu_ps(token, block[t]);
                output.store_rows(token, first + t, row + r, rows);
            }
        }
    }
}

// rows of a tile from `row` on, times all of x
void multiply_tile(
    const Matrix& w, int64_t row, const Dimensions& size, const Entry* x, Entry* weights, float* sums
) {
    int64_t at[TILE];
    const int64_t height = std::min(TILE, size.rows - row);
    for (int64_t r = 0; r < height; ++r) at[r] = w.begin(row + r);
    const int64_t groups = (height + HEIGHT - 1) / HEIGHT;
    for (int64_t word = 0; word < size.words; word += KEPT / WORD) {
        const int64_t end = std::min(word + KEPT / WORD, size.words);
        for (int64_t r = 0; r < height; ++r) {
            at[r] = w.inside(row + r) ? expand_words<false>(w, row + r, word, end, at[r], weights + r * PITCH)
                                      : expand_words<true>(w, row + r, word, end, at[r], weights + r * PITCH);
        }
        const int64_t steps = (end - word) * WORD / STEP;
        for (int64_t panel = 0; panel < size.panels(); ++panel) {
            const Entry* inputs = x + (panel * size.width() + word * WORD) * PANEL;
            float* to = sums + panel * TILE * PANEL;
            const bool whole = size.tokens - panel * PANEL > WIDTH;
            for (int64_t group = 0; group < groups; ++group) {
                const auto multiply = whole ? multiply_rows<2> : multiply_rows<1>;
                multiply(weights + group * HEIGHT * PITCH, inputs, steps, !word, to + group * HEIGHT * PANEL);
            }
        }
    }
}

}  // namespace

// x: [tokens, columns]; values: [count]; mask: [rows, words]; offsets: [rows + 1]; bias, scales: [rows] or null; blocks:
// scales of blocks, [rows, ceil(columns / SCALED)], or null; out: [tokens, rows]
extern "C" void bitmask_linear_many(
    const X* x, const VALUE* values, const uint32_t* mask, const int64_t* offsets, const X* bias, const float* scales,
    const bf16* blocks, X* out, int64_t tokens, int64_t count, int64_t rows, int64_t columns, int threads
) {
    const Matrix w = {values, mask, offsets, blocks, count, rows, columns};
    const Dimensions size = {tokens, rows, columns, w.words()};
    const Output output = {bias, scales, out, rows};
    Buffer inputs(size.panels() * PANEL * size.width() * sizeof(Entry) / sizeof(float));
    Entry* entries = reinterpret_cast<Entry*>(inputs.data());
    lay_out(x, size, entries, threads);
#pragma omp parallel num_threads(threads)
    {
        Buffer weights(TILE * PITCH * sizeof(Entry) / sizeof(float)), sums(size.panels() * TILE * PANEL);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; row += TILE) {
            multiply_tile(w, row, size, entries, reinterpret_cast<Entry*>(weights.data()), sums.data());
            store_tile(sums.data(), row, size, output);
        }
    }
}
#endif
