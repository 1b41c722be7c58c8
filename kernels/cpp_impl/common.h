// Number types, the five ways to round, and the split of a list of tensors over threads.
//
// The compiler vectorises plain loops. It does not contract products and sums (-ffp-contract=off), so results equal
// those of the definitions in kernels/reference bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include <omp.h>

namespace {

// an enumeration, not a struct: compilers do not vectorise selections between structs
enum bf16 : uint16_t {};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline bool is_finite(float value) { return std::fabs(value) < std::numeric_limits<float>::infinity(); }

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return from_bits(static_cast<uint32_t>(value) << 16); }

// rounds to nearest even in the upper 16 bits; NaN stays NaN only if its lower bits are 0
inline uint32_t round_upper(float value) {
    const uint32_t bits = to_bits(value);
    return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

inline void narrow(float value, float& out) { out = value; }
inline void narrow(float value, bf16& out) {
    out = static_cast<bf16>(value != value ? 0x7FC0u : round_upper(value) >> 16);
}

enum fp16 : uint16_t {};

inline float widen(fp16 value) {
    const uint32_t sign = (value & 0x8000u) << 16, magnitude = (value & 0x7FFFu) << 13;
    // the exponents' biases differ by 112; the product is also right for subnormal numbers
    const uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
    return from_bits(sign | (magnitude < 0x0F800000u ? finite : magnitude | 0x7F800000u));
}

// rounds to nearest even
inline void narrow(float value, fp16& out) {
    const uint32_t bits = to_bits(value), magnitude = bits & 0x7FFFFFFFu;
    uint32_t rounded = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // adding 1/2 moves the unit of subnormal numbers to the last bit
    if (magnitude < 0x38800000u) rounded = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    if (magnitude >= 0x47800000u) rounded = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    out = static_cast<fp16>(rounded | ((bits >> 16) & 0x8000u));
}

template <typename... T>
constexpr bool all_bf16 = (std::is_same_v<T, bf16> && ...);

// Two neighbours in one 32-bit word. Loops over pairs widen and narrow in place. Loops over elements spend half of
// their instructions on moving 16-bit lanes to 32-bit lanes and back.
struct Pair {
    float low, high;
};

template <typename T>
inline Pair load_pair(const T* x, int64_t j) {
    if constexpr (all_bf16<T>) {
        uint32_t word;
        std::memcpy(&word, x + 2 * j, sizeof word);
        return {from_bits(word << 16), from_bits(word & 0xFFFF0000u)};
    }
    return {widen(x[2 * j]), widen(x[2 * j + 1])};
}

// for numbers computed from bf16, because the lower bits of their NaNs are 0
template <typename T>
inline void store_pair(T* x, int64_t j, float low, float high) {
    if constexpr (all_bf16<T>) {
        const uint32_t word = (round_upper(low) >> 16) | (round_upper(high) & 0xFFFF0000u);
        std::memcpy(x + 2 * j, &word, sizeof word);
    } else {
        narrow(low, x[2 * j]);
        narrow(high, x[2 * j + 1]);
    }
}

// a * b + c, rounded once if the processor can; only for sums whose last bits the definition leaves open
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// two rounds of xor-shift and multiply: reference.rounding.hash32. The first shift alone is linear: numbers that differ in
// their lower 16 bits share it.
inline uint32_t first_shift(uint32_t x) { return x ^ (x >> 16); }

inline uint32_t after_first_shift(uint32_t x) {
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}

inline uint32_t hash32(uint32_t x) { return after_first_shift(first_shift(x)); }

// rounds to bf16, up with the probability of the dropped fraction; the caller's narrowing is then exact
inline float round_stochastic(float value, uint32_t random) {
    const uint32_t pattern = (to_bits(value) + (random & 0xFFFFu)) & 0xFFFF0000u;
    return is_finite(value) ? from_bits(pattern) : value;
}

enum Rounding { NEAREST, STOCHASTIC, KAHAN, MASTER, SPLIT };

template <int rounding, typename Param>
constexpr bool is_split = rounding == SPLIT && all_bf16<Param>;

// the weight whose upper 24 bits are a bf16 number and the difference of the patterns: reference.rounding.widen
inline float joined(float value, int32_t difference) {
    const float weight = from_bits(to_bits(value) + (static_cast<uint32_t>(difference) << 8));
    return is_finite(value) & (value != 0.0f) ? weight : value;
}

// the pattern of a weight, rounded to 24 bits: its bits 8 to 15 are the difference to the nearest bf16 number
inline uint32_t round_to_24(float value) { return to_bits(value) + 0x80u; }


template <int rounding, typename Param>
inline float before_rounding(float value, uint32_t index, uint32_t seed) {
    if constexpr (rounding == STOCHASTIC && sizeof(Param) == 2) return round_stochastic(value, hash32(index ^ seed));
    return value;
}

// the parameter's dtype for Kahan's remainder, fp32 for a master copy, a byte for the difference of a split weight
template <typename Param, int rounding>
struct RoundingState {
    using type = float;
};
template <typename Param>
struct RoundingState<Param, KAHAN> {
    using type = Param;
};
template <typename Param>
struct RoundingState<Param, SPLIT> {
    using type = int8_t;
};

// A rounding error is at most half the distance to the next number. Shrunk a little, it changes no rounding.
constexpr float SHRINK = 127.0f / 128.0f;

// the nearest number of Param, as a float; not for NaN with a bit set in the lower half
template <typename Param>
inline float nearest(float value) {
    if constexpr (all_bf16<Param>) return from_bits(round_upper(value) & 0xFFFF0000u);
    return value;
}

// the parameter's value alone where the state does not round to it: it was written between two steps
template <int rounding, typename Param>
inline float unrounded(float value, float stored) {
    if constexpr (rounding == MASTER) {
        // a NaN, which may be rounded to a number here, is no state of any value
        return (nearest<Param>(stored) == value) & (stored == stored) ? stored : value;
    }
    return nearest<Param>(value + stored * SHRINK) == value ? value + stored : value;
}

template <int rounding, typename Param, typename StateT>
inline float weight_of(Param param, const StateT* state, int64_t i) {
    if constexpr (rounding == MASTER || rounding == KAHAN) {
        return unrounded<rounding, Param>(widen(param), widen(state[i]));
    }
    if constexpr (is_split<rounding, Param>) return joined(widen(param), state[i]);
    return widen(param);
}

template <int rounding, typename Param, typename StateT>
inline Pair weights_of(const Param* param, const StateT* state, int64_t j) {
    const Pair value = load_pair(param, j);
    if constexpr (rounding == MASTER || rounding == KAHAN) {
        const Pair stored = load_pair(state, j);
        return {unrounded<rounding, Param>(value.low, stored.low), unrounded<rounding, Param>(value.high, stored.high)};
    }
    if constexpr (is_split<rounding, Param>) {
        int16_t word;
        std::memcpy(&word, state + 2 * j, sizeof word);
        return {joined(value.low, static_cast<int8_t>(word)), joined(value.high, word >> 8)};
    }
    return value;
}

// writes the new weight where `keep` is false
template <int rounding, typename Param, typename StateT>
inline void store_weight(float value, bool keep, Param* param, StateT* state, int64_t i, uint32_t index, uint32_t seed) {
    if constexpr (is_split<rounding, Param>) {
        // the largest payload of a NaN would overflow
        const uint32_t pattern = value != value ? 0x7FC00000u : round_to_24(value);
        state[i] = keep ? state[i] : static_cast<int8_t>(pattern >> 8);
        param[i] = keep ? param[i] : static_cast<Param>((pattern + 0x8000u) >> 16);
        return;
    }
    Param rounded;
    narrow(before_rounding<rounding, Param>(value, index, seed), rounded);
    if constexpr (rounding == KAHAN) {
        StateT lost;
        narrow(value - widen(rounded), lost);
        state[i] = keep ? state[i] : lost;
    }
    if constexpr (rounding == MASTER) state[i] = keep ? state[i] : value;
    param[i] = keep ? param[i] : rounded;
}

// the same for two neighbours, computed from bf16; `index` is the first one's
template <int rounding, typename Param, typename StateT>
inline void store_weights(Pair value, Param* param, StateT* state, int64_t j, uint32_t index, uint32_t seed) {
    if constexpr (rounding == KAHAN) {
        store_pair(state, j, value.low - nearest<Param>(value.low), value.high - nearest<Param>(value.high));
    }
    if constexpr (rounding == MASTER) store_pair(state, j, value.low, value.high);
    if constexpr (is_split<rounding, Param>) {
        const uint32_t low = round_to_24(value.low), high = round_to_24(value.high);
        const uint16_t differences = static_cast<uint16_t>(((low >> 8) & 0xFFu) | (high & 0xFF00u));
        const uint32_t word = ((low + 0x8000u) >> 16) | ((high + 0x8000u) & 0xFFFF0000u);
        std::memcpy(state + 2 * j, &differences, sizeof differences);
        std::memcpy(param + 2 * j, &word, sizeof word);
        return;
    }
    store_pair(param, j, before_rounding<rounding, Param>(value.low, index, seed),
               before_rounding<rounding, Param>(value.high, index + 1, seed));
}

// elements that a thread processes at a time: few enough to balance the load, enough for the prefetcher
constexpr int64_t BLOCK = 16384;

// floats aligned to cache lines
class Buffer {
public:
    explicit Buffer(int64_t size) : memory_(size + 16) {
        const auto address = reinterpret_cast<uintptr_t>(memory_.data());
        data_ = memory_.data() + (64 - address % 64) % 64 / sizeof(float);
    }
    float* data() { return data_; }

private:
    std::vector<float> memory_;
    float* data_;
};

// n, rounded up to whole cache lines of floats
constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// the rows `first`, `first` + `stride`, ... of a matrix
struct Rows {
    int64_t first, stride;
    int64_t operator[](int64_t r) const { return first + r * stride; }
};

// Calls work(count, rows) for COUNT rows of a matrix at a time; count is the constant COUNT, or 1 for the last rows.
//
// The COUNT rows are far apart: a thread reads each of COUNT bands of the matrix from one end to the other, and these
// reads wait for memory at the same time. With neighbouring rows, every stream would skip what the others read, and
// neither the processor nor a prefetch a fixed distance ahead would get the beginnings of rows in time.
template <int COUNT, typename Work>
void for_rows(int64_t rows, int threads, Work work) {
    const int64_t blocks = rows / COUNT;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks + rows % COUNT; ++b) {
        if (b < blocks) {
            work(std::integral_constant<int, COUNT>(), Rows{b, blocks});
        } else {
            work(std::integral_constant<int, 1>(), Rows{b + blocks * (COUNT - 1), 1});
        }
    }
}

