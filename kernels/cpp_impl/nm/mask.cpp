// N:M masks: reference/nm/mask.py, one pass over the scores. WORD: uint32_t or uint16_t.
//
// Magnitudes are compared by their bits, which as integers have the order of the numbers. So both 16-bit formats differ
// only in the bits of infinity. There are three ways to select: groups that fit in a vector are ranked in it; long
// contiguous groups are processed one after the other; all others are processed side by side, one group per lane.
#include <utility>

#include "common.h"

namespace {

constexpr int64_t LANES = 64;
// shortest contiguous group that fills vectors alone
constexpr int64_t LONG = 32;
// with more rounds than this, the threshold is found bit by bit
constexpr int64_t MOST_ROUNDS = 8;
// longest group that is ranked, which takes m comparisons per entry
constexpr int64_t MOST_RANKED = 64;
// mark the entries that rounds have taken or dropped
constexpr int32_t TAKEN = -1, DROPPED = 0x7FFFFFFF;

constexpr int BITS = 8 * sizeof(WORD) - 1;

// maps all NaNs to one number, larger than all others
inline int32_t key_of(WORD score, int32_t infinite) {
    constexpr uint32_t magnitude = (1u << BITS) - 1;
    return std::min(static_cast<int32_t>(score & magnitude), infinite + 1);
}

using Vec = int32_t __attribute__((vector_size(64)));
using Bytes = int8_t __attribute__((vector_size(16)));
using Lane = std::make_integer_sequence<int, 16>;

// adds to each entry's rank the number of entries that rank before it; the last of equal entries ranks first
template <int M, int by, int... lane>
inline void rank_entries(Vec key, Vec& rank, std::integer_sequence<int, lane...> lanes) {
    if constexpr (by < M) {
#ifdef __clang__
        const Vec other = __builtin_shufflevector(key, key, (lane / M * M + (lane + by) % M)...);
#else  // g++ has had that function since version 12 only
        const Vec other = __builtin_shuffle(key, Vec{(lane / M * M + (lane + by) % M)...});
#endif
        const Vec is_later = {(lane % M + by < M ? 1 : 0)...};
        rank -= other > key - is_later;
        rank_entries<M, by + 1>(key, rank, lanes);
    }
}

template <int M>
void mask_by_rank(const int32_t* keys, uint8_t* mask, int64_t count, int32_t n) {
    for (int64_t i = 0; i < count; i += 16) {
        Vec key, rank = {};
        std::memcpy(&key, keys + i, sizeof key);
        rank_entries<M, 1>(key, rank, Lane());
        const Bytes selected = __builtin_convertvector(rank < n, Bytes) & 1;
        std::memcpy(mask + i, &selected, sizeof selected);
    }
}

// takes the largest entry `rounds` times, the last of equal ones; or drops the smallest, the first of equal ones
template <bool dropping>
void select_in_row(int32_t* keys, int64_t m, int64_t rounds) {
    for (; rounds > 0; --rounds) {
        int32_t best = dropping ? DROPPED : TAKEN, index = dropping ? m : -1;
        if constexpr (dropping) {
#pragma omp simd reduction(min : best)
            for (int32_t j = 0; j < m; ++j) best = std::min(best, keys[j]);
#pragma omp simd reduction(min : index)
            for (int32_t j = 0; j < m; ++j) index = std::min(index, keys[j] == best ? j : static_cast<int32_t>(m));
        } else {
#pragma omp simd reduction(max : best)
            for (int32_t j = 0; j < m; ++j) best = std::max(best, keys[j]);
#pragma omp simd reduction(max : index)
            for (int32_t j = 0; j < m; ++j) index = std::max(index, keys[j] == best ? j : -1);
        }
        keys[index] = dropping ? DROPPED : TAKEN;
    }
}

// counts the entries that rank before each entry; the last of equal entries ranks first
void take_by_rank(int32_t* keys, int32_t m, int32_t n) {
    int32_t rank[MOST_RANKED] = {};
    for (int32_t j = 0; j < m; ++j) {
        const int32_t key = keys[j];
        for (int32_t i = 0; i < m; ++i) rank[i] += key > keys[i] - (i < j);
    }
    for (int32_t i = 0; i < m; ++i) keys[i] = rank[i] < n ? TAKEN : DROPPED;
}

// finds the n-th largest key bit by bit, then takes the entries above it and the last ones equal to it
void take_above_threshold(int32_t* keys, int64_t m, int32_t n) {
    int32_t threshold = 0;
    for (int bit = BITS - 1; bit >= 0; --bit) {
        const int32_t trial = threshold | 1 << bit;
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t j = 0; j < m; ++j) count += keys[j] >= trial;
        threshold = count >= n ? trial : threshold;
    }
    int32_t needed = n;
#pragma omp simd reduction(- : needed)
    for (int64_t j = 0; j < m; ++j) needed -= keys[j] > threshold;
    for (int64_t j = m - 1; j >= 0 && needed > 0; --j) {
        if (keys[j] == threshold) {
            keys[j] = DROPPED;
            --needed;
        }
    }
    for (int64_t j = 0; j < m; ++j) keys[j] = keys[j] > threshold ? TAKEN : DROPPED;
}