// calls work(t, begin, end) for pieces of 0..sizes[t] with at most block(t) elements; a thread gets adjacent pieces
template <typename Block, typename Work>
void for_blocks(int64_t count, const int64_t* sizes, int threads, Block block, Work work) {
    std::vector<int64_t> first(count + 1, 0);
    for (int64_t t = 0; t < count; ++t) first[t + 1] = first[t] + (sizes[t] + block(t) - 1) / block(t);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < first[count]; ++b) {
        const int64_t t = std::upper_bound(first.begin(), first.end(), b) - first.begin() - 1;
        const int64_t begin = (b - first[t]) * block(t);
        work(t, begin, std::min(begin + block(t), sizes[t]));
    }
}

template <typename Work>
void for_blocks(int64_t count, const int64_t* sizes, int threads, Work work) {
    for_blocks(count, sizes, threads, [](int64_t) { return BLOCK; }, work);
}

// where the elements of a shard are in the whole tensor; null: they are one run, else four numbers: the elements of a run,
// the distance of two runs, the runs of a slab, and the distance of two slabs
struct Runs {
    const int64_t* numbers;

    // index of element i, less that of the first element
    int64_t index(int64_t i) const {
        if (!numbers) return i;
        const int64_t run = i / numbers[0];
        return run / numbers[2] * numbers[3] + run % numbers[2] * numbers[1] + i % numbers[0];
    }
    // at most `most` elements from element i to the end of its run
    int64_t rest(int64_t i, int64_t most) const {
        return numbers ? std::min(most, numbers[0] - i % numbers[0]) : most;
    }
};

// elements that are fetched, checked and updated at a time
constexpr int64_t CHUNK = 256;

// max |x| from bit patterns without signs, whose order is: finite numbers, infinity, NaNs
inline float largest_of(const float* x, int64_t n) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, to_bits(x[i]) & 0x7FFFFFFFu);
    return from_bits(largest);
}

inline float largest_of(const bf16* x, int64_t n) {
    uint16_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; ++i) largest = std::max<uint16_t>(largest, x[i] & 0x7FFFu);
    return widen(static_cast<bf16>(largest));
}

template <typename T>
inline bool any_nonfinite(const T* x, int64_t n) {
    return !is_finite(largest_of(x, n));
}

// prefetches elements begin..end: the processor's own prefetcher stops at the end of a page
template <typename T>
inline void fetch(const T* x, int64_t begin, int64_t end) {
    const char* last = reinterpret_cast<const char*>(x + end);
    for (const char* line = reinterpret_cast<const char*>(x + begin); line < last; line += 64) __builtin_prefetch(line);
}

inline void raise_flag(int32_t* flag) {
#pragma omp atomic write
    *flag = 1;
}

}  // namespace