// the same three functions for LANES groups side by side
using Keys = int32_t (*)[LANES];

template <bool dropping>
void select_in_lanes(Keys keys, int64_t m, int64_t rounds) {
    constexpr int32_t marker = dropping ? DROPPED : TAKEN;
    for (; rounds > 0; --rounds) {
        int32_t best[LANES], index[LANES] = {};
        std::fill(best, best + LANES, marker);
        for (int64_t j = 0; j < m; ++j) {
            for (int64_t l = 0; l < LANES; ++l) {
                const bool better = dropping ? keys[j][l] < best[l] : keys[j][l] >= best[l];
                best[l] = better ? keys[j][l] : best[l];
                index[l] = better ? static_cast<int32_t>(j) : index[l];
            }
        }
        for (int64_t j = 0; j < m; ++j) {
            for (int64_t l = 0; l < LANES; ++l) keys[j][l] = index[l] == j ? marker : keys[j][l];
        }
    }
}

void take_above_thresholds(Keys keys, int64_t m, int32_t n) {
    int32_t threshold[LANES] = {}, needed[LANES];
    for (int bit = BITS - 1; bit >= 0; --bit) {
        int32_t count[LANES] = {};
        for (int64_t j = 0; j < m; ++j) {
            for (int64_t l = 0; l < LANES; ++l) count[l] += keys[j][l] >= (threshold[l] | 1 << bit);
        }
        for (int64_t l = 0; l < LANES; ++l) threshold[l] |= count[l] >= n ? 1 << bit : 0;
    }
    std::fill(needed, needed + LANES, n);
    for (int64_t j = 0; j < m; ++j) {
        for (int64_t l = 0; l < LANES; ++l) needed[l] -= keys[j][l] > threshold[l];
    }
    for (int64_t j = m - 1; j >= 0; --j) {
        for (int64_t l = 0; l < LANES; ++l) {
            const bool equal = keys[j][l] == threshold[l] && needed[l] > 0;
            needed[l] -= equal;
            keys[j][l] = keys[j][l] > threshold[l] || equal ? TAKEN : DROPPED;
        }
    }
}

// whether to drop few entries, take few, or (many of both) find the threshold
inline bool drops(int64_t n, int64_t m) { return m - n < n && m - n <= MOST_ROUNDS; }
inline bool takes(int64_t n, int64_t m) { return n <= MOST_ROUNDS && !drops(n, m); }

// contiguous groups with `count` elements in all
void mask_rows(
    const WORD* __restrict scores, uint8_t* __restrict mask, int64_t count, int32_t n, int64_t m, int32_t infinite,
    int32_t* keys
) {
    for (int64_t i = 0; i < count; ++i) keys[i] = key_of(scores[i], infinite);
    if (m < LONG) {
        alignas(64) uint8_t selected[CHUNK];
        (m == 2 ? mask_by_rank<2> : m == 4 ? mask_by_rank<4> : m == 8 ? mask_by_rank<8> : mask_by_rank<16>)(
            keys, selected, count, n
        );
        std::memcpy(mask, selected, count);
        return;
    }
    for (int64_t g = 0; g < count; g += m) {
        if (takes(n, m)) {
            select_in_row<false>(keys + g, m, n);
        } else if (drops(n, m)) {
            select_in_row<true>(keys + g, m, m - n);
        } else if (m <= MOST_RANKED) {
            take_by_rank(keys + g, m, n);
        } else {
            take_above_threshold(keys + g, m, n);
        }
    }
    if (drops(n, m)) {
        for (int64_t i = 0; i < count; ++i) mask[i] = keys[i] != DROPPED;
    } else {
        for (int64_t i = 0; i < count; ++i) mask[i] = keys[i] == TAKEN;
    }
}

// Groups `first` to `first + count` of a tensor. Group t begins at t / inner * m * inner + t % inner; its entries are
// `inner` apart.
void mask_lanes(
    const WORD* __restrict scores, uint8_t* __restrict mask, int64_t first, int64_t count, int64_t inner, int32_t n,
    int64_t m, int32_t infinite, Keys keys
) {
    const bool adjacent = first / inner == (first + count - 1) / inner;
    int64_t begin[LANES] = {};
    for (int64_t l = 0; l < count; ++l) begin[l] = (first + l) / inner * m * inner + (first + l) % inner;
    for (int64_t j = 0; j < m; ++j) {
        if (adjacent) {
            const WORD* row = scores + begin[0] + j * inner;
            for (int64_t l = 0; l < count; ++l) keys[j][l] = key_of(row[l], infinite);
        } else {
            for (int64_t l = 0; l < count; ++l) keys[j][l] = key_of(scores[begin[l] + j * inner], infinite);
        }
    }
    if (takes(n, m)) {
        select_in_lanes<false>(keys, m, n);
    } else if (drops(n, m)) {
        select_in_lanes<true>(keys, m, m - n);
    } else {
        take_above_thresholds(keys, m, n);
    }
    const bool dropping = drops(n, m);
    for (int64_t j = 0; j < m; ++j) {
        if (adjacent) {
            uint8_t* row = mask + begin[0] + j * inner;
            for (int64_t l = 0; l < count; ++l) row[l] = dropping ? keys[j][l] != DROPPED : keys[j][l] == TAKEN;
        } else {
            for (int64_t l = 0; l < count; ++l) {
                mask[begin[l] + j * inner] = dropping ? keys[j][l] != DROPPED : keys[j][l] == TAKEN;
            }
        }
    }
}

}  // namespace

// groups[t]: number of groups of tensor t; inner[t]: distance of two entries of a group; infinite: bits of infinity
extern "C" void nm_mask(
    int64_t count, const WORD** scores, uint8_t** masks, const int64_t* groups, const int64_t* inner, int64_t n,
    int64_t m, int64_t infinite, int threads
) {
    const bool fills_vectors = m >= LONG || m == 2 || m == 4 || m == 8 || m == 16;
    const int64_t step = std::max<int64_t>(1, CHUNK / m);
    const auto block = [=](int64_t) { return std::max(LANES, BLOCK / m / LANES * LANES); };
    for_blocks(count, groups, threads, block, [=](int64_t t, int64_t begin, int64_t end) {
        if (inner[t] == 1 && fills_vectors) {
            std::vector<int32_t> keys(std::max(CHUNK, m));
            for (int64_t g = begin; g < end; g += step) {
                fetch(scores[t], (g + step) * m, std::min(g + 2 * step, end) * m);
                mask_rows(scores[t] + g * m, masks[t] + g * m, std::min(step, end - g) * m, n, m, infinite,
                          keys.data());
            }
        } else {
            std::vector<int32_t> keys(m * LANES);
            for (int64_t g = begin; g < end; g += LANES) {
                mask_lanes(
                    scores[t], masks[t], g, std::min(LANES, end - g), inner[t], n, m, infinite,
                    reinterpret_cast<Keys>(keys.data())
                );
            }
        }
    });
}
